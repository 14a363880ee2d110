"""Our engine: one autograd Function for a whole program; backward inverts and differentiates in a single pass.

What is alive in backward is the state, its gradient, and one inner function's graph: S_state + S_grad + a half-width
working set, however many steps the program has. Parameters are inputs of the Function, so that autograd's own
machinery (DDP's hooks, `autograd.grad`, frozen parameters, accumulation over steps) works as for any other layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .recompute import AutocastState, frozen_statistics
from .state import State
from .steps import GradientSink, Step

__all__ = ["advance", "run_reversible"]


def advance(steps: Sequence[Step], inputs: Sequence[torch.Tensor], private: bool) -> tuple[torch.Tensor, ...]:
    """Runs the steps in place without gradients (inference): one state and one working set are alive."""
    with torch.no_grad():
        state = State(inputs, owned=private)
        for step in steps:
            step.advance(state)
        return tuple(state.tensors)


def run_reversible(
    steps: Sequence[Step],
    inputs: Sequence[torch.Tensor],
    tap: int | None = None,
    private: bool = False,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Runs the steps differentiably without storing activations. Returns (final stack, tapped pair or ()).

    inputs: the stack to start from; never written to.
    tap: index of the step after which the top pair is copied out as a further output.
    private: True says that nobody else keeps the final stack or its gradients, so that backward may overwrite them
        instead of copying (saves twice the state).
    """
    parameters = unique_parameters(steps)
    outputs = _ReversibleProgram.apply(tuple(steps), tap, private, len(inputs), *inputs, *parameters)
    taps = 2 if tap is not None else 0
    return outputs[: len(outputs) - taps], outputs[len(outputs) - taps :]


def unique_parameters(steps: Sequence[Step]) -> list[nn.Parameter]:
    """Every trainable parameter of the steps, once."""
    found = {id(p): p for step in steps for p in step.parameters() if p.requires_grad}
    return list(found.values())


class _ReversibleProgram(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: tuple[Step, ...], tap: int | None, private: bool, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.steps, ctx.tap, ctx.private, ctx.count = steps, tap, private, count
        ctx.parameters = tensors[count:]
        ctx.autocast = AutocastState.of(tensors[0])
        ctx.set_materialize_grads(False)
        state, tapped = State(tensors[:count]), []
        for index, step in enumerate(steps):
            step.advance(state)
            if index == tap:
                tapped = [state[-2].clone(), state[-1].clone()]
        inputs = {id(t) for t in tensors[:count]}
        outputs = [t.clone() if id(t) in inputs else t for t in state.tensors]
        # Kept as aliases, not with save_for_backward: autograd would hold those alive until backward has ended,
        # while here every tensor goes as soon as it has been inverted. The version check below stands in for its guard.
        ctx.finals = [t.detach() for t in outputs]
        ctx.stash, ctx.random_states = state.stash, state.random_states
        ctx.versions = [t._version for t in ctx.finals]
        ctx.parameter_versions = [p._version for p in ctx.parameters]
        return (*outputs, *tapped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        finals, ctx.finals = ctx.finals, None
        if finals is None:
            raise RuntimeError(
                "Backward ran a second time through a reversible program, which frees its state the first time. "
                "Run the forward again, or use engine='stored' where retain_graph=True is needed."
            )
        if [t._version for t in finals] != ctx.versions:
            raise RuntimeError(
                "The output of a reversible program was changed in place before backward, so its input cannot be "
                "recomputed. Change a copy instead (y = y + 1, not y += 1)."
            )
        if [p._version for p in ctx.parameters] != ctx.parameter_versions:
            raise RuntimeError(
                "A parameter of a reversible program was changed in place between forward and backward, so its input "
                "cannot be recomputed. Run backward before the optimizer's step."
            )
        state = State(finals, owned=ctx.private)
        state.stash, state.random_states = ctx.stash, ctx.random_states
        of_finals, tapped = incoming[: len(finals)], incoming[len(finals) :]
        gradients = State(
            [torch.zeros_like(t) if g is None else g.to(t.dtype) for t, g in zip(finals, of_finals, strict=True)],
            owned=ctx.private,
        )
        del finals, of_finals, incoming
        sink = GradientSink()
        for index in reversed(range(len(ctx.steps))):
            if index == ctx.tap:
                for position, gradient in zip((-2, -1), tapped, strict=True):
                    if gradient is not None:
                        gradients.add(position, gradient)
            step = ctx.steps[index]
            with ctx.autocast.restored(), frozen_statistics(step):
                step.retreat(state, gradients, sink)
        needed = ctx.needs_input_grad[4:]
        of_inputs = [g if wanted else None for g, wanted in zip(gradients.tensors, needed, strict=False)]
        return (None, None, None, None, *of_inputs, *(sink.get(p) for p in ctx.parameters))
