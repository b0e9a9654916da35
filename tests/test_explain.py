"""Maps beside the mask's: each against its formula written out again here, and nothing left behind in the model."""

import pytest
import timm
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F

from loupe_core.errors import LoupeError
from loupe_core.geometry import EvalTransform
from loupe_core.heatmap import mask_to_original
from loupe_core.model import LoupeModel
from loupe_lab.evidence.explain import METHODS, count_passes, explain

QUICK = {"integrated_gradients": dict(steps=3), "occlusion": dict(window=32, stride=16)}


def images(B=2, H=112, W=112, seed=0) -> torch.Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


def swin(**kwargs) -> LoupeModel:
    """swin_micro's grids, 28, 14, 7 and 4 tokens wide, in a small size."""
    torch.manual_seed(0)
    small = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2))
    return LoupeModel("swin_micro", num_classes=5, pretrained=False, backbone_kwargs=small, **kwargs).eval()


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=3, **kwargs).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5).eval()


def odd_swin() -> SwinTransformer:
    """9 x 9 tokens in windows of 4, then 5 x 5: both are padded, and every second block is shifted."""
    torch.manual_seed(0)
    sizes = dict(img_size=36, patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2))
    model = SwinTransformer(**sizes, num_classes=5).eval()
    for parameter in model.parameters():  # the usual start is so small that all attention is even
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method, cells", [
    ("mask", 14), ("grad_cam", 7), ("integrated_gradients", 112), ("rollout", 28), ("occlusion", 112)])
def test_each_method_gives_one_map_an_image_that_goes_back_to_the_photograph(method, cells):
    maps = explain(swin(), images(), method, **QUICK.get(method, {}))
    assert maps.shape == (2, cells, cells) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.isfinite().all()
    geometry = EvalTransform(112, (0.5,) * 3, (0.5,) * 3, 0.9)(Image.new("RGB", (120, 90)))[1]
    assert mask_to_original(maps[0], geometry).shape == (90, 120)


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "occlusion", "rollout"])
def test_other_backbones_and_oblong_images(method):
    kwargs = QUICK.get(method, {})
    assert explain(vit(), images(H=64, W=64), method, **kwargs).shape[0] == 2
    if method == "rollout":
        return
    maps = explain(resnet(), images(1, 64, 96), method, **kwargs)
    assert maps.shape[1:] in ((2, 3), (64, 96)) and maps.any()


def test_the_mask_is_the_models_own():
    model, x = swin(site=["stage1", "stage2"]), images()
    with torch.no_grad():
        _, masks = model(x, return_mask=True)
    assert torch.equal(explain(model, x, "mask", site="stage2"), masks[1][:, 0])
    assert torch.equal(explain(model, x, "mask", site="stage1"), masks[0][:, 0])
    assert torch.equal(explain(swin(), x, "mask"), swin()(x, return_mask=True)[1][:, 0])


def test_a_map_over_padded_cells_is_cut_where_the_image_ends():
    """4 x 4 cells of 32 px over 112 px: the cell centres lie at 16, 48, 80 and 112 px."""
    model = swin(site="stage4")
    with torch.no_grad():
        mask = model(images(1), return_mask=True)[1]
    cut = explain(model, images(1), "mask")[0]
    assert cut.shape == (7, 7)
    # at 8 px the first centre's value is still constant; 24 px lie a quarter of the way from 16 to 48
    first, second = mask[0, 0, 0, :2]
    torch.testing.assert_close(cut[0, :2], torch.stack([first, 0.75 * first + 0.25 * second]))


@pytest.mark.parametrize("kind", ["swin", "resnet", "vit"])
def test_grad_cam_is_its_formula(kind):
    model, backbone, layer, x = {
        "swin": lambda: (m := swin(), m.backbone, m.backbone.norm, images()),
        "resnet": lambda: (m := resnet(), m, m.layer4, images(H=64, W=64)),
        "vit": lambda: (m := vit(), m, m.blocks[-1].norm1, images(H=64, W=64)),
    }[kind]()
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(x)
    handle.remove()
    gradient, = torch.autograd.grad(logits[0, 1] + logits[1, 3], seen)
    A = seen[0].detach()
    if kind == "vit":  # a class token, then 4 x 4 patches
        A, gradient = (t[:, 1:].reshape(2, 4, 4, -1) for t in (A, gradient))
    if kind == "resnet":
        A, gradient = (t.permute(0, 2, 3, 1) for t in (A, gradient))
    cam = (gradient.mean((1, 2), keepdim=True) * A).sum(-1).clamp(min=0)
    if kind == "swin":
        cam = F.interpolate(cam[:, None], (8, 8), mode="bilinear")[:, 0, :7, :7]
    torch.testing.assert_close(explain(model, x, "grad_cam", target=[1, 3]), cam)
    assert cam.any()


def test_grad_cam_at_a_chosen_site_sees_the_gated_features():
    model, x = swin(), images()
    seen = []
    handle = model.backbone.layers[1].register_forward_hook(lambda m, i, output: seen.append(output))
    logits = model(x)  # this hook comes after the gate's, so it gets what the gate made
    handle.remove()
    gradient, = torch.autograd.grad(logits[:, 2].sum(), seen)
    cam = (gradient.mean((1, 2), keepdim=True) * seen[0]).sum(-1).clamp(min=0)
    torch.testing.assert_close(explain(model, x, "grad_cam", target=2, site="stage2"), cam.detach())


def test_integrated_gradients_sum_to_the_difference_of_the_logits():
    model, x = swin(), images(3)
    with torch.no_grad():
        difference = (model(x) - model(0 * x))[range(3), [0, 4, 2]]
    total = explain(model, x, "integrated_gradients", target=[0, 4, 2]).sum((1, 2))
    torch.testing.assert_close(total, difference, atol=0.01, rtol=0.01)


def test_occlusion_is_a_loop_over_windows():
    model, x = swin(), images()
    total, members = torch.zeros(2, 112, 112), torch.zeros(112, 112)
    with torch.no_grad():
        logits = model(x)[range(2), [1, 3]]
        for top in range(0, 112 - 32 + 1, 16):
            for left in range(0, 112 - 32 + 1, 16):
                hidden = x.clone()
                hidden[:, :, top : top + 32, left : left + 32] = 0
                fall = logits - model(hidden)[range(2), [1, 3]]
                total[:, top : top + 32, left : left + 32] += fall[:, None, None]
                members[top : top + 32, left : left + 32] += 1
    maps = explain(model, x, "occlusion", [1, 3], window=32, stride=16)
    torch.testing.assert_close(maps, total / members, atol=1e-5, rtol=1e-4)


def attention_of_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A Swin block's attention among all its tokens, (H W, H W), pair by pair from the definition; x (H, W, C)."""
    H, W, C = x.shape
    (window, _), (shift, _), heads = block.window_size, block.shift_size, block.attn.num_heads
    ends = [side + -side % window for side in (H, W)]  # where the padding ends
    places = [[(p - shift) % side for p, side in zip(divmod(i, W), (H, W))] for i in range(H * W)]  # after the shift
    places += [[r, c] for r in range(ends[0]) for c in range(ends[1]) if r >= H or c >= W]  # the padding
    tokens = torch.cat([block.norm1(x).reshape(H * W, C), torch.zeros(len(places) - H * W, C)])
    q, k, _ = block.attn.qkv(tokens).reshape(len(places), 3, heads, C // heads).unbind(1)
    scores = torch.einsum("ihc,jhc->hij", q, k) / (C // heads) ** 0.5
    bias = block.attn.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, heads)

    def area(place):  # its window, and which part of the image the shift brought there
        return [(s // window, (s >= end - window) + (s >= end - shift) if shift else 0) for s, end in zip(place, ends)]

    areas = [area(place) for place in places]
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if areas[i] == areas[j]:
                scores[:, i, j] += bias[here[0] - there[0] + window - 1, here[1] - there[1] + window - 1]
            else:
                scores[:, i, j] = -torch.inf
    A = scores.softmax(-1).mean(0)[: H * W, : H * W]
    return A / A.sum(1, keepdim=True)


def test_rollout_of_swin_is_the_product_of_whole_matrices():
    model, x = odd_swin(), images(2, 36, 36)
    received = []
    for block in (b for stage in model.layers for b in stage.blocks):
        block.register_forward_pre_hook(lambda module, inputs: received.append((module, inputs[0])))
    with torch.no_grad():
        model(x)
    shares = []
    for k in range(2):
        R = torch.eye(81)
        for step, (block, tokens) in enumerate(received[:4]):
            if step == 2:  # merging: each of 5 x 5 is the mean of those of its 2 x 2 that exist
                M = torch.zeros(25, 81)
                for i in range(81):
                    M[i // 9 // 2 * 5 + i % 9 // 2, i] = 1
                R = M / M.sum(1, keepdim=True) @ R
            with torch.no_grad():
                A = attention_of_block(block, tokens[k])
            R = (0.5 * A + 0.5 * torch.eye(len(A))) @ R
        torch.testing.assert_close(R.sum(1), torch.ones(25))
        shares.append(R.mean(0).reshape(9, 9))
    assert any(block.shift_size[0] for block, _ in received)
    maps = explain(model, x, "rollout")
    torch.testing.assert_close(maps, torch.stack(shares), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))
    assert maps.std() > 1e-4  # uneven, so the comparison means something


def test_rollout_sums_to_one_on_swin_micro_and_on_swin_v2():
    assert torch.allclose(explain(swin(), images(), "rollout").sum((1, 2)), torch.ones(2))
    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=5, depths=(1, 2, 1, 1))
    assert torch.allclose(explain(model, images(H=64, W=64), "rollout").sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_of_a_vit_is_the_product_of_its_matrices(pool):
    model, x = vit(global_pool=pool), images(1, 64, 64)
    received = []
    handles = [b.register_forward_pre_hook(lambda m, inputs: received.append((m, inputs[0]))) for b in model.blocks]
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        R = torch.eye(17)
        for block, tokens in received:
            q, k, _ = block.attn.qkv(block.norm1(tokens[0])).reshape(17, 3, 3, 64).unbind(1)
            A = (torch.einsum("ihc,jhc->hij", q, k) / 8).softmax(-1).mean(0)
            R = (0.5 * A + 0.5 * torch.eye(17)) @ R
    row = R[0, 1:] if pool == "token" else R[1:, 1:].mean(0)
    torch.testing.assert_close(explain(model, x, "rollout")[0], row.reshape(4, 4), atol=1e-6, rtol=1e-4)


def test_rollout_does_not_ask_for_a_class_and_grad_cam_does():
    model, x = swin(), images()
    assert torch.equal(explain(model, x, "rollout", 1), explain(model, x, "rollout", 2))
    assert not torch.equal(explain(model, x, "grad_cam", 1), explain(model, x, "grad_cam", 2))
    predicted = model(x).argmax(1)
    assert torch.equal(explain(model, x, "grad_cam"), explain(model, x, "grad_cam", predicted))


@pytest.mark.parametrize("method, forward, backward", [
    ("mask", 2, 0), ("grad_cam", 2, 2), ("integrated_gradients", 6, 6), ("rollout", 2, 0), ("occlusion", 74, 0)])
def test_passes_are_counted(method, forward, backward):
    model = swin()
    seen = dict(forward=0, backward=0)

    def forth(module, inputs, output):
        seen["forward"] += len(output)

    def back(module, inputs, outputs):
        seen["backward"] += len(outputs[0])

    model.backbone.head.register_full_backward_hook(back)
    handle = model.backbone.head.register_forward_hook(forth)
    with count_passes(model) as passes:
        explain(model, images(), method, target=1, **QUICK.get(method, {}))
    assert (passes.forward, passes.backward) == (forward, backward)
    assert seen["backward"] == backward
    assert seen["forward"] == forward + (method == "grad_cam")  # one look at how the features lie
    handle.remove()
    with count_passes(model) as passes:
        pass
    model(images())
    assert passes.forward == 0


def state(model: nn.Module) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = [(m.training, getattr(m, "fused_attn", None), *[len(getattr(m, kind)) for kind in kinds])
             for m in model.modules()]
    return [*found, *[(p.requires_grad, p.grad is None) for p in model.parameters()], torch.get_rng_state().sum()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind, method", [(kind, method) for kind in ("swin", "vit") for method in METHODS
                                          if (kind, method) != ("vit", "mask")])
def test_nothing_is_left_behind_even_after_an_error(kind, method, fails, monkeypatch):
    model, x = (swin(), images()) if kind == "swin" else (vit(), images(H=64, W=64))
    backbone = getattr(model, "backbone", model)
    model.train()
    backbone.norm.eval()
    blocks = [m for m in model.modules() if hasattr(m, "fused_attn")]
    blocks[0].fused_attn, blocks[1].fused_attn = True, False
    for p in model.parameters():
        p.requires_grad_(False)
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    kwargs = QUICK.get(method, {})
    if fails:
        def broken(x, pre_logits=False):
            raise RuntimeError("broken")

        monkeypatch.setattr(backbone, "forward_head", broken)
        with pytest.raises((RuntimeError, LoupeError), match="broken"):
            explain(model, x, method, target=1, **kwargs)
    else:
        with torch.inference_mode():
            maps = explain(model, x, method, target=1, **kwargs)
        assert maps.any() and x.grad is None and not x.requires_grad
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def named() -> LoupeModel:
    return LoupeModel("swin_micro", num_classes=5, pretrained=False, class_names=["robin", "wren", "tit", "jay", "owl"])


def zero_head() -> nn.Module:
    backbone = timm.create_model("resnet10t", num_classes=5)
    for p in backbone.fc.parameters():
        nn.init.zeros_(p)
    return backbone


def test_a_class_may_be_given_by_its_name():
    model, x = named(), images()
    for target, number in (("tit", 2), (["tit", 0, "owl"][: len(x)], [2, 0, 4][: len(x)])):
        assert torch.equal(explain(model, x, "grad_cam", target), explain(model, x, "grad_cam", number))


@pytest.mark.parametrize("method", ["mask", "grad_cam", "rollout"])
def test_a_compiled_model_is_explained_as_the_one_it_was_made_of(method):
    model, x = swin(), images()
    plain = explain(model, x, method)
    for compiled in (torch.compile(model, backend="eager"), model):
        if compiled is model:
            model.compile(backend="eager")
        with torch.no_grad():
            compiled(x)
        assert torch.equal(explain(compiled, x, method), plain)


@pytest.mark.parametrize("call, words", [
    (lambda: explain(swin(), images(), "lime"), "method 'lime' is unknown; expected one of mask, grad_cam"),
    (lambda: explain(swin(), images()[0], "mask"), r"images: found \(3, 112, 112\), expected a tensor"),
    (lambda: explain(swin(), [1], "mask"), "images: found list"),
    (lambda: explain(swin(), images(), "grad_cam", target=5), "target: found 5, expected a class from 0 to 4"),
    (lambda: explain(swin(), images(), "grad_cam", target=[1]), r"target: found \[1\]"),
    (lambda: explain(swin(), images(), "grad_cam", target=0.5), "target: found 0.5"),
    (lambda: explain(swin(), images(), "grad_cam", site="stage9"), "site 'stage9' is unknown"),
    (lambda: explain(swin(site=()), images(), "mask"), "no gate for site=None .* expected a LoupeModel with a site"),
    (lambda: explain(vit(), images(H=64, W=64), "mask"), "no gate for site=None in this VisionTransformer"),
    (lambda: explain(swin(site=["stage1", "stage2"]), images(), "mask"), "expected site= one of stage1, stage2"),
    (lambda: explain(swin(), images(), "mask", site="stage1"), "no gate for site='stage1'"),
    (lambda: explain(resnet(), images(H=64, W=64), "rollout"), "rollout reads the attention of .*; ResNet is neither"),
    (lambda: explain(vit(), images(H=64, W=64), "grad_cam", site="stage4"), "no gradient reaches its features"),
    (lambda: explain(swin(), images(), "occlusion", window=113), "found window=113, expected 1 to 112 px, the image's"),
    (lambda: explain(swin(), images(), "occlusion", window=0), "found window=0, expected 1 to 112 px"),
    (lambda: explain(swin(), images(), "occlusion", window=8, stride=9), "found stride=9, expected 1 to 8 px"),
    (lambda: explain(swin(), images(), "grad_cam", target="wren"), "found 'wren', expected a number from 0 to 4: the"),
    (lambda: explain(named(), images(), "grad_cam", target="Wren"), "found 'Wren', expected one of robin, wren, tit, "),
    (lambda: explain(zero_head(), images(), "grad_cam"), "ResNet: its classifier's weights are all 0, .* train it"),
])
def test_errors_are_one_line(call, words):
    with pytest.raises(LoupeError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
