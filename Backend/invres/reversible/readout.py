"""The last step of a network: from the state to sums over the volume (of a loss), without a map of all logits.

Logits of 104 classes at 128^3 are 0.8 GiB, and a loss makes several maps of that size. A loss like cross entropy plus
Dice needs only sums over voxels, and its gradient only those sums again: so head and loss are evaluated box by box,
once forward and once more in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .recompute import AutocastState
from .roles import role
from .sink import GradientSink
from .slabs import Block, blocks, load

__all__ = ["Readout"]

MINIMUM_LOGITS = 2**18  # in a box: a loss makes about seven maps of it, and a box costs some dozen operators

Reduce = Callable[[torch.Tensor, Block], tuple[torch.Tensor, ...]]


class Readout:
    """head: from the maps (pieces of them, any size) to logits (N, K, d, h, w), a function of each voxel by itself.

    parameters: those of the head. reduce(logits, where): sums over the voxels of `where`, a box of the volume.
    size: (D, H, W) of the volume without padding; maps may be larger at their far ends.
    """

    def __init__(
        self,
        head: Callable[..., torch.Tensor],
        parameters: Sequence[nn.Parameter],
        classes: int,
        size: Sequence[int],
        reduce: Reduce,
    ):
        self.head = head
        self.parameters = [p for p in parameters if p.requires_grad]
        self.classes = classes
        self.size = tuple(size)
        self.reduce = reduce

    def of(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The sums, differentiable by autograd; keeps nothing but the maps themselves."""
        return _Sums.apply(self, len(maps), *maps, *self.parameters)

    @role("loss")
    def sums(self, maps: Sequence[torch.Tensor], dtype: torch.dtype, elements: int) -> tuple[torch.Tensor, ...]:
        """The sums. maps: floating point, or fixed point decoded as `dtype`. elements: about as many logits a box."""
        total: tuple[torch.Tensor, ...] = ()
        for where in self._boxes(maps[0], elements):
            found = self.reduce(self.head(*(load(m, where, dtype) for m in maps)), where)
            total = found if not total else tuple(a + b for a, b in zip(total, found, strict=True))
        return total

    @role("loss")
    def differentiate(
        self,
        maps: Sequence[torch.Tensor],
        dtype: torch.dtype,
        of_sums: Sequence[torch.Tensor | None],
        of_maps: Sequence[torch.Tensor],
        sink: GradientSink,
        elements: int,
    ) -> None:
        """Writes the gradients of the maps into `of_maps` (zeros at first), those of the parameters into `sink`."""
        found: dict[int, torch.Tensor] = {}
        for where in self._boxes(maps[0], elements):
            leaves = [load(m, where, dtype).detach().requires_grad_() for m in maps]
            with torch.enable_grad():
                sums = self.reduce(self.head(*leaves), where)
            pairs = [(s, g) for s, g in zip(sums, of_sums, strict=True) if g is not None and s.requires_grad]
            if not pairs:
                return
            outputs, after = zip(*pairs, strict=True)
            del sums, pairs
            results = torch.autograd.grad(outputs, [*leaves, *self.parameters], after, allow_unused=True)
            for target, result in zip(of_maps, results, strict=False):
                if result is not None:
                    target[where] = result
            for index, result in enumerate(results[len(leaves) :]):
                if result is not None:
                    found[index] = found[index].add_(result) if index in found else result
        for index, result in found.items():
            sink.add(self.parameters[index], result)

    def _boxes(self, like: torch.Tensor, elements: int) -> Iterator[Block]:
        return blocks(self.size, max(1, max(MINIMUM_LOGITS, elements) // (like.shape[0] * self.classes)))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, readout: Readout, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.readout, ctx.count = readout, count
        ctx.save_for_backward(*tensors)
        ctx.autocast = AutocastState.of(tensors[0])
        ctx.set_materialize_grads(False)
        ctx.elements = tensors[0].numel() // 64
        sums = readout.sums(tensors[:count], tensors[0].dtype, ctx.elements)
        ctx.mark_non_differentiable(*(s for s in sums if not s.is_floating_point()))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_sums: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        maps = ctx.saved_tensors[: ctx.count]
        of_maps = [torch.zeros_like(m) for m in maps]
        sink = GradientSink()
        with ctx.autocast.restored():
            ctx.readout.differentiate(maps, maps[0].dtype, of_sums, of_maps, sink, ctx.elements)
        return (None, None, *of_maps, *(sink.get(p) for p in ctx.readout.parameters))
