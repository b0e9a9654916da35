"""What an explanation costs: the mask, Grad-CAM, integrated gradients, occlusion, rollout. ms and passes an image.

    python -m benchmarks.explanations [--quick]

Swin-Tiny at 224 pixels with a gate after stage 2, one image, fp32. A pass is a forward run of one image through the
backbone, with or without its backward run. The mask comes with the prediction; its row is that forward run. Writes
data/results/bench_explanations.json.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.common import interleaved, ratio, show, write
from loupe_core import LoupeModel
from loupe_core.explain import explain

METHODS = {"mask": {}, "grad_cam": {}, "rollout": {}, "integrated_gradients": dict(steps=50), "occlusion": {}}


def main(argv: list[str] | None = None, **where) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="swin_micro, one round: to see that it runs")
    quick = parser.parse_args(argv).quick
    backbone, rounds = ("swin_micro", 1) if quick else ("swin_tiny_patch4_window7_224", 5)
    torch.manual_seed(0)
    model = LoupeModel(backbone, num_classes=200, pretrained=False).eval()
    image, target = torch.randn(1, 3, *model.img_size), torch.tensor([0])
    calls = {name: lambda name=name, options=options: explain(model, image, name, target, **options)
             for name, options in METHODS.items()}
    passes, seen = {}, []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for name, call in calls.items():
        seen.clear()
        call()
        passes[name] = sum(seen)
    seconds = interleaved(calls, rounds)
    rows = [dict(method=name, passes=passes[name], ms=1000 * statistics.median(seconds[name]),
                 **ratio(seconds[name], seconds["mask"])) for name in METHODS]
    table = dict(backbone=backbone, rounds=rounds, rows=rows)
    print(f"{backbone}, one image, {rounds} rounds; ratio: to the mask")
    print(show(rows))
    if not quick or where:
        print(write("explanations", table, **where))
    return table


if __name__ == "__main__":
    main()
