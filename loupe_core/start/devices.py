"""Which device: where a model is, and the one for those who chose none.

One rule for everything that looks at a trained model, `loupe_lab.evidence` and the explorer: images may be on any
device; the model stays where it is, and works there; what is handed back is on the CPU, as tensors or NumPy arrays.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one without weights."""
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def best_device() -> torch.device:
    """The CUDA card that a training here would use, else the CPU.

    It is Accelerate's choice: ACCELERATE_USE_CPU=1 keeps a command on the CPU.
    """
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return device if device.type == "cuda" else torch.device("cpu")


def on_best_device(model: Model) -> Model:
    """The same model, moved to `best_device()`."""
    return model.to(best_device())
