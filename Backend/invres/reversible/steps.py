"""The steps a reversible program is made of; each can go forward, and back with gradients in the same pass.

A step knows three ways to run:
`forward`  differentiable and out of place, for the strategies built on plain autograd;
`advance`  without gradients and in place on a `State`;
`retreat`  restores the state before the step and turns gradients after it into gradients before it, evaluating
           every inner function once only (memcnn evaluates it twice; a `bottleneck` in parts needs it, too).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .bottleneck import Bottleneck
from .differentiation import evaluate_and_differentiate
from .fixed_point import round_to_grid
from .journal import Journal
from .recompute import AutocastState
from .sink import GradientSink
from .state import State
from .unit import Unit, apply_units, differentiate_units

__all__ = ["AddFromBelow", "Branch", "Couple", "GradientSink", "Stack", "Step"]

Stack = tuple[torch.Tensor, ...]


class Step(nn.Module):
    """Base class; a subclass MUST implement forward, advance and retreat as the module docstring says.

    `forward` takes and returns the whole stack as a tuple; `advance` and `retreat` work on the same stack in place.
    on_grid: `forward` rounds what it adds to the state as the fixed-point state does. fits_grid: False for a step
    whose result a fixed-point state cannot hold exactly.
    """

    on_grid = False
    fits_grid = True

    def forward(self, stack: Stack) -> Stack:
        raise NotImplementedError

    def inverse(self, stack: Stack) -> Stack:
        """The stack before `forward`, out of place and without gradients. Steps that keep their input have none."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse of its own")

    def advance(self, state: State) -> None:
        raise NotImplementedError

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        raise NotImplementedError

    def increment(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`value` in the state's dtype, as it is added to or pushed onto the state in `forward`."""
        return (round_to_grid(value) if self.on_grid else value).to(like.dtype)


def _lean_units(module: nn.Module) -> list[Unit] | None:
    """The units of a function that says it is made of them (`units()`), unless somebody listens inside it."""
    describe = getattr(module, "units", None)
    if describe is None:
        return None
    units: list[Unit] | None = None if _is_listened_to(module) else describe()
    return units


def _lean_bottleneck(module: nn.Module, source: torch.Tensor, journal: Journal) -> Bottleneck | None:
    """A function that says it is one (`bottleneck()`), where its wide maps are so large that parts of them are less.

    Forward and backward decide alike, as a fixed-point state needs the very same sums again.
    """
    describe = getattr(module, "bottleneck", None)
    if describe is None or _is_listened_to(module):
        return None
    found: Bottleneck | None = describe()
    return found if found is not None and len(found.parts(source.shape, journal)) > 1 else None


def _is_listened_to(module: nn.Module) -> bool:
    """True if somebody has put a hook on the module or inside it, which only its plain forward calls."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


class Couple(Step):
    """Additive coupling on the two top tensors, equation 1: y1 = x1 + N1(x2), y2 = x2 + N2(y1).

    keep: keep the input for backward instead of recomputing it (for a block that cannot be inverted accurately).
    """

    keep = False

    def __init__(self, n1: nn.Module, n2: nn.Module):
        super().__init__()
        self.n1 = n1
        self.n2 = n2

    def forward(self, stack: Stack) -> Stack:
        *beneath, x1, x2 = stack
        y1 = x1 + self.increment(self.n1(x2), x1)
        y2 = x2 + self.increment(self.n2(y1), x2)
        return (*beneath, y1, y2)

    def inverse(self, stack: Stack) -> Stack:
        """x2 = y2 - N2(y1), x1 = y1 - N1(x2)."""
        *beneath, y1, y2 = stack
        x2 = y2 - self.increment(self.n2(y1), y2)
        x1 = y1 - self.increment(self.n1(x2), y1)
        return (*beneath, x1, x2)

    def advance(self, state: State) -> None:
        if self.keep and state.journal.recording:
            state.journal.stash += [state.tensors[-2].clone(), state.tensors[-1].clone()]
        self._advance_half(state, self.n1, target=-2, source=-1)
        self._advance_half(state, self.n2, target=-1, source=-2)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        kept = [state.journal.stash.pop() for _ in range(2)] if self.keep else []
        self._retreat_half(state, gradients, sink, self.n2, target=-1, source=-2)
        if kept:
            state.writable(-1).copy_(kept[0])
        self._retreat_half(state, gradients, sink, self.n1, target=-2, source=-1)
        if kept:
            state.writable(-2).copy_(kept[1])

    @staticmethod
    def _advance_half(state: State, function: nn.Module, target: int, source: int) -> None:
        if (bottleneck := _lean_bottleneck(function, state.tensors[source], state.journal)) is not None:
            state.note_random_numbers(function)
            state.add(target, bottleneck.apply(state[source], state.journal))
            return
        units = _lean_units(function)
        if units is None:
            state.add(target, state.evaluate(function, state[source]))
            return
        state.note_random_numbers(function)
        state.writable(target)

        def add(start: int, stop: int, planes: torch.Tensor) -> None:
            state.add_planes(target, start, stop, planes)

        autocast = AutocastState.of(state.tensors[source])
        with autocast.suspended():
            apply_units(units, state.tensors[source], state.journal, add, autocast)

    @staticmethod
    def _retreat_half(
        state: State, gradients: State, sink: GradientSink, function: nn.Module, target: int, source: int
    ) -> None:
        """Undoes target += function(source); its own frame lets go of every map before the other half starts."""

        def subtract(outputs: Sequence[torch.Tensor]) -> None:
            state.add(target, outputs[0], sign=-1)

        if (bottleneck := _lean_bottleneck(function, state.tensors[source], state.journal)) is not None:
            before, after_it = gradients.writable(source), gradients.tensors[target]
            with state.same_numbers():
                bottleneck.differentiate(state[source], after_it, before, sink, state.journal, subtract)
            return
        units = _lean_units(function)
        if units is None:
            sources, after = [state[source]], [gradients[target]]
            with state.same_numbers():
                (gradient,) = evaluate_and_differentiate(function, sources, after, sink, subtract)
            gradients.add(source, gradient)
            return

        def subtract_planes(start: int, stop: int, planes: torch.Tensor) -> None:
            state.add_planes(target, start, stop, planes, sign=-1)

        state.writable(target)
        before, after_it = gradients.writable(source), gradients.tensors[target]
        autocast = AutocastState.of(state.tensors[source])
        with state.same_numbers(), autocast.suspended():
            differentiate_units(
                units, state.tensors[source], after_it, before, sink, state.journal, subtract_planes, autocast
            )


class Branch(Step):
    """Pushes (p1, p2) = module(x1, x2) and leaves (x1, x2) beneath, where they also serve as the skip connection.

    A module with `shrink(half)` and `combine(shrunk1, shrunk2)`, which together make its forward, is worked on half by
    half: one full-size map less is alive.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, stack: Stack) -> Stack:
        return (*stack, *(self.increment(p, stack[-1]) for p in self.module(stack[-2], stack[-1])))

    def advance(self, state: State) -> None:
        parts = state.evaluate(self.module, state[-2], state[-1]) if not self._by_halves else self._combined(state)
        for part in parts:
            state.push(part.to(state.journal.dtype))

    def _combined(self, state: State) -> Sequence[torch.Tensor]:
        state.note_random_numbers(self.module)
        return self.module.combine(*(self.module.shrink(state[index]) for index in (-2, -1)))  # type: ignore[operator]

    @property
    def _by_halves(self) -> bool:
        return hasattr(self.module, "shrink") and not _is_listened_to(self.module)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        for _ in range(2):
            state.pop()
        g2, g1 = gradients.pop(), gradients.pop()
        with state.same_numbers():
            if not self._by_halves:
                found = evaluate_and_differentiate(self.module, [state[-2], state[-1]], [g1, g2], sink)
                gradients.add(-2, found[0])
                gradients.add(-1, found[1])
                return
            shrink, combine = self.module.shrink, self.module.combine
            shrunk = [shrink(state[index]) for index in (-2, -1)]  # type: ignore[operator]
            of_shrunk = list(evaluate_and_differentiate(self.module, shrunk, [g1, g2], sink, part=combine))  # type: ignore[arg-type]
            del shrunk, g1, g2
            for index in (-1, -2):
                after = [of_shrunk.pop()]
                (found_half,) = evaluate_and_differentiate(_NOTHING, [state[index]], after, sink, part=shrink)  # type: ignore[arg-type]
                gradients.add(index, found_half)
                del found_half


class AddFromBelow(Step):
    """Pops (u1, u2) and adds module(u1, u2) to the pair beneath; u is kept, which costs an eighth of that pair.

    A module with `narrow(u1, u2)` and `widen(narrowed half)`, which together make its forward, is worked on half by
    half.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, stack: Stack) -> Stack:
        *beneath, s1, s2, u1, u2 = stack
        a1, a2 = self.module(u1, u2)
        return (*beneath, s1 + self.increment(a1, s1), s2 + self.increment(a2, s2))

    def advance(self, state: State) -> None:
        sources = (state[-2], state[-1])
        u2, u1 = state.pop(), state.pop()
        if state.journal.recording:
            state.journal.stash += [u1, u2]
        if not self._by_halves:
            for index, part in zip((-2, -1), state.evaluate(self.module, *sources), strict=True):
                state.add(index, part)
            return
        state.note_random_numbers(self.module)
        narrowed = list(self.module.narrow(*sources))  # type: ignore[operator]
        for index in (-1, -2):
            state.add(index, self.module.widen(narrowed.pop()))  # type: ignore[operator]

    @property
    def _by_halves(self) -> bool:
        return hasattr(self.module, "widen") and not _is_listened_to(self.module)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        u2, u1 = state.journal.stash.pop(), state.journal.stash.pop()
        state.push_part(u1)
        state.push_part(u2)
        del u1, u2
        kind = gradients[-1].dtype
        with state.same_numbers():
            found = (self._retreat_by_halves if self._by_halves else self._retreat_whole)(state, gradients, sink)
        for gradient in found:
            gradients.push(gradient.to(kind))

    def _retreat_whole(self, state: State, gradients: State, sink: GradientSink) -> Sequence[torch.Tensor]:
        def subtract(parts: Sequence[torch.Tensor]) -> None:
            state.add(-4, parts[0], sign=-1)
            state.add(-3, parts[1], sign=-1)

        sources, after = [state[-2], state[-1]], [gradients[-2], gradients[-1]]
        return evaluate_and_differentiate(self.module, sources, after, sink, subtract)

    def _retreat_by_halves(self, state: State, gradients: State, sink: GradientSink) -> Sequence[torch.Tensor]:
        narrow, widen = self.module.narrow, self.module.widen
        sources = [state[-2], state[-1]]
        of_narrowed: list[torch.Tensor] = []
        for half, (index, after) in enumerate(((-4, -2), (-3, -1))):

            def subtract(parts: Sequence[torch.Tensor], index: int = index) -> None:
                state.add(index, parts[0], sign=-1)

            narrowed = narrow(*sources)[half]  # type: ignore[operator]
            of_narrowed += evaluate_and_differentiate(
                _NOTHING,
                [narrowed],
                [gradients[after]],
                sink,
                subtract,
                part=widen,  # type: ignore[arg-type]
            )
            del narrowed
        return evaluate_and_differentiate(self.module, sources, of_narrowed, sink, part=narrow)  # type: ignore[arg-type]


_NOTHING = nn.Identity()
