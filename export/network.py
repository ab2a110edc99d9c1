"""The unrolled network in PyTorch: conjugate-gradient data consistency alternating with small convolutional networks.

It begins with the classical image and solves argmin |A x − y|² + λ |x − z|² again and again, each time with a z that a
network made of the last x. Everything is real arithmetic on (real, imaginary) pairs, matrix products and convolutions,
so that it exports to one ONNX graph that every runtime takes. `recon.unrolled.Prepared` says what each input holds.

Sources: Aggarwal et al., IEEE TMI 38:394 (2019), for conjugate gradients in an unrolled network; Ramzi et al., IEEE TMI
41:1279 (2022), for memory between cascades; Zhang et al., IEEE TIP 27:4608 (2018), for pixel-unshuffled denoisers that
are told the noise level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

TINY = 1e-20  # keeps 0 / 0 out of the steps of an image that is all zero
SOLVED = 1e-12  # of the right side's energy: what is left of it below that is rounding, and following it adds noise


@dataclass(frozen=True)
class Shape:
    """How large a network is; stored with its weights."""

    n_cascades: int = 5
    n_steps: int = 3  # of conjugate gradients after each network
    width: int = 24  # channels at half resolution, doubled at each coarser level
    n_memory: int = 8  # channels handed from cascade to cascade


class Encoding:
    """The normal operator Aᴴ W A of one scan, in two parts that cost little; see `recon.unrolled.prepare`.

    A uniform lattice of lines folds R voxels onto each other: its part is an R×R matrix for each set of aliases,
    whatever the number of coils. The other lines (calibration, or all of them where there is no lattice) see the image
    through the coils on a grid along y that is just fine enough; of a 3-D scan, without the lines missing along z.
    """

    def __init__(
        self, aliases: Tensor, support: Tensor, coarse: Tensor, rows: Tensor, resample: Tensor, missing: Tensor
    ) -> None:
        self.aliases, self.turned_aliases = aliases, _turn(aliases)
        self.coarse, self.turned_coarse = coarse, _turn(coarse)
        self.support, self.rows, self.resample, self.missing = support, rows, resample, missing
        self.folded = (aliases.shape[0], 2, 1, aliases.shape[2], -1)

    def normal(self, image: Tensor) -> Tensor:
        """Return Aᴴ W A image, (slice, 2, y, x)."""
        folded = image.reshape(self.folded)
        aliased = (self.aliases * folded[:, :1] + self.turned_aliases * folded[:, 1:]).sum(3).reshape(image.shape)
        seen = torch.matmul(self.resample, image * self.support)[:, :, :, None]
        coils = self.coarse * seen[:, :1] + self.turned_coarse * seen[:, 1:]
        back = self._select(coils)
        combined = torch.stack(((self.coarse * back).sum(3).sum(1), (self.turned_coarse * back).sum(3).sum(1)), 1)
        return aliased + torch.matmul(self.resample.T, combined) * self.support

    def _select(self, coils: Tensor) -> Tensor:
        """Return coil images (slice, 2, coarse y, coil, x) of the measured lines alone."""
        n_slices, _, n_coarse, n_coils, n_x = self.coarse.shape
        n_lines = self.rows.shape[0]
        lines = torch.matmul(self.rows, coils.reshape(n_slices, 2 * n_coarse, n_coils * n_x))
        pairs = lines.reshape(n_slices, 2, -1, n_x)
        along_x = torch.cat((pairs[:, 0], pairs[:, 1]), 2)  # (slice, line and coil, 2 x)
        along_x = along_x - torch.matmul(torch.matmul(along_x, self.missing.T), self.missing)
        lines = torch.stack((along_x[:, :, :n_x], along_x[:, :, n_x:]), 1).reshape(n_slices, n_lines, n_coils * n_x)
        return torch.matmul(self.rows.T, lines).reshape(self.coarse.shape)


def _turn(pairs: Tensor) -> Tensor:
    """Return i times (real, imaginary) pairs along axis 1."""
    return torch.stack((-pairs[:, 1], pairs[:, 0]), 1)


def solve(encoding: Encoding, weight: Tensor, measured: Tensor, adjoint: Tensor, guess: Tensor, n_steps: int) -> Tensor:
    """Return argmin |A x − y|² + Σ weight |x − guess|² after `n_steps` of conjugate gradients from `guess`.

    weight: (slice, 1, y, x). measured: share of lines, the diagonal of Aᴴ W A, which preconditions.
    """
    root = torch.rsqrt(measured + weight)
    residual = root * (adjoint - encoding.normal(guess))
    change, direction, energy = torch.zeros_like(residual), residual, _inner(residual, residual)
    enough = SOLVED * _inner(root * adjoint, root * adjoint)
    for step in range(n_steps):
        scaled = root * direction
        product = root * (encoding.normal(scaled) + weight * scaled)
        length = (energy > enough).to(energy.dtype) * energy / (_inner(direction, product) + TINY)
        change = change + length * direction
        if step == n_steps - 1:
            break
        residual = residual - length * product
        former, energy = energy, _inner(residual, residual)
        direction = residual + energy / (former + TINY) * direction
    return guess + root * change


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


class Regulariser(nn.Module):
    """A U-Net of three levels without normalisation, at half the image's resolution: what to add to an image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        w = shape.width
        self.enter = _conv(8 + 8 + 4 + 4 + shape.n_memory + 2, w)
        self.fine = _conv(w, w)
        self.down_1 = nn.Conv2d(w, 2 * w, 2, stride=2)
        self.middle = nn.Sequential(_conv(2 * w, 2 * w), nn.ReLU(), _conv(2 * w, 2 * w), nn.ReLU())
        self.down_2 = nn.Conv2d(2 * w, 4 * w, 2, stride=2)
        self.coarse = nn.Sequential(_conv(4 * w, 4 * w), nn.ReLU(), _conv(4 * w, 4 * w), nn.ReLU())
        self.up_2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2)
        self.merge_2 = _conv(2 * w, 2 * w)
        self.up_1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.merge_1 = _conv(w, w)
        self.leave = _conv(w, 8 + shape.n_memory)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                # signals keep their size through all layers (He et al., ICCV 2015)
                mode = "fan_in" if isinstance(module, nn.Conv2d) else "fan_out"
                scale = 1.0 if isinstance(module, nn.Conv2d) else 0.5
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
                module.weight.data *= scale
                nn.init.zeros_(module.bias)
        self.leave.weight.data *= 0.02  # the first guess is nearly the image that it was given

    def forward(self, features: Tensor) -> Tensor:
        """Return 8 channels of image and the memory, (slice, channel, y / 2, x / 2)."""
        fine = functional.relu(self.fine(functional.relu(self.enter(features))))
        middle = self.middle(functional.relu(self.down_1(fine)))
        coarse = self.coarse(functional.relu(self.down_2(middle)))
        middle = functional.relu(self.merge_2(functional.relu(self.up_2(coarse) + middle)))
        fine = functional.relu(self.merge_1(functional.relu(self.up_1(middle) + fine)))
        out: Tensor = self.leave(fine)
        return out


def _conv(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1)


class UnrolledNetwork(nn.Module):
    """Cascades of a regulariser and data consistency, which start from the classical image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.regularisers = nn.ModuleList(Regulariser(shape) for _ in range(shape.n_cascades))
        # of each cascade: weight exp(offset + slope · log(σ / 0.02)) / variance^power
        self.offset = nn.Parameter(torch.full((shape.n_cascades,), 5.0))
        self.slope = nn.Parameter(torch.zeros(shape.n_cascades))
        self.power = nn.Parameter(torch.full((shape.n_cascades,), 0.8))

    def forward(
        self,
        adjoint: Tensor,
        classical: Tensor,
        aliases: Tensor,
        support: Tensor,
        coarse: Tensor,
        rows: Tensor,
        resample: Tensor,
        missing: Tensor,
        variance: Tensor,
        sigma: Tensor,
        measured: Tensor,
    ) -> Tensor:
        """Return the image, (slice, 2, y, x), from what `recon.unrolled.prepare` makes; y and x multiples of 8."""
        encoding = Encoding(aliases, support, coarse, rows, resample, missing)
        return self.cascades(encoding, adjoint, classical, variance, sigma, measured)[-1]

    def cascades(
        self, encoding: Encoding, adjoint: Tensor, classical: Tensor, variance: Tensor, sigma: Tensor, measured: Tensor
    ) -> list[Tensor]:
        """Return the image after each cascade; see `forward`."""
        level, detail = torch.log(sigma / 0.02), torch.log(variance)
        first = functional.pixel_unshuffle(classical, 2)
        places = functional.pixel_unshuffle(torch.cat((encoding.support, detail / 8), 1), 2)
        flat = torch.zeros_like(first[:, :1])
        known = torch.cat((first, places, level / 2 + flat, measured + flat), 1)
        memory = flat.repeat(1, self.shape.n_memory, 1, 1)
        image, images = classical, []
        for index, regulariser in enumerate(self.regularisers):
            weight = torch.exp(self.offset[index] + self.slope[index] * level - self.power[index] * detail)
            out = regulariser(torch.cat((functional.pixel_unshuffle(image, 2), known, memory), 1))
            guess = image + functional.pixel_shuffle(out[:, :8], 2)
            memory = out[:, 8:]
            image = solve(encoding, weight, measured, adjoint, guess, self.shape.n_steps)
            images.append(image)
        return images
