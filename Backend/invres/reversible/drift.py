"""How far recomputed states are from what they were: checked on samples of the state, at hardly any cost.

The inverse of a coupling is exact on paper only: where N1 or N2 is much larger than what it is added to, the small
term's last bits are lost, and gradients are taken at a state that never was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Watch", "difference", "drifting", "sample"]

SAMPLES = 4096  # values of each half, on a regular lattice


@dataclass
class Watch:
    """What is known of the last runs of a program.

    due: check the next training step. errors: index of step -> largest difference of the recomputed state in front of
    it to the true one, relative to the largest value there; scalars on the device. overflows: fixed-point sums that
    left the range since the count was last taken, or None.
    """

    due: bool = False
    errors: dict[int, torch.Tensor] = field(default_factory=dict)
    overflows: torch.Tensor | None = None


def sample(state: torch.Tensor) -> torch.Tensor:
    """A copy of about SAMPLES values of a map (N, C, D, H, W), spread evenly."""
    steps = [1] * state.ndim
    counts = list(state.shape)
    while math.prod(counts) > SAMPLES:
        axis = max(range(state.ndim), key=counts.__getitem__)
        steps[axis] += 1
        counts[axis] = -(-state.shape[axis] // steps[axis])
    return state[tuple(slice(None, None, step) for step in steps)].clone()


def difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest absolute difference of the samples relative to the largest wanted value; NaN counts as infinite."""
    worst = [
        (f.double() - w.double()).abs().amax() / w.double().abs().amax().clamp(min=1e-12)
        for f, w in zip(found, wanted, strict=True)
    ]
    return torch.stack(worst).nan_to_num(nan=torch.inf).amax()


def drifting(errors: Mapping[int, float], limit: float) -> list[int]:
    """Steps at which the error passes `limit` (walking back from the end, as backward does): the causes of drift."""
    found, behind = [], 0.0
    for index in sorted(errors, reverse=True):
        if errors[index] > limit >= behind:
            found.append(index)
        behind = errors[index]
    return found
