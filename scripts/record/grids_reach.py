"""Chapter 07's runs: how much of a mask reaches the classifier, before and after training."""

from collections.abc import Mapping
from functools import cache

import timm
import torch
from runs import ARMS, MORE_ARMS, SMALL, fieldguide_sets, images_of, lite0, trained
from torch.nn.functional import interpolate
from torch.utils.data import Subset

from loupe_core import LoupeModel, transforms_for
from loupe_core.gate import FORMS
from loupe_lab.evidence.audit import ROWS, TINY, Effect, gate_effect, next_norm, relative_change
from loupe_lab.evidence.masks import blocks, replace_mask
from loupe_lab.evidence.results import pack_right

OTHERS = ROWS[1:]
# name -> (the backbone, its side in pixels)
BACKBONES = {
    "swin_micro": (lambda: timm.create_model("swin_micro", pretrained=True), 112),
    "swin_micro, random weights": (lambda: timm.create_model("swin_micro"), 112),
    "Swin-Tiny, random weights": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224),
    "lite0": (lite0, 112),
    "lite0, random weights": (lambda: timm.create_model("tf_efficientnet_lite0"), 112),
}
# name -> a mask of the shape of m, drawn with g
MASKS = {
    **{f"uniform {c:g}": lambda m, g, c=c: torch.full_like(m, c) for c in (0.5, 0.1, 0.01)},
    "random per block": lambda m, g: torch.rand(
        *m.shape[:2], -(-m.shape[2] // 2), -(-m.shape[3] // 2), generator=g
    ).repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :m.shape[2], :m.shape[3]],
    "smooth": lambda m, g: interpolate(torch.rand(*m.shape[:2], 4, 4, generator=g), m.shape[2:], mode="bilinear"),
    "iid": lambda m, g: torch.rand(m.shape, generator=g),
}


@cache
def birds(config: tuple, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every n-th (`every`) of the small profile's 400 test images `(N, 3, H, W)`, and their labels `(N,)`."""
    test = fieldguide_sets(SMALL, 0, 30, 20)("test", transforms_for(dict(config), train=False))
    return images_of(Subset(test, range(0, len(test), every)))


def columns(effects: Mapping[str, Effect]) -> dict:
    """Means over the images of the effects of each mask X, see `Effect`; empty where they were not measured.

    X_moved: relative change of the logits; X_eps0: the same without the next LayerNorm's eps; X_kl, nats; X_changed:
    fraction of images with another predicted class.
    """
    row = dict(own_eps0=_mean(effects, "own, eps 0", "moved"))
    for name in OTHERS:
        row |= {f"{name}_{what}": _mean(effects, name, what) for what in ("moved", "kl", "changed")}
        row[f"{name}_eps0"] = _mean(effects, f"{name}, eps 0", "moved")
    return row


def _mean(effects, name: str, what: str):
    return round(float(getattr(effects[name], what).mean()), 7) if name in effects else ""


UNTRAINED = {f"{name}_{what}": "" for what in ("accuracy", "right") for name in ROWS} | dict(
    training_accuracy="", mask_mean="", mask_sd="", mask_within="")


@torch.no_grad()
def at_the_start(arm: str, site: str, form: str, mask: str, seed: int) -> dict:
    """A new gate, or one of `MASKS` in place of its mask, in a backbone with a new head.

    bare_moved: `relative_change` of the bare backbone's logits by the gate; bare_eps0: the same without the eps of the
    next LayerNorm.
    """
    make, side = BACKBONES[arm]
    torch.manual_seed(seed)
    model = LoupeModel(make(), len(SMALL), site=site, form=form, img_size=side).eval()
    gate = model.gates[site.replace(".", "_")]
    images, _ = birds(tuple(model.data_config.items()), 80 if side > 112 else 20)
    norm = next_norm(model, gate, images[:1])
    eps = norm and norm.eps

    def logits():
        """With eps, and without it where there is one."""
        with_eps = model(images)
        if norm is None:
            return [with_eps]
        norm.eps = TINY
        without = model(images)
        norm.eps = eps
        return [with_eps, without]

    if mask == "new gate":
        row = columns(gate_effect(model, images, only=("mean", "blocks", "within", "own, eps 0")))
        gated = logits()
    else:
        row = columns({})
        draws = torch.Generator()
        with replace_mask(gate, lambda m: MASKS[mask](m, draws.manual_seed(seed))):
            gated = logits()
    model.eject()
    moved = [_moved(a, b) for a, b in zip(gated, logits())]
    return row | UNTRAINED | dict(images=len(images), bare_moved=moved[0], bare_eps0=moved[1] if norm else "")


def _moved(logits, reference) -> float:
    return round(float(relative_change(logits, reference).mean()), 7)


def after_training(arm: str, noise: float, names: tuple[str, ...], seed: int) -> dict:
    """Other masks in place of a trained gate's, on the 400 test images, or on those with noise added.

    noise: its deviation, where the images' own is about 0.5. mask_within: fraction of the mask's variance (in an image)
    that lies within 2 x 2 blocks. X_right: which images are classified correctly, see `results.pack_right`.
    """
    model, outcome, test = trained(arm, seed)
    images, labels = birds(tuple(model.data_config.items()), 1)
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    seen = []
    handle = next(iter(model.gates.values())).loupe.register_forward_hook(
        lambda module, inputs, m: seen.append(m.cpu()))
    effects = gate_effect(model, images, labels, seed=seed, only=names)
    handle.remove()
    seen = torch.cat(seen)[:len(images)]  # the gate makes the same mask in every pass
    without_eps = gate_effect(model, images[::10], only=[f"{name}, eps 0" for name in names])  # 40 tell as much as 400
    effects = without_eps | effects
    variance = seen.var((1, 2, 3), correction=0)
    inside = (seen - blocks(seen)).var((1, 2, 3), correction=0)
    share = (inside / variance)[variance > 1e-12].mean() if (variance > 1e-12).any() else torch.tensor(0.0)
    row = dict(images=len(images), bare_moved="", bare_eps0="") | columns(effects)
    row |= UNTRAINED
    row |= {f"{name}_accuracy": round(float(effects[name].right.mean()), 4) for name in ("own", *names)}
    row |= {f"{name}_right": pack_right(effects[name].right) for name in ("own", *names)}
    return row | dict(training_accuracy=outcome["accuracy"], mask_mean=round(float(seen.mean()), 5),
                      mask_sd=round(float(variance.sqrt().mean()), 5), mask_within=round(float(share), 4))


def reach(state: str, arm: str, site: str, form: str, mask: str, seed: int) -> tuple[dict, None]:
    """A row of chapter 07: state "start", see `at_the_start`; "trained" or "noise", see `after_training`."""
    if state == "start":
        row = at_the_start(arm, site, form, mask, seed)
        return {name: row[name] for name in COLUMNS}, None
    names = OTHERS if state == "trained" and arm in MAIN else ("mean", "blocks", "within")
    row = after_training(arm, 0.1 if state == "noise" else 0.0, names, seed)
    return {name: row[name] for name in COLUMNS}, None


COLUMNS = ("images", "bare_moved", "bare_eps0", *columns({}), *UNTRAINED)


def new(arm: str, site: str, form: str, mask: str) -> list[dict]:
    """The choices of three rows before training."""
    return [dict(state="start", arm=arm, site=site, form=form, mask=mask, seed=seed) for seed in range(3)]


def old(arm: str, seed: int, state: str = "trained") -> dict:
    """The choices of a row after training."""
    model = (ARMS | MORE_ARMS)[arm].get("model", {})
    return dict(state=state, arm=arm, site=model.get("site", "stage2"), form=model.get("form", "multiply"),
                mask="its own", seed=seed)


SITES = ("stage1", "stage2", "stage3.inside", "stage3", "stage4")
START = [row for site in SITES for form in FORMS for row in new("swin_micro", site, form, "new gate")]
START += [row for site in SITES for mask in MASKS for row in new("swin_micro", site, "multiply", mask)]
START += [row for arm in list(BACKBONES)[1:] for mask in ("new gate", *MASKS)
          for row in new(arm, "stage2", "multiply", mask) if (arm[:9], mask) != ("Swin-Tiny", "new gate")]
MAIN = ("loupe", "lambda 0", "lambda 5")
# Five seeds for what the chapter's claims are about, fewer for what it only shows.
SEEDS = {"loupe": 5, "lambda 0": 5, "lambda 5": 5, "residual": 3, "stage3": 3, "stage3.inside": 3, "reduction 4": 3,
         "lion 1e-4": 2, "lion 1e-5": 2, "lite0": 1, "lite0, residual": 1}
TESTED = [old(arm, seed) for seed in range(5) for arm in SEEDS if seed < SEEDS[arm]]
TESTED += [old(arm, seed, "noise") for seed in range(5) for arm in ("loupe", "lambda 0") if seed < SEEDS[arm]]
GRIDS = {"reach": (reach, START + TESTED)}
