"""The magnifier: a first look at a whole photograph, a second at the part that the first look points at."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from loupe_core.errors import LoupeError
from loupe_core.geometry import transforms_for
from loupe_core.look.boxes import Rule, boxes_of, shown
from loupe_core.look.cut import Box, box_of, cut_to
from loupe_core.look.sources import mask_of, source_of
from loupe_core.model import LoupeModel
from loupe_core.samples import Sample
from loupe_core.sites import eval_mode, gate_of, module_outputs


@dataclass
class Looks:
    """What a `Magnifier` saw, on the CPU, in the order of the photographs.

    logits, first, second: `(N, K)`, of both looks together and of each, the second a mean over its boxes. boxes: for
    each photograph the parts shown, in its own whole pixels. labels, image_ids: `(N,)`.
    """

    logits: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    boxes: list[list[Box]]
    labels: np.ndarray
    image_ids: np.ndarray


class Magnifier(nn.Module):
    """Two looks through one model: the second one is at a part of the photograph in its full resolution.

    The first look sees the whole photograph. A map of it (the gate's mask, or another, see `Rule.source`) gives boxes
    in the photograph's own pixels; these are cut from the original, not from the small input, and go through the same
    model; the logits of both looks are combined. It has no parameters of its own, so any trained or untrained model
    will do; to train one for it, see `loupe_core.look.training`. It looks in eval mode and without gradients.

    The cost is one pass for the first look and one for each box (of `Rule.pixels`), and what the source needs besides:
    nothing for the mask.

    Args:
        model: With a gate, if the source is its mask.
        rule: How to look; None is `Rule()`.

    Raises:
        LoupeError: The source is unknown, or is the mask of a model without a gate, or with several and no site named;
            or the backbone does not run on images of `Rule.pixels`.
    """

    def __init__(self, model: LoupeModel, rule: Rule | None = None) -> None:
        super().__init__()
        self.model, self.rule = model, rule or Rule()
        if self.rule.source == "mask":
            gate_of(model, self.rule.site)
        elif self.rule.source != "box":
            source_of(self.rule.source)
        config = model.data_config
        self.transform = transforms_for(config, train=False)
        self.closer = transforms_for(config | dict(input_size=closer_size(model, self.rule)), train=False)
        if self.rule.pixels:
            like = next(model.parameters())
            module_outputs(model.backbone, like.new_zeros(1, model.in_chans, *self.closer.input_size), ())

    def forward(self, photographs: Sequence[Image.Image | Sample],
                return_boxes: bool = False) -> torch.Tensor | tuple[torch.Tensor, list[list[Box]]]:
        """Photographs of any sizes -> logits `(B, K)` of both looks; with `return_boxes` also the parts shown."""
        looks = self.look(photographs)
        return (looks.logits, looks.boxes) if return_boxes else looks.logits

    def look(self, photographs: Sequence[Image.Image | Sample]) -> Looks:
        """Both looks at one batch: RGB photographs as `open_image` returns them, or samples that hold them.

        Raises:
            LoupeError: There is no photograph; a sample holds none, or no box where the source is "box"; the map is
                not finite.
        """
        if not len(photographs):
            raise LoupeError("second look: found no photograph, expected one or more")
        samples = [_sample(item, i) for i, item in enumerate(photographs)]
        first, boxes = self.first(samples)
        second = self.second(samples, boxes)
        labels, ids = (np.array([getattr(sample, name) for sample in samples]) for name in ("label", "image_id"))
        return Looks(combine(first, second, self.rule), first, second, boxes, labels, ids)

    def first(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, list[list[Box]]]:
        """The first look's logits `(B, K)`, and for each photograph the parts to show."""
        rule, model = self.rule, self.model
        images, geometries = zip(*(self.transform(sample.image) for sample in samples))
        x = torch.stack(images).to(next(model.parameters()))
        with eval_mode(model), torch.no_grad():
            if rule.source == "mask":
                logits, masks = model(x, return_mask=True)
                maps = mask_of(model, masks, tuple(x.shape[-2:]), rule.site)
            else:
                logits = model(x)
                maps = None if rule.source == "box" else source_of(rule.source)(model, x, rule.site)
        found = []
        for i, (sample, geometry) in enumerate(zip(samples, geometries)):
            boxes = [box_of(sample)] if maps is None else boxes_of(maps[i].cpu().numpy(), geometry, rule)
            found.append([shown(box, geometry, rule, sample.image_id) for box in boxes])
        return logits.float().cpu(), found

    def second(self, samples: Sequence[Sample], boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        """The second look's logits `(B, K)`: of the parts of each photograph, their mean."""
        parts = [cut_to(sample.image, box, self.closer)[0] for sample, of in zip(samples, boxes) for box in of]
        model, size = self.model, len(samples)
        x = torch.stack(parts).to(next(model.parameters()))
        with eval_mode(model), torch.no_grad():
            logits = torch.cat([model(some) for some in x.split(size)]).float().cpu()
        return torch.stack([of.mean(0) for of in logits.split([len(of) for of in boxes])])

    def evaluate(self, data: Dataset, batch_size: int = 16, workers: int = 0, progress: bool = True) -> Looks:
        """Both looks at all photographs of a `CUB200` or `PhotoFolder`, whatever its transform. Random places are those
        of `Rule.seed`.

        Args:
            batch_size: So many photographs are in memory at a time, in their full size.

        Raises:
            LoupeError: The set is empty or does not hold photographs.
        """
        plain = photographs_of(data)
        if not len(plain):
            raise LoupeError("the data set holds no image; expected at least one: check its folder and split")
        loader = DataLoader(plain, batch_size, num_workers=workers, collate_fn=list)
        bar = tqdm(loader, desc="two looks", leave=False, disable=None if progress else True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.rule.seed)
            found = [self.look(samples) for samples in bar]
        logits, first, second = (torch.cat([getattr(looks, name) for looks in found])
                                 for name in ("logits", "first", "second"))
        return Looks(logits, first, second, [of for looks in found for of in looks.boxes],
                     np.concatenate([looks.labels for looks in found]),
                     np.concatenate([looks.image_ids for looks in found]))


def closer_size(model: LoupeModel, rule: Rule) -> tuple[int, int]:
    """(H, W) of the second look's input."""
    scale = 1 if rule.pixels is None else rule.pixels / min(model.img_size)
    return tuple(round(scale * side) for side in model.img_size)


def combine(first: torch.Tensor, second: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The logits `(N, K)` of both looks together, see `Rule.combine`."""
    weight = torch.full((len(first), 1), rule.weight)
    if rule.combine == "confidence":
        sure = [logits.softmax(1).max(1, keepdim=True).values for logits in (first, second)]
        weight = sure[1] / (sure[0] + sure[1])
    return (1 - weight) * first + weight * second


def fit_weight(first: torch.Tensor, second: torch.Tensor, labels: np.ndarray) -> float:
    """The weight of the second look with the least cross-entropy: on validation photographs, for `Rule.weight`."""
    target = torch.as_tensor(labels)

    def loss(weight: float) -> float:
        return nn.functional.cross_entropy(((1 - weight) * first + weight * second).double(), target).item()

    return float(minimize_scalar(loss, bounds=(0, 1), method="bounded").x)  # convex in the weight


def photographs_of(data: Dataset) -> Dataset:
    """A `CUB200` or `PhotoFolder` whose samples hold the photographs themselves."""
    if not hasattr(data, "transform") or not hasattr(data, "image"):
        raise LoupeError(f"second look: found a data set {type(data).__name__}, expected a CUB200 or PhotoFolder: it "
                         "needs the photographs, not tensors")
    plain = copy(data)
    plain.transform = None
    return plain


def _sample(item: Image.Image | Sample, i: int) -> Sample:
    if isinstance(item, Image.Image):
        item = Sample(item.convert("RGB"), -1, None, None, None, "", i)
    if not isinstance(getattr(item, "image", None), Image.Image):
        found = type(getattr(item, "image", item)).__name__
        raise LoupeError(f"second look: item {i} holds no photograph, but {found}; expected RGB photographs, as "
                         "open_image or a data set without a transform gives them")
    return item
