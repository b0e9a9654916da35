"""What the labels of a pretraining leave for a gate: swin_micro pretrained on attributes or species, see pretrain.py.

There is one pretraining of each kind, so seeds are those of the fine-tuning: what they show is a difference of these
two backbones.
"""

from functools import lru_cache

import timm
import torch
from pretrain import draw_set
from runs import NO_RANKS, SMALL, build, fieldguide_sets, masks_of, part_ranks, run
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from loupe_core import Recipe, Trainer
from loupe_core.weights.swin_micro import WEIGHTS
from loupe_lab.birds.fieldguide import ATTRIBUTES
from loupe_lab.evidence.results import pack_right

ARMS = ("bare", "loupe", "constant", "residual")
COUNTS = (4_000, 2_000)  # birds that a probe learns from, and those that count


def pretraining(labels: str, arm: str, seed: int) -> tuple[dict, Trainer]:
    """A training of the grid `ablations` from other weights: the small profile, 20 species of field-guide birds.

    rank, rank_on_bird, on_bird: see `part_ranks`; of the gates that are learned.
    """
    model = build(arm, seed, f"swin_micro.{labels}")
    outcome, trainer, test = run(model, fieldguide_sets(SMALL, seed, 30, 20), Recipe.small(seed=seed))
    learned = arm in ("loupe", "residual")
    return outcome | (part_ranks(masks_of(model, test), test) if learned else NO_RANKS), trainer


@lru_cache(1)
def birds() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Images and attributes of `COUNTS` birds to learn from and that count, each a random species of its own.

    No pretraining has drawn them; they are as its held-out ones were.
    """
    firsts = (1_000_000, 2_000_000)  # the first bird's seed
    sets = [draw_set(count, first, (0.15, 0.60), workers=1) for count, first in zip(COUNTS, firsts)]
    return tuple((images.permute(0, 3, 1, 2), labels) for images, _, labels in sets)


@lru_cache(1)
def features(labels: str) -> list[torch.Tensor]:
    """Pooled features `(N, 256)` of both sets of `birds` from a frozen backbone."""
    torch.manual_seed(0)
    name = "swin_micro" if labels == "none" else f"swin_micro.{labels}"
    model = timm.create_model(name, pretrained=labels != "none", num_classes=0).eval()
    with torch.no_grad():
        return [torch.cat([model(part.float() / 127.5 - 1) for part in images.split(250)]) for images, _ in birds()]


def probes(labels: str, attribute: str) -> tuple[dict, None]:
    """How well a linear classifier on the frozen features knows an attribute of birds that it has not seen.

    guess: accuracy of always naming the value that is most frequent among those to learn from.
    """
    k = list(ATTRIBUTES).index(attribute)
    (_, seen), (_, held_out) = birds()
    learn, count = features(labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000)).fit(learn.numpy(), seen[:, k].numpy())
    right = probe.predict(count.numpy()) == held_out[:, k].numpy()
    guess = (held_out[:, k] == seen[:, k].mode().values).float().mean().item()
    return dict(accuracy=round(float(right.mean()), 4), guess=round(guess, 4), right=pack_right(right)), None


GRIDS = {
    "pretraining": (pretraining, [dict(labels=labels, arm=arm, seed=seed) for labels in WEIGHTS for seed in range(5)
                                  for arm in ARMS]),
    "pretraining_probes": (probes, [dict(labels=labels, attribute=attribute) for labels in ("none", *WEIGHTS)
                                    for attribute in ATTRIBUTES]),
}
