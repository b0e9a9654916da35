"""Make the weights of `swin_micro`: `python scripts/record/pretrain.py` (or `make weights`).

The backbone learns from drawn birds of species that the book does not use. `--labels` says what it is told of them:

attributes: the value of each attribute (crown, bill, wing, ...) of birds that are each a species of their own. The
    attributes are what the book's species differ in, so this tells the backbone more than ImageNet tells Swin-Base.
species: one class for each bird, among `--species` others, as ImageNet has it: what to look at is left to the backbone.

Images, steps, schedule, optimizers and seed are the same for both, and both are image-level labels: no box, part or
segmentation enters the loss (boxes only keep the bird inside the augmenting crop), so a mask that finds a part later
has not been trained to.

Beside the weights it writes a .jsonl: the configuration, then one row per epoch (loss, accuracy of every label on
held-out birds, seconds, CPU seconds). A run that was stopped goes on after its last complete epoch when the same
command is given again, and ends as if it had not been stopped; until it ends, a .state lies beside the weights.
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


def other_species(count: int) -> list[dict[str, str]]:
    """Attributes of `count` different species, the same at each call; none of them is one of the book's."""
    rng, found = np.random.default_rng(0), []
    while len(found) < count:
        attributes = random_attributes(rng)
        if attributes not in found:
            found.append(attributes)
    return found


def questions(labels: str, species: int) -> dict[str, int]:
    """What the backbone is asked: the name of each label, and the number of its values."""
    return {"species": species} if labels == "species" else {a: len(values) for a, values in ATTRIBUTES.items()}


def _draw_one(job) -> tuple[np.ndarray, np.ndarray, list[int]]:
    seed, area, attributes = job
    attributes = attributes or random_attributes(np.random.default_rng([seed, 0]))
    bird = draw(attributes, seed, SIZE, area=area)
    return bird.image, bird.box, [values.index(attributes[a]) for a, values in ATTRIBUTES.items()]


def draw_set(count: int, first_seed: int, area: tuple[float, float], workers: int, labels: str = "attributes",
             species: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` birds of species that are not the book's.

    Args:
        first_seed: the birds have this seed and those that follow.
        area: range of the area of a bird's box, see `draw`.
        labels: "attributes" or "species".
        species: the birds are of so many species in turn; 0 means that each is a random species of its own.

    Returns:
        Images `(N, 112, 112, 3)` uint8, boxes `(N, 4)` float32, and for each of `questions` the label `(N, questions)`
        int64.
    """
    known = other_species(species)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = ((first_seed + i, area, known[i % species] if known else None) for i in range(count))
        images, boxes, values = zip(*pool.map(_draw_one, jobs, chunksize=64))
    wanted = torch.arange(count)[:, None] % species if labels == "species" else torch.tensor(values)
    return torch.from_numpy(np.stack(images)), torch.tensor(np.stack(boxes), dtype=torch.float32), wanted


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


class Reader(nn.Module):
    """Backbone and one linear head per label: `(B, 3, H, W)` -> a list of logits, `(B, values)` for each of `asked`."""

    def __init__(self, asked: dict[str, int]) -> None:
        super().__init__()
        self.asked = asked
        self.backbone = timm.create_model("swin_micro", num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, sum(asked.values()))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.head(self.backbone(x)).float().split(list(self.asked.values()), dim=1)


def _to_input(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def read_accuracy(model: Reader, images: torch.Tensor, labels: torch.Tensor,
                  autocast: AbstractContextManager) -> dict[str, float]:
    """Accuracy of each label on images and labels of `draw_set`."""
    model.eval()
    hits = torch.zeros(len(model.asked))
    with torch.inference_mode(), autocast:
        for i in range(0, len(images), 250):
            logits = model(_to_input(images[i:i + 250]))
            hits += torch.stack([(z.argmax(1) == labels[i:i + 250, k]).sum() for k, z in enumerate(logits)])
    return dict(zip(model.asked, (hits / len(images)).tolist()))


def _optimizers(model, lr, matrix_lr, weight_decay):
    """Muon for the matrices of the blocks, AdamW for the rest (embeddings, biases, norms, head)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("backbone.layers")
                and "relative_position" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)]


def pretrain(out: Path | None = None, labels: str = "attributes", species: int | None = None, birds: int = 24_000,
             epochs: int = 20, batch_size: int = 64, lr: float = 1e-3, matrix_lr: float = 2e-2,
             weight_decay: float = 0.05, seed: int = 0, workers: int = 0) -> dict[str, float]:
    """Trains the backbone and writes its weights (fp16, no head) to `out`; returns the accuracies on held-out birds.

    Args:
        out: a .safetensors file; None means that of the package for these labels.
        labels: "attributes" or "species".
        species: see `draw_set`; None means 0 for attributes, 500 for species.

    Raises:
        LoupeError: the loss is not finite, and the files are as the last complete epoch left them; or `out` has the
            state of a run with other settings.
    """
    began, out = time.time(), Path(out or WEIGHTS[labels])
    species = (500 if labels == "species" else 0) if species is None else species
    workers = workers or os.cpu_count() or 1
    settings = dict(labels=labels, species=species, birds=birds, epochs=epochs, batch_size=batch_size, lr=lr,
                    matrix_lr=matrix_lr, seed=seed, weight_decay=weight_decay)
    torch.manual_seed(seed)
    images, boxes, wanted = draw_set(birds, 10_000_000 * (seed + 1), (0.15, 0.75), workers, labels, species)
    held_out = draw_set(min(2_000, birds), 10_000_000 * (seed + 1) + 5_000_000, (0.15, 0.60), workers, labels, species)
    model = Reader(questions(labels, species))
    optimizers = _optimizers(model, lr, matrix_lr, weight_decay)
    steps = epochs * (birds // batch_size)
    warm_up = max(min(300, steps // 10), 1)
    schedules = [torch.optim.lr_scheduler.LambdaLR(  # a float, not numpy's: `_go_on` reads no other types
        o, lambda i: float(min((i + 1) / warm_up, 1) * (0.5 + 0.5 * np.cos(np.pi * i / steps)))) for o in optimizers]
    autocast = torch.autocast("cpu", torch.bfloat16)
    rows = [settings | dict(steps=steps, parameters=sum(p.numel() for p in model.backbone.parameters()),
                            torch=str(torch.__version__), timm=timm.__version__,
                            drawing_seconds=round(time.time() - began))]
    rows = _go_on(out, settings, model, [*optimizers, *schedules]) or rows
    done, cpu = rows[-1].get("seconds", 0), rows[-1].get("cpu_seconds", 0)
    began = began if len(rows) == 1 else time.time()
    for epoch in range(len(rows) - 1, epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(birds)[:birds // batch_size * batch_size].split(batch_size):
            with autocast:
                logits = model(zoom(_to_input(images[index]), boxes[index]))
            loss = sum(F.cross_entropy(z, wanted[index, k]) for k, z in enumerate(logits))
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
                         **{a: round(v, 4) for a, v in accuracy.items()}, seconds=round(done + time.time() - began),
                         cpu_seconds=round(cpu + time.process_time())))
        print(json.dumps(rows[-1]), flush=True)
        _save(model, rows, out)
        _keep(out, settings, model, [*optimizers, *schedules], rows)
    out.with_suffix(".state").unlink(missing_ok=True)
    return {a: rows[-1][a] for a in model.asked}


def _save(model: Reader, rows: list[dict], out: Path) -> None:
    """Writes the weights in fp16 and the log so far; each file is whole or as it was before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as unfinished:
        save_file({k: v.half().contiguous() for k, v in model.backbone.state_dict().items()}, unfinished)
    write_whole(out.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def _keep(out: Path, settings: dict, model: Reader, parts: list, rows: list[dict]) -> None:
    """Writes all that `_go_on` needs; `parts` are optimizers and schedules."""
    with replaced(out.with_suffix(".state")) as unfinished:
        torch.save(dict(settings=settings, model=model.state_dict(), parts=[part.state_dict() for part in parts],
                        random=torch.get_rng_state(), rows=rows), unfinished)


def _go_on(out: Path, settings: dict, model: Reader, parts: list) -> list[dict]:
    """Puts everything back as the last complete epoch left it; returns the rows so far, none for a new run."""
    file = out.with_suffix(".state")
    if not file.exists():
        return []
    state = torch.load(file, weights_only=True)
    if state["settings"] != settings:
        raise LoupeError(f"{file}: found a run with settings {state['settings']}; expected {settings}: give another "
                         "--out")
    model.load_state_dict(state["model"])
    for part, value in zip(parts, state["parts"], strict=True):
        part.load_state_dict(value)
    torch.set_rng_state(state["random"])
    return state["rows"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file of the weights; without it, the package's own")
    parser.add_argument("--labels", choices=("attributes", "species"))
    for name, kind in dict(species=int, birds=int, epochs=int, batch_size=int, lr=float, matrix_lr=float,
                           seed=int).items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    pretrain(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
