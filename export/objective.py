"""What the reconstruction network is trained to make small."""

from __future__ import annotations

import torch
from torch import Tensor

from export.network import Encoding

DEEP_WEIGHT = 0.1  # of the loss of each cascade; what counts is the last one's error in unmeasured lines
FLOOR = 0.01  # relative error below which a sample teaches less and less: eight coils at R = 4 come to about 0.02


def objective(encoding: Encoding, images: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the images after each cascade, and the last one's relative error, without its gradient."""
    losses = [relative_error(image, target) for image in images]
    loss = relative_error(unmeasured(encoding, images[-1], target), target)
    for each in losses:
        loss = loss + DEEP_WEIGHT * each
    return loss, losses[-1].detach()


def unmeasured(encoding: Encoding, image: Tensor, target: Tensor) -> Tensor:
    """Return `target` with the error that `image` has in the lines that were not measured: the others are kept."""
    error = image - target
    return target + error - encoding.normal(error)


def relative_error(image: Tensor, target: Tensor) -> Tensor:
    """Return the loss: the logarithms of the relative complex L2 and magnitude L1 errors, a mean over slices.

    A logarithm gives every scan the same say, however noisy or accelerated: a tenth less error is a tenth less error.
    """
    magnitude = torch.sqrt((target**2).sum(1) + 1e-12)
    size_2 = torch.sqrt((magnitude**2).mean((1, 2))).clamp_min(0.05)
    size_1 = magnitude.mean((1, 2)).clamp_min(0.02)
    error_2 = torch.sqrt(((image - target) ** 2).sum(1).mean((1, 2)) + 1e-12) / size_2
    difference = torch.sqrt((image**2).sum(1) + 1e-8) - torch.sqrt((target**2).sum(1) + 1e-8)
    error_1 = difference.abs().mean((1, 2)) / size_1
    return (torch.log(error_2 + FLOOR) + torch.log(error_1 + FLOOR)).mean()
