"""Evaluating a module once for both: its output, and the gradients of its inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .sink import GradientSink

__all__ = ["evaluate_and_differentiate"]


def evaluate_and_differentiate(
    module: nn.Module,
    sources: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    sink: GradientSink,
    use_output: Callable[[Sequence[torch.Tensor]], None] | None = None,
    part: Callable[..., torch.Tensor | Sequence[torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Evaluates module(*sources) once, hands its output to `use_output`, and returns the gradients for `sources`.

    gradients: one for each output. Parameter gradients go to `sink`. part: evaluated instead of the module as a whole.
    """
    leaves = [source.detach().requires_grad_(True) for source in sources]
    with torch.enable_grad():
        outputs = (part or module)(*leaves)
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
