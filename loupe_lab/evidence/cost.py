"""What a training step costs, counted without taking it, and how long a training would take on a card that is not here.

Operations are counted on fake tensors, which have shapes and no values, as torch hands them to a device: forward,
backward and the optimizer's step. A card's kernels differ from a processor's operations: attention, here some eight
operations, is one or two there, so the count is from above; a reduction may be two, so no count is exact.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loupe_core.errors import LoupeError
from loupe_core.loss import LoupeLoss
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.start.optimizers import optimizer_of
from loupe_core.start.steps import Tally

PHASES = ("forward", "backward", "optimizer", "bookkeeping")
aten = torch.ops.aten
# Operations that hand out memory, or another view of it, and launch nothing; views are told by their schema.
_SILENT = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
           aten.new_empty_strided.default, aten._unsafe_view.default, aten.lift_fresh.default,
           aten._local_scalar_dense.default}
# of torch's multi_tensor_apply: numbers in a block, blocks in a launch, and tensors in it by the number of lists
_CHUNK, _BLOCKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it: `peaks`, dense operations per second in each precision, with tensor cores in 16
    bit and without them in fp32 ("no"); `bandwidth`, bytes per second."""

    name: str
    peaks: dict[str, float]
    bandwidth: float
    source: str


CARDS = {card.name: card for card in (
    Card("T4", dict(fp16=65e12, no=8.1e12), 320e9, "NVIDIA T4 data sheet, 2019"),
    Card("A100", dict(bf16=312e12, fp16=312e12, no=19.5e12), 1555e9, "NVIDIA A100 40 GB SXM data sheet, 2021"),
    Card("H100", dict(bf16=989e12, fp16=989e12, no=67e12), 3350e9, "NVIDIA H100 SXM data sheet, 2023"),
)}


@dataclass(frozen=True)
class Assumptions:
    """What no count gives, and was not measured here.

    launch: Seconds of the processor's time for an operation, from Python to its kernel; eager PyTorch takes some 5 to
    15 microseconds. view: The same for one that launches nothing. utilisation: Of the peak, by matrix products of 16
    bit. plain: The same in fp32, without tensor cores. reached: Of the bandwidth. wait: For data, of a step's time.
    """

    launch: float = 10e-6
    view: float = 3e-6
    utilisation: float = 0.4
    plain: float = 0.8
    reached: float = 0.7
    wait: float = 0.05


@dataclass
class Counts:
    """What one training step asks for, by phase.

    launches, dispatched (with views, which take the processor's time only), flops (a multiplication and an addition are
    two) and traffic, bytes that kernels read and write, each a `Counter` over `PHASES`; each: phase, flops and bytes of
    every operation that launches; names: launches by operation; batch_size: images; precision: as in `Recipe`.
    """

    batch_size: int
    precision: str = "no"
    launches: Counter = field(default_factory=Counter)
    dispatched: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    traffic: Counter = field(default_factory=Counter)
    each: list[tuple[str, int, int]] = field(default_factory=list)
    names: Counter = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Within it, every operation on tensors, real or fake, is added to `counts` under `phase`."""

    def __init__(self, counts: Counts, phase: str) -> None:
        super().__init__()
        self.counts, self.phase = counts, phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, c = function(*args, **kwargs), self.counts
        if function.namespace != "aten":  # a question for the device, a mark for the profiler
            return out
        c.dispatched[self.phase] += 1
        if launches := launches_of(function, args):
            used = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
            traffic = sum(t.numel() * t.element_size() for t in used)
            count = flop_registry.get(function._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            c.launches[self.phase] += launches
            c.flops[self.phase] += flops
            c.traffic[self.phase] += traffic
            c.names[str(function._overloadpacket)] += launches
            c.each.append((self.phase, flops, traffic))
        return out


def launches_of(function: torch._ops.OpOverload, args: tuple) -> int:
    """How many kernels an operation launches: none for a view or for empty memory, one for most; one of the `_foreach`
    kind takes tensors by the hundred, in blocks, as torch's `multi_tensor_apply` does."""
    if function in _SILENT or function.is_view or function._schema.name == "aten::detach":
        return 0
    if not function._schema.name.startswith(("aten::_foreach", "aten::_fused")):
        return 1
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0])]
    depth = len(lists) + (not function._schema.name.endswith("_"))  # with the list that is written
    blocks = sum(-(-t.numel() // _CHUNK) for t in lists[0])
    return max(-(-len(lists[0]) // _TENSORS[min(depth, 5)]), -(-blocks // _BLOCKS))


def count_step(model: LoupeModel, recipe: Recipe | None = None, precision: str = "no", foreach: bool = True) -> Counts:
    """Counts a training step of `model` with its recipe; the model stays as it is. It takes seconds, and no memory to
    speak of.

    Args:
        recipe: Batch size, optimizer and loss; None is the paper's.
        precision: "bf16" or "fp16": also the casts of mixed precision (the scaling of fp16 is left out).
        foreach: Lion as on a card; False: parameter by parameter.
    """
    recipe = recipe or Recipe()
    counts, dtype = Counts(recipe.batch_size, precision), dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision)
    with FakeTensorMode(), fake_copy(model) as fake:
        fake.train()
        images = torch.empty(recipe.batch_size, fake.in_chans, *fake.img_size)
        labels = torch.empty(recipe.batch_size, dtype=torch.long)
        optimizer = optimizer_of(fake, recipe)
        if recipe.optimizer == "lion":
            optimizer.foreach = foreach
        else:
            for group in optimizer.param_groups:
                group["foreach"] = foreach
        loss = LoupeLoss(recipe.lam, recipe.norm, recipe.norm_reduction, 0, recipe.label_smoothing)
        tally = Tally(torch.device("cpu"), 0, every=10**9)  # read once in many steps
        for taken in (Counts(0), counts):  # the first step makes the optimizer's state
            with Counting(taken, "forward"), torch.autocast("cpu", dtype) if dtype else nullcontext():
                logits, masks = fake(images, return_mask=True)
                terms = loss(logits, labels, masks)
            with Counting(taken, "backward"):
                (terms.total / recipe.accumulate).backward()  # as Accelerate does
            with Counting(taken, "optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            with Counting(taken, "bookkeeping"):
                tally.add(terms, masks, logits, labels)
    return counts


@contextmanager
def fake_copy(model: LoupeModel) -> Iterator[LoupeModel]:
    """A copy of a model with fake parameters and buffers; to be used within a FakeTensorMode."""
    memo = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in (*model.parameters(), *model.buffers())}
    for p in model.parameters():
        memo[id(p)] = torch.nn.Parameter(memo[id(p)], p.requires_grad)
    yield copy.deepcopy(model, memo)


def parts_of_step(counts: Counts, card: Card, given: Assumptions | None = None, phases: Sequence[str] = PHASES,
                  times: int = 1) -> tuple[float, float]:
    """Seconds of a step: the processor's, which launches, and the card's, one operation after the other, each as long
    as its arithmetic or its bytes take.

    Args:
        phases: Of the step.
        times: So many times as many images.

    Raises:
        LoupeError: The card does not compute in the counts' precision.
    """
    given = given or Assumptions()
    if counts.precision not in card.peaks:
        raise LoupeError(f"{card.name} does not compute in {counts.precision}; expected one of {', '.join(card.peaks)}")
    launches, dispatched = (sum(part[phase] for phase in phases) for part in (counts.launches, counts.dispatched))
    host = launches * given.launch + max(dispatched - launches, 0) * given.view
    peak = card.peaks[counts.precision] * (given.plain if counts.precision == "no" else given.utilisation)
    device = sum(max(times * flops / peak, times * traffic / (card.bandwidth * given.reached))
                 for phase, flops, traffic in counts.each if phase in phases)
    return host, device


def estimate(card: str, counts: Counts, images: int, epochs: int, val_images: int = 0,
             given: Assumptions | None = None) -> float:
    """Seconds of a training on a card: an estimate from counts. The processor or the card waits for the other.

    Args:
        card: One of `CARDS`, or a card's full name that holds one, such as "NVIDIA A100-SXM4-40GB".
        counts: Of the model and its recipe in the card's precision, see `count_step`.
        images, val_images: For training and validation, which passes forward through batches four times as large.

    Raises:
        LoupeError: The card is unknown, or does not compute in this precision.
    """
    found, given = known_card(card), given or Assumptions()
    if found is None:
        raise LoupeError(f"card {card!r}: expected one of {', '.join(CARDS)}")
    step = max(parts_of_step(counts, found, given))
    validation = max(parts_of_step(counts, found, given, ("forward",), 4))
    steps, more = (math.ceil(n / (k * counts.batch_size)) for n, k in ((images, 1), (val_images, 4)))
    return epochs * (steps * step + more * validation) / (1 - given.wait)


def known_card(name: str) -> Card | None:
    """The card of `CARDS` that a card's full name holds as a word; None where it holds none."""
    words = name.upper().replace("-", " ").split()
    return next((card for short, card in CARDS.items() if short in words), None)
