"""A second look without torch: one ONNX file for both looks, which says how the second is taken."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from loupe_core.errors import LoupeError
from loupe_core.files.export import export_onnx
from loupe_core.look.boxes import Rule
from loupe_core.look.magnifier import closer_size
from loupe_core.look.sources import mask_of
from loupe_core.model import LoupeModel
from loupe_core.sites import eval_mode, gate_of

SOURCES = ("mask", "centre")  # the others need features or gradients, which the graph does not give


def export_looks(model: LoupeModel, path: str | Path, rule: Rule | None = None) -> list[Path]:
    """Writes `model` as an ONNX file, see `export_onnx`, with the rule of a second look among its metadata.

    `magnify` in the metadata is the `Rule` as JSON: `Rule(**json.loads(...))`, then `boxes_of` on the output "mask" (or
    "mask_stage2" of that site, where there are several; or on `hill()` for the source "centre"), and `shown`. The same
    graph takes the second look. Where `Rule.pixels` is another size than the model's, a second file takes it, with
    "-closer" after its name; `closer` in the metadata of the first says its name.

    Args:
        rule: None writes the plain file.

    Returns:
        The file, and the second where there is one.

    Raises:
        LoupeError: The source is none that the graph holds, or is a mask that reaches beyond the image; or as in
            `export_onnx`.
    """
    path = Path(path)
    if rule is None:
        export_onnx(model, path)
        return [path]
    if rule.source not in SOURCES:
        raise LoupeError(f"export: a second look by {rule.source} needs more than the exported graph gives; expected "
                         f"--magnify {' or '.join(SOURCES)}")
    if rule.source == "mask":
        gate_of(model, rule.site)
        _check_cells(model, rule.site)
    facts, files, size = dict(magnify=json.dumps(asdict(rule))), [path], closer_size(model, rule)
    if size != model.img_size:
        files.append(path.with_name(f"{path.stem}-closer{path.suffix}"))
        facts["closer"] = files[1].name
        export_onnx(model, files[1], size=size)
    export_onnx(model, path, facts=facts)
    return files


def _check_cells(model: LoupeModel, site: str | None) -> None:
    """Raises LoupeError where the mask that the graph gives is not one over the input and nothing else."""
    like = next(model.parameters())
    with eval_mode(model), torch.no_grad():
        given = model(like.new_zeros(1, model.in_chans, *model.img_size), return_mask=True)[1]
    gate = gate_of(model, site)
    cells = (given if model.one_mask else given[list(model.gates.values()).index(gate)]).shape[-2:]
    if mask_of(model, given, model.img_size, site).shape[-2:] != cells:
        raise LoupeError(f"export: the mask at {gate.site.name} reaches beyond an image of {model.img_size[0]} x "
                         f"{model.img_size[1]} px, so boxes cannot be found on it as it is; expected a gate at an "
                         "earlier site, or --magnify centre")
