"""Any timm backbone with one or more Loupes in it: logits, or logits and masks; saved and restored as one folder.

Source: "The Loupe", section III; the paper's model is `LoupeModel("swin_base_patch4_window7_224")`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_model, save_model
from torch import nn

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.checkpoint import (
    CONFIG_NAME,
    HUB_ID,
    WEIGHTS_NAME,
    at_most,
    check_config,
    check_folder,
    stored_weights,
)
from loupe_core.gate import Gate
from loupe_core.sites import Layout, Site, attach, check_read, put_back, to_maps
from loupe_core.start.backbones import create_backbone, given_backbone, input_config
from loupe_core.start.layers import find_places

# A Loupe trained on all 48 field-guide species; `LoupeModel.from_pretrained(FIELDGUIDE)` needs no network.
FIELDGUIDE = Path(__file__).parent / "weights" / "fieldguide_loupe"
# the README.md beside shared weights, for Hugging Face's generate_model_card; `loupe train` gives it the facts
CARD = Path(__file__).parent / "files" / "model_card.md"


# What belongs to one forward pass, apart for each thread: `model`, the LoupeModel (or DataParallel's replica) that
# runs; `masks`, what its gates have made so far; `learns`, whether it was called with gradients; and `entrance` with
# `size`, where the last image entered. (Not a context variable: torch.compile cannot set one within a graph.)
_pass = threading.local()


class _Entrance:
    """Where images enter a model's backbone, however it is called: knows (H, W) of the last one.

    It also tells a model's own gates, and those of its replicas, from the gates of other models.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        self.channels, self.size = channels, size

    def note(self, module: nn.Module, inputs: tuple) -> None:
        """Forward pre-hook of the backbone, and of its first layer, which also meets `forward_features(x)`."""
        x = inputs[0] if inputs else None
        if torch.is_tensor(x) and x.ndim == 4 and x.shape[1] == self.channels:
            self.size = _pass.size = tuple(x.shape[-2:])
            _pass.entrance = self

    def now(self) -> tuple[int, int]:
        """The size in this thread's pass; in the backward pass of another thread, of the last image anywhere."""
        return _pass.size if getattr(_pass, "entrance", None) is self else self.size


class SiteGate(Gate):
    """A `Gate` at a site of a backbone: a forward hook that hands on the gated features and keeps the mask."""

    def __init__(self, site: Site, layout: Layout, reduction: int, form: str, entrance: _Entrance) -> None:
        super().__init__(site.channels, reduction, form)
        self.site = site
        self.layout = layout
        self.key = site.name.replace(".", "_")  # among the model's gates
        self.entrance = entrance

    def hook(self, module: nn.Module, inputs: tuple, output: object) -> object:
        """Called by the site's module; returns its output with the features gated, in the backbone's own layout.

        Gradient checkpointing calls it again in the backward pass. Then no model is running, and nothing is kept.
        """
        model = getattr(_pass, "model", None)
        if model is None or model.entrance is not self.entrance:  # a backbone by itself, inside of another model or not
            return put_back(self(to_maps(output, self.layout, self.entrance.now()))[0], output, self.layout)
        gate = model.gates[self.key]  # a replica's own gate has its device's weights
        frozen = _pass.learns and not torch.is_grad_enabled()
        if model.training and frozen and any(p.requires_grad for p in gate.parameters()):
            raise LoupeError(f"gate at {self.site.name}: its stage runs without gradients in a training pass (no_grad, "
                             "or gradient checkpointing of the reentrant kind), so its mask would not learn; expected "
                             "gradients: timm.layers.set_reentrant_ckpt(False), or freeze the gates too")
        gated, mask = gate(to_maps(output, self.layout, self.entrance.now()))
        _pass.masks[self.key] = mask
        return put_back(gated, output, self.layout)


class LoupeModel(nn.Module, PyTorchModelHubMixin, library_name="loupe-core", pipeline_tag="image-classification",
                 tags=["fine-grained", "attention", "timm"], paper_url="https://arxiv.org/abs/2508.16663",
                 license="mit", model_card_template=CARD.read_text(encoding="utf-8")):
    """An image classifier, timm's or another, whose features pass through a Loupe on their way.

    The backbone stays what it is: `model.backbone` is the module itself, with its class, methods and state-dict names.
    The gates are forward hooks on it; their weights are in `model.gates`.

    Args:
        backbone: Name of a timm model, see `create_backbone`; or a classifier from timm (used itself, not a copy; its
            head is replaced where `num_classes` differs); or any module that turns images into logits `(B, K)`, or an
            object with such `logits`: `LoupeModel(torchvision.models.resnet50(), 1000, site="layer2")`. Its head, for
            optimizer and probe, is its last linear layer; its images are 224 px, with ImageNet's mean and std, unless
            `img_size` and `data_config` say otherwise; `from_pretrained` needs the module as `backbone` again.
        num_classes: Number of classes K.
        pretrained: Load the backbone's pretrained weights; only for a name.
        site: Where the gate stands: "stage1" to "stage4" (after the stage; "stage2" is the paper's), or
            "stage3.inside" (after the stage's downsampling, before its blocks). A list gives one gate for each, an
            empty list the bare backbone. See `sites.find_sites`. In a backbone that is not timm's, the dotted name of
            a layer, see `find_places`. After the last block of a ViT that classifies by its class token, nothing
            reads the patches any more: such a site is refused.
        form: "multiply" (the paper), "mix" or "residual", see `gate.Gate`.
        reduction: The gate's hidden layer has C // reduction channels; 4 is the authors' code.
        class_names: K names, kept with the weights.
        img_size: Side or (H, W) of the images, pixels. None takes the backbone's own.
        data_config: Values that replace the backbone's own `mean`, `std`, `interpolation` or `crop_pct`.
        backbone_kwargs: Further arguments for `timm.create_model`: `drop_path_rate`, `in_chans` for images of other
            than three channels, or pretrained weights from a file, see `create_backbone`.

    Attributes: `sites`, `form`, `reduction`, `num_classes`, `class_names`, `in_chans`, `img_size` (H, W), `mean`,
    `std`, `interpolation`, `crop_pct`, `backbone_name`; `data_config`, what `transforms_for` needs of them as a dict.

    Raises:
        LoupeError: The backbone, a site or the form is unknown; weights cannot be loaded; arguments do not fit.
    """

    def __init__(self, backbone: str | nn.Module, num_classes: int = 200, pretrained: bool = True,
                 site: str | Sequence[str] = "stage2", form: str = "multiply", reduction: int = 16,
                 class_names: Sequence[str] | None = None, img_size: int | Sequence[int] | None = None,
                 data_config: dict | None = None, backbone_kwargs: dict | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise LoupeError(f"num_classes={num_classes!r} given to LoupeModel: expected 1 or more")
        if class_names is not None and len(class_names) != num_classes:
            raise LoupeError(
                f"{len(class_names)} class_names for num_classes={num_classes}: expected a name for each class"
            )
        size = (img_size, img_size) if isinstance(img_size, int) else img_size and tuple(img_size)
        if isinstance(backbone, str):
            backbone, self.backbone_name, self.backbone_kwargs = create_backbone(
                backbone, num_classes, pretrained, size, backbone_kwargs)
        else:
            backbone, self.backbone_kwargs = given_backbone(backbone, num_classes), dict(backbone_kwargs or {})
            known = getattr(backbone, "pretrained_cfg", None) or {}
            self.backbone_name = known.get("architecture", type(backbone).__name__)
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        config = input_config(backbone, size, data_config)
        self.in_chans, self.img_size = config["input_size"][0], tuple(config["input_size"][1:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation, self.crop_pct = config["interpolation"], config["crop_pct"]

        self.sites = (site,) if isinstance(site, str) else tuple(site)
        if len(set(self.sites)) < len(self.sites):
            raise LoupeError(f"site={list(self.sites)} given to LoupeModel: expected each site once")
        self.one_mask = isinstance(site, str)
        self.form = form
        self.reduction = reduction
        self.backbone = backbone
        self.gates = nn.ModuleDict()
        weight = next(backbone.parameters())
        places = find_places(backbone, self.sites, self.img_size, num_classes)
        check_read(backbone, places, self.img_size)
        self.entrance = _Entrance(self.in_chans, self.img_size)
        for place, layout in places:
            gate = SiteGate(place, layout, reduction, form, self.entrance)
            self.gates[gate.key] = gate.to(weight.device, weight.dtype)
        for gate in self.gates.values():
            attach(backbone, gate.site, gate.hook)
        for module in (backbone, next(backbone.children(), backbone)) if places else ():
            module.register_forward_pre_hook(self.entrance.note)

    def forward(self, x: torch.Tensor, return_mask: bool = False) -> torch.Tensor | tuple:
        """Images `(B, in_chans, H, W)`, normalised with `mean` and `std` -> logits `(B, K)`.

        With `return_mask`: `(logits, mask)`, mask `(B, 1, h, w)`, or a list of masks where `site` was a list.

        Raises:
            LoupeError: A site's module was not called; or it runs without gradients in training, as under gradient
                checkpointing of the reentrant kind.
        """
        B, C, H, W = x.shape
        before = [getattr(_pass, name, None) for name in ("model", "masks", "learns")]  # a model inside of another
        _pass.model, _pass.masks, _pass.learns = self, {}, torch.is_grad_enabled()
        try:
            logits = self.backbone(x)
            logits = getattr(logits, "logits", logits)  # as Hugging Face's models return them
            masks = [_pass.masks.get(key) for key in self.gates]
        finally:
            _pass.model, _pass.masks, _pass.learns = before
        if any(mask is None for mask in masks):
            raise LoupeError(f"{self.backbone_name}: a gate at {', '.join(self.sites)} was not reached in this pass; "
                             "expected the modules that were there when the model was built: build it again")
        if not return_mask:
            return logits
        return logits, masks[0] if self.one_mask else masks

    def gate_parameters(self) -> int:
        """Number of parameters that the gates add to the backbone."""
        return sum(p.numel() for p in self.gates.parameters())

    def eject(self) -> nn.Module:
        """Takes the gates out and returns the backbone, free of hooks; this model is the bare baseline afterwards."""
        for module in self.backbone.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if _is_gates(hook):
                        del hooks[key]
        self.gates, self.sites, self.one_mask = nn.ModuleDict(), (), False
        return self.backbone

    @property
    def data_config(self) -> dict:
        """A dict for `transforms_for`, with `input_size` (C, H, W), `mean`, `std`, `interpolation` and `crop_pct`."""
        return dict(input_size=(self.in_chans, *self.img_size), mean=self.mean, std=self.std,
                    interpolation=self.interpolation, crop_pct=self.crop_pct)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by `save_pretrained(folder)`: weights as safetensors, all else as config.json."""
        (save_directory / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        save_model(self, str(save_directory / WEIGHTS_NAME))

    @property
    def config(self) -> dict:
        """The arguments that build this model again, without its weights."""
        return dict(
            backbone=self.backbone_name,
            num_classes=self.num_classes,
            site=self.sites[0] if self.one_mask else self.sites,
            form=self.form,
            reduction=self.reduction,
            class_names=self.class_names,
            img_size=self.img_size,
            data_config=self.data_config,
            backbone_kwargs=self.backbone_kwargs,
        )

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, **kwargs: object) -> LoupeModel:
        """The model that `save_pretrained` wrote, in eval mode on the CPU; loads no backbone weights from elsewhere.

        A folder from a stranger is safe to load: nothing in it is run, no other file is opened, and the memory taken
        is bounded by the size of its weights.

        Args:
            folder_or_id: A folder; or "owner/name" on the Hugging Face hub, where there is no such folder.
            **kwargs: Passed on: `revision`, `cache_dir`, `token`, ...; `backbone` for a model that was built from a
                changed timm module, or one that is not timm's, which its name alone does not describe.

        Raises:
            LoupeError: No such folder or hub id; weights are missing, damaged, pickled, of another backbone, or hold
                NaN or infinite values; config.json is broken, or describes a model that its weights are not of.
        """
        folder = Path(folder_or_id)
        if folder.is_dir():
            check_folder(folder)
        elif isinstance(folder_or_id, Path) or not HUB_ID.fullmatch(folder_or_id):
            raise LoupeError(f"no folder {folder_or_id}; expected one that save_pretrained wrote")
        try:
            return super().from_pretrained(str(folder_or_id), **kwargs)
        except LoupeError:
            raise
        except Exception as error:  # the hub's and the file system's, and what a broken config.json may raise
            where = "" if folder.is_dir() else "is no folder here, and on the hub it "
            raise LoupeError(f"{folder_or_id} {where}cannot be read: {one_line(error)}") from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **arguments
    ) -> LoupeModel:
        """Called by `from_pretrained` with what config.json holds. Unlike the mixin's own, it never reads a pickle."""
        if not arguments.get("backbone"):
            raise LoupeError(f"{model_id} has no {CONFIG_NAME} that names a backbone; expected what save_pretrained "
                             "wrote")
        file = Path(model_id) / WEIGHTS_NAME
        if not file.parent.is_dir():
            options = dict(revision=revision, cache_dir=cache_dir, token=token)
            options |= dict(force_download=force_download, local_files_only=local_files_only)
            file = hf_hub_download(model_id, WEIGHTS_NAME, **options)
        check_config(f"{model_id}: {CONFIG_NAME}", arguments)
        with at_most(stored_weights(file), file):
            model = cls(**arguments | {"pretrained": False})
        try:
            load_model(model, file, strict=True)
        except RuntimeError as error:
            differences = str(error).strip().splitlines()
            raise LoupeError(
                f"{file} does not fit backbone '{model.backbone_name}' with {model.num_classes} classes, sites "
                f"{list(model.sites)} ({differences[min(1, len(differences) - 1)].strip()[:200]}); it is a checkpoint"
                " of another backbone or gate: load it with the config.json that was saved beside it"
            ) from error
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise LoupeError(f"{file}: '{name}' holds NaN or infinite values; expected finite weights")
        return model.eval()


def _is_gates(hook: object) -> bool:
    """Whether a hook of a backbone's module was put there for a gate."""
    return isinstance(getattr(hook, "__self__", None), (SiteGate, _Entrance))
