"""The networks of image quality transfer: ESPCN, and ESPCN elongated by stacks of reversible blocks."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import InvresError
from ..networkconfig import NetworkConfig
from ..reversible import Couple, Program, role
from .base import Network
from .blocks import CouplingFunction
from .resampling import squeeze, unsqueeze

__all__ = ["BORDER", "ESPCN", "ElongatedESPCN", "shuffle", "unshuffle"]

BORDER = 2
"""Voxels that the output lacks at each side: two of the layers are 3x3x3 convolutions without padding."""
WIDTHS = (50, 100)
BOTTLENECK = (1, 3, 1)
BLOCKS = 4  # of ESPCN-RN4, the best model of figure 4

shuffle = unsqueeze
"""(N, s * C, D, H, W) -> (N, C, D * s0, H * s1, W * s2): from low to high resolution, as at the end of figure 2."""
unshuffle = squeeze
"""The inverse of `shuffle`: a target of high resolution as the network gives it."""


class ESPCN(Network):
    """Figure 2 of Blumberg et al. 2018: (N, C, D, H, W) -> (N, s * C', D - 4, H - 4, W - 4), to be `shuffle`d.

    Convolution 3x3x3 without padding to 50 channels, ReLU, 1x1x1 to 100, ReLU, 3x3x3 without padding to s * C', where
    s is the number of high-resolution voxels in one of low resolution. He initialisation.

    config.channels: the two widths; (50, 100) is published. config.strides: one entry, the upsampling along D, H, W;
    (2, 2, 2) is published. config.out_channels: C', of the image of high resolution. config.blocks: `ElongatedESPCN`.
    Raises InvresError for what the architecture does not have.
    """

    engines: tuple[str, ...] = ("stored",)
    default_blocks = 0

    def __init__(self, config: NetworkConfig, engine: str = "auto", memory: str = "low"):
        config = _completed(config, self.default_blocks)
        super().__init__(config, engine, memory)
        widths = (config.in_channels, *config.channels)
        stacks = []
        for place, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            halves = [[CouplingFunction(width // 2, config, BOTTLENECK) for _ in range(2)] for _ in range(blocks)]
            # What the first one is given belongs to the caller; the others may overwrite what they are given.
            stacks.append(Program([Couple(*pair) for pair in halves], private=place > 0))
            stacks[-1].memory = memory
        self.stacks = nn.ModuleList(stacks)
        outputs = (*config.channels, config.out_channels * math.prod(config.strides[0]))
        self.layers = nn.ModuleList(
            nn.Conv3d(before, after, kernel)
            for before, after, kernel in zip(widths, outputs, (config.kernel, 1, config.kernel), strict=True)
        )
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check_input(x)
        if min(x.shape[2:]) <= 2 * BORDER:
            raise InvresError(
                f"{self.config.name} needs patches of {2 * BORDER + 1} voxels or more along each axis, got "
                f"{'x'.join(map(str, x.shape[2:]))}.",
                hint="The published patch is 11x11x11.",
            )
        for place in range(2):
            x = self._hidden(place, *self._elongated(place, x))
        return self._output(*self._elongated(2, x))

    def _elongated(self, place: int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stack in front of a layer; its output is what figure 3 calls the cached activation A."""
        stack = self.stacks[place]
        if not len(stack.steps):  # type: ignore[arg-type]
            return (x,)
        return stack(x.chunk(2, dim=1), self.engine)[0]

    def _hidden(self, place: int, *parts: torch.Tensor) -> torch.Tensor:
        """ReLU(layer(parts)), of which nothing is kept but the parts, unless all is stored (figure 3c)."""

        def layer(*parts: torch.Tensor) -> torch.Tensor:
            return torch.relu_(self.layers[place](torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]))

        if self.engine == "stored" or not torch.is_grad_enabled():
            return layer(*parts)
        return checkpoint(layer, *parts, use_reentrant=False, preserve_rng_state=False)

    def _output(self, *parts: torch.Tensor) -> torch.Tensor:
        with role("loss"):
            return self.layers[2](torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])


class ElongatedESPCN(ESPCN):
    """ESPCN-RN-N (figure 3): N reversible blocks in front of each layer of ESPCN, at its input's width.

    A block is a `Couple` whose two functions are three times (batch norm, ReLU, convolution) of half the width, with
    kernels 1, 3 (padded) and 1. Each stack is a `Program` of its own. Under the engine "stored" this is the paper's
    ESPCN-RN-N-Naive; under "reversible" its low-memory execution: forward keeps only the three activations behind the
    stacks, and backward inverts each stack block by block and evaluates the layers between them again. Predictions and
    gradients are the same.

    config.blocks: (N,), or one number for each of the three stacks; the default, 4, is ESPCN-RN4. The first stack
    works on the input itself, so that an input with an odd number of channels (a scalar image) cannot be halved: there
    it is left out (0 blocks), and the stacks at 50 and 100 channels remain.
    The paper's figure gives the norm "batch"; config.norm may choose another one.
    """

    engines = ("stored", "checkpoint", "recursive", "reversible")
    automatic_engine = "reversible"
    default_blocks = BLOCKS


def _completed(config: NetworkConfig, default_blocks: int) -> NetworkConfig:
    widths = config.channels or WIDTHS
    blocks = config.blocks or (default_blocks,)
    if len(blocks) == 1:
        blocks = (blocks[0] if config.in_channels % 2 == 0 else 0, *blocks, *blocks)
    strides = config.strides or ((2, 2, 2),)
    if len(widths) != 2 or min(widths) < 1:
        raise InvresError(f"network.channels of {config.name} are two widths of 1 or more, got {list(widths)}.")
    if len(blocks) != 3 or min(blocks) < 0:
        raise InvresError(
            f"network.blocks of {config.name} are one number, or three of 0 or more for its stacks, got {list(blocks)}."
        )
    if default_blocks == 0 and any(blocks):
        raise InvresError(f"{config.name} has no blocks, got {list(blocks)}.", hint="Choose the network espcn_rn.")
    for width, count in zip((config.in_channels, *widths), blocks, strict=True):
        if count and width % 2:
            raise InvresError(
                f"The reversible blocks of {config.name} need an even number of channels, got {width}.",
                hint="Give this stack 0 blocks in network.blocks.",
            )
    if len(strides) != 1 or any(s not in (1, 2) for s in strides[0]) or max(strides[0]) < 2:
        raise InvresError(
            f"network.strides of {config.name} is one entry of 1 and 2, the upsampling of each axis, got "
            f"{[list(stride) for stride in strides]}."
        )
    if config.kernel != 3 or config.vae is not None or config.dropout or config.learnable_resampling:
        raise InvresError(
            f"{config.name} has kernels of 3 voxels and neither VAE branch, dropout nor learnt resampling."
        )
    return dataclasses.replace(
        config,
        channels=widths,
        blocks=blocks,
        strides=strides,
        norm="batch" if config.norm == "auto" else config.norm,
        negative_slope=0.0,  # ReLU, as published
    )
