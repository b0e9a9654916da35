"""What a training begins with where nobody chose: the backbone, the recipe, the gate's form. Each is said in a line."""

import json
from importlib.util import find_spec
from pathlib import Path

from loupe_core.weights.lite0 import PACKAGE

ENOUGH = 4000  # training images: from here on the paper's recipe, whose rate moves little in fewer steps
DRAWN = "swin_micro"  # pretrained on the package's own drawings, and on nothing else
IDENTITY = ("finetune", "probe")  # recipes that keep the pretrained features at the start


def is_drawn(folder: str | Path) -> bool:
    """Whether a folder holds field-guide birds, as `loupe fieldguide` draws them."""
    try:
        text = (Path(folder) / "attributes.json").read_text(encoding="utf-8")
        return json.loads(text)["generator"] == "loupe_core.fieldguide"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def default_backbone(drawn: bool) -> str:
    """`swin_micro` for drawn birds; for photographs EfficientNet-Lite0, which a laptop's processor can train: from PyPI
    where that package is installed, else from the hub."""
    if drawn:
        return DRAWN
    return "tf_efficientnet_lite0.in1k" if find_spec(PACKAGE) is None else "efficientnet_lite0_pypi"


def default_recipe(images: int, backbone: str, pretrained: bool) -> tuple[str, str]:
    """The name of a recipe for so many training images, and the reason in words."""
    if images >= ENOUGH:
        return "paper", f"{images} training images, {ENOUGH} or more"
    if backbone.split(".")[0] == DRAWN or not pretrained:
        return "small", f"{images} training images, and " + (
            f"{DRAWN} knows drawings only" if pretrained else "nothing pretrained")
    return "finetune", f"{images} training images, fewer than {ENOUGH}, and a pretrained backbone"


def default_form(recipe: str) -> str:
    """The gate's form: the one that starts as the identity where the recipe begins from the pretrained features."""
    return "residual" if recipe in IDENTITY else "multiply"
