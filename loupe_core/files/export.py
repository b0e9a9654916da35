"""A trained model as one ONNX file, with logits and masks as outputs."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from loupe_core.errors import LoupeError, one_line
from loupe_core.files.atomic import remove
from loupe_core.model import LoupeModel
from loupe_core.sites import eval_mode


class _WithMask(nn.Module):
    """The model as a function of the image alone."""

    def __init__(self, model: LoupeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor):
        return self.model(image, return_mask=True)


def export_onnx(model: LoupeModel, path: str | Path, dynamic_batch: bool = True, size: tuple[int, int] | None = None,
                facts: dict[str, str] | None = None) -> list[str]:
    """Writes `model`, in eval mode, as an ONNX file; needs the packages onnx and onnxscript.

    Input: "image" `(B, C, H, W)`, float32, normalised with the model's `mean` and `std`, of size `model.img_size`.
    Outputs: "logits" `(B, K)`, and "mask" `(B, 1, h, w)`; with a list of sites "mask_stage2", ... one for each.
    Its metadata say how to make such an image and read the answer, see `metadata_of`.

    Args:
        dynamic_batch: Let B vary; False fixes it to 1.
        size: (H, W) of the images, where it is not `model.img_size`.
        facts: More metadata.

    Returns:
        The names of the outputs.

    Raises:
        LoupeError: onnx or onnxscript is missing; the backbone has something that the exporter cannot express; or the
            file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise LoupeError(f"no folder {path.parent} to write {path.name} into; make it first")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise LoupeError(f"export: the package {missing[0]} is not installed; install it: pip install {missing[0]}")
    names = ["logits", *(["mask"] if model.one_mask else [f"mask_{key}" for key in model.gates])]
    like = next(model.parameters())
    scratch = path.with_name(f"unfinished-{path.name}")
    # Two images, because torch.export takes a batch of one for a constant.
    size = tuple(size or model.img_size)
    shape = (2 if dynamic_batch else 1, model.in_chans, *size)
    images = torch.zeros(shape, dtype=like.dtype, device=like.device)
    try:
        with eval_mode(model):
            program = torch.onnx.export(
                _WithMask(model).eval(), (images,), input_names=["image"], output_names=names,
                dynamic_shapes={"image": {0: torch.export.Dim("batch")}} if dynamic_batch else None,
                dynamo=True, verbose=False)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # the exporter notes here where in this machine's files each node comes from
        known = dict(input_size=json.dumps((model.in_chans, *size)))
        program.model.metadata_props.update(metadata_of(model) | known | (facts or {}))
        remove(scratch)  # of a process that was killed
        scratch.mkdir()
        program.save(str(scratch / path.name))
        # above 2 GB the weights are a file of their own; the model comes last
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    except Exception as error:  # the exporter's stages each raise their own kinds
        raise LoupeError(f"{model.backbone_name} cannot be exported to {path}: {one_line(error)}") from error
    finally:
        with suppress(OSError):
            remove(scratch)
    return names


def metadata_of(model: LoupeModel) -> dict[str, str]:
    """What an exported file says of itself: `backbone`, `form` and `interpolation` as they are; as JSON `class_names`
    (null where the model has none), `input_size` (C, H, W), `mean`, `std`, `crop_pct` and `sites`."""
    facts = model.data_config | dict(class_names=model.class_names, form=model.form, sites=model.sites,
                                     backbone=model.backbone_name)
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in facts.items()}
