"""LoupeModel: any layout, any site, and the backbone left as it was. Tiny random backbones from timm."""

import copy
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import loupe_core.model
from loupe_core.errors import LoupeError
from loupe_core.geometry import transforms_for
from loupe_core.model import FIELDGUIDE, LoupeModel
from loupe_core.sites import find_sites, locate, token_grid
from loupe_lab.birds.fieldguide import SPECIES, draw


def swin() -> nn.Module:
    """A Swin of 60,000 weights, 112 px."""
    return timm.create_model("swin_micro", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=5)


# One backbone for each layout: (B, H, W, C), (B, C, H, W), and tokens with and without a class token.
BACKBONES = {
    "NHWC": swin,
    "NCHW": lambda: timm.create_model("test_convnext", num_classes=5),
    "NLC with a class token": lambda: timm.create_model("test_vit", num_classes=5),
    "NLC without": lambda: timm.create_model("test_vit_relpos", num_classes=5),
}


def build(layout: str = "NHWC", **kwargs) -> LoupeModel:
    torch.manual_seed(0)
    return LoupeModel(BACKBONES[layout](), num_classes=5, **kwargs).eval()


def images(model: LoupeModel, B: int = 2) -> torch.Tensor:
    return torch.randn(B, 3, *model.img_size, generator=torch.Generator().manual_seed(3))


def assert_one_line(caught, *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- what the gate does to the features ---------------------------------------------------------------------------


def gated_by_hand(x: torch.Tensor, loupe: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """M * F cell by cell, for features x of any of the layouts at 14 x 14 or 10 x 10 or 20 x 20 cells."""
    x = x.clone()
    if x.ndim == 3:
        prefix = x.shape[1] % 10  # 100 cells; a class token makes 101
        maps = x[:, prefix:].reshape(len(x), 10, 10, -1).permute(0, 3, 1, 2)
        mask = loupe(maps)
        for row in range(10):
            for column in range(10):
                x[:, prefix + 10 * row + column] *= mask[:, :, row, column]
    elif x.shape[1] == x.shape[2]:  # NHWC
        mask = loupe(x.permute(0, 3, 1, 2))
        for channel in range(x.shape[3]):
            x[..., channel] *= mask[:, 0]
    else:
        mask = loupe(x)
        for channel in range(x.shape[1]):
            x[:, channel] *= mask[:, 0]
    return x, mask


@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_logits_and_mask_equal_a_hook_written_by_hand_for_the_layout(layout):
    model = build(layout)
    torch.manual_seed(0)
    bare = BACKBONES[layout]().eval()  # the same weights, once more
    seen = []

    def hook(module, inputs, output):
        gated, mask = gated_by_hand(output, model.gates["stage2"].loupe)
        seen.append(mask)
        return gated

    bare.get_submodule(model.gates["stage2"].site.module).register_forward_hook(hook)
    x = images(model)
    logits, mask = model(x, return_mask=True)
    torch.testing.assert_close(logits, bare(x))
    torch.testing.assert_close(mask, seen[0])
    assert torch.equal(logits, model(x))
    assert mask.std() > 1e-4
    assert 0 <= mask.min() and mask.max() <= 1


@torch.no_grad()
def test_the_class_token_passes_the_gate_untouched():
    model = build("NLC with a class token")
    before, after = [], []
    torch.manual_seed(0)
    bare = BACKBONES["NLC with a class token"]().eval()
    bare.blocks[2].register_forward_hook(lambda m, i, out: before.append(out))
    model.backbone.blocks[2].register_forward_hook(lambda m, i, out: after.append(out))
    x = images(model)
    bare(x), model(x)
    assert torch.equal(before[0][:, 0], after[0][:, 0])
    assert not torch.equal(before[0][:, 1:], after[0][:, 1:])


@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_residual_logits_are_exactly_the_bare_backbones_at_the_start(layout):
    model = build(layout, site=["stage2", "stage3"], form="residual")
    torch.manual_seed(0)
    bare = BACKBONES[layout]().eval()
    x = images(model)
    assert torch.equal(model(x), bare(x))


@torch.no_grad()
def test_tokens_of_an_oblong_image_become_an_oblong_mask():
    model = LoupeModel("test_vit", num_classes=5, pretrained=False, img_size=(96, 160))
    _, mask = model.eval()(images(model), return_mask=True)
    assert model.img_size == (96, 160) and mask.shape == (2, 1, 6, 10)


@pytest.mark.parametrize(
    "tokens, size, grid",
    [(196, (224, 224), (14, 14)), (60, (96, 160), (6, 10)), (16, (224, 224), (4, 4)), (197, (224, 224), None)],
)
def test_a_grid_is_found_only_where_the_tokens_fill_one(tokens, size, grid):
    assert token_grid(tokens, size) == grid


@pytest.mark.parametrize("layout", BACKBONES)
def test_the_gate_learns_from_the_logits_alone(layout):
    model = build(layout)
    model(images(model)).square().sum().backward()
    for name, p in model.gates.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


# --- sites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, cells, options",
    [
        ("test_convnext", (40, 20, 10, 5), {}),
        ("test_resnet", (40, 20, 10, 5), {}),
        ("test_efficientnet", (40, 20, 10, 5), {}),
        ("test_vit", (10, 10, 10, 10), dict(global_pool="avg")),  # by its class token, nothing would read the last
    ],
)
@torch.no_grad()
def test_four_sites_give_four_masks_at_the_strides_of_the_stages(name, cells, options):
    sites = ["stage1", "stage2", "stage3", "stage4"]
    model = LoupeModel(name, num_classes=5, pretrained=False, site=sites, backbone_kwargs=options).eval()
    _, masks = model(images(model), return_mask=True)
    assert [tuple(m.shape) for m in masks] == [(2, 1, n, n) for n in cells]


def test_a_stage_of_several_modules_ends_with_its_last_and_a_vit_is_cut_in_quarters():
    efficientnet = find_sites(timm.create_model("efficientnet_b0"))  # feature_info: strides 2, 4, 8, 16, 32
    assert [efficientnet[f"stage{k}"].module for k in (1, 2, 3, 4)] == ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    vit = find_sites(timm.create_model("vit_tiny_patch16_224"))  # 12 blocks
    assert [vit[f"stage{k}"].module for k in (1, 2, 3, 4)] == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    assert list(vit) == ["stage1", "stage2", "stage3", "stage4"]  # no downsampling, so nothing "inside"


@torch.no_grad()
def test_masks_come_in_the_order_of_the_sites_and_a_list_of_one_stays_a_list():
    model = build(site=["stage3", "stage1"])
    _, masks = model(images(model), return_mask=True)
    assert [m.shape[-1] for m in masks] == [7, 28]
    model = build(site=["stage2"])
    _, masks = model(images(model), return_mask=True)
    assert isinstance(masks, list) and [m.shape[-1] for m in masks] == [14]


@torch.no_grad()
def test_no_site_is_the_bare_backbone():
    model = build(site=())
    torch.manual_seed(0)
    bare = swin().eval()
    logits, masks = model(images(model), return_mask=True)
    assert masks == [] and model.gate_parameters() == 0
    assert torch.equal(logits, bare(images(model)))


@torch.no_grad()
def test_inside_a_stage_is_after_its_downsampling_and_before_its_blocks():
    model = build(site="stage3.inside")
    stage, seen = model.backbone.layers[2], {}
    merge = copy.deepcopy(stage.downsample)
    merge._forward_hooks.clear()
    stage.register_forward_pre_hook(lambda m, inputs: seen.update(into=inputs[0]))
    stage.blocks.register_forward_pre_hook(lambda m, inputs: seen.update(blocks=inputs[0]))
    _, mask = model(images(model), return_mask=True)
    assert mask.shape == (2, 1, 7, 7)
    merged = merge(seen["into"])
    M = model.gates["stage3_inside"].loupe(merged.permute(0, 3, 1, 2))
    torch.testing.assert_close(mask, M)
    torch.testing.assert_close(seen["blocks"], merged * M.permute(0, 2, 3, 1))


# --- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, authors", [("swin_base_patch4_window7_224", 147_585), ("swin_tiny_patch4_window7_224", 83_041)]
)
def test_the_default_is_under_a_thousandth_of_the_backbone_and_reduction_4_is_the_authors_count(name, authors):
    with torch.device("meta"):
        model = LoupeModel(name, num_classes=200, pretrained=False)
        wide = LoupeModel(name, num_classes=200, pretrained=False, reduction=4)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert 0 < model.gate_parameters() < 0.001 * backbone
    assert wide.gate_parameters() == authors
    assert sum(p.numel() for p in wide.parameters()) == backbone + authors


# --- the backbone stays what it is ---------------------------------------------------------------------------------


def test_the_backbone_keeps_its_class_and_its_names():
    model, plain = LoupeModel("test_convnext", num_classes=5, pretrained=False), BACKBONES["NCHW"]()
    assert type(model.backbone) is type(plain)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert set(model.state_dict()) == {f"backbone.{k}" for k in plain.state_dict()} | {
        f"gates.stage2.loupe.{layer}.{p}" for layer in ("conv3x3", "conv1x1") for p in ("weight", "bias")
    }


def test_a_given_module_is_used_itself_and_its_head_is_fitted():
    backbone = timm.create_model("test_convnext", num_classes=1000)
    model = LoupeModel(backbone, num_classes=7)
    assert model.backbone is backbone
    assert model(images(model)).shape == (2, 7)


def test_finding_the_sites_changes_neither_modes_nor_statistics_nor_random_numbers():
    backbone = timm.create_model("test_resnet").train()
    backbone.layer1.eval()  # frozen statistics, as some recipes have them
    modes = {n: m.training for n, m in backbone.named_modules()}
    weights = {k: v.clone() for k, v in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    locate(backbone, ["stage2", "stage3"], (160, 160))
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks for m in backbone.modules())


@torch.no_grad()
def test_eject_gives_back_a_backbone_without_gates():
    model = build(site=["stage2", "stage3.inside"])
    torch.manual_seed(0)
    bare, x = swin().eval(), images(model)
    assert not torch.equal(model(x), bare(x))
    backbone = model.eject()
    assert torch.equal(backbone(x), bare(x))
    assert model(x, return_mask=True)[1] == [] and model.gate_parameters() == 0
    LoupeModel(backbone, num_classes=5)  # free for another gate


def test_a_backbone_that_has_a_gate_is_not_given_a_second_one_unnoticed():
    model = build()
    with pytest.raises(LoupeError) as caught:
        LoupeModel(model.backbone, num_classes=5)
    assert_one_line(caught, "already carries a gate", "eject()")


@torch.no_grad()
def test_a_copy_uses_its_own_gate():
    model = build()
    x, twin = images(model), copy.deepcopy(model)
    before = model(x)
    assert torch.equal(twin(x), before)
    nn.init.constant_(twin.gates["stage2"].loupe.conv1x1.bias, -3.0)
    assert torch.equal(model(x), before)
    logits, mask = twin(x, return_mask=True)
    assert not torch.equal(logits, before) and mask.max() < 0.2


def test_a_model_can_be_copied_after_a_step_with_gradient_checkpointing_which_changes_no_gradient():
    plain, checkpointed = build("NCHW"), build("NCHW")
    checkpointed.backbone.set_grad_checkpointing(True)
    x = images(plain)
    for model in (plain, checkpointed):
        logits, mask = model.train()(x, return_mask=True)
        (logits.square().sum() + mask.sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    copy.deepcopy(checkpointed)  # fails where a mask with its graph is left behind


# --- where it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BACKBONES)
def test_bf16_autocast_stays_close_and_trains(layout):
    model = build(layout, form="mix")
    x = images(model)
    reference, reference_mask = model(x, return_mask=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, mask = model(x, return_mask=True)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(mask.float(), reference_mask, rtol=0, atol=0.01)
    assert (logits - reference).norm() < 0.05 * reference.norm()
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad.any() for p in model.gates.parameters())


@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_torch_compile_takes_the_whole_model_as_one_graph(layout):
    model = build(layout, site=["stage2", "stage3"])
    x = images(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        logits, masks = compiled(x, return_mask=True)
    expected_logits, expected = model(x, return_mask=True)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(masks, expected)


@torch.no_grad()
def test_the_gate_takes_the_backbones_dtype():
    model = LoupeModel(swin().double(), num_classes=5).eval()
    logits, mask = model(images(model).double(), return_mask=True)
    assert logits.dtype == mask.dtype == torch.float64


# --- saved and restored --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """(model, folder): a trained-like model and where save_pretrained wrote it."""
    torch.manual_seed(0)
    model = LoupeModel(
        "test_vit",
        num_classes=3,
        pretrained=False,
        site=["stage2", "stage1"],
        form="mix",
        reduction=8,
        class_names=["Dodo", "Grand pingouin", "Ō'ō"],
        img_size=96,
        data_config=dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8, interpolation="bilinear"),
        backbone_kwargs=dict(drop_path_rate=0.25),
    )
    for p in model.gates.parameters():
        nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "bird")
    return model.eval(), tmp_path / "bird"


def test_a_saved_model_comes_back_whole(saved, monkeypatch):
    model, folder = saved
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k))
    again = LoupeModel.from_pretrained(folder)
    assert asked == [False]  # no weights from the hub
    assert not again.training
    x = images(model)
    logits, masks = again(x, return_mask=True)
    expected_logits, expected = model(x, return_mask=True)
    assert torch.equal(logits, expected_logits)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    for name in ("class_names", "img_size", "data_config", "sites", "form", "reduction", "backbone_name", "mean"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.class_names[2] == "Ō'ō" and again.img_size == (96, 96) and again.crop_pct == 0.8
    assert again.backbone.blocks[5].drop_path1.drop_prob == 0.25


def test_a_restored_model_can_be_saved_again_without_change(saved, tmp_path):
    _, folder = saved
    LoupeModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_saved_is_safetensors_and_json(saved):
    _, folder = saved
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((folder / "config.json").read_text())["backbone"] == "test_vit"


def test_one_site_comes_back_as_one_mask_and_no_site_as_none(tmp_path):
    for site, kind in (("stage2", torch.Tensor), ([], list)):
        build("NCHW", site=site).save_pretrained(tmp_path)
        again = LoupeModel.from_pretrained(str(tmp_path))
        assert isinstance(again(images(again), return_mask=True)[1], kind)


def test_a_changed_module_comes_back_with_the_module(tmp_path):
    model = build()  # a Swin narrower than its name says
    model.save_pretrained(tmp_path)
    with pytest.raises(LoupeError) as caught:
        LoupeModel.from_pretrained(tmp_path)
    assert_one_line(caught, "model.safetensors", "does not fit backbone 'swin_micro'")
    again = LoupeModel.from_pretrained(tmp_path, backbone=swin())
    assert torch.equal(again(images(model)), model(images(model)))


def test_a_hub_id_is_read_from_the_hub_and_only_its_safetensors(saved, monkeypatch):
    model, folder = saved
    asked = []

    def download(repo_id=None, filename=None, **kwargs):
        asked.append((repo_id, filename))
        if not (folder / filename).exists():
            raise FileNotFoundError(f"{filename} is not on the hub")
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr(loupe_core.model, "hf_hub_download", download)
    again = LoupeModel.from_pretrained("someone/birds")
    assert asked == [("someone/birds", "config.json"), ("someone/birds", "model.safetensors")]
    assert torch.equal(again(images(model)), model(images(model)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoupeError) as caught:
        LoupeModel.from_pretrained("someone/birds")
    assert_one_line(caught, "someone/birds", "model.safetensors is not on the hub")
    assert ("someone/birds", "pytorch_model.bin") not in asked


def break_(folder, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"backbone": ')
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "other backbone":
        LoupeModel("test_convnext", num_classes=3, pretrained=False).save_pretrained(folder.parent / "other")
        shutil.copy(folder.parent / "other" / "model.safetensors", weights)
    elif how == "NaN":
        from safetensors.torch import load_file, save_file

        values = load_file(weights)
        values["gates.stage1.background"][3] = float("nan")
        save_file(values, weights)


@pytest.mark.parametrize(
    "how, parts",
    [
        ("pickle", ["pytorch_model.bin", "no model.safetensors", "not read"]),
        ("no weights", ["no model.safetensors", "expected"]),
        ("no config", ["config.json", "expected"]),
        ("broken config", ["cannot be read", "Expecting value"]),
        ("truncated", ["model.safetensors", "damaged"]),
        ("other backbone", ["model.safetensors", "does not fit backbone 'test_vit'", "another backbone"]),
        ("NaN", ["model.safetensors", "gates.stage1.background", "NaN"]),
    ],
)
def test_a_folder_that_is_not_sound_is_refused_in_one_line(saved, how, parts):
    _, folder = saved
    break_(folder, how)
    with pytest.raises(LoupeError) as caught:
        LoupeModel.from_pretrained(folder)
    assert_one_line(caught, str(folder), *parts)


@pytest.mark.parametrize("kind", [str, lambda s: s])
def test_a_folder_that_is_not_there_is_not_sought_on_the_hub(tmp_path, kind):
    with pytest.raises(LoupeError) as caught:
        LoupeModel.from_pretrained(kind(tmp_path / "nowhere"))
    assert_one_line(caught, "no folder", "nowhere")


# --- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (dict(backbone="swin_micr"), ["'swin_micr'", "did you mean swin_micro"]),
        (dict(backbone="qqqq"), ["'qqqq'", "timm.list_models()"]),
        (dict(backbone="test_vit.no_such_tag"), ["test_vit.no_such_tag"]),
        (dict(site="stage9"), ["'stage9'", "stage1, stage1.inside, stage2, stage2.inside", "stage4"]),
        (dict(site="layers.1"), ["'layers.1'", "stage2"]),
        (dict(backbone="test_vit", site="stage2.inside"), ["'stage2.inside'", "stage1, stage2, stage3, stage4"]),
        (dict(site=["stage2", "stage2"]), ["stage2", "once"]),
        (dict(form="add"), ["'add'", "multiply, mix, residual"]),
        (dict(num_classes=0), ["num_classes=0"]),
        (dict(class_names=["a", "b"]), ["2 class_names", "num_classes=3"]),
        (dict(backbone="test_vit", backbone_kwargs=dict(no_such_option=1)), ["test_vit", "no_such_option"]),
        (dict(data_config=dict(men=(0.5, 0.5, 0.5))), ["'men'", "mean"]),
        (dict(backbone="test_vit", img_size=100), ["100 x 100", "img_size"]),
        (dict(backbone="test_vit", site="stage4"), ["'stage4'", "VisionTransformer", "do not depend", "earlier site"]),
        (dict(backbone="deit_tiny_distilled_patch16_224", img_size=64, site=["stage2", "stage4"]), ["'stage4'"]),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(arguments, parts):
    with pytest.raises(LoupeError) as caught:
        LoupeModel(**dict(backbone="swin_micro", num_classes=3, pretrained=False) | arguments)
    assert_one_line(caught, *parts)


def test_a_site_that_nothing_reads_is_refused_and_the_backbone_stays_as_it_was():
    backbone = timm.create_model("test_vit", num_classes=5)
    with pytest.raises(LoupeError):
        LoupeModel(backbone, num_classes=5, site="stage4")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert all(p.grad is None for p in backbone.parameters()) and backbone.training
    LoupeModel(backbone, num_classes=5, site="stage3")


@pytest.mark.parametrize("change", [
    pytest.param(lambda net: nn.init.zeros_(net.head.weight), id="a head that starts at zero"),
    pytest.param(lambda net: [nn.init.constant_(b.attn.proj.weight, 1e-12) for b in net.blocks], id="a faint branch"),
    pytest.param(lambda net: net.requires_grad_(False), id="a frozen backbone"),
])
def test_a_site_that_is_read_is_not_refused(change):
    backbone = timm.create_model("test_vit", num_classes=5)
    change(backbone)
    with torch.no_grad():
        LoupeModel(backbone, num_classes=5, site="stage3")


def test_a_layer_that_works_in_place_behind_the_site_is_no_obstacle():
    backbone = timm.create_model("test_resnet", num_classes=5)
    backbone.layer3.insert(0, nn.ReLU(inplace=True))
    LoupeModel(backbone, num_classes=5)


def test_a_vit_that_averages_its_patches_may_have_a_gate_at_its_end():
    LoupeModel("test_vit", num_classes=5, pretrained=False, site="stage4", backbone_kwargs=dict(global_pool="avg"))


def test_a_module_that_is_no_timm_classifier_is_refused():
    with pytest.raises(LoupeError) as caught:
        LoupeModel(nn.Linear(3, 3))
    assert_one_line(caught, "Linear", "timm")
    with pytest.raises(LoupeError) as caught:
        LoupeModel(timm.create_model("test_resnet", features_only=True))
    assert_one_line(caught, "timm")


def test_a_backbone_without_feature_info_is_refused():
    backbone = timm.create_model("test_convnext")
    del backbone.feature_info
    with pytest.raises(LoupeError) as caught:
        LoupeModel(backbone)
    assert_one_line(caught, "ConvNeXt", "feature_info")


def test_a_site_whose_module_never_runs_is_refused():
    backbone = timm.create_model("test_resnet")
    backbone.feature_info[2]["module"] = "no.such.module"
    backbone.forward_intermediates = lambda x, indices, **kwargs: [torch.zeros(1, 48, 20, 20)]
    with pytest.raises(LoupeError) as caught:
        LoupeModel(backbone)
    assert_one_line(caught, "'stage2'", "no.such.module")


@torch.no_grad()
def test_a_module_that_feature_info_misnames_is_found_by_what_it_returns():
    model = build("NCHW")
    torch.manual_seed(0)
    backbone = BACKBONES["NCHW"]()
    backbone.feature_info[1]["module"] = "stage.1"
    misnamed = LoupeModel(backbone, num_classes=5).eval()
    assert misnamed.gates["stage2"].site.channels == model.gates["stage2"].site.channels
    assert torch.equal(misnamed(images(model)), model(images(model)))


def test_tokens_out_of_reading_order_are_refused():
    backbone = timm.create_model("test_vit")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    intermediates = backbone.forward_intermediates
    backbone.forward_intermediates = lambda *args, **kwargs: [
        x.flatten(2)[:, :, order].unflatten(2, (10, 10)) for x in intermediates(*args, **kwargs)
    ]
    with pytest.raises(LoupeError) as caught:
        LoupeModel(backbone)
    assert_one_line(caught, "'stage2'", "row by row")


# --- pretrained weights --------------------------------------------------------------------------------------------


def test_weights_that_cannot_be_had_are_named_with_the_ways_out(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("the hub cannot be reached\nand more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(LoupeError) as caught:
        LoupeModel("test_vit")
    assert_one_line(caught, "'test_vit'", "the hub cannot be reached", "pretrained=False", "file")


def test_weights_can_come_from_a_local_file(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(5)
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "vit.safetensors")))
    model = LoupeModel("test_vit", num_classes=5, backbone_kwargs=overlay)
    assert torch.equal(model.backbone.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_the_data_config_is_the_backbones_own():
    model = LoupeModel("swin_micro", num_classes=5, pretrained=False)
    assert model.data_config == dict(
        input_size=(3, 112, 112), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9
    )
    assert (model.num_classes, model.class_names, model.backbone_name) == (5, None, "swin_micro")


def test_the_loupe_that_travels_with_the_package_names_new_birds():
    model = LoupeModel.from_pretrained(FIELDGUIDE).eval()
    assert [name.split(".")[1] for name in model.class_names] == [species.name for species in SPECIES]
    transform = transforms_for(model.data_config, train=False)
    drawings = [draw(species.attributes, seed=(77, k)).image for k, species in enumerate(SPECIES)]
    x = torch.stack([transform(Image.fromarray(drawing))[0] for drawing in drawings])
    with torch.no_grad():
        logits, mask = model(x, return_mask=True)
    assert (logits.argmax(1) == torch.arange(len(SPECIES))).float().mean() > 0.8  # 1/48 by chance
    assert mask.shape == (48, 1, 14, 14) and mask.std((1, 2, 3)).min() > 0.01


# --- what belongs to one forward pass stays in it -----------------------------------------------------------------


def test_threads_on_one_model_get_the_masks_of_their_own_images():
    """Sides differ too, so that a thread that took the other's size would fail or answer wrongly."""
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    model = LoupeModel("vit_tiny_patch16_224", num_classes=3, pretrained=False, site=["stage1", "stage2"],
                       backbone_kwargs=dict(dynamic_img_size=True)).eval()
    images = [torch.randn(1 + k % 2, 3, *((64, 128) if k % 3 else (96, 32))) for k in range(6)]
    ask = torch.no_grad()(lambda x: model(x, return_mask=True))
    alone = [ask(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, images * 20))
    for k, (logits, masks) in enumerate(together):
        expected, own = alone[k % 6]
        torch.testing.assert_close(logits, expected)
        for mask, its in zip(masks, own):
            assert mask.shape == its.shape
            torch.testing.assert_close(mask, its)


def replica_of(model: torch.nn.Module) -> torch.nn.Module:
    """What DataParallel runs in another thread on another card: a copy whose parameters are plain tensors."""
    modules = list(model.modules())
    number = {module: i for i, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, copy_ in zip(modules, copies):
        for name, child in module._modules.items():
            copy_._modules[name] = None if child is None else copies[number[child]]
        for name, p in module._parameters.items():
            setattr(copy_, name, None if p is None else p.detach().clone())
    return copies[0]


def test_a_replica_uses_its_own_gate():
    torch.manual_seed(0)
    model = LoupeModel("swin_micro", num_classes=3, pretrained=False).eval()
    x = torch.randn(2, 3, 112, 112)
    replica = replica_of(model)
    with torch.no_grad():
        for mine, own in zip(model(x, return_mask=True), replica(x, return_mask=True)):
            torch.testing.assert_close(mine, own)
        gate = replica.gates["stage2"].loupe.conv1x1
        gate.weight.zero_(), gate.bias.zero_()  # as weights on another card differ: in place, of the copy alone
        assert (replica(x, return_mask=True)[1] == 0.5).all()
        assert not (model(x, return_mask=True)[1] == 0.5).any()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "swin_micro",
                                  "vit_tiny_patch16_224"])
@pytest.mark.parametrize("site", ["stage2", ["stage1", "stage2"]])
def test_gradient_checkpointing_changes_no_logit_mask_or_gradient(name, site):
    def step(checkpointing: bool):
        torch.manual_seed(0)
        side = 112 if name == "swin_micro" else 64
        kwargs = dict(dynamic_img_size=True) if name.startswith("vit") else {}
        model = LoupeModel(name, num_classes=3, pretrained=False, site=site, backbone_kwargs=kwargs)
        model.backbone.set_grad_checkpointing(checkpointing)
        x = torch.randn(2, 3, side, side)
        logits, masks = model.train()(x, return_mask=True)
        masks = [masks] if isinstance(site, str) else masks
        (logits.square().sum() + sum(mask.sum() for mask in masks)).backward()
        return [logits, *masks, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, checkpointed = step(False), step(True)
    assert len(plain) == len(checkpointed)
    for a, b in zip(plain, checkpointed):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused_in_training_and_runs_in_evaluation():
    import timm.layers

    model = LoupeModel("resnet18", num_classes=3, pretrained=False)
    model.backbone.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(LoupeError, match="stage2.*without gradients.*set_reentrant_ckpt.False"):
            model.train()(x, return_mask=True)
        assert model.eval()(x, return_mask=True)[1].shape == (2, 1, 8, 8)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert model.train()(x, return_mask=True)[1].requires_grad


def test_the_backbone_alone_may_be_called_with_another_size():
    torch.manual_seed(0)
    model = LoupeModel("vit_tiny_patch16_224", num_classes=3, pretrained=False,
                       backbone_kwargs=dict(dynamic_img_size=True)).eval()
    wide = torch.randn(1, 3, 64, 160)
    with torch.no_grad():
        expected = model(wide)
        model(torch.randn(1, 3, 96, 96))
        torch.testing.assert_close(model.backbone(wide), expected)
        model(torch.randn(1, 3, 96, 96))
        torch.testing.assert_close(model.backbone.forward_head(model.backbone.forward_features(wide)), expected)


def test_a_model_called_inside_of_another_leaves_its_pass_alone():
    torch.manual_seed(0)
    student, teacher = (LoupeModel("swin_micro", num_classes=5, pretrained=False).eval() for _ in range(2))
    other = LoupeModel("swin_micro", num_classes=5, pretrained=False, site="stage3").eval()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected, answers = student(x, return_mask=True), [teacher(x), other(x)]
        for inner in (teacher, teacher.backbone, other, other.backbone):
            for layer in (student.backbone.layers[0], student.backbone.layers[3]):
                seen = []
                handle = layer.register_forward_hook(lambda m, i, o, inner=inner, seen=seen: seen.append(inner(x)))
                found = student(x, return_mask=True)
                handle.remove()
                torch.testing.assert_close(found, expected)
                torch.testing.assert_close(seen[0], answers[inner in (other, other.backbone)])


def test_another_models_images_do_not_change_how_tokens_are_read():
    torch.manual_seed(0)
    tokens = LoupeModel("resmlp_12_224", num_classes=3, pretrained=False).eval()  # has no patch_embed
    wide = LoupeModel("resnet10t", num_classes=3, pretrained=False, img_size=64).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = tokens.backbone.forward_features(x)
        wide(torch.randn(1, 3, 64, 256))
        assert torch.equal(tokens.backbone.forward_features(x), before)


@pytest.mark.parametrize("thread", [False, True])
def test_a_checkpointed_backward_pass_knows_its_own_size(thread):
    """With another model asked in between, and in a thread of its own, as on a GPU."""
    from threading import Thread

    def gradients(checkpointing):
        torch.manual_seed(0)
        kwargs = dict(dynamic_img_size=True, depth=4, embed_dim=64, num_heads=2)
        model = LoupeModel("vit_tiny_patch16_224", num_classes=3, pretrained=False, img_size=64, backbone_kwargs=kwargs)
        teacher = LoupeModel("vit_tiny_patch16_224", num_classes=3, pretrained=False, img_size=96,
                             backbone_kwargs=kwargs)
        model.backbone.set_grad_checkpointing(checkpointing)
        loss = model.train()(torch.randn(1, 3, 64, 256)).square().sum()
        with torch.no_grad():
            teacher(torch.randn(1, 3, 96, 96))
        if thread:
            backward = Thread(target=loss.backward)
            backward.start()
            backward.join()
        else:
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-5)


def test_a_refused_construction_and_eject_leave_no_hook():
    backbone = timm.create_model("resnet10t", num_classes=3)
    with pytest.raises(LoupeError, match="form='nix'"):
        LoupeModel(backbone, num_classes=3, form="nix")
    LoupeModel(backbone, num_classes=3, site=["stage1", "stage2"]).eject()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_a_model_whose_backbone_was_gated_anew_is_still_the_bare_one():
    backbone = timm.create_model("swin_micro", num_classes=3)
    first = LoupeModel(backbone, num_classes=3).eval()
    first.eject()
    second = LoupeModel(backbone, num_classes=3, site="stage3").eval()
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x))


def test_construction_runs_the_network_twice_however_many_sites_there_are(monkeypatch):
    """Once to see how the features lie, once to see that something reads them."""
    passes = []
    backbone = timm.create_model("swin_micro", num_classes=3)
    backbone.register_forward_pre_hook(lambda module, inputs: passes.append(inputs))
    LoupeModel(backbone, num_classes=3, site=["stage1", "stage2", "stage3.inside", "stage4"])
    assert len(passes) == 2


def test_every_unread_site_is_found_among_read_ones():
    with pytest.raises(LoupeError, match="site 'stage4'.*the logits do not depend"):
        LoupeModel("vit_tiny_patch16_224", num_classes=3, pretrained=False, site=["stage1", "stage4", "stage2"])
