"""A backbone by its name, or as it is given: how it is built, where its weights come from, what images it takes."""

from __future__ import annotations

import difflib
from pathlib import Path

import timm
import torch
from timm.models import resolve_model_input_args
from torch import nn

import loupe_core.weights.lite0
import loupe_core.weights.swin_micro  # noqa: F401  (both register a model with timm)
from loupe_core.errors import LoupeError, one_line
from loupe_core.files.checkpoint import FILE_OPTIONS
from loupe_core.files.hub import SOURCES, hub_or_cache
from loupe_core.gate import Gate
from loupe_core.sites import classifiers, input_channels
from loupe_core.start.layers import is_timms


def create_backbone(name: str, num_classes: int, pretrained: bool = True, img_size: tuple[int, int] | None = None,
                    options: dict | None = None) -> tuple[nn.Module, str, dict]:
    """A backbone from timm by its name.

    Args:
        name: Of a timm model, with its tag or without, "resnet50.a1_in1k", or as the hub has it, "timm/...";
            "hf-hub:owner/name" or "local-dir:FOLDER" is a model that timm saved on the Hugging Face hub or in a folder.
        img_size: (H, W), pixels; None takes the backbone's own.
        options: Further arguments for `timm.create_model`. `pretrained_cfg_overlay={"file": "weights.safetensors"}`
            takes the pretrained weights from a file (.safetensors, or .pth without code); a head of another number of
            classes is dropped.

    Returns:
        The backbone; and the name and the options that build its like again without opening or fetching a file.

    Raises:
        LoupeError: The name is unknown, the options do not fit, or the weights cannot be had or do not fit.
    """
    options = dict(options or {})
    if name.startswith("timm/"):
        name = name[5:] if timm.is_model(name[5:].split(".")[0]) else f"hf-hub:{name}"
    file = (options.get("pretrained_cfg_overlay") or {}).get("file") if pretrained else None
    if file and not Path(file).is_file():
        raise LoupeError(f"weights {file}: found no such file; expected pretrained weights of {name} as .safetensors or"
                         " .pth")
    elsewhere = name.partition(":")[0].lower() in SOURCES
    if not elsewhere:
        _check_name(name)
    if elsewhere or pretrained and not file:
        hub_or_cache(name)
    try:
        architecture, arguments = _resolved(name, img_size, options, file) if elsewhere else (name, options)
        # Models of a fixed size take it when they are built; the others run on any size.
        if not elsewhere and img_size and timm.get_pretrained_cfg(name).fixed_input_size:
            arguments = {"img_size": img_size} | arguments
        build = dict(pretrained=pretrained, num_classes=num_classes, **arguments)
        backbone = timm.create_model(architecture, **build)
        if file:
            _check_filled(backbone, architecture, build, file)
    except LoupeError:
        raise
    except Exception as error:  # timm, the hub, and the file system each raise their own kinds
        raise _not_built(error, name, options, pretrained, file) from error
    kept = options if not elsewhere else {k: v for k, v in arguments.items() if k != "num_classes"}
    kept = {k: v for k, v in kept.items() if k not in FILE_OPTIONS and not k.startswith("pretrained_")}
    return backbone, architecture, kept


def given_backbone(backbone: nn.Module, num_classes: int) -> nn.Module:
    """The module itself; of a timm classifier, the head is replaced where it has another number of classes.

    Raises:
        LoupeError: It already carries a gate.
    """
    for module in backbone.modules():
        if any(isinstance(getattr(hook, "__self__", None), Gate) for hook in module._forward_hooks.values()):
            raise LoupeError(
                f"this {type(backbone).__name__} already carries a gate; expected a bare one: call eject() on its "
                "LoupeModel first, or pass copy.deepcopy(...) of a bare backbone"
            )
    if is_timms(backbone) and backbone.num_classes != num_classes:
        backbone.reset_classifier(num_classes)
    return backbone


def input_config(backbone: nn.Module, img_size: tuple[int, int] | None = None, changes: dict | None = None) -> dict:
    """What images a backbone takes: `input_size` (C, H, W), `mean` and `std` of C values, `interpolation`, `crop_pct`.

    Where timm knows nothing of it, ImageNet's mean and std, and 224 px. For other images than of three channels, each
    channel has the mean of the three values.

    Args:
        img_size: (H, W), pixels, in place of the backbone's own.
        changes: Replace the backbone's own values.

    Raises:
        LoupeError: A change is unknown, or `mean` or `std` has another number of values than there are channels.
    """
    config, channels = timm.data.resolve_model_data_config(backbone), input_channels(backbone)
    if unknown := set(changes or {}) - set(config):
        raise LoupeError(f"data_config has {sorted(unknown)}; expected some of {', '.join(config)}")
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    config |= changes or {}
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            raise LoupeError(f"data_config has {len(config[name])} values of {name}, but the backbone takes images of "
                             f"{channels} channels; expected a value for each")
    own_size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) if is_timms(backbone) else None
    return config | dict(input_size=(channels, *(img_size or own_size or config["input_size"][-2:])))


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
    if "/" in name and ":" not in name:
        hint = f"did you mean hf-hub:{name[:100]}, or local-dir:{name[:100]}?"
    elif name.isidentifier() and name != name.lower():  # as timm's names never are
        hint = "if it is a class of your own, pass the module itself as backbone="
    raise LoupeError(f"backbone {name[:100]!r} is unknown to timm; expected the name of a timm model: {hint}")


def _resolved(name: str, img_size: tuple[int, int] | None, options: dict, file: str | None) -> tuple[str, dict]:
    """The architecture behind a name with a source, and the arguments that build it."""
    if file:  # or timm would look where the name comes from
        options = options | dict(pretrained_cfg_overlay=options["pretrained_cfg_overlay"] | dict(source=""))
    arguments = resolve_model_input_args(name, dict(img_size=img_size), **options)
    arguments.pop("num_classes", None)
    return arguments.pop("model_name"), arguments


def _check_filled(backbone: nn.Module, name: str, build: dict, file: str) -> None:
    """Refuses a file that leaves weights as they were drawn: timm passes over what a file lacks without a word.

    What differs when the backbone is built once more, from other random numbers, was drawn and not read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ 1)
        other = timm.create_model(name, **build).state_dict()
    heads = {id(p) for module in classifiers(backbone) for p in module.parameters()}
    own = [(key, p) for key, p in backbone.named_parameters() if id(p) not in heads and not p.is_meta]
    drawn = [key for key, p in own if not torch.equal(p, other[key])]
    if drawn:
        listed = ", ".join(drawn[:3]) + (", ..." if len(drawn) > 3 else "")
        raise LoupeError(f"weights {file} do not fit backbone {name!r}: at least {len(drawn)} of its {len(own)} "
                         f"tensors are not in it ({listed}); expected weights of this architecture, with timm's names")


def _not_built(error: Exception, name: str, options: dict, pretrained: bool, file: str | None) -> LoupeError:
    lines = str(error).strip().splitlines()
    # torch's first line says only that a state did not fit, the next one where
    reason = lines[1].strip()[:200] if len(lines) > 1 and lines[0].endswith(":") else one_line(error)
    if file and not isinstance(error, TypeError):
        return LoupeError(f"weights {file} cannot be loaded into backbone {name!r} ({reason}); expected weights of "
                          "this architecture, with timm's names, as .safetensors or .pth")
    if name.partition(":")[0].lower() in SOURCES:
        return LoupeError(f"backbone {name!r} cannot be built ({reason}); expected a model that timm saved there, with "
                          "a config.json: check the name and the connection")
    if pretrained and not isinstance(error, TypeError):
        return LoupeError(
            f"backbone {name!r}: no pretrained weights could be loaded ({reason}); give --weights FILE or "
            "--from-scratch, in Python backbone_kwargs={'pretrained_cfg_overlay': {'file': 'weights.safetensors'}} or "
            "pretrained=False"
        )
    return LoupeError(f"backbone {name!r} cannot be built with {options}: {reason}")
