"""Counts floating-point operations of whatever runs inside a block, by torch's own formulas for each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Operations"]


class Operations(TorchDispatchMode):
    """Context with `total`: operations of convolutions and matrix products so far, on real or hollow tensors.

    torch's own FlopCounterMode follows modules with hooks that put nodes into the graph, and these get into the way of
    gradients taken inside a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
            if func._overloadpacket is torch.ops.aten.convolution_backward:
                self.total -= _counted_too_often(formula, args, result)
        return result


def _counted_too_often(formula: Callable[..., int], args: Sequence[Any], result: Any) -> int:
    """torch's formula takes the gradient of a weight to be that of a convolution in one group."""
    groups, mask = args[-2:]
    if not mask[1]:
        return 0
    of_weight: int = formula(*args[:-1], [False, True, False], out_val=result)
    return of_weight - of_weight // groups
