"""ONNX Runtime computes what torch computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from build_lab import store_halves
from PIL import Image
from torch.onnx._internal.exporter import _onnx_program

from loupe_core.errors import LoupeError
from loupe_core.files.export import export_onnx
from loupe_core.geometry import Geometry
from loupe_core.look.boxes import Rule, boxes_of, hill, shown
from loupe_core.look.export import export_looks
from loupe_core.look.magnifier import Magnifier
from loupe_core.model import LoupeModel


def swin():
    return timm.create_model("swin_micro", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=5)


def build(backbone, **kwargs) -> LoupeModel:
    torch.manual_seed(0)
    backbone = backbone() if callable(backbone) else backbone
    model = LoupeModel(backbone, num_classes=5, pretrained=False, **kwargs)
    for p in model.gates.parameters():
        torch.nn.init.normal_(p, std=0.5)  # a mask that varies
    return model.eval()


@pytest.mark.parametrize(
    "backbone, options, outputs",
    [
        (swin, {}, ["logits", "mask"]),
        (swin, dict(site=["stage1", "stage3.inside"], form="mix"), ["logits", "mask_stage1", "mask_stage3_inside"]),
        ("test_vit", dict(form="residual"), ["logits", "mask"]),
        ("test_convnext", {}, ["logits", "mask"]),
        ("test_convnext", dict(site=()), ["logits"]),
    ],
)
def test_onnx_runtime_gives_torchs_logits_and_masks_for_any_batch(tmp_path, backbone, options, outputs):
    model = build(backbone, **options)
    assert export_onnx(model, tmp_path / "model.onnx") == outputs
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # weights are inside
    content = (tmp_path / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b"export.py" not in content  # nor where on this machine its code lies
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [o.name for o in session.get_outputs()] == outputs
    assert [i.name for i in session.get_inputs()] == ["image"]
    for B in (1, 3):
        x = torch.randn(B, 3, *model.img_size)
        with torch.no_grad():
            logits, masks = model(x, return_mask=True)
        expected = [logits, *([masks] if isinstance(masks, torch.Tensor) else masks)]
        found = session.run(None, {"image": x.numpy()})
        for name, a, b in zip(outputs, found, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-4, err_msg=name)
            assert a.std() > 1e-3  # not a constant that would agree with anything


def test_a_model_in_training_is_exported_in_eval_mode_and_goes_on_training(tmp_path):
    model = build("test_resnet").train()
    export_onnx(model, tmp_path / "model.onnx", dynamic_batch=False)
    assert model.training
    x = torch.randn(1, 3, *model.img_size)
    with torch.no_grad():
        expected = model.eval()(x)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 160, 160]
    np.testing.assert_allclose(session.run(["logits"], {"image": x.numpy()})[0], expected.numpy(), rtol=0, atol=1e-4)


def test_the_file_says_how_to_make_its_image_and_read_its_answer(tmp_path):
    names, config = ["Dodo", "Ō'ō", "c", "d", "e"], dict(mean=(0.1, 0.2, 0.3), crop_pct=0.8, interpolation="bilinear")
    model = build("test_convnext", site=["stage1", "stage3"], form="mix", class_names=names, data_config=config)
    export_onnx(model, tmp_path / "model.onnx")
    told = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert (told["backbone"], told["form"], told["interpolation"]) == ("test_convnext", "mix", "bilinear")
    expected = dict(class_names=names, mean=[0.1, 0.2, 0.3], std=list(model.std), crop_pct=0.8,
                    input_size=[3, *model.img_size], sites=["stage1", "stage3"])
    assert {name: json.loads(told[name]) for name in expected} == expected


def looked_twice(file: Path, photograph: Image.Image, site: str = "") -> tuple[np.ndarray, list]:
    """Both looks as an exported file describes them, without torch: the logits together, and the parts shown."""
    def opened(path) -> tuple[onnxruntime.InferenceSession, dict]:
        session = onnxruntime.InferenceSession(path)
        told, words = session.get_modelmeta().custom_metadata_map, ("backbone", "form", "interpolation", "closer")
        return session, {name: told[name] if name in words else json.loads(told[name]) for name in told}

    def look(session, told, picture) -> tuple[dict, Geometry]:
        h, w = told["input_size"][1:]
        scale = int(min(h, w) / told["crop_pct"]) / min(picture.size)
        size = [int(scale * side) for side in picture.size]  # as timm scales a photograph
        left, top = (round((side - length) / 2) for side, length in zip(size, (w, h)))
        small = picture.resize(size, Image.BICUBIC).crop((left, top, left + w, top + h))
        x = (np.asarray(small, np.float32) / 255 - np.float32(told["mean"])) / np.float32(told["std"])
        found = session.run(None, {"image": x.transpose(2, 0, 1)[None]})
        scales = size[1] / picture.height, size[0] / picture.width
        names = (output.name for output in session.get_outputs())
        return dict(zip(names, found)), Geometry(picture.size[::-1], (h, w), scales, (top, left))

    session, told = opened(file)
    closer = opened(file.with_name(told["closer"])) if "closer" in told else (session, told)
    rule = Rule(**told["magnify"])
    first, geometry = look(session, told, photograph)
    map_ = first["mask" + site][0, 0] if rule.source == "mask" else hill()
    boxes = [shown(box, geometry, rule) for box in boxes_of(map_, geometry, rule)]
    parts = [photograph.crop((b.x, b.y, b.x + b.width, b.y + b.height)) for b in boxes]
    second = [look(*closer, part)[0]["logits"] for part in parts]
    return (1 - rule.weight) * first["logits"] + rule.weight * np.mean(second, 0), boxes


@pytest.mark.parametrize("backbone, rule, options", [
    ("test_convnext", Rule(), {}),
    ("test_convnext", Rule(source="centre", weight=0.3), dict(site=())),
    ("test_convnext", Rule(boxes=2, smallest=0.1, share=0.1, site="stage2"), dict(site=["stage1", "stage2"])),
    ("test_convnext", Rule(pixels=96), {}),
    (swin, Rule(margin=0), {}),
])
def test_both_looks_of_an_exported_file_give_the_magnifiers_logits(tmp_path, backbone, rule, options):
    model = build(backbone, **options)
    files = export_looks(model, tmp_path / "m.onnx", rule)
    assert [file.name for file in files] == ["m.onnx"] + ["m-closer.onnx"] * bool(rule.pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    rng = np.random.default_rng(0)
    for width, height in ((500, 300), (90, 140)):
        small = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8))
        photograph = small.resize((width, height), Image.BILINEAR)
        both, boxes = looked_twice(files[0], photograph, "_stage2" if rule.site else "")
        looks = Magnifier(model, rule).look([photograph])
        assert boxes == looks.boxes[0] and len(boxes) <= rule.boxes
        np.testing.assert_allclose(both, looks.logits.numpy(), rtol=0, atol=1e-4)
        assert (looks.logits - looks.first).abs().max() > 1e-3  # the second look says something of its own


def test_a_second_look_that_the_graph_does_not_give_is_refused(tmp_path):
    model, path = build("test_convnext"), tmp_path / "m.onnx"
    for source in ("norm", "box", "random"):
        with pytest.raises(LoupeError, match=f"a second look by {source} needs more .*--magnify mask or centre"):
            export_looks(model, path, Rule(source=source))
    with pytest.raises(LoupeError, match="found no gate"):
        export_looks(build("test_convnext", site=()), path, Rule())
    padded = LoupeModel("swin_micro", num_classes=3, pretrained=False, site="stage4")
    with pytest.raises(LoupeError, match="the mask at stage4 reaches beyond an image of 112 x 112 px"):
        export_looks(padded, path, Rule())
    assert list(tmp_path.iterdir()) == []


def test_a_plain_export_says_nothing_of_a_second_look(tmp_path):
    export_looks(build("test_convnext"), tmp_path / "m.onnx")
    told = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert not {"magnify", "closer"} & told.keys()


def test_a_path_that_cannot_be_written_is_named_in_one_line(tmp_path):
    with pytest.raises(LoupeError) as caught:
        export_onnx(build("test_convnext"), tmp_path / "no" / "such" / "folder.onnx")
    assert "folder.onnx" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_fit_halves_take_half_the_bytes_and_give_the_same_results(tmp_path):
    model = build("test_convnext")
    for p in model.parameters():
        p.data = p.data.half().float()
    full, half = tmp_path / "full.onnx", tmp_path / "half.onnx"
    export_onnx(model, full)
    store_halves(shutil.copy(full, half))
    x = torch.randn(2, 3, *model.img_size).numpy()
    for a, b in zip(*(onnxruntime.InferenceSession(path).run(None, {"image": x}) for path in (full, half))):
        np.testing.assert_array_equal(a, b)
    saved = full.stat().st_size - half.stat().st_size
    assert 0.8 < saved / (2 * sum(p.numel() for p in model.parameters())) <= 1


def test_a_weight_that_a_half_would_round_or_lose_stays_as_it_is(tmp_path):
    model = build("test_convnext")
    for p in model.parameters():
        p.data = p.data.half().float()
    weight = model.backbone.head.fc.weight
    weight.data[0, 0] = 1e5  # infinite as a half
    model.gates["stage2"].loupe.conv3x3.weight.data[0, 0, 0, 0] = 0.1  # rounded
    export_onnx(model, tmp_path / "model.onnx")
    store_halves(tmp_path / "model.onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    kept = [values for values in tensors.values() if values.dtype == np.float32]
    for parameter in (weight, model.gates["stage2"].loupe.conv3x3.weight):
        assert any(np.array_equal(np.sort(v, None), np.sort(parameter.detach().numpy(), None)) for v in kept)
    assert sum(values.dtype == np.float16 for values in tensors.values()) > 5


def test_an_onnx_file_is_whole_or_as_it_was_and_above_2_gb_its_weights_go_by_its_name(tmp_path, monkeypatch):
    def contents() -> dict:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    made, real = [], torch.onnx.export  # once for both writes
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: (made or made.append(real(*a, **k)) or made)[0])
    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    model = build("test_convnext")
    export_onnx(model, tmp_path / "m.onnx")
    before = contents()
    assert sorted(before) == ["m.onnx", "m.onnx.data"]
    x = torch.randn(1, 3, *model.img_size)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(["logits"], {"image": x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=0, atol=1e-4)

    def full(self, file):
        Path(file + ".data").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(made[0]), "save", full)
    with pytest.raises(LoupeError, match=r"cannot be exported to \S+m.onnx: .*No space left on device$"):
        export_onnx(model, tmp_path / "m.onnx")
    assert contents() == before
