"""Muon: momentum whose step has all directions of a weight matrix equally long (K. Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalised"]

# The quintic of the source: not an exact sign of the singular values, but in 5 rounds all are between 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # of a step per learning rate: Adam's, so that the same learning rates suit (Liu et al. 2025, equation 4)


def orthogonalised(gradient: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `gradient`, (O, ...) taken as a matrix (O, rest).

    In float32 whatever the gradient's type is: many processors have no fast 16-bit matrix product.
    """
    matrix = gradient.flatten(1).float()
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        matrix = matrix.T
    matrix = matrix / matrix.norm().clamp_min(1e-30)
    for _ in range(_ROUNDS):
        gram = matrix @ matrix.T
        matrix = _A * matrix + (_B * gram + _C * (gram @ gram)) @ matrix
    return (matrix.T if tall else matrix).reshape(gradient.shape)


class Muon(torch.optim.AdamW):
    """Orthogonalised Nesterov momentum for `matrices`, AdamW for all other parameters, at one learning rate.

    matrices: those of `parameters` that map channels to channels; (O, I, d, h, w) is a matrix of O rows, and of a
    transposed convolution (I, O, d, h, w) one of I rows. They keep one tensor of state where Adam keeps two.
    weight_decay: decoupled, of the matrices only; it bounds them, as steps of one length would let them, and with them
    the state of an invertible network, grow without end (Liu et al. 2025).
    """

    def __init__(self, parameters: Iterable[Tensor], matrices: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        # foreach=False updates one tensor after the other: the fused form holds copies of all gradients at once.
        super().__init__(parameters, lr=lr, weight_decay=0.0, foreach=False)
        self._matrices = {id(matrix) for matrix in matrices}
        self._decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._matrices and parameter.grad is not None:
                    self._turn(parameter, parameter.grad, group["lr"])
                    gradients.append((parameter, parameter.grad))
                    parameter.grad = None
        super().step()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def _turn(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # Adam looks for it when a state is loaded
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - _MOMENTUM)
        turned = orthogonalised(gradient.lerp(momentum, _MOMENTUM))
        rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
        parameter.mul_(1 - lr * self._decay)
        parameter.add_(turned, alpha=-lr * _RMS * math.sqrt(max(rows, columns)))
