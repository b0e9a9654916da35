"""What an explanation costs, in ms and passes per image: mask, Grad-CAM, integrated gradients, occlusion, rollout.

    python -m benchmarks.explanations [--quick]

Swin-Tiny at 224 pixels with a gate after stage 2, one image, fp32, on the card where there is one. A pass is a forward
run of one image through the backbone, with or without its backward run. The mask comes with the prediction; its row is
that forward run. A call ends when its map is on the CPU. Writes data/results/bench_explanations.json.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.common import command, interleaved, ratio
from loupe_core import LoupeModel
from loupe_core.start.devices import on_best_device
from loupe_lab.evidence.explain import count_passes, explain

METHODS = {"mask": {}, "grad_cam": {}, "rollout": {}, "integrated_gradients": dict(steps=50), "occlusion": {}}


def measure(quick: bool) -> dict:
    backbone, rounds = ("swin_micro", 1) if quick else ("swin_tiny_patch4_window7_224", 5)
    torch.manual_seed(0)
    model = on_best_device(LoupeModel(backbone, num_classes=200, pretrained=False)).eval()
    image, target = torch.randn(1, 3, *model.img_size), torch.tensor([0])
    calls = {name: lambda name=name, options=options: explain(model, image, name, target, **options)
             for name, options in METHODS.items()}
    passes = {}
    for name, call in calls.items():
        with count_passes(model) as counted:
            call()
        passes[name] = counted.forward
    seconds = interleaved(calls, rounds)
    rows = [dict(method=name, passes=passes[name], ms=1000 * statistics.median(seconds[name]),
                 **ratio(seconds[name], seconds["mask"])) for name in METHODS]
    return dict(backbone=backbone, rounds=rounds, rows=rows)


main = partial(command, "explanations", __doc__, measure)

if __name__ == "__main__":
    main()
