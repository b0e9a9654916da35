"""A small Swin Transformer, registered with timm as `swin_micro`, whose weights travel inside this package.

It is Swin-Tiny's plan at a size that two CPU cores can train: 112 px, patches of 4 px, windows of 7 x 7 tokens.
Its stages have 28 x 28, 14 x 14, 7 x 7 and 4 x 4 tokens, so the mask after stage 2 has 14 x 14 cells.
`pretrained=True` loads weights that `scripts/record/pretrain.py` made from drawn birds of species that the field guide
does not have. timm's tag says what their labels were: `swin_micro.attributes`, which `swin_micro` means, or
`swin_micro.species`.
"""

from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer

# labels of the pretraining -> its weights
WEIGHTS = {"attributes": Path(__file__).with_name("swin_micro.safetensors"),
           "species": Path(__file__).with_name("swin_micro_species.safetensors")}

# The first is the default: what has been recorded with `swin_micro` was recorded with it.
default_cfgs = generate_default_cfgs({
    f"swin_micro.{labels}": dict(
        # timm takes a cfg without any source for "has no weights"; a missing file should say so, not train from noise.
        file=str(file),
        num_classes=0,  # the file holds no head: each task grows its own
        input_size=(3, 112, 112),
        fixed_input_size=True,
        pool_size=(4, 4),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv="patch_embed.proj",
        classifier="head.fc",
        license="mit",
    ) for labels, file in WEIGHTS.items()})


@register_model
def swin_micro(pretrained: bool = False, **kwargs: object) -> SwinTransformer:
    """Swin (Liu et al. 2021) with 1.5 M parameters: x `(B, 3, 112, 112)` -> logits `(B, num_classes)`."""
    args = dict(img_size=112, patch_size=4, window_size=7, embed_dim=32, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
    return build_model_with_cfg(
        SwinTransformer, "swin_micro", pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
        **dict(args, **kwargs),
    )
