"""The Loupe: a plug-and-play spatial attention gate, with the tools to train it and to look through it.

Names are loaded when they are first used, so that ``import loupe_core`` costs next to nothing until then.
"""

import importlib

_PUBLIC = {
    "LoupeError": "errors",
    "Loupe": "gate",
    "LoupeModel": "model",
    "export_onnx": "export",
    "LoupeLoss": "loss",
    "LossTerms": "loss",
    "Geometry": "geometry",
    "EvalTransform": "geometry",
    "TrainTransform": "geometry",
    "transforms_for": "geometry",
    "FieldGuide": "fieldguide",
    "CUB200": "datasets",
    "PhotoFolder": "datasets",
    "Sample": "datasets",
    "collate": "datasets",
    "open_image": "images",
    "open_set": "datasets",
    "Recipe": "trainer",
    "Trainer": "trainer",
    "mask_to_original": "heatmap",
    "overlay": "heatmap",
}

__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'loupe_core' has no attribute '{name}'")
    return getattr(importlib.import_module(f"loupe_core.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
