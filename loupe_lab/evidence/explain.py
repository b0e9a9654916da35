"""Maps of where a model looked: the mask, Grad-CAM, integrated gradients, attention rollout, occlusion.

All share one signature, and each is a map over the whole model input, at its own resolution:
`heatmap.mask_to_original(map, geometry)` brings it to the photograph. Captum computes three of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from loupe_core.errors import LoupeError
from loupe_core.look.sources import SWIN, without_padding
from loupe_core.sites import (
    Layout,
    Site,
    attach,
    check_images,
    classifiers,
    eval_mode,
    find_layout,
    find_sites,
    gate_of,
    locate,
    module_outputs,
    put_back,
    to_maps,
    token_grid,
)
from loupe_core.start.layers import find_places, is_timms

BATCH = 64  # images per forward pass, where a map needs many


def explain(model: nn.Module, images: torch.Tensor, method: str,
            target: int | str | Sequence[int | str] | torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """One map per image of where the model looked: `(B, C, H, W)` -> `(B, h, w)`, float32 on the CPU, without gradient.

    - "mask": a value per cell of the gate. Option: `site`, where the model has several gates.
    - "grad_cam": a value per cell of a site. Option: `site`, or a layer of a backbone that is not timm's; by
      default the features that the classifier reads.
    - "integrated_gradients": a signed value per pixel. Option: `steps` = 50.
    - "rollout": a value per patch; the same for any target.
    - "occlusion": a signed value per pixel. Options: `window` and `stride`, px; by default a 7th of the image's shorter
      side, and half of the window.

    The model runs in eval mode, a compiled one as it was before. Afterwards its modes, hooks, fused attention and
    gradients are what they were.

    Args:
        model: a `LoupeModel`, or a classifier from timm.
        images: `(B, C, H, W)`, normalised, so that 0 is the mean colour; on any device.
        method: one of `METHODS`.
        target: class to explain, by its number, or by its name where the model has names; or one per image. None takes
            the predicted ones, in one more forward pass.
        options: of the method, see above.

    Raises:
        LoupeError: the method, the site or a class is unknown; the images have another shape; the model has no gate
            (mask) or is neither a Swin nor a plain ViT (rollout); no gradient reaches the site (Grad-CAM).
    """
    if method not in METHODS:
        raise LoupeError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    check_images(images)
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given: compiled code passes hooks by
    with torch.compiler.set_stance("force_eager"), eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        x = images.detach().to(next(model.parameters()), copy=True)
        target = None if method in ("mask", "rollout") else _classes(model, x, target)
        return METHODS[method](model, x, target, **options).detach().float().cpu()


def features_at(model: nn.Module, images: torch.Tensor, site: str = "stage2") -> torch.Tensor:
    """The features at a site, as they come to a gate there: `(B, C, H, W)` -> `(B, channels, h, w)`, on the CPU.

    Args:
        model: a `LoupeModel`, with a gate at that site or without any, or a classifier from timm.
        images: as in `explain`.

    Raises:
        LoupeError: the site is unknown, or the model's gates are at others.
    """
    check_images(images)
    seen, size, backbone = [], tuple(images.shape[-2:]), _backbone(model)
    if getattr(model, "gates", None):
        handle = gate_of(model, site).loupe.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    else:
        place, layout = find_places(backbone, [site], size)[0]
        handle = attach(backbone, place, lambda module, inputs, output: seen.append(to_maps(output, layout, size)))
    try:
        with eval_mode(model), torch.inference_mode():
            model(images.to(next(model.parameters())))
    finally:
        handle.remove()
    return seen[-1].float().cpu()


@dataclass
class Passes:
    """How many images have gone forward through a model, and for how many a gradient was computed."""

    forward: int = 0
    backward: int = 0


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Passes]:
    """Within `with count_passes(model) as passes:` counts images forward and backward: a cost that is the same on any
    machine."""
    passes = Passes()

    def went(module, inputs, output):
        logits = output[0] if isinstance(output, tuple) else output
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(came_back)

    def came_back(gradient):
        passes.backward += len(gradient)

    handle = model.register_forward_hook(went)
    try:
        yield passes
    finally:
        handle.remove()


def _mask(model, x, target, site: str | None = None) -> torch.Tensor:
    gate = gate_of(model, site)
    with torch.no_grad():
        masks = model(x, return_mask=True)[1]
    mask = masks if model.one_mask else masks[list(model.gates.values()).index(gate)]
    return without_padding(mask[:, 0], model.backbone, gate.site, tuple(x.shape[-2:]))


def _grad_cam(model, x, target, site: str | None = None) -> torch.Tensor:
    """Selvaraju et al. 2017: the sum of the channels, each weighted by its mean gradient; negative values become 0."""
    backbone, size = _backbone(model), tuple(x.shape[-2:])
    place, layout = find_places(backbone, [site], size)[0] if site else _last_features(backbone, x)
    probe = nn.Identity()  # sees the features as (B, C, h, w), which is how captum's Grad-CAM reads them

    def hook(module, inputs, output):
        return put_back(probe(to_maps(output, layout, size)), output, layout)

    handle = attach(backbone, place, hook)
    try:  # the image asks for a gradient, so that a frozen backbone passes one on too
        cam = LayerGradCam(model, probe).attribute(x.requires_grad_(), target)[:, 0]
    finally:
        handle.remove()
    if not cam.any() and not any(p.any() for module in classifiers(backbone) for p in module.parameters()):
        raise LoupeError(f"Grad-CAM of {type(backbone).__name__}: its classifier's weights are all 0, as timm begins "
                         "some models, so no class depends on anything yet: train it first")
    if not cam.any():
        raise LoupeError(f"site {place.name!r} of {type(backbone).__name__}: no gradient reaches its features, because "
                         "the classifier does not read them: choose an earlier site")
    return without_padding(F.relu(cam), backbone, place, size)


def _integrated_gradients(model, x, target, steps: int = 50) -> torch.Tensor:
    """Sundararajan et al. 2017, from the mean colour to the image, summed over the colours; signed."""
    method = IntegratedGradients(model)
    parts = [method.attribute(x[i : i + BATCH], 0, target[i : i + BATCH], n_steps=steps, internal_batch_size=BATCH)
             for i in range(0, len(x), BATCH)]  # captum takes no batch smaller than the number of images
    return torch.cat(parts).sum(1)


def _occlusion(model, x, target, window: int | None = None, stride: int | None = None) -> torch.Tensor:
    """Zeiler and Fergus 2014: how far the logit falls under a square of the mean colour; at each pixel the mean over
    the squares that cover it."""
    side = min(x.shape[-2:])
    window = max(side // 7, 1) if window is None else window
    stride, colours = max(window // 2, 1) if stride is None else stride, x.shape[1]
    for name, value, most, what in (("window", window, side, "the image's shorter side"),
                                    ("stride", stride, window, "the window, so that no pixel is left out")):
        if not 1 <= value <= most:
            raise LoupeError(f"occlusion: found {name}={value}, expected 1 to {most} px, {what}")
    with torch.no_grad():
        falls = Occlusion(model).attribute(x, (colours, window, window), (colours, stride, stride), 0, target,
                                           perturbations_per_eval=max(BATCH // len(x), 1))
    return falls[:, 0]  # the same in every colour


def _rollout(model, x, target) -> torch.Tensor:
    """Abnar and Zuidema 2020: what fraction of the tokens that the classifier reads comes from each patch.

    A block is 0.5 A + 0.5 I, with A the mean of its heads' attention and I for the residual connection. Only one row of
    the product of all blocks is needed, so it is computed from the last block on: for a plain ViT the row of its class
    token (the mean of the patches' rows where it averages), for a Swin the mean of all rows.

    The paper has neither windows nor merging. For Swin, A is 0 outside of a (shifted) window, and patch merging is the
    mean of each 2 x 2 tokens. Padding is not part of the image: its columns are dropped and the rows sum to 1 again.
    A gate multiplies features, not attention; it shows here only through the attention of later blocks.
    """
    backbone = _backbone(model)
    if isinstance(backbone, SWIN):
        weights, shapes = _attention(model, [b for stage in backbone.layers for b in stage.blocks], x)
        h, w = shapes[backbone.layers[-1].blocks[-1]][1:3]
        share = x.new_full((len(x), h, w), 1 / (h * w))
        for stage in reversed(backbone.layers):
            for block in reversed(stage.blocks):
                share = 0.5 * share + 0.5 * _through_windows(share, weights[block], block)
            if stage.downsample in shapes:
                share = _through_merging(share, shapes[stage.downsample])
        return share
    blocks = list(getattr(backbone, "blocks", []))
    plain = isinstance(backbone, VisionTransformer) and all(hasattr(block, "attn") for block in blocks)
    if not plain or backbone.global_pool not in ("token", "avg"):
        raise LoupeError(f"rollout reads the attention of a Swin, or of a ViT that classifies by its class token or a "
                         f"mean; {type(backbone).__name__} is neither: choose another method")
    weights, shapes = _attention(model, blocks, x)
    tokens, prefix = shapes[blocks[-1]][1], backbone.num_prefix_tokens
    read = slice(0, 1) if backbone.global_pool == "token" else slice(prefix, None)
    share = x.new_zeros(len(x), tokens)
    share[:, read] = 1 / len(range(tokens)[read])
    for block in reversed(blocks):
        share = 0.5 * share + 0.5 * torch.einsum("bi,bij->bj", share, weights[block])
    return share[:, prefix:].unflatten(1, token_grid(tokens - prefix, tuple(x.shape[-2:])))


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "mask": _mask, "grad_cam": _grad_cam, "integrated_gradients": _integrated_gradients, "rollout": _rollout,
    "occlusion": _occlusion,
}


def _through_windows(share: torch.Tensor, A: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """Shares of a block's tokens `(B, H, W)` times its attention `(B * windows, N, N)`, in timm's order of windows."""
    B, H, W = share.shape
    window, (sh, sw) = tuple(block.window_size), block.shift_size

    def cut(t):  # (B, H, W) -> (B * windows, 1, N)
        return window_partition(F.pad(t, (0, -W % window[1], 0, -H % window[0]))[..., None], window).flatten(1)[:, None]

    A = A * cut(torch.ones_like(share))
    rows = cut(share.roll((-sh, -sw), (1, 2))) @ (A / A.sum(-1, keepdim=True))
    padded = H + -H % window[0], W + -W % window[1]
    return window_reverse(rows.view(-1, *window, 1), window, *padded)[:, :H, :W, 0].roll((sh, sw), (1, 2))


def _through_merging(share: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Shares of merged tokens `(B, h, w)` -> of the tokens before, whose shape is `(B, H, W, C)`: `(B, H, W)`. Each
    share is divided equally among its 2 x 2 tokens."""
    rows, columns = (torch.arange(side, device=share.device) // 2 for side in shape[1:3])
    members = rows.bincount()[:, None] * columns.bincount()  # 4, or fewer at an odd border
    return (share / members)[:, rows][:, :, columns]


def _attention(model, blocks, x) -> tuple[dict, dict]:
    """Each block's attention, mean over heads, `(B or B * windows, N, N)`, and the shapes of the inputs of blocks and
    mergings."""
    weights, shapes = {}, {}
    handles = [block.attn.attn_drop.register_forward_hook(
        lambda module, inputs, output, block=block: weights.update({block: output.mean(1)})) for block in blocks]
    stages = getattr(_backbone(model), "layers", [])
    for module in (*blocks, *(s.downsample for s in stages if not isinstance(s.downsample, nn.Identity))):
        handles.append(module.register_forward_pre_hook(lambda m, inputs: shapes.update({m: inputs[0].shape})))
    fused = {block.attn: block.attn.fused_attn for block in blocks if hasattr(block.attn, "fused_attn")}
    try:
        for attention in fused:
            attention.fused_attn = False  # the fused kernel never shows its weights
        with torch.no_grad():
            model(x)
    finally:
        for attention, flag in fused.items():
            attention.fused_attn = flag
        for handle in handles:
            handle.remove()
    return weights, shapes


def _last_features(backbone: nn.Module, x: torch.Tensor) -> tuple[Site, Layout]:
    """Grad-CAM's site by default: the backbone's last `norm` where it keeps the grid, else the end of the last stage.

    Where the classifier reads a class token, the last `norm` has no gradient for the patches: then it is the first norm
    of the last block.
    """
    if not is_timms(backbone):
        raise LoupeError(f"grad_cam: found no site for {type(backbone).__name__}, which is no classifier from timm; "
                         "expected site= the dotted name of one of its layers")
    site = [site for name, site in find_sites(backbone).items() if not name.endswith(".inside")][-1]
    by_token = getattr(backbone, "global_pool", "") == "token" and hasattr(backbone, "blocks")
    module = f"blocks.{len(backbone.blocks) - 1}.norm1" if by_token else "norm"
    output = module_outputs(backbone, x[:1], [module]).get(module)
    layout = None if output is None else find_layout(backbone, output, site, tuple(x.shape[-2:]))
    return (replace(site, module=module), layout) if layout else locate(backbone, [site.name], tuple(x.shape[-2:]))[0]


def _backbone(model: nn.Module) -> nn.Module:
    return getattr(model, "backbone", model)


def _classes(model: nn.Module, x: torch.Tensor, target) -> torch.Tensor:
    """The classes to explain, `(B,)`."""
    if target is None:
        with torch.no_grad():
            return model(x).argmax(1)
    names, last = getattr(model, "class_names", None) or [], model.num_classes - 1
    given = list(target) if isinstance(target, (list, tuple)) else [target]
    if unknown := [name for name in given if isinstance(name, str) and name not in names]:
        known = f"one of {', '.join(names[:3])}, ..." if names else f"a number from 0 to {last}: the model has no names"
        raise LoupeError(f"target: found {unknown[0]!r}, expected {known}")
    if any(isinstance(name, str) for name in given):
        target = [names.index(name) if isinstance(name, str) else name for name in given]
        target = target[0] if len(target) == 1 else target
    classes = torch.as_tensor(target, device=x.device)
    classes = classes.expand(len(x)) if classes.ndim == 0 else classes
    if classes.shape != (len(x),) or classes.is_floating_point() or not 0 <= classes.min() <= classes.max() <= last:
        raise LoupeError(f"target: found {target}, expected a class from 0 to {last}, or {len(x)} of them")
    return classes
