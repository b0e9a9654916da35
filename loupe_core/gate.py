"""The Loupe: a small gate that looks at features and says where to look.

Source: "The Loupe", section III: a 3x3 convolution, ReLU, a 1x1 convolution and a sigmoid turn the features F of a
middle stage into a mask M with one channel, and the next stage receives F * M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from loupe_core.errors import LoupeError

FORMS = ("multiply", "mix", "residual")


class Loupe(nn.Module):
    """Features to a mask: 3x3 convolution, ReLU, 1x1 convolution, sigmoid.

    Args:
        channels: Channels C of the features.
        reduction: The hidden layer has C // reduction channels, and at least one. 16 keeps the module under 0.1 % of
            Swin-Tiny and of Swin-Base; 4 is the width of the authors' code.

    Shape:
        features `(B, C, H, W)`, any memory format -> mask `(B, 1, H, W)`, each value in [0, 1]; 0 by rounding alone,
        in fp16 from a logit of -17.33 on, in bf16 and fp32 far below -80.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise LoupeError(f"reduction={reduction!r} given to the Loupe: expected a whole number of 1 or more")
        hidden = max(channels // reduction, 1)
        self.conv3x3 = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.conv1x1 = nn.Conv2d(hidden, 1, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        B, C, H, W = features.shape
        hidden = F.relu(self.conv3x3(features))  # (B, C // reduction, H, W)
        return torch.sigmoid(self.conv1x1(hidden))  # (B, 1, H, W)


class Gate(nn.Module):
    """A Loupe, and the way in which its mask meets the features it was made from.

    - `multiply`, the paper's: M * F goes on. At the start M is near 0.5.
    - `mix`: M * F + (1 - M) * b, with b learned, one value per channel. b starts at 0, so it starts as `multiply`.
    - `residual`: F + (2M - 1) * F = 2M * F. M starts at 0.5 exactly, so F itself goes on.

    The residual form starts as the identity because its 1x1 convolution starts at zero. The other usual way, a learned
    factor s = 0 in F + s * M * F, would keep the classification's gradient from the mask until s has grown, while the
    sparsity penalty already pulls the mask to zero. Here the mask receives its full gradient in the first step (the
    3x3 convolution behind it from the second step on). The mask can still close (M = 0 removes the features) and it can
    also amplify (M = 1 doubles them).

    To try another mask in a trained model (a constant one, a shuffled one), put a forward hook on `gate.loupe`.

    Attributes: `form`; `neutral`, the mask's value with which the features go on as they came.

    Args:
        channels: Channels C of the features.
        reduction: See `Loupe`.
        form: One of "multiply", "mix", "residual".

    Shape:
        features `(B, C, H, W)` -> features of the same shape and dtype, mask `(B, 1, H, W)`.

    Raises:
        LoupeError: The form is unknown.
    """

    def __init__(self, channels: int, reduction: int = 16, form: str = "multiply") -> None:
        super().__init__()
        if form not in FORMS:
            raise LoupeError(f"form={form!r} given to the gate: expected one of {', '.join(FORMS)}")
        self.form = form
        self.neutral = 0.5 if form == "residual" else 1.0
        self.loupe = Loupe(channels, reduction)
        if form == "mix":
            self.background = nn.Parameter(torch.zeros(channels))
        if form == "residual":
            nn.init.zeros_(self.loupe.conv1x1.weight)
            nn.init.zeros_(self.loupe.conv1x1.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, C, H, W = features.shape
        mask = self.loupe(features)  # (B, 1, H, W)
        M = mask.to(features.dtype)  # autocast makes a bf16 mask; the features keep their own dtype
        if self.form == "multiply":
            return M * features, mask
        if self.form == "mix":
            b = self.background.to(features.dtype).view(1, C, 1, 1)
            return M * features + (1 - M) * b, mask
        return 2 * M * features, mask
