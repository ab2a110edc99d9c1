"""The super-resolution network in PyTorch: a small U-Net at half of the fine resolution, then a projection.

It sees the image placed on the fine grid, where each fine voxel lies in its measured one, and the noise; it says what
to add. Of that, all that the measurement determines is taken away again: the measured content of the result is the
input's, whatever the weights. Only matrix products and convolutions, so that every runtime takes the graph.

Sources: Shi et al., CVPR 2016 (work at low resolution, then shuffle); Bahat & Michaeli, CVPR 2020 (consistency by
projection); Zhang et al., IEEE TIP 27:4608 (2018) (a denoiser that is told the noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

GAIN = 0.05  # of the last layer: detail is small, and so are the steps towards it
QUIET = 0.02  # noise over the image's scale at which its input is 0


@dataclass(frozen=True)
class Shape:
    """How large a network is; stored with its weights."""

    fine: int = 48  # channels at half resolution
    middle: int = 64  # at a quarter
    coarse: int = 96  # at an eighth


class Detail(nn.Module):
    """What to add to an image on the fine grid: 0 at the start of training."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        fine, middle, coarse = shape.fine, shape.middle, shape.coarse
        self.enter = _conv(4 + 8 + 1, fine)
        self.fine = Block(fine)
        self.down_1 = nn.Conv2d(fine, middle, 2, stride=2)
        self.middle = Block(middle)
        self.down_2 = nn.Conv2d(middle, coarse, 2, stride=2)
        self.coarse = nn.Sequential(Block(coarse), Block(coarse))
        self.up_2 = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.merge_2 = Block(middle)
        self.up_1 = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.merge_1 = nn.Sequential(Block(fine), Block(fine))
        self.leave = _conv(fine, 4)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                mode = "fan_in" if isinstance(module, nn.Conv2d) else "fan_out"
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
                module.weight.data *= 1.0 if isinstance(module, nn.Conv2d) else 0.5
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                module.second.weight.data *= 0.3  # many blocks add up
        nn.init.zeros_(self.leave.weight)

    def forward(self, image: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """Return what to add to `image` (slice, 1, y, x), sides multiples of 8.

        phase: (slice, 2, y, x), where fine voxels lie in their measured ones. noise: (slice, 1, 1, 1), its level.
        """
        level = torch.clamp(torch.log(noise / QUIET + 0.02), -4.0, 4.0) / 2
        shuffled = functional.pixel_unshuffle(torch.cat((image, phase), 1), 2)
        features = torch.cat((shuffled, level + torch.zeros_like(shuffled[:, :1])), 1)
        fine = self.fine(self.enter(features))
        middle = self.middle(self.down_1(fine))
        middle = self.merge_2(self.up_2(self.coarse(self.down_2(middle))) + middle)
        fine = self.merge_1(self.up_1(middle) + fine)
        return functional.pixel_shuffle(GAIN * self.leave(fine), 2)


class Block(nn.Module):
    """Two convolutions, added to what they are given."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.second = _conv(n, n), _conv(n, n)

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` with what the convolutions make of them added."""
        change: Tensor = self.second(functional.relu(self.first(features)))
        return features + change


class SuperResolution(nn.Module):
    """An image on its fine grid with detail added: the graph that is exported. See `recon.fine_grid.FineAxis`."""

    def __init__(self, detail: Detail) -> None:
        super().__init__()
        self.detail = detail

    def forward(
        self,
        image: Tensor,
        place_y: Tensor,
        place_x: Tensor,
        basis_y: Tensor,
        basis_x: Tensor,
        phase_y: Tensor,
        phase_x: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the placed image and what was estimated to be added to it, both (slice, 1, filled y, filled x).

        image: (slice, 1, y, x), scaled to about 1. noise: (slice, 1, 1, 1), in its unit.
        """
        placed = torch.matmul(torch.matmul(place_y, image), place_x.T)
        zeros = torch.zeros_like(placed)
        phase = torch.cat((phase_y[:, None] + zeros, phase_x[None] + zeros), 1)
        added = self.detail(placed, phase, noise)
        known = torch.matmul(torch.matmul(basis_y.T, added), basis_x)
        return placed, added - torch.matmul(torch.matmul(basis_y, known), basis_x.T)


def _conv(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1)
