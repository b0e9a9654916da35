"""Any timm backbone with one or more Loupes in it: logits, or logits and masks; saved and restored as one folder.

Source: "The Loupe", section III; the paper's model is `LoupeModel("swin_base_patch4_window7_224")`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

import loupe_core.swin_micro  # noqa: F401  (registers the model with timm)
from loupe_core.errors import LoupeError
from loupe_core.gate import Gate
from loupe_core.sites import Layout, Site, check_read, locate, one_line, put_back, to_maps

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# A Loupe trained on all 48 field-guide species; `LoupeModel.from_pretrained(FIELDGUIDE)` needs no network.
FIELDGUIDE = Path(__file__).parent / "weights" / "fieldguide_loupe"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_SIDE = 2048  # pixels; of the images of a checkpoint from elsewhere
# timm.create_model would open, fetch or even unpickle a file for these
FILE_OPTIONS = {"cache_dir", "checkpoint_path", "features_only", "pretrained", "scriptable"}
# the README.md beside shared weights, for Hugging Face's generate_model_card; `loupe train` gives it the facts
CARD = Path(__file__).parent / "files" / "model_card.md"


class SiteGate(Gate):
    """A `Gate` at a site of a backbone: a forward hook that hands on the gated features and keeps the mask."""

    def __init__(self, site: Site, layout: Layout, reduction: int, form: str, input_size: tuple[int, int]) -> None:
        super().__init__(site.channels, reduction, form)
        self.site = site
        self.layout = layout
        self.input_size = input_size  # (H, W) of the images on their way through the backbone
        self.masks: list[torch.Tensor] | None = None  # a list only while LoupeModel.forward collects

    def hook(self, module: nn.Module, inputs: tuple, output):
        """Called by the site's module; returns its output with the features gated, in the backbone's own layout."""
        gated, mask = self(to_maps(output, self.layout, self.input_size))
        if self.masks is not None:
            self.masks.append(mask)
        return put_back(gated, output, self.layout)


class LoupeModel(nn.Module, PyTorchModelHubMixin, library_name="loupe-core", pipeline_tag="image-classification",
                 tags=["fine-grained", "attention", "timm"], paper_url="https://arxiv.org/abs/2508.16663",
                 license="mit", model_card_template=CARD.read_text(encoding="utf-8")):
    """A timm classifier whose features pass through a Loupe on their way.

    The backbone stays what it is: `model.backbone` is timm's own module, with its class, methods and state-dict names.
    The gates are forward hooks on it; their weights are in `model.gates`.

    Args:
        backbone: Name of a timm model, or a classifier from timm (used itself, not a copy; its head is replaced where
            `num_classes` differs).
        num_classes: Number of classes K.
        pretrained: Load the backbone's pretrained weights; only for a name.
        site: Where the gate stands: "stage1" to "stage4" (after the stage; "stage2" is the paper's), or
            "stage3.inside" (after the stage's downsampling, before its blocks). A list gives one gate for each, an
            empty list the bare backbone. See `sites.find_sites`. After the last block of a ViT that classifies by
            its class token, nothing reads the patches any more: such a site is refused.
        form: "multiply" (the paper), "mix" or "residual", see `gate.Gate`.
        reduction: The gate's hidden layer has C // reduction channels; 4 is the authors' code.
        class_names: K names, kept with the weights.
        img_size: Side or (H, W) of the images, pixels. None takes the backbone's own.
        data_config: Values that replace the backbone's own `mean`, `std`, `interpolation` or `crop_pct`.
        backbone_kwargs: Further arguments for `timm.create_model`, such as `drop_path_rate`.

    Attributes: `sites`, `form`, `reduction`, `num_classes`, `class_names`, `img_size` (H, W), `mean`, `std`,
    `interpolation`, `crop_pct`, `backbone_name`; `data_config`, the last five as a dict with `input_size`.

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
        self.backbone_kwargs = dict(backbone_kwargs or {})
        if isinstance(backbone, str):
            self.backbone_name = backbone
            backbone = _create_backbone(backbone, num_classes, pretrained, size, self.backbone_kwargs)
        else:
            backbone = _given_backbone(backbone, num_classes)
            self.backbone_name = backbone.pretrained_cfg["architecture"]
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        config = timm.data.resolve_model_data_config(backbone)
        if unknown := set(data_config or {}) - set(config):
            raise LoupeError(f"data_config has {sorted(unknown)}; expected some of {', '.join(config)}")
        config |= data_config or {}
        own_size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        self.img_size = tuple(size or own_size or config["input_size"][-2:])
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
        places = locate(backbone, self.sites, self.img_size) if self.sites else []
        for place, layout in places:
            check_read(backbone, place, layout, self.img_size)
        for place, layout in places:
            gate = SiteGate(place, layout, reduction, form, self.img_size)
            self.gates[place.name.replace(".", "_")] = gate.to(weight.device, weight.dtype)
            backbone.get_submodule(place.module).register_forward_hook(gate.hook)

    def forward(self, x: torch.Tensor, return_mask: bool = False):
        """Images `(B, 3, H, W)`, normalised with `mean` and `std` -> logits `(B, K)`.

        With `return_mask`: `(logits, mask)`, mask `(B, 1, h, w)`, or a list of masks where `site` was a list.
        """
        B, C, H, W = x.shape
        for gate in self.gates.values():
            gate.input_size, gate.masks = (H, W), []
        logits = self.backbone(x)
        masks = []
        for gate in self.gates.values():
            masks.append(gate.masks[-1])
            gate.masks = None  # gradient checkpointing calls the hook again in the backward pass
        if not return_mask:
            return logits
        return logits, masks[0] if self.one_mask else masks

    def gate_parameters(self) -> int:
        """Number of parameters that the gates add to the backbone."""
        return sum(p.numel() for p in self.gates.parameters())

    def eject(self) -> nn.Module:
        """Takes the gates out and returns the backbone, free of hooks; this model is the bare baseline afterwards."""
        for module in self.backbone.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SiteGate):
                    del module._forward_hooks[key]
        self.gates, self.sites, self.one_mask = nn.ModuleDict(), (), False
        return self.backbone

    @property
    def data_config(self) -> dict:
        """A dict for `transforms_for`, with `input_size` (3, H, W), `mean`, `std`, `interpolation` and `crop_pct`."""
        return dict(input_size=(3, *self.img_size), mean=self.mean, std=self.std, interpolation=self.interpolation,
                    crop_pct=self.crop_pct)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by `save_pretrained(folder)`: weights as safetensors, all else as config.json."""
        config = dict(
            backbone=self.backbone_name,
            num_classes=self.num_classes,
            site=self.sites[0] if self.one_mask else self.sites,
            form=self.form,
            reduction=self.reduction,
            class_names=self.class_names,
            img_size=self.img_size,
            data_config=self.data_config,
            # where the backbone's first weights came from is a path of one machine, and no longer needed
            backbone_kwargs={k: v for k, v in self.backbone_kwargs.items() if not k.startswith("pretrained_cfg")},
        )
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_model(self, str(save_directory / WEIGHTS))

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, **kwargs) -> LoupeModel:
        """The model that `save_pretrained` wrote, in eval mode on the CPU; loads no backbone weights from elsewhere.

        A folder from a stranger is safe to load: nothing in it is run, no other file is opened, and the memory taken
        is bounded by the size of its weights.

        Args:
            folder_or_id: A folder; or "owner/name" on the Hugging Face hub, where there is no such folder.
            **kwargs: Passed on: `revision`, `cache_dir`, `token`, ...; `backbone` for a model that was built from a
                changed timm module, which its name alone does not describe.

        Raises:
            LoupeError: No such folder or hub id; weights are missing, damaged, pickled, of another backbone, or hold
                NaN or infinite values; config.json is broken, or describes a model that its weights are not of.
        """
        folder = Path(folder_or_id)
        if folder.is_dir():
            _check_folder(folder)
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
            raise LoupeError(f"{model_id} has no {CONFIG} that names a backbone; expected what save_pretrained wrote")
        file = Path(model_id) / WEIGHTS
        if not file.parent.is_dir():
            options = dict(revision=revision, cache_dir=cache_dir, token=token)
            options |= dict(force_download=force_download, local_files_only=local_files_only)
            file = hf_hub_download(model_id, WEIGHTS, **options)
        _check_config(f"{model_id}: {CONFIG}", arguments)
        try:
            with safe_open(file, framework="pt") as weights:
                room = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
        except SafetensorError as error:
            raise LoupeError(f"{file} is damaged or no safetensors file ({one_line(error)})") from error
        with _at_most(room, file):
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


def _create_backbone(name: str, num_classes: int, pretrained: bool, size, kwargs: dict) -> nn.Module:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise LoupeError(f"backbone {name[:100]!r} is unknown to timm; expected the name of a timm model: {hint}")
    try:
        # Models of a fixed size take it when they are built; the others run on any size.
        if size and timm.get_pretrained_cfg(name).fixed_input_size:
            kwargs = {"img_size": size} | kwargs
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except LoupeError:
        raise
    except Exception as error:  # timm, the hub, and the file system each raise their own kinds
        if pretrained and not isinstance(error, TypeError):
            raise LoupeError(
                f"backbone {name!r}: no pretrained weights could be loaded ({one_line(error)}); pass pretrained=False, "
                "or a local file as backbone_kwargs={'pretrained_cfg_overlay': {'file': 'weights.safetensors'}}"
            ) from error
        raise LoupeError(f"backbone {name!r} cannot be built with {kwargs}: {one_line(error)}") from error


def _given_backbone(backbone: nn.Module, num_classes: int) -> nn.Module:
    kind = type(backbone).__name__
    if not hasattr(backbone, "reset_classifier") or not getattr(backbone, "pretrained_cfg", None):
        raise LoupeError(f"backbone is a {kind}; expected the name of a timm model, or a classifier from timm")
    for module in backbone.modules():
        if any(isinstance(getattr(hook, "__self__", None), SiteGate) for hook in module._forward_hooks.values()):
            raise LoupeError(
                f"this {kind} already carries a gate; expected a bare one: call eject() on its LoupeModel first, or "
                "pass copy.deepcopy(...) of a bare backbone"
            )
    if backbone.num_classes != num_classes:
        backbone.reset_classifier(num_classes)
    return backbone


def _check_config(where: str, arguments: dict) -> None:
    """Refuse what LoupeModel's own code would not write into config.json; a stranger may have written this one."""

    def whole(value, top=10**9) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= top

    def numbers(value) -> bool:
        kinds = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
        return kinds and len(value) == 3 and all(abs(v) < 1e6 for v in value)

    def texts(value) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)

    def size(value) -> bool:
        sides = value if isinstance(value, (list, tuple)) else [value]
        return len(sides) in (1, 2) and all(whole(v, LARGEST_SIDE) for v in sides)

    def modest(value) -> bool:  # timm makes lists as long as `depth` says
        if isinstance(value, (dict, list, tuple)):
            return len(value) < 1000 and all(map(modest, value.values() if isinstance(value, dict) else value))
        return not isinstance(value, (int, float)) or abs(value) <= 100_000

    def options(value) -> bool:
        plain = isinstance(value, dict) and modest(value)
        return plain and not any(k in FILE_OPTIONS or k.startswith("pretrained_") for k in value)

    data = arguments.get("data_config")
    checks = dict(
        backbone=(lambda v: isinstance(v, (str, nn.Module)), "the name of a timm model"),
        num_classes=(whole, "a whole number from 1"),
        site=(lambda v: isinstance(v, str) or texts(v), "a site's name or a list of them"),
        form=(lambda v: isinstance(v, str), "a name"),
        reduction=(whole, "a whole number from 1"),
        class_names=(texts, "a list of names"),
        img_size=(size, f"one or two whole numbers of pixels up to {LARGEST_SIDE}"),
        data_config=(lambda v: isinstance(v, dict), "an object with mean, std, ..."),
        backbone_kwargs=(options, "an object of modest numbers, without options that lead to files"),
        input_size=(lambda v: isinstance(v, (list, tuple)) and size(v[-2:]), f"sides up to {LARGEST_SIDE} pixels"),
        mean=(numbers, "three numbers"),
        std=(lambda v: numbers(v) and min(v) > 0, "three numbers above 0"),
        crop_pct=(lambda v: isinstance(v, (int, float)) and 0.01 < v < 100, "a share such as 0.9"),
        interpolation=(lambda v: isinstance(v, str), "a name such as bicubic"),
    )
    given = {k: v for k, v in arguments.items() if v is not None} | (data if isinstance(data, dict) else {})
    for name, (good, expected) in checks.items():
        if name in given and not good(given[name]):
            raise LoupeError(f"{where} has {name}={repr(given[name])[:80]}; expected {expected}")


@contextmanager
def _at_most(room: int, file):
    """Refuse to build a model of many more weights than `room`, before its memory is filled."""
    taken = 0

    def count(module, name, parameter):
        nonlocal taken
        taken += 0 if parameter is None else parameter.numel()
        if taken > max(2 * room, 2**24):  # twice, as a head that is replaced was built before; 2**24 are 67 MB
            raise LoupeError(
                f"{file} holds {room:,} weights, the config.json beside it describes a model of many more; expected "
                "both files of one model"
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_folder(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    if special := [name for name in (WEIGHTS, CONFIG) if name in files and not (folder / name).is_file()]:
        raise LoupeError(f"{folder / special[0]} is no file; expected a folder that save_pretrained wrote")
    if WEIGHTS in files:
        return
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    if pickles:
        raise LoupeError(
            f"{folder} holds {pickles[0]} but no {WEIGHTS}: pickled weights can run code and are not read; save the "
            "model with save_pretrained"
        )
    raise LoupeError(f"{folder} holds no {WEIGHTS}; expected a folder that save_pretrained wrote")
