"""A program of steps with a switch for the memory strategy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import InvresError
from .engine import advance, run_reversible
from .recompute import draws_random_numbers, frozen_statistics
from .steps import Couple, Stack, Step

__all__ = ["Program"]

StackAndTap = tuple[Stack, Stack]


class Program(nn.Module):
    """Runs its steps under one of four strategies, all with equal output and gradients.

    stored      plain autograd: every activation is kept, O(L) memory
    checkpoint  activations are kept at sqrt(L) places and recomputed between them
    memcnn      each coupling wrapped by the MemCNN library
    reversible  our engine: nothing is kept but the final state

    tap: index of the step after which the top pair is also returned (for the VAE branch); None = no tap.
    private: True says that the caller hands over its inputs and lets nobody else keep the final stack, so that both
        may be overwritten; a network with its own stem and head does so.
    """

    def __init__(self, steps: Sequence[Step], tap: int | None = None, private: bool = False):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.tap = tap
        self.private = private

    def forward(self, inputs: Sequence[torch.Tensor], engine: str = "reversible", tapped: bool = False) -> StackAndTap:
        """inputs: the stack to start from. Returns (final stack, tapped pair or () unless `tapped`)."""
        steps: list[Step] = list(self.steps)  # type: ignore[arg-type]
        tap = self.tap if tapped else None
        if engine == "reversible" and torch.is_grad_enabled():
            return run_reversible(steps, inputs, tap, self.private)
        if tap is None:
            if not torch.is_grad_enabled():
                return advance(steps, inputs, self.private), ()
            return _run(engine, steps, tuple(inputs)), ()
        stack = _run(engine, steps[: tap + 1], tuple(inputs))
        return _run(engine, steps[tap + 1 :], stack), stack[-2:]

    def inverse(self, outputs: Sequence[torch.Tensor]) -> Stack:
        """The stack that `forward` was given, recomputed from what it returned."""
        stack = tuple(outputs)
        with torch.no_grad():
            for step in reversed(self.steps):
                stack = step.inverse(stack)  # type: ignore[operator]
        return stack


def _run(engine: str, steps: list[Step], stack: Stack) -> Stack:
    if engine == "checkpoint" and torch.is_grad_enabled():
        return _run_checkpoint(steps, stack)
    if engine == "memcnn" and torch.is_grad_enabled():
        return _run_memcnn(steps, stack)
    for step in steps:
        stack = step(stack)
    return stack


def _run_checkpoint(steps: list[Step], stack: Stack) -> Stack:
    """Chen et al., arXiv 1604.06174: sqrt(L) segments, the inside of each recomputed in backward."""
    size = max(1, math.isqrt(len(steps)))
    for start in range(0, len(steps), size):
        segment = nn.ModuleList(steps[start : start + size])

        def run(*tensors: torch.Tensor, segment: nn.ModuleList = segment) -> Stack:
            for step in segment:
                tensors = step(tensors)
            return tensors

        def contexts(segment: nn.ModuleList = segment):
            return nullcontext(), frozen_statistics(segment)

        stack = checkpoint(run, *stack, use_reentrant=False, context_fn=contexts)
    return stack


def _run_memcnn(steps: list[Step], stack: Stack) -> Stack:
    """Each coupling through memcnn (van de Leemput et al., JOSS 2019), everything else through plain autograd.

    memcnn frees the storage of the tensor it is given, so each wrapper gets a fresh concatenation that nobody else
    holds. It counts BatchNorm's statistics three times and differentiates dropout wrongly: both are refused.
    """
    # memcnn uses torch's autograd decorators and storages under their old names and warns at each of them.
    warnings.filterwarnings("ignore", module=r"memcnn\.")
    import memcnn

    for step in steps:
        if not isinstance(step, Couple):
            stack = step(stack)
            continue
        if draws_random_numbers(step):
            raise InvresError(
                "The memcnn engine gives wrong gradients with dropout.",
                hint="Set network.dropout to 0, or choose the engine 'reversible'.",
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in step.modules()):
            raise InvresError(
                "The memcnn engine updates BatchNorm's statistics three times in each step.",
                hint="Choose instance norm, or the engine 'reversible'.",
            )
        coupling = memcnn.AdditiveCoupling(step.n1, step.n2)
        wrapped = memcnn.InvertibleModuleWrapper(coupling, keep_input=False, keep_input_inverse=False)
        *beneath, x1, x2 = stack
        stack = (*beneath, *wrapped(torch.cat([x1, x2], dim=1)).chunk(2, dim=1))
    return stack
