"""Training for a second look: photographs shown whole, cut to their boxes, or with the boxes covered."""

from copy import copy
from dataclasses import asdict

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from loupe_core.errors import LoupeError
from loupe_core.look.boxes import Rule
from loupe_core.look.cut import Box, box_of, cut_to
from loupe_core.look.magnifier import Magnifier, photographs_of
from loupe_core.model import LoupeModel
from loupe_core.samples import Sample


class Magnified(Dataset):
    """A training set that also shows parts: attention cropping and dropping, after WS-DAN (Hu et al. 2019).

    Each time a photograph is taken, it is shown whole; or, with probability `crop`, cut from the original to a box of
    its own; or, with probability `drop`, with that box covered by the mean colour. `Trainer` calls `begin_epoch` before
    each epoch, and the boxes are found anew by the model as it then is, in one more pass without gradients. In the
    first epoch all photographs are whole: an untrained mask points nowhere.

    Args:
        dataset: A `CUB200` or `PhotoFolder` with its training transform.
        model: The one that is trained.
        rule: As in `Magnifier`; of several boxes, one is drawn.
        crop, drop: Probabilities.
        batch_size: Of the pass that finds boxes: so many photographs are in memory at a time, in their full size.
        progress: Show a bar there.

    Raises:
        LoupeError: The probabilities are out of range; the rule's boxes are the recorded ones, and the set has none; or
            as in `Magnifier`.
    """

    def __init__(self, dataset: Dataset, model: LoupeModel, rule: Rule | None = None, crop: float = 0.4,
                 drop: float = 0.1, batch_size: int = 16, progress: bool = True) -> None:
        if not (0 <= crop and 0 <= drop and crop + drop <= 1):
            raise LoupeError(f"second look: crop={crop}, drop={drop}; expected probabilities whose sum is 1 at most")
        self.photographs = photographs_of(dataset)
        self.magnifier, self.transform = Magnifier(model, rule), dataset.transform
        if self.magnifier.rule.source == "box" and len(self.photographs):
            box_of(self.photographs[0])  # or the first epoch would have been for nothing
        self.crop, self.drop, self.batch_size, self.progress = crop, drop, batch_size, progress
        self.shown = dict(crop=crop, drop=drop, **asdict(self.magnifier.rule))  # a training goes on with the same
        self.found: dict[str, list[list[Box]] | None] = dict(boxes=None)  # shared with the trainer's copy of this set
        self.labels, self.class_names, self.image_ids, self.cut = (
            getattr(dataset, name) for name in ("labels", "class_names", "image_ids", "cut"))

    def __len__(self) -> int:
        return len(self.photographs)

    def begin_epoch(self, epoch: int) -> None:
        """Finds the boxes of an epoch, counted from 0."""
        if epoch == 0 or not (self.crop or self.drop):
            self.found["boxes"] = None
            return
        loader = DataLoader(self.photographs, self.batch_size, collate_fn=list)
        bar = tqdm(loader, desc="finding boxes", leave=False, disable=None if self.progress else True)
        self.found["boxes"] = [of for samples in bar for of in self.magnifier.first(samples)[1]]

    def __getitem__(self, i: int) -> Sample:
        sample, boxes = copy(self.photographs[i]), self.found["boxes"]
        chance = torch.rand(()).item()
        if boxes is None or chance >= self.crop + self.drop:
            sample.image, sample.geometry = self.transform(sample.image)
            return sample
        of = boxes[i]
        box = of[int(torch.randint(len(of), ()))]
        if chance < self.crop:
            sample.image, sample.geometry = cut_to(sample.image, box, self.transform)
        else:
            sample.image, sample.geometry = self.transform(covered(sample.image, box, self.transform.mean))
        return sample

    def identities(self) -> list[str]:
        """Those of its photographs."""
        return self.photographs.identities()


def covered(image: Image.Image, box: Box, mean: list[float]) -> Image.Image:
    """A copy of a photograph with a box of the mean colour; `mean` as in a transform."""
    image, colour = image.copy(), tuple(round(255 * value) for value in (list(mean) * 3)[:3])
    image.paste(colour, (round(box.x), round(box.y), round(box.x + box.width), round(box.y + box.height)))
    return image
