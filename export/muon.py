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
    """Muon for parameters of four axes, Adam for the others; a group's `lr` is the rate of both."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    def step(self, closure: Any = None) -> None:
        """Take one step along the gradients."""
        with torch.no_grad():
            for group in self.param_groups:
                known = [each for each in group["params"] if each.grad is not None]
                self._move_layers([each for each in known if each.ndim == 4], group["lr"])
                for each in known:
                    if each.ndim != 4:
                        self._move_number(each, group["lr"])

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

    def _move_number(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(())
        state["step"] += 1
        n = float(state["step"])
        state["mean"].lerp_(parameter.grad, 1 - ADAM_DECAY[0])
        state["square"].lerp_(parameter.grad**2, 1 - ADAM_DECAY[1])
        size = (state["square"] / (1 - ADAM_DECAY[1] ** n)).sqrt() + 1e-8
        scale = SCALAR_RATE if parameter.numel() < FEW else 1.0
        parameter.add_(state["mean"] / (1 - ADAM_DECAY[0] ** n) / size, alpha=-rate * scale)


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
