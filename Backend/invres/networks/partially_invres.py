"""Partially-InvRes: invertible couplings inside the levels of a U-Net; pooling and interpolation between them."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from .. import InvresError
from ..networkconfig import NetworkConfig
from ..reversible import AddFromBelow, Branch, Couple, Step
from .base import ProgramNetwork, complete_config
from .blocks import CouplingFunction
from .resampling import Interpolate, Pool

__all__ = ["PartiallyInvRes"]

CHANNELS = (16, 32, 64, 128, 256)
BLOCKS = (1, 1, 2, 3, 4)
DECODER_BLOCKS = (1, 1, 2, 3)


class PartiallyInvRes(ProgramNetwork):
    """The Partially Invertible Residual Network of the paper (section 2, figure 2).

    Published: additive couplings (equation 1) inside encoder and decoder levels, max pooling down, interpolation up,
    instance norm, leaky ReLU, a VAE branch.
    Chosen (nearest exact reference: Bruegger et al., arXiv 1906.06148): 1x1x1 convolutions change the width, the skip
    connection is a sum, so that the engine gets the encoder's maps back from the decoder's by subtraction. Couplings
    grow in number with depth, where they cost almost no memory.

    widths, counts, decoder_counts, norm: the defaults.
    """

    widths: ClassVar[tuple[int, ...]] = CHANNELS
    counts: ClassVar[tuple[int, ...]] = BLOCKS
    decoder_counts: ClassVar[tuple[int, ...]] = DECODER_BLOCKS
    norm: ClassVar[Literal["instance", "group"]] = "instance"

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        config = complete_config(config, self.widths, self.counts, self.decoder_counts, self.norm)
        channels, strides = config.channels, config.strides
        if config.learnable_resampling or config.resampling != "auto":
            key = "learnable_resampling" if config.learnable_resampling else "resampling"
            raise InvresError(
                f"network.{key} belongs to fully_invres; {config.name} pools and interpolates.",
                hint="Remove it, or choose fully_invres.",
            )
        if any(width % 2 for width in channels):
            raise InvresError(f"network.channels must be even, because couplings halve them; got {list(channels)}.")
        steps: list[Step] = []

        def couple(level: int, count: int) -> None:
            half = channels[level] // 2
            steps.extend(Couple(self.function(half, config), self.function(half, config)) for _ in range(count))

        for level, stride in enumerate(strides):
            couple(level, config.blocks[level])
            steps.append(Branch(Pool(channels[level], channels[level + 1], stride)))
        couple(len(strides), config.blocks[-1])
        tap = len(steps) - 1
        for level, stride in reversed(list(enumerate(strides))):
            steps.append(AddFromBelow(Interpolate(channels[level + 1], channels[level], stride)))
            couple(level, config.decoder_blocks[level])
        super().__init__(config, steps, tap, engine, memory)

    def function(self, width: int, config: NetworkConfig) -> nn.Module:
        """N1 or N2 of a coupling; its input and output have this width."""
        return CouplingFunction(width, config)
