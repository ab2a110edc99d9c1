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

QUIET = 0.02  # noise over the image's scale at which its input is 0


@dataclass(frozen=True)
class Shape:
    """How large a network is; stored with its weights."""

    fine: int = 32  # channels at half resolution
    middle: int = 48  # at a quarter
    coarse: int = 64  # at an eighth


class Detail(nn.Module):
    """What to add to an image on the fine grid: 0 at the start of training."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        fine, middle, coarse = shape.fine, shape.middle, shape.coarse
        self.enter = _conv(4 + 8 + 1, fine)
        self.fine = _conv(fine, fine)
        self.down_1 = nn.Conv2d(fine, middle, 2, stride=2)
        self.middle = nn.Sequential(_conv(middle, middle), nn.ReLU(), _conv(middle, middle), nn.ReLU())
        self.down_2 = nn.Conv2d(middle, coarse, 2, stride=2)
        self.coarse = nn.Sequential(_conv(coarse, coarse), nn.ReLU(), _conv(coarse, coarse), nn.ReLU())
        self.up_2 = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.merge_2 = _conv(middle, middle)
        self.up_1 = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.merge_1 = nn.Sequential(_conv(fine, fine), nn.ReLU(), _conv(fine, fine), nn.ReLU())
        self.leave = _conv(fine, 4)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                mode = "fan_in" if isinstance(module, nn.Conv2d) else "fan_out"
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
                module.weight.data *= 1.0 if isinstance(module, nn.Conv2d) else 0.5
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.leave.weight)

    def forward(self, image: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """Return what to add to `image` (slice, 1, y, x), sides multiples of 8.

        phase: (slice, 2, y, x), where fine voxels lie in their measured ones. noise: (slice, 1, 1, 1), its level.
        """
        level = torch.clamp(torch.log(noise / QUIET + 0.02), -4.0, 4.0) / 2
        shuffled = functional.pixel_unshuffle(torch.cat((image, phase), 1), 2)
        features = torch.cat((shuffled, level + torch.zeros_like(shuffled[:, :1])), 1)
        fine = functional.relu(self.fine(functional.relu(self.enter(features))))
        middle = self.middle(functional.relu(self.down_1(fine)))
        coarse = self.coarse(functional.relu(self.down_2(middle)))
        middle = functional.relu(self.merge_2(functional.relu(self.up_2(coarse) + middle)))
        fine = self.merge_1(functional.relu(self.up_1(middle) + fine))
        return functional.pixel_shuffle(self.leave(fine), 2)


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
