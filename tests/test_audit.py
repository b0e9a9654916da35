"""What reaches the classifier: recomputed by hand on a Swin cut in two, and by what LayerNorm must and must not do."""

import copy

import numpy as np
import pytest
import timm
import torch

from loupe_core import LoupeError, LoupeModel
from loupe_core.cli import main
from loupe_lab.birds.fieldguide import species_of, write_fieldguide
from loupe_lab.evidence.audit import conclusion, gate_effect, next_norm, relative_change, shuffled, table
from loupe_lab.evidence.masks import centre_gaussian, replace_mask

NAMES = ["own", "mean", "blocks", "within", "shuffled", "ones"]


def swin(site="stage2", form="multiply", seed=0):
    torch.manual_seed(seed)
    return LoupeModel("swin_micro", num_classes=7, site=site, form=form).eval()


def pictures(n=5, side=112):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def uneven(gate, low=0.05):
    """A mask with large differences between cells, fixed."""
    draws = torch.Generator().manual_seed(2)
    return replace_mask(gate, lambda m: (low + (1 - low) * torch.rand(1, *m.shape[1:], generator=draws.manual_seed(2))
                                         ).expand_as(m))


def block_means(mask):
    """By loops, in float64; for any height and width."""
    mask = mask.double().numpy()
    result = mask.copy()
    for y in range(0, mask.shape[2], 2):
        for x in range(0, mask.shape[3], 2):
            square = mask[:, :, y:y + 2, x:x + 2]
            result[:, :, y:y + 2, x:x + 2] = square.sum((2, 3), keepdims=True) / (square.shape[2] * square.shape[3])
    return torch.tensor(result, dtype=torch.float32)


def test_effects_are_those_of_a_swin_cut_in_two_by_hand():
    model, x, labels = swin(), pictures(), torch.arange(5)
    loupe, net = model.gates["stage2"].loupe, copy.deepcopy(model.backbone)
    for module in net.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        features = net.layers[1](net.layers[0](net.patch_embed(x)))  # (B, H, W, C)
        own = 3 * loupe(features.permute(0, 3, 1, 2)) ** 2  # a mask with larger differences than a new gate's
        average = torch.tensor(own.numpy().mean((2, 3), keepdims=True))
        by_hand = {"own": own, "mean": average * torch.ones_like(own), "blocks": block_means(own),
                   "within": own * average / block_means(own), "ones": torch.ones_like(own)}
        logits = {name: net.forward_head(net.norm(net.layers[3](net.layers[2](mask.permute(0, 2, 3, 1) * features))))
                  for name, mask in by_hand.items()}
    with replace_mask(model.gates["stage2"], lambda m: 3 * m ** 2):
        effects = gate_effect(model, x, labels)
    assert list(effects) == NAMES + [f"{name}, eps 0" for name in NAMES]
    p = logits["own"].double().softmax(1)
    for name, there in logits.items():
        moved = (there - logits["own"]).norm(dim=1) / logits["own"].norm(dim=1)
        np.testing.assert_allclose(effects[name].moved, moved, rtol=1e-2, atol=2e-6)
        kl = (p * (p / there.double().softmax(1)).log()).sum(1)
        np.testing.assert_allclose(effects[name].kl, kl, rtol=1e-2, atol=1e-9)
        assert (effects[name].right == (there.argmax(1) == labels).numpy()).all()
        assert (effects[name].changed == (there.argmax(1) != logits["own"].argmax(1)).numpy()).all()
    assert effects["mean"].moved.min() > 1e-2 > 1e-3 > effects["within"].moved.max()


@pytest.mark.parametrize("site", ["stage1", "stage2", "stage3"])  # stage 3 of swin_micro is 7 x 7: padded blocks
def test_a_mask_that_is_constant_in_blocks_reaches_nothing_but_through_eps(site):
    model = swin(site)
    gate = model.gates[site]

    def faint_blocks(m):
        draws = torch.Generator().manual_seed(0)
        h, w = m.shape[2:]
        mask = 1e-3 * (0.01 + torch.rand(1, 1, -(-h // 2), -(-w // 2), generator=draws))
        return mask.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :h, :w].expand_as(m)

    with replace_mask(gate, faint_blocks):
        effects = gate_effect(model, pictures(3))
    for name in ("mean", "within", "ones"):
        assert effects[f"{name}, eps 0"].moved.max() < 1e-3 < 1e-2 < effects[name].moved.min()
    assert effects["shuffled, eps 0"].moved.min() > 1e-2  # differences within blocks do reach
    assert effects["own, eps 0"].moved.min() > 1e-2


def test_inside_a_stage_and_on_batchnorm_a_uniform_factor_does_reach():
    inside = swin("stage3.inside")
    with uneven(inside.gates["stage3_inside"]):
        assert gate_effect(inside, pictures(3))["within, eps 0"].moved.min() > 1e-2
    torch.manual_seed(0)
    resnet = LoupeModel("resnet18", num_classes=7, pretrained=False).eval()
    with uneven(resnet.gates["stage2"]):
        effects = gate_effect(resnet, pictures(3, 64))
    assert list(effects) == NAMES  # no LayerNorm, no eps to take out
    assert effects["within"].moved.min() > 1e-2 and effects["ones"].moved.min() > 0.1


def test_the_next_layernorm_is_the_one_that_reads_the_gated_features():
    for site, name in (("stage2", "layers.2.downsample.norm"), ("stage3.inside", "layers.2.blocks.0.norm1"),
                       ("stage4", "norm")):
        model = swin(site)
        gate = next(iter(model.gates.values()))
        assert next_norm(model, gate, pictures(1)) is model.backbone.get_submodule(name)


def test_of_several_gates_only_the_one_asked_for_is_changed():
    model = swin(["stage1", "stage3"])
    seen = {name: [] for name in model.gates}
    for name, gate in model.gates.items():
        gate.register_forward_hook(lambda module, inputs, out, name=name: seen[name].append(out[1].std().item()))
    effects = gate_effect(model, pictures(3), site="stage3")
    assert len({round(sd, 5) for sd in seen["stage1"][:6]}) == 1  # the same mask whatever stage 3 is given
    assert effects["mean"].moved.max() > 0
    with pytest.raises(LoupeError, match=r"site=None in this LoupeModel; expected site= one of stage1, stage3$"):
        gate_effect(model, pictures(1))


@pytest.mark.parametrize("form", ["multiply", "mix", "residual"])
def test_no_mask_is_the_backbone_without_its_gate(form):
    model = swin(form=form)
    if form == "mix":
        torch.nn.init.normal_(model.gates["stage2"].background, generator=torch.Generator().manual_seed(0))
    x = pictures(3)
    with uneven(model.gates["stage2"]):
        effects = gate_effect(model, x)
        with torch.no_grad():
            own = model(x)
    with torch.no_grad():
        bare = model.eject()(x)
    np.testing.assert_allclose(effects["ones"].moved, (bare - own).norm(dim=1) / own.norm(dim=1), rtol=1e-3)


def test_a_mask_in_the_centre_is_tried_where_it_is_asked_for():
    model = swin()
    x, labels = pictures(3), torch.arange(3)
    effects = gate_effect(model, x, labels, only=["centre"])
    assert list(effects) == ["own", "centre"]
    with torch.no_grad(), replace_mask(model.gates["stage2"], lambda m: centre_gaussian(14, 14, torch).expand_as(m)):
        there = model(x)
    assert (effects["centre"].right == (there.argmax(1) == labels).numpy()).all()


def test_a_shuffled_mask_keeps_its_values_and_each_image_has_its_own_order():
    mask = torch.rand(4, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    first, other = shuffled(0)(mask), shuffled(1)(mask)
    assert torch.equal(first.flatten(1).sort().values, mask.flatten(1).sort().values)
    assert not torch.equal(first, mask) and not torch.equal(first, other) and torch.equal(first, shuffled(0)(mask))
    same = shuffled(0)(mask[:1].expand(4, -1, -1, -1))
    assert not torch.equal(same[0], same[1])


def test_the_relative_change_counts_a_number_that_is_added_to_all_logits():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(relative_change(2 * z, z), torch.ones(2))
    torch.testing.assert_close(relative_change(z + 1, z), torch.tensor([2**0.5 / 5, 2**0.5 / 2]))


def test_rows_that_are_not_wanted_are_left_out_and_the_others_are_the_same():
    model, x = swin(), pictures(3)
    some, all_of_them = gate_effect(model, x, only=["shuffled", "within, eps 0"]), gate_effect(model, x)
    assert list(some) == ["own", "shuffled", "own, eps 0", "within, eps 0"]
    for name in some:
        np.testing.assert_array_equal(some[name].moved, all_of_them[name].moved)
    assert list(gate_effect(model, x, only=["ones"])) == ["own", "ones"]


def test_modes_hooks_and_eps_are_restored_also_after_an_error():
    model = swin().train()
    model.backbone.norm.eval()
    modes = [module.training for module in model.modules()]
    gate, eps = model.gates["stage2"], [m.eps for m in model.modules() if hasattr(m, "eps")]

    def untouched():
        hooks = [m for m in gate.loupe.modules() if m._forward_hooks]
        return (not hooks and modes == [module.training for module in model.modules()]
                and eps == [m.eps for m in model.modules() if hasattr(m, "eps")]
                and not model.backbone.layers[2].downsample.norm._forward_hooks)

    gate_effect(model, pictures(2))
    assert untouched()
    for fails_at in (2, 7, 9):  # with a replaced mask, while the next norm is looked for, and with eps taken out
        calls = []

        def fail(module, inputs, calls=calls, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise RuntimeError("on the way")

        handle = model.backbone.head.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on the way"):
            gate_effect(model, pictures(2))
        handle.remove()
        assert untouched()


@pytest.mark.parametrize("arguments, says", [
    (dict(images=torch.zeros(3, 112, 112)), r"found \(3, 112, 112\), expected a tensor \(B, C, H, W\)"),
    (dict(images="birds"), "images: found str"),
    (dict(labels=torch.zeros(3)), r"found labels \(3,\) for 2 images"),
    (dict(site="stage3"), "no gate for site='stage3' .* expected site= one of stage2"),
    (dict(only=["blocks", "middle"]), "found only='middle'; expected some of own; mean"),
])
def test_what_does_not_fit_is_refused_in_one_line(arguments, says):
    with pytest.raises(LoupeError, match=says) as error:
        gate_effect(swin(), **dict(images=pictures(2)) | arguments)
    assert "\n" not in str(error.value)


def test_a_bare_backbone_has_nothing_to_audit():
    for model in (swin(site=()), timm.create_model("swin_micro", num_classes=7)):
        with pytest.raises(LoupeError, match="found no gate"):
            gate_effect(model, pictures(1))


def test_the_conclusion_names_the_part_that_reaches():
    model, labels = swin(), torch.zeros(3, dtype=torch.long)
    with uneven(model.gates["stage2"]):
        effects = gate_effect(model, pictures(3), labels)
    assert "differences within 2 x 2 blocks" in conclusion(effects) and "n = 3" in conclusion(effects)
    assert len(table(effects).splitlines()) == 13 and max(map(len, table(effects).splitlines())) < 80
    with replace_mask(model.gates["stage2"], lambda m: torch.full_like(m, 0.5)):
        assert "does not reach" in conclusion(gate_effect(model, pictures(3)))


def test_the_command_prints_the_table_and_the_conclusion(tmp_path, capsys):
    root = write_fieldguide(tmp_path / "birds", species_of(1), train=2, test=3)
    torch.manual_seed(0)
    LoupeModel("swin_micro", num_classes=4, site=["stage1", "stage2"]).save_pretrained(tmp_path / "two")
    assert main(["audit", str(tmp_path / "two"), "--data", str(root), "--site", "stage2", "--images", "6"]) == 0
    out = capsys.readouterr().out
    assert "6 test images of 12" in out and "within, eps 0" in out and out.rstrip().endswith(".")
    assert main(["audit", str(tmp_path / "two"), "--data", str(root)]) == 2
    assert "expected site= one of stage1, stage2" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "two"), "--data", str(root), "--images", "0"]) == 2
