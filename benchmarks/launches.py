"""Kernel launches and waits of a training step, counted; and the hours that the paper's table would take on a card.

    python -m benchmarks.launches [--quick]

Nothing is timed. A step of the paper's recipe is counted on fake tensors (see loupe_lab.evidence.cost), with Lion
parameter by parameter and the sums of a row read in every step, as it was until November 2026, and as it is on a card
now; a real training of a small Swin is counted beside it, and must give the same number. Hours are an estimate from
these counts, the cards' data sheets and the assumptions in the file. Writes data/results/bench_launches.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

import loupe_core.trainer
from benchmarks.common import command
from loupe_core import LoupeModel, Recipe, Sample, Trainer
from loupe_core.loss import LossTerms, mask_mean_of
from loupe_core.start import optimizers
from loupe_core.start.lion import Lion
from loupe_core.start.steps import READ_EVERY, Step, Tally
from loupe_lab.evidence.cost import CARDS, PHASES, Assumptions, Counting, Counts, count_step, estimate, parts_of_step
from loupe_lab.paper.arms import ARMS, AUTHORS, BACKBONES, TABLES
from loupe_lab.paper.hours import TEST, TRAIN, VAL

SMALL = "swin_micro"


class Waiting(TorchFunctionMode):
    """Counts what makes the processor wait for the card: a tensor read as a number, or copied to the processor."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        read = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__,
                torch.Tensor.__float__, torch.Tensor.__int__)
        self.count += function in read
        return function(*args, **kwargs or {})


def as_before(sums: torch.Tensor, terms: LossTerms, masks: torch.Tensor, logits: torch.Tensor,
              labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the trainer did beside a step until November 2026; for the count."""
    if not torch.isfinite(terms.total):
        raise ValueError
    values = torch.stack([*(t.detach().float() for t in terms), mask_mean_of(masks, logits)])
    sums = sums + len(logits) * values.cpu().double()
    return sums, (logits.detach().argmax(1) == labels).sum().item()


def bookkeeping(before: bool, steps: int) -> tuple[float, float]:
    """Launches and waits of the trainer's own sums, per step."""
    logits, labels, masks = torch.randn(4, 5), torch.zeros(4, dtype=torch.long), torch.rand(4, 1, 3, 3)
    terms = LossTerms(*(torch.tensor(1.0) for _ in range(3)))
    counts, sums, tally = Counts(4), torch.zeros(4, dtype=torch.double), Tally(torch.device("cuda"), 0)
    with Waiting() as waiting, Counting(counts, "bookkeeping"):
        for _ in range(steps):
            if before:
                sums, _ = as_before(sums, terms, masks, logits, labels)
            else:
                tally.check(terms.total)
                tally.add(terms, masks, logits, labels)
    return counts.launches["bookkeeping"] / steps, waiting.count / steps


class Noise(Dataset):
    """So many images without sense."""

    def __init__(self, count: int, side: int) -> None:
        self.labels, self.side = [k % 4 for k in range(count)], side

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        return Sample(torch.full((3, self.side, self.side), i / 10), self.labels[i], None, None, None, "", i)


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """A processor's training takes a card's ways: Lion in few kernels, sums that are read seldom."""
    with mock.patch.object(optimizers, "Lion", partial(Lion, foreach=True)), \
            mock.patch.object(loupe_core.trainer, "Tally", partial(Tally, every=READ_EVERY)):
        yield


def real_steps(name: str, steps: int) -> list[tuple[int, int]]:
    """Launches and waits of each step of a real training in fp32, without its bookkeeping, as on a card."""
    torch.manual_seed(0)
    model, found, take = LoupeModel(name, num_classes=4, pretrained=False), [], Step.__call__

    def counted(self, *args):
        counts = Counts(0)
        with Waiting() as waiting, Counting(counts, "forward"):
            out = take(self, *args)
        found.append((counts.launches["forward"], waiting.count))
        return out

    recipe = Recipe(batch_size=4, epochs=1, precision="no", workers=0)
    with as_on_a_card(), mock.patch.object(Step, "__call__", counted):
        Trainer(model, recipe, progress=False).fit(Noise(4 * steps, model.img_size[0]))
    return found


def steps_of(name: str, recipe: Recipe, reading: int) -> list[dict]:
    """Rows: a step before and now, in fp32 and bf16."""
    model, rows = LoupeModel(name, num_classes=200, pretrained=False), []
    for precision in ("no", "bf16"):
        for before in (True, False):
            counts = count_step(model, recipe, precision, foreach=not before)
            own, waits = bookkeeping(before, reading)
            launches = {phase: counts.launches[phase] for phase in PHASES[:-1]} | dict(bookkeeping=round(own, 2))
            rows.append(dict(model=name, precision={"no": "fp32"}.get(precision, precision),
                             step="before" if before else "now", **launches, all=round(sum(launches.values())),
                             dispatched=sum(counts.dispatched[phase] for phase in PHASES[:-1]), waits=waits,
                             gflops=round(sum(counts.flops.values()) / 1e9), megabytes=round(
                                 sum(counts.traffic.values()) / 1e6)))
    return rows


def hours(given: Assumptions, small: bool) -> tuple[list[dict], list[dict]]:
    """Rows: the core table's trainings on each card, with all epochs that the recipe allows; and their sums."""
    counted, rows, sums = {}, [], []
    for card in CARDS.values():
        for backbone, arm, seeds in TABLES["core"]:
            change = (ARMS | AUTHORS)[arm]
            authors = change.get("protocol") == "authors"
            precision = "no" if authors else "bf16" if "bf16" in card.peaks else "fp16"
            name = SMALL if small else BACKBONES[backbone].split(".")[0]
            if (name, arm, precision) not in counted:
                model = LoupeModel(name, num_classes=200, pretrained=False, **change.get("model", {}))
                recipe = replace(Recipe(), **change.get("recipe", {}))
                counted[name, arm, precision] = count_step(model, recipe, precision)
            counts = counted[name, arm, precision]
            # the authors' protocol trains with all, and looks at the test split after every epoch
            images, looked_at = (TRAIN + VAL, TEST) if authors else (TRAIN, VAL)
            seconds = estimate(card.name, counts, images, Recipe().epochs, looked_at, given)
            host, device = parts_of_step(counts, card, given)
            rows.append(dict(card=card.name, model=name, arm=arm, precision={"no": "fp32"}.get(precision, precision),
                             launches=sum(counts.launches.values()), host_ms=1000 * host, device_ms=1000 * device,
                             images_s=counts.batch_size / max(host, device) * (1 - given.wait), runs=seeds,
                             hours=seconds / 3600))
        mine = [row for row in rows if row["card"] == card.name]
        sums.append(dict(card=card.name, runs=sum(row["runs"] for row in mine),
                         hours=sum(row["runs"] * row["hours"] for row in mine)))
    return rows, sums


def measure(quick: bool) -> dict:
    recipe, reading = Recipe(), 2 * READ_EVERY
    names = (SMALL,) if quick else ("swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224")
    steps = [row for name in names for row in steps_of(name, recipe, reading)]
    real = real_steps(SMALL, 3)
    fake = count_step(LoupeModel(SMALL, num_classes=4, pretrained=False), replace(recipe, batch_size=4))
    given = Assumptions()
    rows, sums = hours(given, quick)
    return dict(
        batch=recipe.batch_size, steps=steps,
        check=[dict(model=SMALL, fake=sum(fake.launches[phase] for phase in PHASES[:-1]), real=real[-1][0],
                    waits=real[-1][1])],
        assumptions=asdict(given), sources={card.name: card.source for card in CARDS.values()},
        hours=rows, sums=sums)


main = partial(command, "launches", __doc__, measure)

if __name__ == "__main__":
    main()
