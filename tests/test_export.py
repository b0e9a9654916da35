"""ONNX Runtime computes what torch computes."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from loupe_core.errors import LoupeError
from loupe_core.export import export_onnx
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


def test_a_path_that_cannot_be_written_is_named_in_one_line(tmp_path):
    with pytest.raises(LoupeError) as caught:
        export_onnx(build("test_convnext"), tmp_path / "no" / "such" / "folder.onnx")
    assert "folder.onnx" in str(caught.value) and "\n" not in str(caught.value)
