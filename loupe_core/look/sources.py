"""Where a second look may be told to look: maps of a batch of images, all by one signature."""

import math
from collections.abc import Callable
from importlib.metadata import entry_points

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch.nn.functional import interpolate

from loupe_core.errors import LoupeError
from loupe_core.look.boxes import hill
from loupe_core.model import LoupeModel
from loupe_core.sites import Site, find_sites, gate_of, module_outputs, to_maps
from loupe_core.start.layers import find_places

# (model in eval mode, images (B, C, H, W) on its device, site or None) -> maps (B, h, w) over the whole input, anywhere
Source = Callable[[LoupeModel, torch.Tensor, str | None], torch.Tensor]
SWIN = (SwinTransformer, SwinTransformerV2)


def mask(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """The mask of a gate. Raises LoupeError where there is none, or several and no `site`."""
    return mask_of(model, model(images, return_mask=True)[1], tuple(images.shape[-2:]), site)


def mask_of(model: LoupeModel, masks: torch.Tensor | list[torch.Tensor], size: tuple[int, int],
            site: str | None = None) -> torch.Tensor:
    """`(B, h, w)` of what `model(images, return_mask=True)` returned for images of a size (H, W)."""
    gate = gate_of(model, site)
    masks = [masks] if model.one_mask else masks
    found = masks[list(model.gates.values()).index(gate)][:, 0].float()
    return without_padding(found, model.backbone, gate.site, size)


def without_padding(maps: torch.Tensor, backbone: nn.Module, site: Site, size: tuple[int, int]) -> torch.Tensor:
    """Maps `(B, h, w)` without what lies outside of the image: Swin pads an odd grid, whose last cells reach beyond it.

    112 px have 4 cells of 32 px after stage 4, which are 128 px: 4 x 4 becomes 7 x 7 cells of 16 px.

    Args:
        size: (H, W) of the images, pixels.
    """
    cells = [n * site.stride for n in maps.shape[1:]]
    if not isinstance(backbone, SWIN) or cells == list(size):
        return maps
    px = math.gcd(site.stride, *size)
    maps = interpolate(maps[:, None], [side // px for side in cells], mode="bilinear")[:, 0]
    return maps[:, : size[0] // px, : size[1] // px]


def norm(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """The length of the feature vectors at a site; None is the last stage. It needs no gate and no training of one.

    Raises:
        LoupeError: The backbone has no such site; or it is not timm's, and `site` is None.
    """
    size = tuple(images.shape[-2:])
    names = [site] if site else [name for name in find_sites(model.backbone) if "." not in name][-1:]
    (place, layout), = find_places(model.backbone, names, size)
    features = module_outputs(model.backbone, images, [place.module])[place.module]
    return without_padding(to_maps(features, layout, size).float().norm(dim=1), model.backbone, place, size)


def centre(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """The middle of the input, whatever it shows: a control."""
    return torch.from_numpy(np.stack([hill()] * len(images)))


def random(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """A place of the input drawn from torch's generator: a control. See `Rule.place` for one with the size of a box
    that was found."""
    return torch.from_numpy(np.stack([hill(*at) for at in torch.rand(len(images), 2).tolist()]))


SOURCES: dict[str, Source] = dict(mask=mask, norm=norm, centre=centre, random=random)


def source_names() -> list[str]:
    """The names of `SOURCES`, and those that installed packages offer as entry points "loupe.sources"."""
    return list(dict.fromkeys([*SOURCES, *sorted(entry_points(group="loupe.sources").names)]))


def source_of(name: str) -> Source:
    """The source of a name, the core's own first. Raises LoupeError where there is none."""
    if name in SOURCES:
        return SOURCES[name]
    for point in entry_points(group="loupe.sources", name=name):
        return point.load()
    raise LoupeError(f"second look: source {name!r} is unknown; expected one of {', '.join(source_names())}, or box")
