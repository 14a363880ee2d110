"""The steps a reversible program is made of; each can go forward, and back with gradients in the same pass.

A step knows three ways to run:
`forward`  differentiable and out of place, for the strategies built on plain autograd;
`advance`  without gradients and in place on a `State`;
`retreat`  restores the state before the step and turns gradients after it into gradients before it, evaluating
           every inner function once only (memcnn evaluates it twice).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .state import State

__all__ = ["AddFromBelow", "Branch", "Couple", "GradientSink", "Stack", "Step", "evaluate_and_differentiate"]

Stack = tuple[torch.Tensor, ...]


class GradientSink:
    """Collects parameter gradients by identity, so that a block used twice gets the sum."""

    def __init__(self) -> None:
        self._gradients: dict[int, torch.Tensor] = {}

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        known = self._gradients.get(id(parameter))
        self._gradients[id(parameter)] = gradient if known is None else known + gradient

    def get(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return self._gradients.get(id(parameter))


class Step(nn.Module):
    """Base class; a subclass MUST implement forward, advance and retreat as the module docstring says.

    `forward` takes and returns the whole stack as a tuple; `advance` and `retreat` work on the same stack in place.
    """

    def forward(self, stack: Stack) -> Stack:
        raise NotImplementedError

    def inverse(self, stack: Stack) -> Stack:
        """The stack before `forward`, out of place and without gradients. Steps that keep their input have none."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse of its own")

    def advance(self, state: State) -> None:
        raise NotImplementedError

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        raise NotImplementedError


def evaluate_and_differentiate(
    module: nn.Module,
    sources: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    sink: GradientSink,
    use_output: Callable[[Sequence[torch.Tensor]], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Evaluates module(*sources) once, hands its output to `use_output`, and returns the gradients for `sources`.

    gradients: one for each output. Parameter gradients go to `sink`.
    """
    leaves = [source.detach().requires_grad_(True) for source in sources]
    with torch.enable_grad():
        outputs = module(*leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    matched = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    if use_output is not None:
        use_output([output.detach() for output in outputs])
    # The output itself is not needed to differentiate: keep only its edge in the graph, free its memory.
    edges = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]
    del outputs
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(edges, [*leaves, *parameters], matched, allow_unused=True)
    for parameter, gradient in zip(parameters, found[len(leaves) :], strict=True):
        sink.add(parameter, gradient)
    pairs = zip(found[: len(leaves)], leaves, strict=True)
    return tuple(torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs)


class Couple(Step):
    """Additive coupling on the two top tensors, equation 1: y1 = x1 + N1(x2), y2 = x2 + N2(y1)."""

    def __init__(self, n1: nn.Module, n2: nn.Module):
        super().__init__()
        self.n1 = n1
        self.n2 = n2

    def forward(self, stack: Stack) -> Stack:
        *beneath, x1, x2 = stack
        y1 = x1 + self.n1(x2).to(x1.dtype)
        y2 = x2 + self.n2(y1).to(x2.dtype)
        return (*beneath, y1, y2)

    def inverse(self, stack: Stack) -> Stack:
        """x2 = y2 - N2(y1), x1 = y1 - N1(x2)."""
        *beneath, y1, y2 = stack
        x2 = y2 - self.n2(y1).to(y2.dtype)
        x1 = y1 - self.n1(x2).to(y1.dtype)
        return (*beneath, x1, x2)

    def advance(self, state: State) -> None:
        state.add(-2, state.evaluate(self.n1, state[-1]))
        state.add(-1, state.evaluate(self.n2, state[-2]))

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        self._retreat_half(state, gradients, sink, self.n2, target=-1, source=-2)
        self._retreat_half(state, gradients, sink, self.n1, target=-2, source=-1)

    @staticmethod
    def _retreat_half(
        state: State, gradients: State, sink: GradientSink, function: nn.Module, target: int, source: int
    ) -> None:
        """Undoes target += function(source); its own frame lets go of every map before the other half starts."""

        def subtract(outputs: Sequence[torch.Tensor]) -> None:
            state.add(target, outputs[0], sign=-1)

        sources, after = [state[source]], [gradients[target]]
        with state.same_numbers():
            (gradient,) = evaluate_and_differentiate(function, sources, after, sink, subtract)
        gradients.add(source, gradient)


class Branch(Step):
    """Pushes (p1, p2) = module(x1, x2) and leaves (x1, x2) beneath, where they also serve as the skip connection."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, stack: Stack) -> Stack:
        return (*stack, *(p.to(stack[-1].dtype) for p in self.module(stack[-2], stack[-1])))

    def advance(self, state: State) -> None:
        dtype = state[-1].dtype
        for part in state.evaluate(self.module, state[-2], state[-1]):
            state.push(part.to(dtype))

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        for _ in range(2):
            state.pop()
        g2, g1 = gradients.pop(), gradients.pop()
        with state.same_numbers():
            found = evaluate_and_differentiate(self.module, [state[-2], state[-1]], [g1, g2], sink)
        gradients.add(-2, found[0])
        gradients.add(-1, found[1])


class AddFromBelow(Step):
    """Pops (u1, u2) and adds module(u1, u2) to the pair beneath; u is kept, which costs an eighth of that pair."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, stack: Stack) -> Stack:
        *beneath, s1, s2, u1, u2 = stack
        a1, a2 = self.module(u1, u2)
        return (*beneath, s1 + a1.to(s1.dtype), s2 + a2.to(s2.dtype))

    def advance(self, state: State) -> None:
        u2, u1 = state.pop(), state.pop()
        state.stash += [u1, u2]
        for index, part in zip((-2, -1), state.evaluate(self.module, u1, u2), strict=True):
            state.add(index, part)

    def retreat(self, state: State, gradients: State, sink: GradientSink) -> None:
        u2, u1 = state.stash.pop(), state.stash.pop()

        def subtract(parts: Sequence[torch.Tensor]) -> None:
            state.add(-2, parts[0], sign=-1)
            state.add(-1, parts[1], sign=-1)

        after = [gradients[-2], gradients[-1]]
        with state.same_numbers():
            g1, g2 = evaluate_and_differentiate(self.module, [u1, u2], after, sink, subtract)
        for half, gradient in ((u1, g1), (u2, g2)):
            state.push(half)
            gradients.push(gradient.to(half.dtype))
