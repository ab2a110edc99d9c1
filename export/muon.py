"""Muon: gradient descent in which each convolution moves by an orthogonal step.

A convolution's momentum, as a matrix (out, in · kernel), is replaced by the nearest matrix with equal singular values,
so that every direction of the layer learns at one pace; all other parameters take Adam's steps.
Source: Jordan et al., "Muon: an optimizer for hidden layers" (2024), with the scale of Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
N_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial
ADAM_SIZE = 0.2  # usual root mean square of Adam's steps, which Muon's are scaled to
ADAM_DECAY = (0.9, 0.99)
SCALAR_RATE = 10.0  # times the rate, for the few numbers a layer does not hold: they should settle early
FEW = 8
MOST_PADDED = 1 << 24  # numbers, with the zeros


class Muon(torch.optim.Optimizer):
    """Muon for parameters of four axes, Adam for the others; a group's `lr` is the rate of both.

    decay: how much of a convolution is taken away in each step, times the rate.
    """

    def __init__(self, parameters: Any, rate: float, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": rate})
        self.decay = decay

    def step(self, closure: Any = None) -> None:
        """Take one step along the gradients."""
        with torch.no_grad():
            for group in self.param_groups:
                known = [each for each in group["params"] if each.grad is not None]
                self._move_layers([each for each in known if each.ndim == 4], group["lr"])
                self._move_numbers([each for each in known if each.ndim != 4], group["lr"])

    def _move_layers(self, layers: list[Tensor], rate: float) -> None:
        """Move convolutions; those of one shape are made orthogonal together, since a GPU waits for each small step."""
        if not layers:
            return
        momenta = [self._kept(layer, "momentum") for layer in layers]
        gradients: list[Tensor] = [layer.grad for layer in layers if layer.grad is not None]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        changes = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)  # Nesterov's look ahead
        if self.decay:
            torch._foreach_mul_(layers, 1 - rate * self.decay)
        if layers[0].is_cuda and _padded(layers) <= MOST_PADDED:
            _move_padded(layers, list(changes), rate)
            return
        by_shape: dict[torch.Size, list[int]] = {}
        for index, layer in enumerate(layers):
            by_shape.setdefault(layer.shape, []).append(index)
        for shape, alike in by_shape.items():
            stacked = torch.stack([changes[index].reshape(shape[0], -1) for index in alike])
            moved = _orthogonal(stacked) * (-rate * ADAM_SIZE * max(stacked.shape[1:]) ** 0.5)
            torch._foreach_add_([layers[index] for index in alike], list(moved.reshape(-1, *shape).unbind()))

    def _move_numbers(self, numbers: list[Tensor], rate: float) -> None:
        """Move everything else, all together."""
        if not numbers:
            return
        means = [self._kept(each, "mean") for each in numbers]
        squares = [self._kept(each, "square") for each in numbers]
        counts = [self.state[each].setdefault("step", torch.zeros(())) for each in numbers]  # stay on the host
        gradients: list[Tensor] = [each.grad for each in numbers if each.grad is not None]
        torch._foreach_add_(counts, 1)
        taken = [float(count) for count in counts]
        torch._foreach_lerp_(means, gradients, 1 - ADAM_DECAY[0])
        torch._foreach_mul_(squares, ADAM_DECAY[1])
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - ADAM_DECAY[1])
        sizes = torch._foreach_div(squares, [1 - ADAM_DECAY[1] ** n for n in taken])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, 1e-8)
        changes = torch._foreach_div(means, sizes)
        scales = [SCALAR_RATE if each.numel() < FEW else 1.0 for each in numbers]
        torch._foreach_mul_(
            changes, [-rate * scale / (1 - ADAM_DECAY[0] ** n) for scale, n in zip(scales, taken, strict=True)]
        )
        torch._foreach_add_(numbers, changes)

    def _kept(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        kept: Tensor = state[name]
        return kept


def _padded(layers: list[Tensor]) -> int:
    """Return how many numbers all layers are with the sides of the largest."""
    sides = [sorted((each.shape[0], each[0].numel())) for each in layers]
    return int(len(layers) * max(each[0] for each in sides) * max(each[1] for each in sides))


def _move_padded(layers: list[Tensor], changes: list[Tensor], rate: float) -> None:
    """Move convolutions of any shapes, all made orthogonal together: many launches cost a GPU more than zeros do.

    A matrix with rows and columns of zeros has the singular vectors of the one without them.
    """
    flat = [each.reshape(each.shape[0], -1) for each in changes]
    is_tall = [each.shape[0] > each.shape[1] for each in flat]
    wide = [each.mT if tall else each for each, tall in zip(flat, is_tall, strict=True)]
    rows, columns = (max(each.shape[axis] for each in wide) for axis in (0, 1))
    stacked = wide[0].new_zeros((len(wide), rows, columns))
    for place, each in zip(stacked, wide, strict=True):
        place[: each.shape[0], : each.shape[1]] = each
    moved = []
    for layer, found, each, tall in zip(layers, _orthogonal(stacked), wide, is_tall, strict=True):
        part = found[: each.shape[0], : each.shape[1]] * (-rate * ADAM_SIZE * max(each.shape) ** 0.5)
        moved.append((part.mT if tall else part).reshape(layer.shape))
    torch._foreach_add_(layers, moved)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Return about U Vᵀ of the singular value decompositions U S Vᵀ of (n, a, b), by Newton-Schulz iterations."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    a, b, c = COEFFICIENTS
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(N_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
