"""Our engine: one autograd Function for a whole program; backward inverts and differentiates in a single pass.

What is alive in backward is the state, its gradient, and a part of one inner function: S_state + S_grad + a working
set, however many steps the program has. Parameters are inputs of the Function, so that autograd's own machinery
(DDP's hooks, `autograd.grad`, frozen parameters, accumulation over steps) works as for any other layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .drift import Watch, difference, sample
from .fixed_point import encode
from .journal import Journal
from .lift import Lift
from .readout import Readout
from .recompute import AutocastState, frozen_statistics
from .setting import SETTINGS, MemorySetting
from .sink import GradientSink
from .state import State, same_memory
from .steps import Couple, Step

__all__ = ["Run", "advance", "run_reversible"]

OutputsAndTap = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Run:
    """What is to be run.

    tap: index of the step after which the top pair is copied out as a further output.
    private: True says that nobody else keeps the final stack or its gradients, so that backward may overwrite them
        instead of copying (saves twice the state).
    readout: turns the final pair into sums, which are then the outputs instead of the stack.
    first_index: of the step that `watch` counts as the first.
    """

    steps: tuple[Step, ...]
    tap: int | None = None
    private: bool = False
    readout: Readout | None = None
    setting: MemorySetting = SETTINGS["low"]
    watch: Watch = field(default_factory=Watch)
    first_index: int = 0

    def start(self, inputs: Sequence[torch.Tensor], owned: bool, recording: bool) -> State:
        """The state in front of the first step. Tensors of the caller are never written to unless `owned`."""
        first = inputs[0].dtype
        journal = Journal(self.setting, watch=self.watch, recording=recording)
        if isinstance(self.steps[0], Lift):
            journal.dtype = first if first == torch.float64 else torch.float32
            return State(inputs, journal=journal, fixed=self.setting.fixed_point)
        journal.dtype = first
        journal.largest = max(t.numel() for t in inputs)
        if not self.setting.fixed_point:
            return State(inputs, owned=owned, journal=journal)
        encoded = [encode(t) for t in inputs]
        for _, outside in encoded:
            journal.count_overflows(outside)
        return State([t for t, _ in encoded], owned=True, journal=journal, fixed=True)

    def first_trained(self) -> int:
        """Index of the first step with a trainable parameter; the number of steps where none has one."""
        trained = (i for i, step in enumerate(self.steps) if any(p.requires_grad for p in step.parameters()))
        return next(trained, len(self.steps))


def advance(run: Run, inputs: Sequence[torch.Tensor]) -> OutputsAndTap:
    """Runs the steps in place without gradients (inference): one state and one working set are alive.

    Returns as `run_reversible` does.
    """
    with torch.no_grad():
        state = run.start(inputs, run.private, recording=False)
        tapped: tuple[torch.Tensor, ...] = ()
        for index, step in enumerate(run.steps):
            step.advance(state)
            if index == run.tap:
                tapped = _tapped(state)
        if run.readout is not None:
            return run.readout.sums(state.tensors[-2:], state.journal.dtype, state.journal.slab_elements // 4), tapped
        return _outside(state, inputs), tapped


def run_reversible(run: Run, inputs: Sequence[torch.Tensor]) -> OutputsAndTap:
    """Runs the steps differentiably without storing activations. Returns (final stack or sums, tapped pair or ()).

    inputs: the stack to start from; never written to.
    """
    outputs = _ReversibleProgram.apply(run, len(inputs), *inputs, *unique_parameters(run))
    taps = 2 if run.tap is not None else 0
    return outputs[: len(outputs) - taps], outputs[len(outputs) - taps :]


def unique_parameters(run: Run) -> list[nn.Parameter]:
    """Every trainable parameter of the steps and the readout, once."""
    found = {id(p): p for step in run.steps for p in step.parameters() if p.requires_grad}
    if run.readout is not None:
        found |= {id(p): p for p in run.readout.parameters}
    return list(found.values())


def _outside(state: State, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The state as floating-point tensors that share no memory with one another or with the inputs."""
    outputs: list[torch.Tensor] = []
    for index in range(len(state)):
        tensor = state[index]
        shared = any(tensor is t for t in inputs) or any(same_memory(tensor, t) for t in outputs)
        outputs.append(tensor.clone() if shared else tensor)
    return tuple(outputs)


class _ReversibleProgram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = tensors[:count]
        ctx.run, ctx.count = run, count
        ctx.parameters = tensors[count:]
        ctx.autocast = AutocastState.of(tensors[0])
        ctx.set_materialize_grads(False)
        state = run.start(inputs, owned=False, recording=True)
        tapped: tuple[torch.Tensor, ...] = ()
        journal, watched = state.journal, run.watch.due
        journal.wants_input_gradient = any(ctx.needs_input_grad[2 : 2 + count])
        for index, step in enumerate(run.steps):
            if watched and isinstance(step, Couple):
                journal.samples[index] = (sample(state.tensors[-2]), sample(state.tensors[-1]))
            step.advance(state)
            if index == run.tap:
                tapped = _tapped(state)
        ctx.journal = journal
        # In front of it nobody wants a gradient, as where a fine-tuning freezes the encoder.
        ctx.first = 0 if journal.wants_input_gradient else run.first_trained()
        # Kept as aliases, not with save_for_backward: autograd would hold those alive until backward has ended,
        # while here every tensor goes as soon as it has been inverted. The version check below stands in for its guard.
        if run.readout is not None:
            outputs = run.readout.sums(state.tensors[-2:], journal.dtype, journal.slab_elements // 4)
            ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
            ctx.finals, ctx.guarded = state.tensors, []
        else:
            outputs = _outside(state, inputs)
            ctx.finals = [o.detach() if o is t else t for o, t in zip(outputs, state.tensors, strict=True)]
            ctx.guarded = list(ctx.finals)
        ctx.guarded += [t.detach() for t in journal.stash if any(same_memory(t, i) for i in inputs)]
        ctx.versions = [t._version for t in ctx.guarded]
        ctx.parameter_versions = [p._version for p in ctx.parameters]
        return (*outputs, *tapped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        finals, ctx.finals = ctx.finals, None
        run, journal = ctx.run, ctx.journal
        if finals is None:
            raise RuntimeError(
                "Backward ran a second time through a reversible program, which frees its state the first time. "
                "Run the forward again, or use engine='stored' where retain_graph=True is needed."
            )
        if [t._version for t in ctx.guarded] != ctx.versions:
            raise RuntimeError(
                "The output of a reversible program was changed in place before backward, so its input cannot be "
                "recomputed. Change a copy instead (y = y + 1, not y += 1)."
            )
        if [p._version for p in ctx.parameters] != ctx.parameter_versions:
            raise RuntimeError(
                "A parameter of a reversible program was changed in place between forward and backward, so its input "
                "cannot be recomputed. Run backward before the optimizer's step."
            )
        ctx.guarded = None
        fixed = run.setting.fixed_point
        state = State(finals, owned=run.private or fixed or run.readout is not None, journal=journal, fixed=fixed)
        short = run.setting.short_gradients and ctx.autocast.enabled and journal.dtype == torch.float32
        kind = ctx.autocast.dtype if short else journal.dtype
        del finals
        sink = GradientSink()
        taps = 2 if run.tap is not None else 0
        of_outputs, tapped = incoming[: len(incoming) - taps], incoming[len(incoming) - taps :]
        del incoming
        if run.readout is not None:
            gradients = State([torch.zeros_like(t, dtype=kind) for t in state.tensors], owned=True, journal=journal)
            with ctx.autocast.restored():
                run.readout.differentiate(
                    state.tensors[-2:],
                    journal.dtype,
                    of_outputs,
                    gradients.tensors[-2:],
                    sink,
                    journal.slab_elements // 4,
                )
        else:
            gradients = State(
                [
                    torch.zeros_like(t, dtype=kind) if g is None else g.to(kind)
                    for t, g in zip(state.tensors, of_outputs, strict=True)
                ],
                owned=run.private,
                journal=journal,
            )
        del of_outputs
        for index in reversed(range(ctx.first, len(run.steps))):
            if index == run.tap:
                for position, gradient in zip((-2, -1), tapped, strict=True):
                    if gradient is not None:
                        gradients.add(position, gradient)
                tapped = ()
            step = run.steps[index]
            with ctx.autocast.restored(), frozen_statistics(step):
                step.retreat(state, gradients, sink)
            if index in journal.samples:
                found = (sample(state.tensors[-2]), sample(state.tensors[-1]))
                run.watch.errors[index - run.first_index] = difference(found, journal.samples.pop(index))
        needed = ctx.needs_input_grad[2 : 2 + ctx.count]
        # Where the walk ended before the first step, the stack may have another length than the inputs.
        found_gradients = gradients.tensors if any(needed) else [None] * ctx.count
        of_inputs = [g if wanted else None for g, wanted in zip(found_gradients, needed, strict=False)]
        return (None, None, *of_inputs, *(sink.get(p) for p in ctx.parameters))


def _tapped(state: State) -> tuple[torch.Tensor, ...]:
    """Copies of the top pair: what lies in the state goes on being changed."""
    return tuple(state[i].clone() if state[i] is state.tensors[i] else state[i] for i in (-2, -1))
