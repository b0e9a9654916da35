"""Where a gate can stand in a timm backbone, and how the features lie there.

All of it comes from what timm's models say of themselves (`feature_info`, `output_fmt`, `num_prefix_tokens`) and from
one forward pass that looks at what the named modules really return. No list of model names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loupe_core.errors import LoupeError, one_line


@dataclass(frozen=True)
class Site:
    """A place in a backbone: after `module` (its dotted name), whose features have `channels` and `stride` pixels."""

    name: str
    module: str
    channels: int
    stride: int
    index: int  # of the entry in feature_info


@dataclass(frozen=True)
class Layout:
    """How a module returns its features: the item of its output (None: the output itself) and the order of axes.

    `prefix`: tokens before the grid's (class token, registers), only for NLC.
    """

    item: int | None
    fmt: str  # "NCHW", "NHWC" or "NLC"
    prefix: int = 0


def find_sites(backbone: nn.Module) -> dict[str, Site]:
    """Every site of a timm backbone by name.

    "stageK" is after the last module of the K-th feature stride, counted from stride 4; for the usual strides 4, 8,
    16, 32 these are the four stages. A backbone of one stride, such as a ViT, counts quarters of its blocks.
    "stageK.inside" is after the `downsample` that opens a stage, before the stage's blocks.

    Raises:
        LoupeError: The backbone has no `feature_info`.
    """
    info = getattr(backbone, "feature_info", None)
    if not isinstance(info, list) or not info:
        raise LoupeError(
            f"backbone {type(backbone).__name__} has no feature_info to find its stages by; expected an image "
            "classifier from timm: build it with timm.create_model, without features_only"
        )
    entries = [(i, e) for i, e in enumerate(info) if e["reduction"] >= 4]  # strides 1 and 2 are the stem
    by_stride = {e["reduction"]: (i, e) for i, e in entries}  # the last entry of each stride stays
    stages = list(by_stride.values())
    if len(stages) == 1:
        stages = [entries[math.ceil(len(entries) * k / 4) - 1] for k in (1, 2, 3, 4)]
    modules, sites = dict(backbone.named_modules()), {}
    for k, (i, e) in enumerate(stages, start=1):
        site = Site(f"stage{k}", e["module"], e["num_chs"], e["reduction"], i)
        sites[site.name] = site
        if f"{site.module}.downsample" in modules:
            inside = replace(site, name=f"{site.name}.inside", module=f"{site.module}.downsample")
            sites[inside.name] = inside
    return sites


def locate(backbone: nn.Module, names: Iterable[str], input_size: tuple[int, int]) -> list[tuple[Site, Layout]]:
    """The sites of these names, each with the layout of its features, seen in one forward pass on one image.

    The pass runs in eval mode without gradients and draws no random numbers; it leaves the backbone as it was.

    Args:
        input_size: (H, W) of the image, pixels.

    Raises:
        LoupeError: A site is unknown; the backbone does not run on such an image; or a site's module is missing, is
            never called, or returns features of another shape than `feature_info` promises.
    """
    names, sites, kind = list(names), find_sites(backbone), type(backbone).__name__
    for name in names:
        if name not in sites:
            raise LoupeError(f"site {name!r} is unknown to {kind}; expected one of {', '.join(sites)}")
    x = pattern(backbone, input_size)
    outputs = module_outputs(backbone, x, {sites[name].module for name in names})
    found = []
    for name in names:
        site = sites[name]
        if site.module not in outputs:
            found.append(_find_by_value(backbone, x, site))
            continue
        output = outputs[site.module]
        layout = find_layout(backbone, output, site, input_size)
        if layout is None:
            raise LoupeError(
                f"site {name!r} of {kind}: module '{site.module}' returned {_shapes(output)}; "
                f"expected features of {site.channels} channels as (B, C, H, W), (B, H, W, C) or (B, tokens, C): "
                "choose another site"
            )
        maps = to_maps(output, layout, input_size)
        if layout.fmt == "NLC" and not name.endswith(".inside"):
            _check_reading_order(backbone, x, site, maps)
        found.append((replace(site, channels=maps.shape[1]), layout))
    return found


def check_read(backbone: nn.Module, places: Sequence[tuple[Site, Layout]], input_size: tuple[int, int]) -> None:
    """Refuses a site whose features do not reach the logits: a gate there would learn from its penalty alone.

    One pass forward and back for all sites, on one image, in eval mode; the backbone and its gradients stay as they
    were. Where no gradient can be had (meta device, inference mode, half precision), nothing is refused.

    Args:
        places: as `locate` gives them.
        input_size: (H, W) of the image, pixels.

    Raises:
        LoupeError: Nothing reads these features.
    """
    x = pattern(backbone, input_size)
    if not places or x.is_meta or torch.is_inference_mode_enabled():
        return
    if x.dtype == torch.float16:  # a gradient that is only small may round to zero
        return
    features, read = [], []

    def keep(site, layout):
        def hook(module, inputs, output):
            maps = to_maps(output, layout, input_size)
            features.append((site, maps if maps.requires_grad else maps.detach().requires_grad_()))
            return put_back(features[-1][1].clone(), output, layout)  # the next layer may work in place

        return hook

    handles = [attach(backbone, site, keep(site, layout)) for site, layout in places]
    # The classifiers' inputs, not the logits: timm starts some classifiers at zero, which stops every gradient.
    for classifier in classifiers(backbone):
        handles.append(classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0])))
    try:
        with eval_mode(backbone), torch.enable_grad():
            logits = backbone(x)
            # unequal weights: the plain sum of what a LayerNorm gives does not depend on its input
            read = read or [getattr(logits, "logits", logits)]
            total = sum((inputs * _steps(inputs)).sum() for inputs in read)
    finally:
        for handle in handles:
            handle.remove()
    maps = [maps for _, maps in features]
    gradients = torch.autograd.grad(total, maps, allow_unused=True) if total.requires_grad else [None] * len(maps)
    reached = {site for (site, _), gradient in zip(features, gradients) if gradient is not None and gradient.any()}
    for site, _ in features:
        if site not in reached:
            raise LoupeError(
                f"site {site.name!r} of {type(backbone).__name__}: the logits do not depend on the features after "
                f"module '{site.module}' (after its last block, a ViT may read its class token alone), so a mask there "
                "would explain nothing: choose an earlier site, or another backbone"
            )


def attach(backbone: nn.Module, site: Site, hook: Callable) -> RemovableHandle:
    """Registers a forward hook on the features of a site.

    Where the site's module is a plain chain of blocks, the hook goes to its last block, whose output is the same:
    timm's gradient checkpointing calls the blocks one by one and never the chain.
    """
    module = backbone.get_submodule(site.module)
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module.register_forward_hook(hook)


@torch.no_grad()
def module_outputs(backbone: nn.Module, x: torch.Tensor, names: Iterable[str]) -> dict[str, object]:
    """What the modules of these names return in `backbone(x)`, in the order in which they finish."""
    outputs, modules = {}, dict(backbone.named_modules())

    def keep(name):
        def hook(module, inputs, output):
            outputs.pop(name, None)  # a module called twice counts where it was called last
            outputs[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    try:
        with eval_mode(backbone):
            backbone(x)
    except Exception as error:  # each backbone has its own way to say that an image has the wrong size
        H, W = x.shape[-2:]
        raise LoupeError(f"{type(backbone).__name__} does not run on an image of {H} x {W} pixels ({one_line(error)}); "
                         "set img_size to a size that it was built for") from error
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def find_layout(backbone: nn.Module, output: object, site: Site, input_size: tuple[int, int]) -> Layout | None:
    """Where a module's output holds the site's features, and in which order of axes; None where it does not."""
    items = list(enumerate(output)) if isinstance(output, (tuple, list)) else [(None, output)]
    formats = {"NHWC": 3, "NCHW": 1}  # the channels' axis
    if getattr(backbone, "output_fmt", "NCHW") == "NCHW":
        formats = {"NCHW": 1, "NHWC": 3}
    for item, x in items:
        if not isinstance(x, torch.Tensor):
            continue
        if x.ndim == 4:
            for fmt, axis in formats.items():
                if x.shape[axis] == site.channels:
                    return Layout(item, fmt)
        if x.ndim == 3 and x.shape[2] == site.channels:
            # The class token may join late (then 0 here), or be there without being stated (then 1).
            for prefix in (getattr(backbone, "num_prefix_tokens", 0), 0, 1):
                if token_grid(x.shape[1] - prefix, input_size):
                    return Layout(item, "NLC", prefix)
    grid = tuple(-(-pixels // site.stride) for pixels in input_size)
    for item, x in items:  # several resolutions at once (HRNet's branches): the one of the site's stride
        if item is not None and isinstance(x, torch.Tensor) and x.ndim == 4 and tuple(x.shape[2:]) == grid:
            return Layout(item, "NCHW")
    return None


def token_grid(tokens: int, input_size: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) with h * w = tokens and the image's aspect ratio; None where there is no such grid."""
    H, W = input_size
    h, w = round(math.sqrt(tokens * H / W)), round(math.sqrt(tokens * W / H))
    return (h, w) if h * w == tokens > 0 else None


def to_maps(output: object, layout: Layout, input_size: tuple[int, int]) -> torch.Tensor:
    """The features in a module's output -> `(B, C, H, W)`, a view. `input_size`: (H, W) of the image."""
    x = output if layout.item is None else output[layout.item]
    if layout.fmt == "NCHW":
        return x
    if layout.fmt == "NHWC":
        return x.permute(0, 3, 1, 2)
    grid = token_grid(x.shape[1] - layout.prefix, input_size)
    if grid is None:
        raise LoupeError(
            f"an image of {input_size[0]} x {input_size[1]} pixels gave {x.shape[1]} tokens, {layout.prefix} of them "
            "before the grid; expected the rest to fill a grid of the image's aspect ratio: use another img_size"
        )
    return x[:, layout.prefix :].transpose(1, 2).unflatten(2, grid)


def put_back(maps: torch.Tensor, output: object, layout: Layout) -> object:
    """The way back: a module's output with `maps` `(B, C, H, W)` in place of its features, in the layout they had."""
    if layout.fmt == "NCHW":
        features = maps
    elif layout.fmt == "NHWC":
        features = maps.permute(0, 2, 3, 1)
    else:
        x, features = output if layout.item is None else output[layout.item], maps.flatten(2).transpose(1, 2)
        features = torch.cat([x[:, : layout.prefix], features], dim=1) if layout.prefix else features
    if layout.item is None:
        return features
    return type(output)([*output[: layout.item], features, *output[layout.item + 1 :]])


def classifiers(backbone: nn.Module) -> list[nn.Module]:
    """The classifiers of a timm backbone: one, or one for each class token of a distilled or two-scale model.

    Of a backbone that is not timm's, its last linear layer, where it has one.
    """
    if not hasattr(backbone, "get_classifier"):
        return [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1:]
    found = backbone.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


def gate_of(model: nn.Module, site: str | None = None) -> nn.Module:
    """The gate of a `LoupeModel` at a site; None means the only one.

    Raises:
        LoupeError: the model has no gate, none at this site, or several and no `site`.
    """
    gates = {gate.site.name: gate for gate in getattr(model, "gates", {}).values()}
    name = next(iter(gates)) if site is None and len(gates) == 1 else site
    if name not in gates:
        expected = f"site= one of {', '.join(gates)}" if gates else "a LoupeModel with a site"
        raise LoupeError(f"found no gate for site={site!r} in this {type(model).__name__}; expected {expected}")
    return gates[name]


def check_images(images: object) -> None:
    """Raises LoupeError for anything but a tensor `(B, C, H, W)` of one image or more."""
    if not torch.is_tensor(images) or images.ndim != 4 or len(images) == 0:
        found = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
        raise LoupeError(f"images: found {found}, expected a tensor (B, C, H, W) of one image or more")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module has its own mode again (a frozen BatchNorm stays in eval mode)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_channels(backbone: nn.Module) -> int:
    """The channels of a backbone's images: what it says as `in_chans`, else those of its first convolution, else 3."""
    first = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return getattr(backbone, "in_chans", first)


def pattern(backbone: nn.Module, input_size: tuple[int, int]) -> torch.Tensor:
    """One image `(1, C, H, W)` whose patches all differ, on the backbone's device."""
    return _steps(next(backbone.parameters()), (1, input_channels(backbone), *input_size))


def _steps(like: torch.Tensor, shape: Iterable[int] | None = None) -> torch.Tensor:
    """Numbers in [-1, 1] that all differ, of the type and on the device of `like`; of its shape if none is given."""
    shape = tuple(like.shape if shape is None else shape)
    steps = torch.arange(math.prod(shape), device=like.device, dtype=torch.float32)
    return torch.sin(steps).view(shape).to(like.dtype)


def _shapes(output: object) -> str:
    items = output if isinstance(output, (tuple, list)) else [output]
    return ", ".join(str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__ for x in items)


@torch.no_grad()
def _reference(backbone: nn.Module, x: torch.Tensor, site: Site) -> torch.Tensor | None:
    """The site's features `(1, C, h, w)` as timm's own forward_intermediates gives them, where a model has it."""
    if not hasattr(backbone, "forward_intermediates"):
        return None
    with eval_mode(backbone):
        return backbone.forward_intermediates(x, indices=[site.index], intermediates_only=True)[0]


def _find_by_value(backbone: nn.Module, x: torch.Tensor, site: Site) -> tuple[Site, Layout]:
    """For a `feature_info` that names no module that is called: the first module that returns these very features."""
    reference, input_size = _reference(backbone, x, site), tuple(x.shape[-2:])
    outputs = {} if reference is None else module_outputs(backbone, x, [n for n, _ in backbone.named_modules() if n])
    for name, output in outputs.items():
        layout = find_layout(backbone, output, site, input_size)
        if layout:
            # exactly equal: a block whose branch starts near zero returns almost its input
            if torch.equal(to_maps(output, layout, input_size), reference):
                return replace(site, module=name), layout
    raise LoupeError(
        f"site {site.name!r} of {type(backbone).__name__}: feature_info names module '{site.module}', which is missing "
        "or never called, and no other module returns its features: choose another site or backbone"
    )


def _check_reading_order(backbone: nn.Module, x: torch.Tensor, site: Site, maps: torch.Tensor) -> None:
    """Refuses tokens that do not lie row by row (Hiera's, say): their mask would be a scrambled picture."""
    reference = None if x.is_meta else _reference(backbone, x, site)
    if reference is None or reference.shape != maps.shape:
        return
    here, there = maps[0].flatten(1).norm(dim=0), reference[0].flatten(1).norm(dim=0)  # one number per token
    if not torch.allclose(here, there, rtol=1e-3) and torch.allclose(here.sort()[0], there.sort()[0], rtol=1e-3):
        raise LoupeError(
            f"site {site.name!r} of {type(backbone).__name__}: its tokens do not lie row by row, so a mask over them "
            "would be no picture: choose another backbone"
        )
