"""The Loupe on every architecture family of timm: attach, forward, backward, shape and place of the mask.

    python -m benchmarks.timm_sweep            # choose the smallest member of each family, then try them all
    python -m benchmarks.timm_sweep resnet18   # try these models only, print the rows

A family is one of timm's model files whose models have `feature_info`. Its member here is the one with the smallest
product of parameters and pixels. Weights are random, images small. The first form writes data/results/timm_sweep.csv.
"""

from __future__ import annotations

import csv
import sys
import time
from importlib.util import find_spec

import timm
import torch
from timm.models import list_modules
from torch.nn import functional as F

from benchmarks.common import CODE, ROOT
from loupe_core.errors import LoupeError
from loupe_core.model import LoupeModel
from loupe_core.sites import classifiers
from loupe_lab.evidence.results import commit

RESULTS = ROOT / "data" / "results" / "timm_sweep.csv"
SEED = 0


def timm_families() -> list[str]:
    """timm's model files; without `swin_micro`, which this package adds."""
    return [family for family in list_modules() if find_spec(f"timm.models.{family}")]


def smallest_member(family: str) -> str | None:
    """The family's cheapest model, or None where no model of it has feature_info."""
    costs = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        if getattr(model, "feature_info", None):
            costs[name] = sum(p.numel() for p in model.parameters()) * image_size(name) ** 2
    return min(costs, key=costs.get, default=None)


def image_size(name: str) -> int:
    """Side of the images, pixels: the model's smallest; and at most 224 where its size is free."""
    cfg = timm.get_pretrained_cfg(name)
    side = (cfg.min_input_size or cfg.input_size)[-1]
    return side if cfg.fixed_input_size else min(side, 224)


def try_model(name: str) -> dict:
    """One row: what the gate found at stage2 of this model, whether all is as it should be, and if not, why."""
    row = dict(model=name, module="", layout="", stride="", image=image_size(name), mask="", ok=False, reason="")
    began = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        model = LoupeModel(name, num_classes=5, pretrained=False, img_size=image_size(name))
        for p in (p for head in classifiers(model.backbone) for p in head.parameters()):
            torch.nn.init.normal_(p, std=0.02)  # some families start their head at zero, which stops every gradient
        gate = model.gates["stage2"]
        row |= dict(module=gate.site.module, layout=gate.layout.fmt, stride=gate.site.stride)
        images = torch.randn(2, 3, *model.img_size)
        logits, mask = model.train()(images, return_mask=True)
        F.cross_entropy(logits, torch.tensor([0, 1])).backward()  # no sparsity term: the gradient comes by the features
        row |= dict(mask="x".join(map(str, mask.shape[-2:])))
        row |= dict(reason=fault(model, logits, mask) or misplaced(model, images[:1]))
    except LoupeError as error:
        row |= dict(reason=str(error))
    return row | dict(ok=not row["reason"], seconds=round(time.perf_counter() - began, 1))


def fault(model: LoupeModel, logits: torch.Tensor, mask: torch.Tensor) -> str:
    """What is wrong with the shapes, the mask's values or the gate's gradients; "" where nothing is."""
    gate, (H, W) = model.gates["stage2"], model.img_size
    B, _, h, w = mask.shape
    if tuple(logits.shape) != (2, 5) or mask.shape[:2] != (2, 1):
        return f"logits {tuple(logits.shape)}, mask {tuple(mask.shape)}"
    for cells, pixels in ((h, H), (w, W)):
        if abs(cells - pixels / gate.site.stride) > 1 + 0.1 * pixels / gate.site.stride:  # some stems do not pad
            return f"mask of {h} x {w} cells for stride {gate.site.stride} on {H} x {W} pixels"
    if not (mask.min() >= 0 and mask.max() <= 1):
        return "mask outside [0, 1]"
    for key, p in gate.named_parameters():
        if p.grad is None or not p.grad.any():
            return f"no gradient in {key}: nothing between the site and the logits reads these features"
        if not p.grad.isfinite().all():
            return f"gradient of {key} is not finite"
    return ""


@torch.no_grad()
def misplaced(model: LoupeModel, image: torch.Tensor) -> str:
    """A square of the image is painted; the features must change most in the mask's cells over that square."""
    model.eval()
    features = []
    handle = model.gates["stage2"].loupe.register_forward_hook(lambda m, inputs, out: features.append(inputs[0]))
    H, W = model.img_size
    y, x, side = H // 4, 3 * W // 4, H // 8
    painted = image.clone()
    painted[..., y - side : y + side, x - side : x + side] = 3.0
    model(image), model(painted)
    handle.remove()
    change = (features[1] - features[0]).norm(dim=1)[0]  # (h, w)
    h, w = change.shape
    if change.max() < 2 * change.median():
        return ""  # attention with random weights may spread a change over all cells; then this shows nothing
    row, column = divmod(change.argmax().item(), w)
    far = max(abs((row + 0.5) / h - y / H), abs((column + 0.5) / w - x / W))
    return f"painting ({y}, {x}) of {H} x {W} changed cell ({row}, {column}) of {h} x {w} most" if far > 0.2 else ""


def main(names: list[str]) -> None:
    if names:
        for name in names:
            print(try_model(name))
        return
    torch.set_num_threads(1)
    made_at, rows = commit(ROOT, CODE), []
    for family in timm_families():
        name = smallest_member(family)
        if name:
            row = dict(family=family) | try_model(name)
            rows.append(row | dict(seed=SEED, timm=timm.__version__, torch=torch.__version__, commit=made_at))
            print(f"{family:28}{name:40}{row['layout']:6}{row['mask']:8}{row['reason'] or 'ok'}", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} families; written to {RESULTS}")


if __name__ == "__main__":
    main(sys.argv[1:])
