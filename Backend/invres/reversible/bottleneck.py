"""An inverted bottleneck that is evaluated and differentiated for some of its expanded channels at a time.

Its inside is several times as wide as the state, and plain autograd keeps four maps of that width. But expansion and
depthwise convolution make each expanded channel from the source alone, the norms between them look at the channels of
one group, and the projection is a sum over expanded channels. So whole groups can be worked on one after the other,
exactly: what exists of the wide maps is a part, and what exists as a whole is as narrow as the source. The last norm
sees the finished sum; so in backward the sum is made once more before any part can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .differentiation import evaluate_and_differentiate
from .journal import Journal
from .sink import GradientSink
from .slabs import channel_parts

__all__ = ["Bottleneck"]

Where = tuple[slice, ...]
MAPS = 4  # of a part that are kept for its gradient
ALL = slice(None)


@dataclass(frozen=True)
class Bottleneck:
    """expand (1x1x1) -> norm -> leaky ReLU -> depthwise -> norm -> leaky ReLU -> project (1x1x1) -> norm.

    norms: group norm with affine parameters, or identity; the first two MUST have groups of one size. All
    convolutions have a bias, stride 1, and keep the size.
    """

    expand: nn.Conv3d
    depthwise: nn.Conv3d
    project: nn.Conv3d
    norms: tuple[nn.Module, nn.Module, nn.Module]
    slope: float

    def parts(self, shape: Sequence[int], journal: Journal) -> list[slice]:
        """The runs of expanded channels for a source of this shape: as few as the memory setting allows."""
        wide = self.expand.out_channels
        n, _, depth, height, width = shape
        elements = max(1, journal.part_elements // MAPS)
        return list(channel_parts(wide, self._group, -(-n * wide * depth * height * width // elements)))

    @property
    def _group(self) -> int:
        norm = self.norms[0]
        return norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1

    def apply(self, source: torch.Tensor, journal: Journal) -> torch.Tensor:
        """The output for a source (N, C, D, H, W). Call without gradients."""
        return self.norms[2](self._projected(source, journal))

    def differentiate(
        self,
        source: torch.Tensor,
        gradient: torch.Tensor,
        of_source: torch.Tensor,
        sink: GradientSink,
        journal: Journal,
        use_output: Callable[[Sequence[torch.Tensor]], None],
    ) -> None:
        """Evaluates it again (the output goes to `use_output`); adds the gradient of the source to `of_source`.

        gradient: of the output. Parameter gradients go to `sink`.
        """
        summed = self._projected(source, journal)
        (of_sum,) = evaluate_and_differentiate(self.norms[2], [summed], [gradient], sink, use_output)
        del summed
        bias = self.project.bias
        assert bias is not None
        if bias.requires_grad:
            sink.add(bias, of_sum.sum((0, 2, 3, 4)).to(bias.dtype))
        # In 16 bits the sum over the parts would be rounded with each of them.
        total = of_source if of_source.dtype == journal.dtype else torch.zeros_like(of_source, dtype=journal.dtype)
        found: dict[torch.Tensor, torch.Tensor] = {}
        for part in self.parts(source.shape, journal):
            self._differentiate_part(part, source, of_sum, total, found)
        if total is not of_source:
            of_source.add_(total)
        for parameter, value in found.items():
            sink.add(parameter, value)

    def _projected(self, source: torch.Tensor, journal: Journal) -> torch.Tensor:
        """The projection's output, the sum over all parts."""
        n, _, *size = source.shape
        total = torch.zeros((n, self.project.out_channels, *size), dtype=journal.dtype, device=source.device)
        with torch.no_grad():
            for part in self.parts(source.shape, journal):
                total.add_(self._share(source, part, [p[where] for p, where in self._parameters(part)]))
            assert self.project.bias is not None
            return total.add_(self.project.bias.view(1, -1, 1, 1, 1))

    def _differentiate_part(
        self,
        part: slice,
        source: torch.Tensor,
        of_sum: torch.Tensor,
        of_source: torch.Tensor,
        found: dict[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds what the part gives to the gradients of source and parameters; its maps go with this frame."""
        leaf = source.detach().requires_grad_(True)
        places = self._parameters(part)
        pieces = [parameter[where].detach().requires_grad_(parameter.requires_grad) for parameter, where in places]
        with torch.enable_grad():
            share = self._share(leaf, part, pieces)
        of_share = of_sum.to(share.dtype)
        edge = torch.autograd.graph.get_gradient_edge(share)
        del share
        of_leaf, *of_pieces = torch.autograd.grad(edge, [leaf, *(p for p in pieces if p.requires_grad)], of_share)
        of_source.add_(of_leaf)
        wanted = [place for place in places if place[0].requires_grad]
        for (parameter, where), value in zip(wanted, of_pieces, strict=True):
            if parameter not in found:
                found[parameter] = torch.zeros_like(parameter)
            found[parameter][where] = value

    def _parameters(self, part: slice) -> list[tuple[torch.Tensor, Where]]:
        """The parameters that are made of shares of the expanded channels, each with the place of this part's share."""
        found: list[tuple[torch.Tensor, Where]] = []
        for conv, norm in ((self.expand, self.norms[0]), (self.depthwise, self.norms[1])):
            for module in (conv, norm):
                found += [(parameter, (part,)) for parameter in module.parameters(recurse=False)]
        return [*found, (self.project.weight, (ALL, part))]

    def _share(self, source: torch.Tensor, part: slice, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the expanded channels of `part` add to the projection. pieces: in the order of `_parameters`."""
        waiting = list(pieces)

        def following(count: int) -> list[torch.Tensor]:
            taken = waiting[:count]
            del waiting[:count]
            return taken

        x = source
        for conv, norm in ((self.expand, self.norms[0]), (self.depthwise, self.norms[1])):
            weight, bias = following(2)
            groups = 1 if conv is self.expand else x.shape[1]
            x = functional.conv3d(x, weight, bias, padding=conv.padding, groups=groups)
            if isinstance(norm, nn.GroupNorm):
                scale, shift = following(2)
                x = functional.group_norm(x, x.shape[1] // self._group, scale, shift, norm.eps)
            x = functional.leaky_relu_(x, self.slope)
        (weight,) = following(1)
        return functional.conv3d(x, weight)
