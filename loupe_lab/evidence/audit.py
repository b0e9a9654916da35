"""How much of a mask reaches the classifier: put other masks in its place and see how far the logits change.

Patch merging, which follows Swin's stages, concatenates 2 x 2 tokens and divides them by their common spread
(LayerNorm). A factor that the four share cancels, up to LayerNorm's eps. So a mask is split here into what is constant
in each block and what differs within it, and each part is tried alone, with eps and without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from loupe_core.errors import LoupeError
from loupe_core.gate import Gate
from loupe_core.sites import check_images, eval_mode, gate_of
from loupe_lab.evidence.masks import blocks, centre_gaussian, mean, replace_mask, shuffle_cells, within
from loupe_lab.evidence.statistics import mcnemar

NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
ROWS = ("own", "mean", "blocks", "within", "shuffled", "ones")
TINY = 1e-20  # eps "0": far below any variance, and a token of zeros stays zero


@dataclass(frozen=True)
class Effect:
    """What another mask does to each of N images; all arrays `(N,)`.

    moved: `relative_change` of the logits; kl: Kullback-Leibler divergence of the reference's softmax from the new
    one, KL(reference || new), nats; changed: another class is predicted; right: the predicted class is the label (None
    without labels).
    """

    moved: np.ndarray
    kl: np.ndarray
    changed: np.ndarray
    right: np.ndarray | None


def relative_change(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Euclidean length of the change from the reference over the reference's length: `(N, K)` twice -> `(N,)`."""
    return (logits - reference).norm(dim=1) / reference.norm(dim=1)


def centre(mask: torch.Tensor) -> torch.Tensor:
    """`centre_gaussian` in the place of each mask `(B, 1, h, w)`."""
    return centre_gaussian(*mask.shape[-2:], torch).to(mask).expand_as(mask)


def shuffled(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that shuffles each image's mask cells, in an order of its own for every image that it is given."""
    draws = torch.Generator().manual_seed(seed)
    return lambda mask: shuffle_cells(mask, torch.stack([torch.randperm(mask[0].numel(), generator=draws)
                                                         for _ in mask]))


def gate_effect(model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None, *,
                site: str | None = None, seed: int = 0, only: Sequence[str] | None = None,
                progress: bool = False) -> dict[str, Effect]:
    """What other masks in place of a gate's own do to the logits, by name; each is compared with the own mask.

    - "own": the mask itself, for its predictions.
    - "mean", "blocks", "within": see the functions of these names in `loupe_lab.evidence.masks`.
    - "shuffled": the mask's cells shuffled, by `seed`; "ones": no mask, which is `gate.neutral` everywhere.
    - "centre", only where it is asked for: `centre_gaussian`, which has not seen the image.
    - "own, eps 0": the own mask, with eps taken out of the first LayerNorm that runs after the gate. "mean, eps 0" and
      the others compare with that. All are absent where no LayerNorm, or another normalisation, follows first.

    The model runs in eval mode without gradients, on its own device. Afterwards its modes, hooks and eps are what they
    were.

    Args:
        model: a `LoupeModel`, of any form.
        images: `(N, 3, H, W)`, normalised, on any device.
        labels: `(N,)` whole numbers, for `right`.
        site: of the gate, where the model has several.
        seed: of "shuffled".
        only: the names to compute; None means all but "centre". "own" is always there, "own, eps 0" with any other of
            eps 0.

        progress: show a bar on stderr, where that is a terminal.

    Raises:
        LoupeError: the model has no gate, several and no `site`, or not this one; images or labels have a wrong shape;
            a name in `only` is unknown.
    """
    gate = gate_of(model, site)
    check_images(images)
    if labels is not None and tuple(labels.shape) != (len(images),):
        raise LoupeError(f"gate_effect: found labels {tuple(labels.shape)} for {len(images)} images; expected "
                         f"({len(images)},), one per image")
    names = [*ROWS, *(f"{name}, eps 0" for name in ROWS)]
    if unknown := set(only or ()) - {*names, "centre"}:
        raise LoupeError(f"gate_effect: found only={sorted(unknown)[0]!r}; expected some of {'; '.join(names)}; centre")
    wanted = names if only is None else only
    changes = dict(own=lambda m: m, mean=mean, blocks=blocks, within=within, centre=centre,
                   ones=lambda m: torch.full_like(m, gate.neutral))
    effects: dict[str, Effect] = {}

    def logits_with(name):
        weight = next(model.parameters())
        with replace_mask(gate, shuffled(seed) if name == "shuffled" else changes[name]):
            parts = tqdm(images.split(64), desc=name, leave=False, disable=None if progress else True)
            return torch.cat([model(part.to(weight)).cpu().double() for part in parts])

    def measure(suffix, reference=None):
        own = logits_with("own")
        effects["own" + suffix] = _effect(own, own if reference is None else reference, labels)
        for name in (*ROWS[1:], *([] if suffix else ["centre"])):
            if name + suffix in wanted:
                effects[name + suffix] = _effect(logits_with(name), own, labels)
        return own

    with eval_mode(model), torch.no_grad():
        own = measure("")
        norm = next_norm(model, gate, images[:1])
        if norm is not None and any(name.endswith("eps 0") for name in wanted):
            eps, norm.eps = norm.eps, TINY
            try:
                measure(", eps 0", own)
            finally:
                norm.eps = eps
    return effects


def next_norm(model: nn.Module, gate: Gate, image: torch.Tensor) -> nn.LayerNorm | None:
    """The first LayerNorm that runs after the gate; None where another normalisation comes first, or none at all.

    Args:
        image: `(1, 3, H, W)`, for one forward pass, in the mode (train or eval) that the model is in.
    """
    seen = []  # the gate, then what runs after it
    modules = [module for module in model.modules() if isinstance(module, NORMALISATIONS)]
    handles = [gate.loupe.register_forward_hook(lambda module, inputs, output: seen.append(module))]
    handles += [module.register_forward_hook(lambda module, inputs, output: seen and seen.append(module) or None)
                for module in modules if module not in set(gate.modules())]
    try:
        model(image.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    following = seen[1] if len(seen) > 1 else None
    return following if isinstance(following, nn.LayerNorm) else None


def table(effects: dict[str, Effect]) -> str:
    """The effects of `gate_effect` as lines of text: one per mask, means over the images."""
    labelled = effects["own"].right is not None
    lines = ["mask in use         logits move   KL, nats   answer changes" + ("    right" if labelled else "")]
    for name, effect in effects.items():
        line = f"{name:<18}  {effect.moved.mean():>10.2%}  {effect.kl.mean():>9.4f}  {effect.changed.mean():>14.1%}"
        lines.append(line + (f"  {effect.right.mean():>8.1%}" if labelled else ""))
    return "\n".join(lines)


def conclusion(effects: dict[str, Effect]) -> str:
    """One sentence on the effects of `gate_effect`: which part of the mask reaches the logits, and, with labels, how
    much accuracy the pattern adds to the mask's mean."""
    moved = {name: float(effect.moved.mean()) for name, effect in effects.items()}
    if moved["mean"] < 1e-3:
        line = f"The mask's pattern does not reach the logits: its mean moves them by {moved['mean']:.2%}"
    else:
        part = {"within": "differences within 2 x 2 blocks", "blocks": "differences between 2 x 2 blocks"}
        alone = next((name for name in part if moved[name] < 0.1 * moved["mean"]), None)
        what = part[alone] if alone else "differences within and between 2 x 2 blocks"
        line = f"What reaches the logits are {what}: without any they move by {moved['mean']:.1%}"
        line += f", with these alone by {moved[alone]:.2%}" if alone else ""
    if effects["own"].right is not None:
        own, flat = effects["own"].right, effects["mean"].right
        only_own, only_flat, p = mcnemar(own, flat)
        line += (f"; the mean in the mask's place costs {100 * (own.mean() - flat.mean()):.1f} points of accuracy "
                 f"(right only with the own mask {only_own}, only with the mean {only_flat}, p = {p:.2g}, "
                 f"n = {len(own)})")
    return line + "."


def _effect(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor | None) -> Effect:
    log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
    first = logits.argmax(1)
    return Effect(relative_change(logits, reference).numpy(), (log_p.exp() * (log_p - log_q)).sum(1).numpy(),
                  (first != reference.argmax(1)).numpy(),
                  None if labels is None else (first == labels.cpu()).numpy())
