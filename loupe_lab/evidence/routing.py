"""Gradient routing: the terms of the gradient at the features before a gate, and trainings in which one is changed.

The paper's summary says that the mask M routes the gradient into the features F: dL/dF = M * dL/dF', with F' = M * F.
Since M is computed from F, the whole gradient has two more terms, see `gradient_terms`. `intervene` changes the
gradient and leaves the forward pass as it is, so what differs after training is caused by the change.
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
from loupe_core.start.devices import device_of
from loupe_lab.evidence.masks import blocks, mean, shuffle_cells

INTERVENTIONS = ("none", "frozen", "detached", "even", "blocks", "shuffled")
SCALE = {"multiply": 1, "residual": 2}  # F' = SCALE * M * F


def backward_mask(mask: torch.Tensor, kind: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """What replaces M as the factor of the gradient that goes into the features: `(B, 1, H, W)`, like the mask.

    Args:
        mask: M, `(B, 1, H, W)`.
        kind: "even": the image's mean of M. "blocks": the mean of each 2 x 2 block, see `masks.blocks`. "shuffled": M
            with each image's cells shuffled. All others: M.
        generator: of the shuffled orders; None takes torch's own.
    """
    B, _, H, W = mask.shape
    if kind == "even":
        return mean(mask)
    if kind == "blocks":
        return blocks(mask)
    if kind == "shuffled":
        return shuffle_cells(mask, torch.rand(B, H * W, generator=generator).argsort(1))
    return mask


@contextmanager
def intervene(model: LoupeModel, kind: str, seed: int = 0) -> Iterator[LoupeModel]:
    """Within `with intervene(model, kind):` the gradient is changed; the results of every forward pass stay the same.

    With G = dL/dF' after the gate, the unchanged gradient at F is M * G plus what comes through the mask (from the
    classification and from the penalty).

    - "none": nothing is changed.
    - "frozen": the gate's weights do not learn. F still receives all terms.
    - "detached": F receives nothing through the mask, neither from the classification nor from the penalty, but M * G
      alone, the summary's formula. The gate's weights learn as before.
    - "even": F receives mean(M) * G in place of M * G, with the mean of each image; all else as before.
    - "blocks": F receives R * G in place of M * G, with R the mean of M in each 2 x 2 block; all else as before.
    - "shuffled": F receives S * G in place of M * G, with S the cells of M in an order that is drawn anew in every
      forward pass; all else as before.

    Args:
        model: with gates of the form "multiply".
        kind: one of `INTERVENTIONS`.
        seed: of the shuffled orders. They have a generator of their own, so that a training draws the same batches
            and crops under every kind.

    Yields:
        The model.

    Raises:
        LoupeError: the kind is unknown, or a gate has another form, or there is no gate.
    """
    if kind not in INTERVENTIONS:
        raise LoupeError(f"intervene: found kind={kind!r}; expected one of {', '.join(INTERVENTIONS)}")
    gates = list(model.gates.values())
    if not gates or any(gate.form != "multiply" for gate in gates):
        found = ", ".join(gate.form for gate in gates) or "no gate"
        raise LoupeError(f"intervene: found {found} in the model; expected gates of form 'multiply'")
    generator = torch.Generator().manual_seed(seed)

    def routed(gate: Gate, inputs: tuple, output: tuple) -> tuple:
        features, mask = inputs[0], output[1]
        M = mask.to(features.dtype)
        R, still = backward_mask(M.detach(), kind, generator), features.detach()
        return M * still + R * (features - still), mask  # the second term is 0, and its derivative in F is R

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
    """The terms of the gradient at the features before a gate, each `(B, C, H, W)`, and the mask `(B, 1, H, W)`; on
    the CPU.

    direct: s * M * dL/dF', the classification's with the mask held constant (s is 1, or 2 in the residual form);
    via_mask: the classification's through the mask; penalty: the sparsity penalty's, lambda included.
    """

    direct: torch.Tensor
    via_mask: torch.Tensor
    penalty: torch.Tensor
    mask: torch.Tensor

    @property
    def whole(self) -> torch.Tensor:
        """The sum of the three terms, the gradient of the loss."""
        return self.direct + self.via_mask + self.penalty


def gradient_terms(model: LoupeModel, images: torch.Tensor, labels: torch.Tensor, lam: float = 0.05) -> GradientTerms:
    """The gradient at F, the features before the gate, of cross-entropy + lam * mean|M|, summed over the images.

    Args:
        model: with one gate, of the form "multiply" or "residual"; it runs where it is, in the mode (train or eval)
            that it is in.
        images: `(B, 3, H, W)`, normalised, on any device.
        labels: `(B,)`, the true classes.
        lam: lambda, the penalty's weight.

    Raises:
        LoupeError: the model has no gate, several, or one of the form "mix".
    """
    gates = list(model.gates.values())
    if len(gates) != 1 or gates[0].form not in SCALE:
        found = ", ".join(gate.form for gate in gates) or "no gate"
        raise LoupeError(f"gradient_terms: found {found} in the model; expected one gate, of form "
                         f"{' or '.join(SCALE)}")
    seen, device = {}, device_of(model)

    def split(gate: Gate, inputs: tuple, output: tuple) -> tuple:
        # F twice, as two independent inputs: one that is multiplied, one that the mask is computed from
        multiplied, masked = (inputs[0].detach().requires_grad_() for _ in range(2))
        mask = gate.loupe(masked)
        seen.update(multiplied=multiplied, masked=masked, mask=mask)
        return SCALE[gate.form] * mask.to(multiplied.dtype) * multiplied, mask

    handle = gates[0].register_forward_hook(split)
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images.to(device)).float(), labels.to(device), reduction="sum")
            penalty = lam * seen["mask"].float().abs().mean((1, 2, 3)).sum()
            ways = [seen["multiplied"], seen["masked"]]
            direct, via_mask = torch.autograd.grad(loss, ways, retain_graph=True, materialize_grads=True)
            pull = [torch.zeros_like(via_mask)]
            if penalty.requires_grad:  # a control's fixed mask has no gradient
                pull = torch.autograd.grad(penalty, ways[1:], materialize_grads=True)
    finally:
        handle.remove()
    return GradientTerms(*(part.detach().cpu() for part in (direct, via_mask, pull[0], seen["mask"])))


def shares(terms: GradientTerms) -> dict[str, float]:
    """Lengths of the terms over the length of the whole, and how the first two compare.

    `direct`, `via_mask`, `penalty`: Euclidean length over that of the whole gradient, all images together (they add up
    as vectors, not as lengths). `cosine`: between direct and via_mask. `agree`: the correlation, over cells, of the
    lengths of these two, mean over images; 1 where both are strong in the same cells.
    """
    whole = float(terms.whole.double().norm())
    parts = dict(direct=terms.direct, via_mask=terms.via_mask, penalty=terms.penalty)
    result = {name: float(part.double().norm()) / whole if whole else 0.0 for name, part in parts.items()}
    a, b = terms.direct.double(), terms.via_mask.double()
    lengths = float(a.norm() * b.norm())
    result["cosine"] = float((a * b).sum()) / lengths if lengths else 0.0
    x, y = (part.norm(dim=1).flatten(1) for part in (a, b))  # (B, cells)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    below = x.norm(dim=1) * y.norm(dim=1)
    result["agree"] = float(((x * y).sum(1) / below.clamp(min=torch.finfo(below.dtype).tiny)).mean())
    return result
