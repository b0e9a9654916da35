"""One photograph with all that is known of it, batches of them, and data sets of other kinds taken as such."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, default_collate

from loupe_core.errors import LoupeError
from loupe_core.files.given_labels import given_labels
from loupe_core.geometry import Geometry


@dataclass
class Sample:
    """One photograph. Parts and box are in pixels of the upright photograph, as `open_image` returns it.

    CUB's annotations refer to stored pixels. Its photographs carry no EXIF rotation, so these are the same.
    """

    image: Tensor | Image.Image  # (3, H, W) from the transform; the photograph itself without one
    label: int
    parts: Tensor | None  # (15, 3): x, y, visible (1 or 0; x = y = 0 where not visible)
    box: Tensor | None  # (4,): x, y, width, height
    geometry: Geometry | None  # None without a transform, or when the transform keeps no record
    path: str
    image_id: int


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> one batch: image (B, 3, H, W), label (B,), parts (B, 15, 3) or None, box (B, 4) or None,
    geometry (list), path (list), image_id (B,).

    Raises:
        LoupeError: the samples hold photographs instead of tensors.
    """
    if not torch.is_tensor(samples[0].image):
        raise LoupeError("collate: found photographs, expected tensors: give the set a transform, see transforms_for")
    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    return {name: values if name in ("geometry", "path") else None if any(v is None for v in values)
            else default_collate(values)  # in a worker, straight into shared memory
            for name, values in columns.items()}


def labels_of(dataset: Dataset) -> np.ndarray:
    """The labels of a data set, (N,) int64, without opening an image.

    Of a set with `labels` or `targets`, of torchvision's own, and of a Subset (random_split gives these) or a
    ConcatDataset of such sets.

    Raises:
        LoupeError: There are none, or as many as images; or one is no whole number of 0 or more.
    """
    if isinstance(dataset, Subset) and not hasattr(dataset, "labels"):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([labels_of(part) for part in dataset.datasets])
    kind = type(dataset).__name__
    found = given_labels(dataset)
    if found is None or not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        raise LoupeError(f"data set {kind}: found no labels; expected a length and an attribute `labels` or `targets`, "
                         "a whole number for each image, or a Subset or ConcatDataset of such sets")
    try:
        labels = np.asarray(found) if len(found) else np.empty(0, dtype=np.int64)
    except (ValueError, TypeError):  # of different lengths, or without one
        labels = np.empty(0)
    if labels.shape != (len(dataset),) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise LoupeError(f"data set {kind}: found labels of shape {labels.shape} and type {labels.dtype} for "
                         f"{len(dataset)} images; expected a whole number of 0 or more for each")
    return labels.astype(np.int64)


def check_labels(num_classes: int, *datasets: Dataset) -> None:
    """Raises LoupeError where a set is empty, without labels, or has a label that `num_classes` classes do not have."""
    for dataset in datasets:
        labels = labels_of(dataset)
        if len(labels) == 0:
            raise LoupeError("the data set holds no image; expected at least one: check its folder and split")
        if (top := int(labels.max())) >= num_classes:
            raise LoupeError(f"the data set has label {top}, the model has classes 0..{num_classes - 1}: build it with "
                             f"num_classes={top + 1}")


def identities_of(dataset: Dataset) -> list[str]:
    """What tells each image of a data set from others in another process: its name and size where it is known, else its
    label and position. For the sets of `labels_of`."""
    if isinstance(dataset, Subset):
        known = identities_of(dataset.dataset)
        return [known[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [identity for part in dataset.datasets for identity in identities_of(part)]
    if hasattr(dataset, "identities"):
        return dataset.identities()
    return [f"label {label}, position {i}" for i, label in enumerate(labels_of(dataset))]


class AsSamples(Dataset):
    """A data set of (image, label) pairs, such as torchvision's, as one of `Sample`; one of `Sample` stays as it is.

    The image is what the set's transform gives: a tensor `(3, H, W)`, or (tensor, `Geometry`). `image_id` is the
    position in the set, counted from 0.

    Raises:
        LoupeError: An item is neither a `Sample` nor such a pair.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        item = self.dataset[i]
        if isinstance(item, Sample):
            return item
        image, label = item if _is_pair(item) else (None, None)
        image, geometry = image if _is_pair(image) else (image, None)
        if not torch.is_tensor(image):
            found = [type(part).__name__ for part in item] if isinstance(item, tuple) else type(item).__name__
            raise LoupeError(f"data set {type(self.dataset).__name__}, item {i}: found {found}, expected a Sample, or "
                             "(tensor, label): give the set a transform, see transforms_for")
        return Sample(image, int(label), None, None, geometry, path="", image_id=i)


def _is_pair(item: object) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2
