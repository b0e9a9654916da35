"""Baselines: other attention in the Loupe's place, after the same stage and of the same number of parameters.

Squeeze-and-Excitation (Hu et al. 2018) and CBAM (Woo et al. 2018) are timm's own modules. They return attended
features and no mask, so they work as a forward hook on the bare backbone.
"""

import torch
from timm.layers.cbam import CbamModule, SpatialAttn
from timm.layers.squeeze_excite import SEModule
from torch import nn

from loupe_core.errors import LoupeError
from loupe_core.gate import Loupe
from loupe_core.model import LoupeModel
from loupe_core.sites import attach, locate, put_back, to_maps
from loupe_lab.evidence.masks import centre_gaussian, mean, shuffle_cells


class SelfAttentionMask(nn.Module):
    """A mask from one head of global self-attention instead of convolutions; `gate.loupe` may be replaced by it.

    Args:
        channels: Channels C of the features.
        width: Size of queries, keys and values.

    Shape:
        features `(B, C, H, W)` -> mask `(B, 1, H, W)` in [0, 1].
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * width)
        self.score = nn.Linear(width, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        B, C, H, W = features.shape
        tokens = self.norm(features.flatten(2).transpose(1, 2))  # (B, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)  # each (B, HW, width)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.sigmoid(self.score(attended)).transpose(1, 2).unflatten(2, (H, W))


def _with_width(kind: str, channels: int, width: int) -> nn.Module:
    if kind == "se":
        return SEModule(channels, rd_channels=width)
    if kind == "cbam":
        return CbamModule(channels, rd_channels=width)
    return SelfAttentionMask(channels, width)


def baseline(kind: str, channels: int, parameters: int) -> nn.Module:
    """Attention of this kind, with the hidden width that brings it closest to a number of parameters.

    Args:
        kind: "se" or "cbam": features `(B, C, H, W)` -> features; "self-attention": features -> mask.
        channels: Channels C of the features.
        parameters: the size to match, such as the Loupe's.

    Raises:
        LoupeError: the kind is unknown.
    """
    if kind not in ("se", "cbam", "self-attention"):
        raise LoupeError(f"baseline {kind!r} is unknown; expected one of se, cbam, self-attention")

    def size(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in _with_width(kind, channels, width).parameters())

    step = size(2) - size(1)  # every kind grows by the same amount for each unit of width
    width = max(round((parameters - size(1)) / step) + 1, 1)
    return _with_width(kind, channels, width)


def put_after(model: LoupeModel, module: nn.Module, site: str = "stage2") -> LoupeModel:
    """Sends the features at a site through `module` (features -> features), and returns the `model`, changed in place.

    `model.peer` is the module, so that it is trained and saved with the rest; `from_pretrained` does not know it.

    Raises:
        LoupeError: the site is unknown.
    """
    (place, layout), = locate(model.backbone, [site], model.img_size)
    model.peer = module  # the name is part of the keys in saved state dicts

    def hook(stage, inputs, output):
        return put_back(module(to_maps(output, layout, model.img_size)), output, layout)

    attach(model.backbone, place, hook)
    return model


class ControlMask(nn.Module):
    """A mask that lacks one property of the Loupe's; `gate.loupe` may be replaced by it, see `control`.

    Args:
        kind: "constant", "shuffled", "random" or "centre".
        channels: Channels C of the features.

    Shape:
        features `(B, C, H, W)` -> mask `(B, 1, H, W)` in [0, 1].
    """

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind, self.seed = kind, int(torch.randint(2**31, ()))
        self.loupe = Loupe(channels)
        if kind in ("random", "centre"):
            self.loupe.requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        B, C, H, W = features.shape
        if self.kind == "centre":
            return centre_gaussian(H, W, torch).to(features).expand(B, 1, H, W)
        mask = self.loupe(features)
        if self.kind == "constant":
            return mean(mask)
        if self.kind == "shuffled":  # one order for all images: a new one per training step, the same one in eval mode
            draws = None if self.training else torch.Generator().manual_seed(self.seed)
            return shuffle_cells(mask, torch.randperm(H * W, generator=draws))
        return mask


def control(kind: str, channels: int) -> nn.Module:
    """A mask to compare the Loupe's with. It has as many parameters, except "cbam", which has fewer.

    Args:
        kind: "constant": the mean of a learned mask, one number per image; "shuffled": a learned mask whose cells are
            shuffled; "random": the mask of a Loupe that keeps its random weights; "centre": `centre_gaussian`, the
            same for all images; "cbam": timm's spatial half of CBAM (Woo et al. 2018), a 7x7 convolution of the
            channels' mean and maximum.
        channels: Channels C of the features.

    Raises:
        LoupeError: the kind is unknown.
    """
    if kind not in ("constant", "shuffled", "random", "centre", "cbam"):
        raise LoupeError(f"control {kind!r} is unknown; expected one of constant, shuffled, random, centre, cbam")
    return CbamMask() if kind == "cbam" else ControlMask(kind, channels)


class CentredLoupe(Loupe):
    """A Loupe with a centre prior added to what it learns; `gate.loupe` may be replaced by it.

    The logarithm of `centre_gaussian` is added to the logit, so the prior multiplies the odds M / (1 - M) of each cell:
    by 1 in the middle, by exp(-4) in the corners. It is fixed, and the learned part may outweigh it.

    Args, shape: as `Loupe`.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        B, C, H, W = features.shape
        prior = centre_gaussian(H, W, torch).log().to(features)
        hidden = nn.functional.relu(self.conv3x3(features))
        return torch.sigmoid(self.conv1x1(hidden) + prior)  # (B, 1, H, W)


class CbamMask(SpatialAttn):
    """timm's spatial half of CBAM, up to its mask: features `(B, C, H, W)` -> `(B, 1, H, W)`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)
        return torch.sigmoid(self.conv(pooled))
