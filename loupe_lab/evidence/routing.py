"""Gradient routing: the terms of the gradient in front of a gate, and trainings in which it goes another way.

The paper's summary says that the mask M routes the gradient into the features F: dL/dF = M * dL/dF', with F' = M * F.
Since M is made from F, the whole gradient has two more terms, see `gradient_terms`. `intervene` changes which cells
hear how much, or who learns, while the forward pass stays as it is: what differs after training is caused by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from loupe_core.errors import LoupeError
from loupe_core.gate import Gate
from loupe_core.model import LoupeModel
from loupe_lab.evidence.audit import blocks, mean

KINDS = ("none", "frozen", "detached", "even", "blocks", "shuffled")
SCALE = {"multiply": 1, "residual": 2}  # F' = SCALE * M * F


def backward_mask(mask: torch.Tensor, kind: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """What stands in M's place where the gradient goes into the features: `(B, 1, H, W)`, as the mask itself.

    Args:
        mask: M, `(B, 1, H, W)`.
        kind: "even": the image's mean of M. "blocks": the mean over each 2 x 2 cells, see `audit.blocks`. "shuffled":
            M with the image's cells in another order. All others: M.
        generator: of the orders; None takes torch's own.
    """
    B, _, H, W = mask.shape
    if kind == "even":
        return mean(mask)
    if kind == "blocks":
        return blocks(mask)
    if kind == "shuffled":
        order = torch.rand(B, 1, H * W, generator=generator).argsort(2).to(mask.device)
        return mask.flatten(2).gather(2, order).view_as(mask)
    return mask


@contextmanager
def intervene(model: LoupeModel, kind: str, seed: int = 0) -> Iterator[LoupeModel]:
    """Within `with intervene(model, kind):` the gradient takes another way; every forward pass gives what it gave.

    With G = dL/dF' behind the gate, the plain gradient into F is M * G, plus what comes through the mask (from the
    loss and from the penalty); the gate's weights learn from both.

    - "none": nothing is changed.
    - "frozen": the gate's weights do not learn. F still receives all terms.
    - "detached": nothing comes into F through the mask, neither from the loss nor from the penalty: F receives M * G
      alone, the summary's formula. The gate's weights learn as ever.
    - "even": F receives mean(M) * G in place of M * G, with the mean of each image; all else as ever.
    - "blocks": F receives R * G, with R the mean of M over each 2 x 2 cells; all else as ever.
    - "shuffled": F receives S * G, with S the cells of M in an order that is drawn anew in every pass; all else as
      ever.

    Args:
        model: with gates of the form "multiply".
        kind: one of `KINDS`.
        seed: of the shuffled orders. They have a generator of their own, so that a training draws the same batches
            and crops under every kind.

    Raises:
        LoupeError: the kind is unknown, or a gate has another form, or there is no gate.
    """
    if kind not in KINDS:
        raise LoupeError(f"intervene: kind={kind!r}; expected one of {', '.join(KINDS)}")
    gates = list(model.gates.values())
    if not gates or any(gate.form != "multiply" for gate in gates):
        found = ", ".join(gate.form for gate in gates) or "no gate"
        raise LoupeError(f"intervene: the model has {found}; expected gates of form 'multiply'")
    generator = torch.Generator().manual_seed(seed)

    def routed(gate: Gate, inputs: tuple, output: tuple) -> tuple:
        features, mask = inputs[0], output[1]
        M = mask.to(features.dtype)
        R, still = backward_mask(M.detach(), kind, generator), features.detach()
        return M * still + R * (features - still), mask  # the second term is 0, and its slope in F is R

    handles, frozen = [], []
    for gate in gates:
        if kind == "frozen":
            frozen += [p for p in gate.parameters() if p.requires_grad]
        elif kind == "detached":
            handles.append(gate.loupe.register_forward_pre_hook(lambda loupe, inputs: (inputs[0].detach(),)))
        elif kind != "none":
            handles.append(gate.register_forward_hook(routed))
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield model
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()


class GradientTerms(NamedTuple):
    """The gradient in front of a gate in its terms, each `(B, C, H, W)`, and the mask `(B, 1, H, W)`.

    beside: M * dL/dF'; through: what the classification sends through the mask; penalty: lambda times what the mask's
    mean sends through it.
    """

    beside: torch.Tensor
    through: torch.Tensor
    penalty: torch.Tensor
    mask: torch.Tensor

    @property
    def whole(self) -> torch.Tensor:
        """Their sum, the gradient of the loss."""
        return self.beside + self.through + self.penalty


def gradient_terms(model: LoupeModel, images: torch.Tensor, labels: torch.Tensor, lam: float = 0.05) -> GradientTerms:
    """The gradient at F, the features in front of the gate, of cross-entropy + lam * mean|M|, summed over images.

    Args:
        model: with one gate, of the form "multiply" or "residual"; in the mode (train or eval) that it is in.
        images: `(B, 3, H, W)`; labels: `(B,)`.

    Raises:
        LoupeError: the model has no gate, several, or one of the form "mix".
    """
    gates = list(model.gates.values())
    if len(gates) != 1 or gates[0].form not in SCALE:
        found = ", ".join(gate.form for gate in gates) or "none"
        raise LoupeError(f"gradient_terms: gates of the model: {found}; expected one, of form {' or '.join(SCALE)}")
    seen = {}

    def split(gate: Gate, inputs: tuple, output: tuple) -> tuple:
        # F twice, as two inputs that do not know of each other: one to be multiplied, one to make the mask from
        multiplied, masked = (inputs[0].detach().requires_grad_() for _ in range(2))
        mask = gate.loupe(masked)
        seen.update(multiplied=multiplied, masked=masked, mask=mask)
        return SCALE[gate.form] * mask.to(multiplied.dtype) * multiplied, mask

    handle = gates[0].register_forward_hook(split)
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
            penalty = lam * seen["mask"].float().abs().mean((1, 2, 3)).sum()
            ways = [seen["multiplied"], seen["masked"]]
            # (a fixed mask that a control puts in the gate's place has no slope)
            beside, through = torch.autograd.grad(loss, ways, retain_graph=True, materialize_grads=True)
            slope = [torch.zeros_like(through)]
            if penalty.requires_grad:
                slope = torch.autograd.grad(penalty, ways[1:], materialize_grads=True)
    finally:
        handle.remove()
    return GradientTerms(beside, through, slope[0], seen["mask"].detach())


def shares(terms: GradientTerms) -> dict[str, float]:
    """Sizes of the terms over the size of the whole, and how two of them lie to each other.

    `beside`, `through`, `penalty`: Euclidean length over that of the whole gradient, all images together (they add up
    as vectors, not as lengths). `cosine`: between beside and through. `agree`: mean over images of the correlation,
    over cells, of the two terms' lengths; 1 where both are strong at the same places.
    """
    whole = float(terms.whole.double().norm())
    parts = dict(beside=terms.beside, through=terms.through, penalty=terms.penalty)
    result = {name: float(part.double().norm()) / whole if whole else 0.0 for name, part in parts.items()}
    a, b = terms.beside.double(), terms.through.double()
    lengths = float(a.norm() * b.norm())
    result["cosine"] = float((a * b).sum()) / lengths if lengths else 0.0
    x, y = (part.norm(dim=1).flatten(1) for part in (a, b))  # (B, cells)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    below = x.norm(dim=1) * y.norm(dim=1)
    result["agree"] = float(((x * y).sum(1) / below.clamp(min=torch.finfo(below.dtype).tiny)).mean())
    return result
