"""The grids on what the summary asks: arms begin and train as they say; gradients and features are what is meant."""

from itertools import pairwise

import grids_questions as grids
import numpy as np
import pytest
import torch
from test_devices_grids import tiny  # noqa: F401  a fixture: few birds, one epoch
from torch import nn

from loupe_core import Loupe
from loupe_lab.evidence.baselines import CentredLoupe
from loupe_lab.evidence.masks import centre_gaussian


def test_the_centre_prior_multiplies_the_odds_and_is_no_weight():
    torch.manual_seed(0)
    plain, centred, x = Loupe(16), CentredLoupe(16), torch.randn(2, 16, 9, 9)
    centred.load_state_dict(plain.state_dict())
    assert [name for name, _ in centred.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not list(centred.buffers())
    with torch.no_grad():
        M, found = plain(x), centred(x)
    odds = M / (1 - M) * torch.from_numpy(centre_gaussian(9, 9)).float()
    torch.testing.assert_close(found, odds / (1 + odds))
    assert torch.equal(found[..., 4, 4], M[..., 4, 4])


def test_the_learned_part_outweighs_the_centre_prior():
    """Told to open in one corner alone, it does: the prior is a start and no limit."""
    torch.manual_seed(0)
    gate, corner = CentredLoupe(64), torch.zeros(1, 1, 7, 7)
    corner[..., 0, 0] = 1
    x = torch.randn(1, 64, 7, 7)
    before = gate(x)[0, 0]
    learn = torch.optim.Adam(gate.parameters(), lr=0.02)
    for _ in range(300):
        learn.zero_grad()
        nn.functional.binary_cross_entropy(gate(x), corner).backward()
        learn.step()
    after = gate(x)[0, 0]
    assert before[0, 0] < 0.1 < before[3, 3] and after[3, 3] < 0.1 and after[0, 0] > 0.9


def test_a_gate_starts_where_its_arm_says():
    _, mask = grids.begun("start near 1", 0).eval()(torch.randn(1, 3, 112, 112), return_mask=True)
    assert mask.mean().item() == pytest.approx(0.98, abs=0.01)


@pytest.mark.parametrize("arm", ["start near 1", "centre prior added", "warm-up 5", "no decay"])
def test_the_arms_of_a_seed_begin_with_the_same_weights_but_for_what_they_change(arm):
    plain, changed = grids.begun("loupe", 2).state_dict(), grids.begun(arm, 2).state_dict()
    differ = {name for name in plain if not torch.equal(plain[name], changed[name])}
    assert differ == ({"gates.stage2.loupe.conv1x1.bias"} if arm == "start near 1" else set())


def test_the_stages_are_the_backbone_without_its_last_norm_and_without_gates():
    model = grids.begun("multi-scale", 0)
    parts = [{id(p) for p in part} for part in grids.stages(model)]
    assert all(not a & b for a, b in pairwise(parts)) and len(parts) == 4
    left = {name.rpartition(".")[0] for name, p in model.named_parameters() if id(p) not in set.union(*parts)}
    assert {name for name in left if name.startswith("backbone")} == {"backbone.norm"} | {
        name for name in left if "head" in name}


def test_likeness_is_one_of_features_with_themselves_whatever_their_scale_and_turn_and_none_of_strangers():
    torch.manual_seed(0)
    x, turn = torch.randn(60, 200), torch.linalg.qr(torch.randn(200, 200)).Q
    gram = lambda x: (x - x.mean(0)) @ (x - x.mean(0)).T  # noqa: E731
    assert grids.likeness(gram(x), gram(3 * x @ turn + 5)) == pytest.approx(1, abs=1e-4)
    strangers = [grids.likeness(gram(torch.randn(60, 200)), gram(x)) for _ in range(50)]
    assert abs(np.mean(strangers)) < 3 * np.std(strangers) / 50**0.5  # unbiased
    assert 0.3 < grids.likeness(gram(x), gram(x + torch.randn(60, 200))) < 0.7


def test_a_gates_level_is_no_difference_to_the_next_reader_and_ratios_within_blocks_are():
    model, images = grids.begun("loupe", 0).eval(), torch.randn(8, 3, 112, 112)
    gate = model.gates["stage2"]
    bare = grids.grams(grids.begun("bare", 0).eval(), images)
    for factor, alike in ((lambda m: 0.3 + 0 * m, True), (lambda m: torch.rand(m.shape), False)):
        handle = gate.loupe.register_forward_hook(lambda module, inputs, mask, f=factor: f(mask))
        found = grids.grams(model, images)
        handle.remove()
        assert torch.equal(found[0], bare[0])  # in front of the gate
        change = (found[1] - bare[1]).norm() / bare[1].norm()
        assert (change < 0.01) == alike


def test_rises_are_over_the_median_of_the_nine_steps_before():
    losses = [5.0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 3]
    assert grids.rises(losses) == pytest.approx([10 / 5, 3 / 6]) and len(grids.rises(losses[:9])) == 0


def test_a_watched_training_is_the_same_as_one_that_is_not(tiny, monkeypatch):  # noqa: F811
    kept = {}
    real = grids.Trainer.fit

    def fit(self, *sets, **options):
        rows = real(self, *sets, **options)
        kept["weights"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return rows

    monkeypatch.setattr(grids.Trainer, "fit", fit)
    watched = grids.taught("loupe", 1)
    weights = kept["weights"]
    recipe, sets = grids.Recipe.small(seed=1), grids.fieldguide_sets(grids.SMALL, 1, 30, 20)
    outcome, _, _ = grids.runs.run(grids.begun("loupe", 1), sets, recipe)
    assert all(torch.equal(value, weights[name]) for name, value in kept["weights"].items())
    assert outcome["right"] == watched["outcome"]["right"]
    lengths = watched["moments"][1]["lengths"]
    assert len(lengths) == 4 and all(length > 0 for length in lengths)
