"""The triage network: a small U-Net at half resolution that sees a plane and its mirror image.

Plain convolutions with batch normalisation (folded into them at export), ReLU, max-pooling and transposed
convolutions, so that it quantises to INT8 and runs on any backend. In training it also says from the bottom whether a
plane holds a finding at all, so that the deepest features know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64, 96, 96)
WIDE = (24, 48, 96, 128, 128)  # for long training on a GPU
PRIOR = -4.0  # logit of a pixel at the start: lesions are rare


class Block(nn.Module):
    """Convolutions of 3 × 3 with batch normalisation and ReLU; the second one is residual."""

    def __init__(self, n_in: int, n_out: int, n_convolutions: int = 2) -> None:
        super().__init__()
        self.first = _convolution(n_in, n_out)
        self.second = _convolution(n_out, n_out) if n_convolutions == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same size."""
        x = torch.relu(self.first(x))
        return x if self.second is None else torch.relu(x + self.second(x))


def _convolution(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out))


class TriageNetwork(nn.Module):
    """Planes (n, 2, y, x), sides multiples of 32, to lesion logits (n, 1, y, x) and features of the whole (n, k).

    dropout: share of the deepest features that are left out in training.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, dropout: float = 0.0) -> None:
        super().__init__()
        self.widths, self.dropout = widths, dropout
        first = widths[0]
        self.enter = nn.Sequential(nn.Conv2d(2, first, 4, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((first, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.join = nn.ModuleList(Block(2 * b, b, 1) for _, b in pairs)
        self.leave = nn.ConvTranspose2d(first, 1, 2, 2)
        self.whole = nn.Linear(2 * widths[-1], 1)
        nn.init.constant_(self.leave.bias, PRIOR)
        nn.init.zeros_(self.whole.weight)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return lesion logits (n, 1, y, x), features (n, k), and the logit (n,) that a plane holds a finding."""
        x = self.enter(planes)
        kept = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else torch.max_pool2d(x, 2))
            kept.append(x)
        features = x.mean((2, 3))
        if self.training and self.dropout:
            x = functional.dropout2d(x, self.dropout)
        present = self.whole(torch.cat((features, x.amax((2, 3))), 1))
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat((up(x), skip), 1))
        return self.leave(x), features, present[:, 0]
