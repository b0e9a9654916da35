"""What a card wants and a processor does not: images of 8 bit, channels last, compiled kernels."""

from __future__ import annotations

from copy import copy
from functools import lru_cache

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from loupe_core.geometry import EvalTransform, TrainTransform
from loupe_core.model import LoupeModel


def in_bytes(dataset: Dataset, model: LoupeModel) -> Dataset:
    """The same data set, images `(C, H, W)` as uint8, a quarter of the bytes on their way to the card; `to_floats` then
    does there what the transform does here.

    A set whose transform is another than `transforms_for` gives, or has another mean and std than the model, is
    returned as it is, and so is one of another kind than those with `transform`, Subset and ConcatDataset.
    """
    if isinstance(dataset, (Subset, ConcatDataset)):
        name = "dataset" if isinstance(dataset, Subset) else "datasets"
        parts = getattr(dataset, name)
        inner = [in_bytes(part, model) for part in ([parts] if name == "dataset" else parts)]
        other = copy(dataset)
        setattr(other, name, inner[0] if name == "dataset" else inner)
        # of mixed parts a batch could not be made
        return other if all(map(gives_bytes, inner)) else dataset
    transform = getattr(dataset, "transform", None)
    if not isinstance(transform, (EvalTransform, TrainTransform)) or \
            (tuple(transform.mean), tuple(transform.std)) != (model.mean, model.std):
        return dataset
    other = copy(dataset)
    other.transform = copy(transform)
    other.transform.raw = True
    return other


def gives_bytes(dataset: Dataset) -> bool:
    """Whether a data set gives images of 8 bit, as `in_bytes` makes them."""
    if isinstance(dataset, Subset):
        return gives_bytes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(gives_bytes, dataset.datasets))
    return getattr(getattr(dataset, "transform", None), "raw", False)


def to_floats(images: torch.Tensor, model: LoupeModel) -> torch.Tensor:
    """Images of 8 bit `(B, C, H, W)` -> normalised ones, float32, on their device; others stay as they are."""
    if images.dtype == torch.uint8:
        mean, std = _constants(model.mean, model.std, images.device)
        images = images.float().sub_(mean).div_(std)
    return images.contiguous(memory_format=torch.channels_last) if is_channels_last(model) else images


@lru_cache(maxsize=8)  # made once: a copy to a card waits for it
def _constants(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(255 * torch.tensor(values, device=device)[:, None, None] for values in (mean, std))


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of a model's parameters belong to convolutions of more than one pixel or channel group."""
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * convolutions > sum(p.numel() for p in model.parameters())


def is_channels_last(model: nn.Module) -> bool:
    """Whether `lay_out` has laid its convolutions out so."""
    return getattr(model, "_channels_last", False)


def lay_out(model: nn.Module, channels_last: bool) -> None:
    """Lays a model's convolutions out for a card's kernels, or as they were; the values stay."""
    if channels_last != is_channels_last(model):
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        model._channels_last = channels_last


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The same model, compiled for the steps of a training; state and names stay those of `model`.

    Args:
        mode: "no", or torch.compile's mode. What `accelerate launch --dynamo_backend` asks for goes before it.
    """
    asked = TorchDynamoPlugin()  # reads what the launcher has put into the environment
    if asked.backend != DynamoBackend.NO:
        return torch.compile(model, backend=asked.backend.value.lower(), mode=asked.mode, fullgraph=asked.fullgraph,
                             dynamic=asked.dynamic)
    return model if mode == "no" else torch.compile(model, mode=mode)
