"""What the gate costs on Swin-Base at 224 pixels: parameters, FLOPs, a training step, inference, peak memory.

    python -m benchmarks.gate [--quick]

Bare and gated take turns in one process, in the precision that the Trainer would choose here. FLOPs are torch's own
count: a multiplication and an addition are two. Weights are random: none of this depends on them. Writes
data/results/bench_gate.json.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from lion_pytorch import Lion
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import command, interleaved, ratio
from benchmarks.memory import peak_memory
from loupe_core import LoupeLoss, LoupeModel
from loupe_core.recipe import pick_precision

BACKBONE = {False: "swin_base_patch4_window7_224", True: "swin_tiny_patch4_window7_224"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(backbone: str, gated: bool) -> LoupeModel:
    torch.manual_seed(0)
    return LoupeModel(backbone, num_classes=200, pretrained=False, site="stage2" if gated else ()).to(DEVICE)


def stepper(model: LoupeModel, batch: int, side: int = 224) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: one training step, and one forward pass without gradient, on `batch` images of `side` pixels."""
    images = torch.randn(batch, 3, side, side, device=DEVICE)
    labels = torch.randint(200, (batch,), device=DEVICE)
    loss, optimizer = LoupeLoss(0.05), Lion(model.parameters(), lr=1e-6, weight_decay=0.02)
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(pick_precision(DEVICE))
    autocast = (lambda: torch.autocast(DEVICE.type, dtype)) if dtype else nullcontext

    def wait():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def step():
        model.train()
        with autocast():
            logits, masks = model(images, return_mask=True)
            total = loss(logits, labels, masks).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        wait()

    @torch.inference_mode()
    def infer():
        model.eval()
        with autocast():
            model(images)
        wait()

    return step, infer


def one_step(backbone: str, gated: bool, batch: int) -> None:
    stepper(build(backbone, gated), batch)[0]()


def flops(model: LoupeModel) -> int:
    """FLOPs of one image, forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224, device=DEVICE))
    return counter.get_total_flops()


def measure(quick: bool) -> dict:
    backbone, batch, rounds = BACKBONE[quick], 2 if quick else 8, 1 if quick else 9
    models = {name: build(backbone, name == "gated") for name in ("bare", "gated")}
    calls = {name: stepper(model, batch) for name, model in models.items()}
    for step, infer in calls.values():  # the first call allocates
        step()
        infer()
    rows = []
    for what, k in (("training step, s", 0), ("inference, s", 1)):
        seconds = interleaved({name: pair[k] for name, pair in calls.items()}, rounds)
        rows.append(dict(what=what, bare=sorted(seconds["bare"])[rounds // 2],
                         gated=sorted(seconds["gated"])[rounds // 2], **ratio(seconds["gated"], seconds["bare"])))
    exact = [("parameters", {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}),
             ("FLOPs an image", {n: flops(m) for n, m in models.items()})]
    del models, calls
    exact.append(("peak memory, bytes", {n: peak_memory(one_step, backbone, n == "gated", batch)
                                         for n in ("bare", "gated")}))
    for what, values in exact:
        found = round(values["gated"] / values["bare"], 6)
        rows.append(dict(what=what, **values, ratio=found, least=found, largest=found))
    return dict(backbone=backbone, batch=batch, rounds=rounds, device=str(DEVICE), precision=pick_precision(DEVICE),
                rows=rows)


main = partial(command, "gate", __doc__, measure)

if __name__ == "__main__":
    main()
