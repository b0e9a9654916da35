"""The Loupe: a plug-and-play spatial attention gate, with the tools to train it and to look through it.

Importing the package registers the backbone `swin_micro` with timm.
"""

from loupe_core.datasets import CUB200, PhotoFolder, open_set
from loupe_core.errors import LoupeError
from loupe_core.files.download import download_cub
from loupe_core.files.export import export_onnx
from loupe_core.files.images import open_image
from loupe_core.gate import Loupe
from loupe_core.geometry import EvalTransform, Geometry, TrainTransform, transforms_for
from loupe_core.heatmap import mask_to_original, overlay, peak
from loupe_core.look.words import alt_text
from loupe_core.loss import LossTerms, LoupeLoss
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.samples import Sample, collate
from loupe_core.trainer import Trainer
from loupe_core.weights import swin_micro  # noqa: F401  (registers itself)

__all__ = [
    "CUB200", "EvalTransform", "Geometry", "LossTerms", "Loupe", "LoupeError", "LoupeLoss", "LoupeModel", "PhotoFolder",
    "Recipe", "Sample", "TrainTransform", "Trainer", "alt_text", "collate", "download_cub", "export_onnx",
    "mask_to_original", "open_image", "open_set", "overlay", "peak", "transforms_for",
]
__version__ = "0.1.0"
