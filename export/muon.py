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
                layers = [each for each in known if each.ndim == 4]
                numbers = [each for each in known if each.ndim != 4]
                if self.decay and layers:
                    torch._foreach_mul_(layers, 1 - group["lr"] * self.decay)
                if layers and layers[0].is_cuda:
                    self._move_padded(layers, group["lr"])
                else:
                    self._move_layers(layers, group["lr"])
                if numbers:
                    self._move_numbers(numbers, group["lr"])

    def _move_layers(self, layers: list[Tensor], rate: float) -> None:
        """Move convolutions; those of one shape are made orthogonal together."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for layer in layers:
            by_shape.setdefault(layer.shape, []).append(layer)
        for shape, alike in by_shape.items():
            changes = []
            for layer in alike:
                momentum = self.state[layer].setdefault("momentum", torch.zeros_like(layer))
                momentum.mul_(MOMENTUM).add_(layer.grad)
                changes.append((layer.grad + MOMENTUM * momentum).reshape(shape[0], -1))  # Nesterov's look ahead
            moved = _orthogonal(torch.stack(changes)) * (ADAM_SIZE * max(changes[0].shape) ** 0.5)
            for layer, change in zip(alike, moved, strict=True):
                layer.add_(change.reshape(shape), alpha=-rate)

    def _move_padded(self, layers: list[Tensor], rate: float) -> None:
        """Move convolutions, all made orthogonal together: on a GPU a hundred launches cost more than zeros do.

        A matrix with rows and columns of zeros has the singular vectors of the one without them.
        """
        momenta = [self.state[each].setdefault("momentum", torch.zeros_like(each)) for each in layers]
        slopes = [each.grad for each in layers if each.grad is not None]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, slopes)
        changes = []
        for change in torch._foreach_add(slopes, momenta, alpha=MOMENTUM):
            flat = change.reshape(change.shape[0], -1)
            changes.append(flat.mT if flat.shape[0] > flat.shape[1] else flat)
        rows, columns = (max(each.shape[axis] for each in changes) for axis in (0, 1))
        stacked = changes[0].new_zeros((len(changes), rows, columns))
        for place, each in zip(stacked, changes, strict=True):
            place[: each.shape[0], : each.shape[1]] = each
        for layer, moved, each in zip(layers, _orthogonal(stacked), changes, strict=True):
            found = moved[: each.shape[0], : each.shape[1]]
            found = found if each.shape[0] == layer.shape[0] and each.shape[1] == layer[0].numel() else found.mT
            layer.add_(found.reshape(layer.shape), alpha=-rate * ADAM_SIZE * max(each.shape) ** 0.5)

    def _move_numbers(self, parameters: list[Tensor], rate: float) -> None:
        """Move all that is no convolution by Adam's steps."""
        for each in parameters:
            if not self.state[each]:
                self.state[each].update(mean=torch.zeros_like(each), square=torch.zeros_like(each))
                self.state[each]["step"] = torch.zeros(())
            self.state[each]["step"] += 1
        n = [float(self.state[each]["step"]) for each in parameters]
        slopes = [each.grad for each in parameters if each.grad is not None]
        means = [self.state[each]["mean"] for each in parameters]
        squares = [self.state[each]["square"] for each in parameters]
        torch._foreach_lerp_(means, slopes, 1 - ADAM_DECAY[0])
        torch._foreach_mul_(squares, ADAM_DECAY[1])
        torch._foreach_addcmul_(squares, slopes, slopes, 1 - ADAM_DECAY[1])
        sizes = torch._foreach_div(squares, [1 - ADAM_DECAY[1] ** each for each in n])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, 1e-8)
        moves = torch._foreach_div(means, sizes)
        scales = [SCALAR_RATE if each.numel() < FEW else 1.0 for each in parameters]
        torch._foreach_mul_(
            moves, [-rate * scale / (1 - ADAM_DECAY[0] ** each) for scale, each in zip(scales, n, strict=True)]
        )
        torch._foreach_add_(parameters, moves)


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
