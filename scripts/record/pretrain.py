"""Make the weights of `swin_micro`: `python scripts/record/pretrain.py` (or `make weights`).

The backbone learns to classify every attribute of random birds of species that the book does not use, as Swin-Base has
learned ImageNet-22k's classes before it is trained on CUB. It gets image-level labels only: no box, part or
segmentation enters the loss (boxes only keep the bird inside the augmenting crop), so a mask that finds a part later
has not been trained to.

Beside the weights it writes `swin_micro.jsonl`: the configuration, then one row per epoch (loss, accuracy of every
attribute on held-out birds, seconds, CPU seconds).
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from loupe_core.errors import LoupeError
from loupe_core.files.atomic import replaced, write_whole
from loupe_core.weights.swin_micro import WEIGHTS
from loupe_lab.birds.fieldguide import ATTRIBUTES, SPECIES, draw

SIZE = 112


def random_attributes(rng: np.random.Generator) -> dict[str, str]:
    """Attributes of a random species that is not one of the book's (pretraining never sees those)."""
    while True:
        attributes = {a: values[rng.integers(len(values))] for a, values in ATTRIBUTES.items()}
        if not any(attributes == s.attributes for s in SPECIES):
            return attributes


def _draw_one(job) -> tuple[np.ndarray, np.ndarray, list[int]]:
    seed, area = job
    attributes = random_attributes(np.random.default_rng([seed, 0]))
    bird = draw(attributes, seed, SIZE, area=area)
    return bird.image, bird.box, [values.index(attributes[a]) for a, values in ATTRIBUTES.items()]


def draw_set(count: int, first_seed: int, area: tuple[float, float],
             workers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` random birds: images `(N, 112, 112, 3)` uint8, boxes `(N, 4)` float32, labels `(N, attributes)` int64."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = ((first_seed + i, area) for i in range(count))
        images, boxes, labels = zip(*pool.map(_draw_one, jobs, chunksize=64))
    return torch.from_numpy(np.stack(images)), torch.tensor(np.stack(boxes), dtype=torch.float32), torch.tensor(labels)


def zoom(x: torch.Tensor, boxes: torch.Tensor, low: float = 0.95, high: float = 1.6) -> torch.Tensor:
    """Random zoom, shift, mirror and brightness that keep the bird's box in view: `(B, 3, H, W)` -> the same shape.

    Args:
        x: square images in [-1, 1]; brighter ones may exceed 1 afterwards.
        boxes: `(B, 4)`, x, y, width and height in pixels.
        low, high: range of the zoom; it is less where the box would not fit.
    """
    n, _, _, side = x.shape
    centre = (boxes[:, :2] + boxes[:, 2:] / 2) / side * 2 - 1
    half_box = boxes[:, 2:] / side
    half = 1 / (low + (high - low) * torch.rand(n))  # half the window's side in grid_sample's [-1, 1]
    half = torch.maximum(half, half_box.max(1).values)
    slack = (half[:, None] - half_box).clamp(min=0)
    middle = centre + (2 * torch.rand(n, 2) - 1) * slack
    middle = middle.clamp(min=(half - 1)[:, None].clamp(max=0), max=(1 - half)[:, None].clamp(min=0))
    sign = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sign * half, half, middle
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return (x + 1) * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) - 1


class AttributeReader(nn.Module):
    """Backbone and one linear head per attribute: `(B, 3, H, W)` -> a list of logits, `(B, values)` per attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("swin_micro", num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, sum(map(len, ATTRIBUTES.values())))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.head(self.backbone(x)).float().split([len(v) for v in ATTRIBUTES.values()], dim=1)


def _to_input(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def read_accuracy(model: AttributeReader, images: torch.Tensor, labels: torch.Tensor,
                  autocast: AbstractContextManager) -> dict[str, float]:
    """Accuracy of each attribute on images and labels of `draw_set`."""
    model.eval()
    hits = torch.zeros(len(ATTRIBUTES))
    with torch.inference_mode(), autocast:
        for i in range(0, len(images), 250):
            logits = model(_to_input(images[i:i + 250]))
            hits += torch.stack([(z.argmax(1) == labels[i:i + 250, k]).sum() for k, z in enumerate(logits)])
    return dict(zip(ATTRIBUTES, (hits / len(images)).tolist()))


def _optimizers(model, lr, matrix_lr, weight_decay):
    """Muon for the matrices of the blocks, AdamW for the rest (embeddings, biases, norms, head)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("backbone.layers")
                and "relative_position" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)]


def pretrain(out: Path = WEIGHTS, birds: int = 24_000, epochs: int = 20, batch_size: int = 64, lr: float = 1e-3,
             matrix_lr: float = 2e-2, weight_decay: float = 0.05, seed: int = 0, workers: int = 0) -> dict[str, float]:
    """Trains the backbone and writes its weights (fp16, no head) to `out`; returns the accuracies on held-out birds.

    Raises:
        LoupeError: the loss is not finite; the files are as the last complete epoch left them.
    """
    began, out = time.time(), Path(out)
    workers = workers or os.cpu_count() or 1
    torch.manual_seed(seed)
    images, boxes, labels = draw_set(birds, 10_000_000 * (seed + 1), (0.15, 0.75), workers)
    held_out = draw_set(min(2_000, birds), 10_000_000 * (seed + 1) + 5_000_000, (0.15, 0.60), workers)
    model = AttributeReader()
    optimizers = _optimizers(model, lr, matrix_lr, weight_decay)
    steps = epochs * (birds // batch_size)
    warm_up = max(min(300, steps // 10), 1)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / warm_up, 1)
                                                   * (0.5 + 0.5 * np.cos(np.pi * i / steps))) for o in optimizers]
    autocast = torch.autocast("cpu", torch.bfloat16)
    rows = [dict(birds=birds, epochs=epochs, batch_size=batch_size, lr=lr, matrix_lr=matrix_lr, seed=seed,
                 weight_decay=weight_decay, parameters=sum(p.numel() for p in model.backbone.parameters()),
                 torch=torch.__version__, timm=timm.__version__, drawing_seconds=round(time.time() - began))]
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(birds)[:birds // batch_size * batch_size].split(batch_size):
            with autocast:
                logits = model(zoom(_to_input(images[index]), boxes[index]))
            loss = sum(F.cross_entropy(z, labels[index, k]) for k, z in enumerate(logits))
            if not torch.isfinite(loss):
                raise LoupeError(f"pretraining: the loss is {loss.item()} in epoch {epoch}; expected a finite number: "
                                 "lower --lr or --matrix-lr")
            for o in optimizers:
                o.zero_grad()
            loss.backward()
            for o, s in zip(optimizers, schedules):
                o.step()
                s.step()
            total += loss.item()
        accuracy = read_accuracy(model, held_out[0], held_out[2], autocast)
        rows.append(dict(epoch=epoch + 1, loss=round(total / (birds // batch_size), 4),
                         **{a: round(v, 4) for a, v in accuracy.items()}, seconds=round(time.time() - began),
                         cpu_seconds=round(time.process_time())))
        print(json.dumps(rows[-1]), flush=True)
        _save(model, rows, out)
    return accuracy


def _save(model: AttributeReader, rows: list[dict], out: Path) -> None:
    """Writes the weights in fp16 and the log so far; each file is whole or as it was before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as unfinished:
        save_file({k: v.half().contiguous() for k, v in model.backbone.state_dict().items()}, unfinished)
    write_whole(out.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    for name, kind in dict(birds=int, epochs=int, batch_size=int, lr=float, matrix_lr=float, seed=int).items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS)
    pretrain(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
