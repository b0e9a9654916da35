"""Where a gate stands in a backbone that is not timm's: after a layer, by its dotted name, as one look finds it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn

from loupe_core.errors import LoupeError
from loupe_core.sites import Layout, Site, locate, module_outputs, pattern, to_maps, token_grid

MOST_PREFIX = 8  # tokens before the grid's: a class token, a distillation token, registers


def is_timms(backbone: nn.Module) -> bool:
    """Whether a module is a classifier from timm, which knows its own sites and can grow another head."""
    told = getattr(backbone, "pretrained_cfg", None) or isinstance(getattr(backbone, "feature_info", None), list)
    return hasattr(backbone, "reset_classifier") and bool(told)


def find_places(backbone: nn.Module, names: Iterable[str], input_size: tuple[int, int],
                num_classes: int | None = None) -> list[tuple[Site, Layout]]:
    """As `sites.locate`; of a backbone that is not timm's, the names are those of its layers: "layer2".

    A layer's features may be `(B, C, h, w)`, `(B, h, w, C)` or tokens `(B, N, C)`, row by row, with at most
    `MOST_PREFIX` others before them; it may return them first in a tuple.

    Args:
        input_size: (H, W) of the image, pixels.
        num_classes: K. A backbone that is not timm's must give logits `(B, K)`, or an object with such `logits`.

    Raises:
        LoupeError: A site or layer is unknown, is never called, or returns no feature map; the backbone does not run
            on such an image, or gives other logits.
    """
    names = list(names)
    if is_timms(backbone):
        return locate(backbone, names, input_size) if names else []
    kind, layers = type(backbone).__name__, [name for name, _ in backbone.named_modules() if name]
    for name in names:
        if name not in layers:
            close = [*difflib.get_close_matches(name, layers, n=3), *(n for n, _ in backbone.named_children())]
            such = f", such as {', '.join(list(dict.fromkeys(close))[:8])}" if close else ""
            raise LoupeError(f"site {name!r} is unknown to {kind}, which is no classifier from timm; expected the "
                             f"dotted name of one of its layers{such}")
    outputs = module_outputs(backbone, pattern(backbone, input_size), {*names, ""})
    if num_classes is not None:
        _check_logits(kind, outputs[""], num_classes)
    return [_place(kind, name, outputs, input_size) for name in names]


def _check_logits(kind: str, output: object, num_classes: int) -> None:
    logits = getattr(output, "logits", output)
    if not torch.is_tensor(logits) or logits.ndim != 2:
        found = tuple(logits.shape) if torch.is_tensor(logits) else type(output).__name__
        raise LoupeError(f"backbone {kind} gives {found} for an image; expected logits (B, {num_classes}), or an object"
                         " with such logits: a classifier from timm or torchvision, say")
    if logits.shape[1] != num_classes:
        raise LoupeError(f"backbone {kind} gives {logits.shape[1]} logits, but num_classes={num_classes}; expected the "
                         "same: its head is used as it is, so replace it first, or change num_classes")


def _place(kind: str, name: str, outputs: dict[str, object], input_size: tuple[int, int]) -> tuple[Site, Layout]:
    if name not in outputs:
        raise LoupeError(f"site {name!r} of {kind}: this layer is not called; expected one that images pass through")
    layout = _layout(outputs[name], input_size)
    if layout is None:
        output = outputs[name]
        items = output if isinstance(output, (tuple, list)) else [output]
        found = ", ".join(str(tuple(x.shape)) if torch.is_tensor(x) else type(x).__name__ for x in items)
        raise LoupeError(f"site {name!r} of {kind}: this layer returned {found}; expected features of several cells as "
                         "(B, C, H, W), (B, H, W, C) or (B, tokens, C): choose another layer, or a larger img_size")
    maps = to_maps(outputs[name], layout, input_size)
    stride = max(round(input_size[0] / maps.shape[2]), 1)
    return Site(name, name, maps.shape[1], stride, index=-1), layout


def _layout(output: object, input_size: tuple[int, int]) -> Layout | None:
    """Nobody says how many channels there are: the axes of the grid are those with the image's aspect ratio."""
    H, W = input_size
    for item, x in enumerate(output) if isinstance(output, (tuple, list)) else [(None, output)]:
        if not torch.is_tensor(x) or not x.is_floating_point():
            continue
        if x.ndim == 4:
            for fmt, (h, w) in {"NCHW": x.shape[2:], "NHWC": x.shape[1:3]}.items():
                if h * w > 1 and abs(h * W - w * H) < H + W:  # each side is rounded on its own
                    return Layout(item, fmt)
        if x.ndim == 3:
            for prefix in range(min(MOST_PREFIX + 1, x.shape[1] - 1)):
                if token_grid(x.shape[1] - prefix, input_size):
                    return Layout(item, "NLC", prefix)
    return None
