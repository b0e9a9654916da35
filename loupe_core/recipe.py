"""Every choice of a training run in one place, with its limits; `Recipe()` is the paper's (v1, section IV).

That is Lion with lr 1e-5 and weight decay 0.02, cosine annealing, early stopping, cross-entropy + `0.05 |M|_1`. Where
the paper is silent the values are those of the authors' code.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loupe_core.errors import LoupeError
from loupe_core.loss import NORM_REDUCTIONS, NORMS
from loupe_core.start.limits import allowed, expected


def _choice(default: Any, about: str, **limits: Any) -> Any:
    """A field of `Recipe`. `about` says what it is, `limits` what it may be: `choices`; or `least`, `above`, `below`.

    `paper` is the paper's own value, where it gives one. The command line makes its options from these.
    """
    return field(default=default, metadata=dict(about=about, **limits))


RECIPES = ("paper", "small", "finetune", "probe")


@dataclass
class Recipe:
    """Every choice of a training run. The defaults are the paper's, or where it is silent those of the authors' code.

    Raises:
        LoupeError: A value is of another type, out of its range, or lr_min is above lr.
    """

    optimizer: str = _choice("lion", "Lion (Chen et al. 2023) or AdamW", choices=("lion", "adamw"), paper="lion")
    lr: float = _choice(1e-5, "learning rate at the first step", above=0, most=1e6, paper="1e-5")
    lr_min: float = _choice(1e-7, "learning rate where the cosine ends", least=0)
    lr_warmup_epochs: float = _choice(0.0, "the rates rise to their first values over so many epochs, at most half of "
                                      "all", least=0)
    anneal: str = _choice("step", "the cosine moves the rate after each step or, as in the authors' code, each epoch",
                          choices=("step", "epoch"))
    backbone_lr_factor: float = _choice(1.0, "factor on lr and lr_min for the backbone's own parameters, not for gate "
                                        "and classifier; 0 freezes the backbone, BatchNorm's statistics too", least=0,
                                        most=1e6)
    gate_lr_factor: float = _choice(1.0, "factor on lr and lr_min for the gates", least=0, most=1e6)
    layer_decay: float = _choice(1.0, "each layer of the backbone learns at this factor of the next one's rate",
                                 above=0, most=1)
    weight_decay: float = _choice(0.02, "decoupled weight decay; the authors' code: in effect 0", least=0, paper="0.02")
    clip_grad: float = _choice(0.0, "longest norm of all gradients together; 0: any", least=0)
    epochs: int = _choice(50, "at most so many epochs; 0 with a probe as head", least=0, below=2**31)
    batch_size: int = _choice(16, "images per step and process", least=1, below=2**31)
    accumulate: int = _choice(1, "batches whose gradients make one step together", least=1)
    choose: str = _choice("loss", "what on validation chooses the best epoch", choices=("loss", "accuracy"))
    patience: int = _choice(5, "stop after so many epochs without a better one", least=1)
    min_delta: float = _choice(1e-3, "of the loss, what counts as better, for `patience`", least=0)
    ema: float = _choice(0.0, "keep and evaluate an average of the weights, with this decay per step; 0: none", least=0,
                         below=1)
    head: str = _choice("new", "new: the classifier begins at random; probe: as a linear probe on the frozen features, "
                        "and an epoch must be better than it to be kept", choices=("new", "probe"))
    freeze_epochs: int = _choice(0, "in so many first epochs gate and classifier learn alone", least=0)
    freeze_batchnorm: bool = _choice(False, "keep the statistics that BatchNorm layers came with")
    lam: float = _choice(0.05, "lambda, the weight of the mask's norm in the loss", least=0, paper="0.05")
    norm: str = _choice("l1", "norm of the mask", choices=NORMS, paper="l1")
    norm_reduction: str = _choice("mean", "of the norm, over the mask's positions", choices=NORM_REDUCTIONS)
    warmup_epochs: float = _choice(0.0, "lambda grows from 0 over so many epochs", least=0)
    label_smoothing: float = _choice(0.0, "of the cross-entropy", least=0, below=1)
    class_weights: str = _choice("none", "balanced: a class weighs the more in the cross-entropy, the fewer images it "
                                 "has", choices=("none", "balanced"))
    augment: str = _choice("randaugment", "crop: random resized crop and mirror; randaugment (the authors' code): also "
                           "timm's RandAugment", choices=("randaugment", "crop", "none"))
    crop_min: float = _choice(0.08, "least fraction of the photograph's area in the random crop", above=0, most=1)
    mixup: float = _choice(0.0, "alpha of mixup (Zhang et al. 2018); 0: none", least=0)
    cutmix: float = _choice(0.0, "alpha of CutMix (Yun et al. 2019); 0: none", least=0)
    precision: str = _choice("auto", "of the arithmetic; no: fp32; auto: bf16 where the device computes in it, else "
                             "fp16 on CUDA, else no", choices=("auto", "bf16", "fp16", "no"))
    compile: str = _choice("no", "of the training's steps by torch.compile, in its mode; reduce-overhead: with CUDA "
                           "graphs", choices=("no", "default", "reduce-overhead"))
    workers: int = _choice(-1, "processes that read images; -1: up to 8 with a GPU, none on a CPU", least=-1)
    seed: int = _choice(0, "of the order of images, augmentation and dropout", least=0, below=2**32)

    def __post_init__(self) -> None:
        for choice in dataclasses.fields(self):
            value, limits = getattr(self, choice.name), choice.metadata
            if not allowed(value, choice.type, limits):
                raise LoupeError(f"recipe: {choice.name}={value!r}; expected {expected(choice.type, limits)}")
            setattr(self, choice.name, choice.type(value))  # NumPy's numbers have no JSON
        if self.lr_min > self.lr:
            raise LoupeError(f"recipe: lr_min={self.lr_min}; expected at most lr, which is {self.lr}")
        if self.compile == "reduce-overhead" and self.accumulate > 1:  # a graph writes over the gradients of the last
            raise LoupeError("recipe: compile='reduce-overhead' with accumulate above 1; expected compile 'default'")
        if self.epochs == 0 and self.head != "probe":
            raise LoupeError("recipe: epochs=0; expected 1 or more, or head='probe'")

    @classmethod
    def small(cls, **changes: Any) -> "Recipe":
        """The recipe for field-guide birds on two CPU cores; `changes` replace values.

        A run here has some 200 steps, CUB's has 17,000: at 1e-5 nothing would move. The crop is gentler because the
        bird fills the drawing, and RandAugment's colour changes would repaint the marks that tell species apart.
        """
        values = dict(lr=3e-4, lr_min=1e-6, epochs=12, batch_size=32, augment="crop", crop_min=0.6)
        return cls(**(values | changes))

    @classmethod
    def finetune(cls, **changes: Any) -> "Recipe":
        """The recipe for a few hundred photographs on a pretrained backbone; `changes` replace values.

        The classifier begins as a linear probe; then all layers learn at gentle rates, the early ones most gently
        (Kumar et al. 2022: from a random classifier, the first steps distort the pretrained features). The backbone's
        rate is the better of two, on three backbones and four sets (data/results/finetune.csv). Made for a gate of the
        form "residual", which starts as the identity.
        """
        values = dict(optimizer="adamw", lr=1e-3, lr_min=1e-6, lr_warmup_epochs=1.0, backbone_lr_factor=0.1,
                      layer_decay=0.75, weight_decay=0.05, epochs=12, batch_size=32, choose="accuracy", head="probe",
                      freeze_batchnorm=True, augment="crop", crop_min=0.5)
        return cls(**(values | changes))

    @classmethod
    def probe(cls, **changes: Any) -> "Recipe":
        """A linear probe and nothing else: what the frozen features give; `changes` replace values."""
        return cls.finetune(**dict(epochs=0) | changes)

    @classmethod
    def named(cls, name: str, **changes: Any) -> "Recipe":
        """The recipe of a name in `RECIPES`; `changes` replace values."""
        return cls(**changes) if name == "paper" else getattr(cls, name)(**changes)

    @classmethod
    def read(cls, file: Path, **changes: Any) -> "Recipe":
        """The recipe in a folder's `recipe.json`; `changes` replace values. Raises LoupeError where it is none."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if "backbone_lr" in values:  # its name until November 2026
                values["backbone_lr_factor"] = values.pop("backbone_lr")
                if values["backbone_lr_factor"] == 0:
                    raise ValueError("it was begun when backbone_lr 0 did not yet freeze the backbone")
            found = cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as e:
            raise LoupeError(f"{file}: found no recipe ({e}), expected what a training wrote: use a new folder") from e
        return dataclasses.replace(found, **changes)

    def train_transform_options(self) -> dict[str, Any]:
        """The keyword arguments for `transforms_for(data_config, ...)` that carry out `augment` in training."""
        if self.augment == "none":
            return dict(train=False)
        options = dict(train=True, scale=(self.crop_min, 1.0))
        # `fast`: photographs are large, and RandAugment changes their pixels by far more than the faster resize does
        return options | dict(randaugment="rand-m9-mstd0.5", fast=True) if self.augment == "randaugment" else options


# The meanings are written once, above; here they join the docstring.
Recipe.__doc__ += "\n    Args:\n" + "".join(
    f"        {f.name}: {f.metadata['about']}.\n" for f in dataclasses.fields(Recipe))


def pick_precision(device: torch.device) -> str:
    """bf16 where the device computes in it natively, fp16 on older CUDA cards such as the T4, otherwise "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and any(torch.cpu.get_capabilities().get(f) for f in ("avx512_bf16", "amx_bf16", "bf16")):
        return "bf16"
    return "no"
