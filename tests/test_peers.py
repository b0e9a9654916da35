"""Other attention in the Loupe's place: of equal size, at the same site, trained with the rest."""

import pytest
import torch
from torch import nn

from loupe_core import LoupeError, LoupeModel
from loupe_core.peers import SelfAttentionMask, peer, put_after


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("channels, parameters", [(64, 2_313), (256, 36_897)])
@pytest.mark.parametrize("kind", ["se", "cbam", "self-attention"])
def test_a_peer_is_as_large_as_the_loupe_to_three_percent(kind, channels, parameters):
    assert abs(size(peer(kind, channels, parameters)) / parameters - 1) < 0.03


def test_an_unknown_peer_is_refused():
    with pytest.raises(LoupeError, match="peer 'eca' is unknown; expected one of se, cbam, self-attention"):
        peer("eca", 64, 2_313)


def test_a_self_attention_mask_equals_its_formula():
    torch.manual_seed(0)
    gate, x = SelfAttentionMask(6, 4), torch.randn(2, 6, 3, 5)
    tokens = gate.norm(x.permute(0, 2, 3, 1).reshape(2, 15, 6))
    q, k, v = (tokens @ gate.qkv.weight.T + gate.qkv.bias).split(4, dim=-1)
    attended = torch.softmax(q @ k.transpose(1, 2) / 2, dim=-1) @ v
    expected = torch.sigmoid(attended @ gate.score.weight.T + gate.score.bias).reshape(2, 1, 3, 5)
    torch.testing.assert_close(gate(x), expected)


@pytest.mark.parametrize("backbone, size", [("swin_micro", 112), ("resnet10t", 64)])
def test_a_peer_stands_where_the_loupe_would_and_is_trained(backbone, size):
    torch.manual_seed(0)
    gated = LoupeModel(backbone, 5, pretrained=False, img_size=size)
    channels = gated.gates["stage2"].site.channels
    model = LoupeModel(backbone, 5, pretrained=False, img_size=size, site=()).eval()
    x = torch.randn(2, 3, size, size)
    before, seen = model(x), []
    put_after(model, nn.Conv2d(channels, channels, 1))
    with torch.no_grad():
        model.peer.weight.copy_(torch.eye(channels)[..., None, None])
        model.peer.bias.zero_()
    model.peer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    torch.testing.assert_close(model(x), before)  # the identity changes nothing
    grid = tuple(gated.eval()(x, return_mask=True)[1].shape[2:])
    assert seen == [(2, channels, *grid)]
    model(x).sum().backward()
    assert model.peer.weight.grad.abs().sum() > 0 and any(name.startswith("peer.") for name in model.state_dict())
