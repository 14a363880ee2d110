"""What every network shares: the output tuple, padding to the divisor, the choice of engine, the VAE branch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import InvresError
from ..networkconfig import NetworkConfig
from ..reversible import SETTINGS, Program, Readout, Step, role
from ..reversible.recompute import frozen_statistics
from .portable import Convolution
from .vae import VAEBranch

__all__ = ["Network", "NetworkOutput", "ProgramNetwork", "SegmentationNetwork", "complete_config"]

Triple = tuple[int, int, int]
Reduce = Callable[[torch.Tensor, tuple[slice, ...]], tuple[torch.Tensor, ...]]


class NetworkOutput(NamedTuple):
    """logits (N, K, D, H, W), or None where `sums` took their place (see `SegmentationNetwork`).

    reconstruction, mean, log_variance: None unless the VAE branch ran (see vae.VAEOutput).
    """

    logits: torch.Tensor | None
    reconstruction: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None
    sums: tuple[torch.Tensor, ...] | None = None


def complete_config(
    config: NetworkConfig,
    channels: tuple[int, ...],
    blocks: tuple[int, ...],
    decoder_blocks: tuple[int, ...],
    norm: Literal["instance", "group", "batch"] = "instance",
) -> NetworkConfig:
    """The configuration with all that is left open filled in: from the architecture's defaults given here, or ones.

    What is saved with weights is the filled one, so that a changed default never orphans a model.
    Raises InvresError naming the entry whose length does not fit.
    """
    if config.channels:
        levels = len(config.channels)
        if levels < 2:
            raise InvresError(f"network.channels needs two levels or more, got {list(config.channels)}.")
        channels, blocks, decoder_blocks = config.channels, (1,) * levels, (1,) * (levels - 1)
    else:
        levels = config.levels or len(channels)
        if levels > len(channels):
            raise InvresError(
                f"network.levels is {levels}, but {config.name} has {len(channels)} by default.",
                hint="Give the widths of all levels in network.channels.",
            )
        channels, blocks, decoder_blocks = channels[:levels], blocks[:levels], decoder_blocks[: levels - 1]
    full = dataclasses.replace(
        config,
        levels=levels,
        norm=norm if config.norm == "auto" else config.norm,
        channels=channels,
        blocks=config.blocks or blocks,
        decoder_blocks=config.decoder_blocks or decoder_blocks,
        strides=config.strides or ((2, 2, 2),) * (levels - 1),
    )
    for name, wanted in (("blocks", levels), ("decoder_blocks", levels - 1), ("strides", levels - 1)):
        got = len(getattr(full, name))
        if got != wanted:
            raise InvresError(
                f"network.{name} has {got} entries, but {levels} levels (network.channels) need {wanted}."
            )
    if min(full.channels) < 1 or min(full.blocks) < 0 or min(full.decoder_blocks) < 0:
        raise InvresError("network.channels must be 1 or more each, blocks and decoder_blocks 0 or more each.")
    if any(s not in (1, 2) for stride in full.strides for s in stride):
        raise InvresError("network.strides may hold only 1 and 2.")
    return full


class Network(nn.Module):
    """What the trainer knows of a network, whatever it gives.

    config: complete, so that it describes the same network when defaults have changed.
    engine: the memory strategy used when gradients are wanted; may be changed at any time.
    engines: the strategies that this network has.
    memory: how far the reversible engine goes (see `reversible.SETTINGS`); may be changed at any time.
    """

    engines: tuple[str, ...] = ("stored", "checkpoint")
    automatic_engine = "stored"
    takes_inplace_norm = False
    """Whether every norm follows a convolution whose output nobody else needs."""

    def __init__(self, config: NetworkConfig, engine: str, memory: str = "low"):
        super().__init__()
        if config.inplace_norm and not self.takes_inplace_norm:
            raise InvresError(
                f"{config.name} cannot normalise in place: its norms stand in front of convolutions, or in couplings.",
                hint="Leave network.inplace_norm out, or choose compact_fcn, unet3d or no_new_net.",
            )
        self.config = config
        if memory not in SETTINGS:
            raise InvresError(f"There is no memory setting {memory!r}; the settings are {', '.join(SETTINGS)}.")
        self.memory = memory
        self.engine = engine

    @property
    def engine(self) -> str:
        return self._engine

    @engine.setter
    def engine(self, name: str) -> None:
        name = self.automatic_engine if name == "auto" else name
        if name not in self.engines:
            raise InvresError(
                f"{self.config.name} does not run under the engine {name!r}; its engines are {', '.join(self.engines)}."
            )
        self._engine = name

    def check_input(self, x: torch.Tensor) -> None:
        """Raises InvresError unless x is (N, C, D, H, W) with the network's channels."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise InvresError(
                f"The network takes (N, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}.",
                hint="Give one volume for each of its channels.",
            )


class SegmentationNetwork(Network):
    """Base class. `forward(x)` takes (N, C, D, H, W) of any size and returns a `NetworkOutput`.

    forward(x, reduce): the logits are made box by box and never as a whole; reduce(logits, where) turns those of a box
    (indices into N, K, D, H, W) into sums over its voxels, and the output has the sums over the volume instead.
    config: complete, as `complete_config` gives it.
    """

    def __init__(self, config: NetworkConfig, engine: str, memory: str = "low"):
        super().__init__(config, engine, memory)
        strides = config.strides
        self.divisor: Triple = tuple(math.prod(s[axis] for s in strides) for axis in range(3))  # type: ignore[assignment]
        self.vae: VAEBranch | None = None
        if config.vae is not None:
            self.vae = VAEBranch(config.vae, self.bottom_width(config), config.in_channels, strides)

    def forward(self, x: torch.Tensor, reduce: Reduce | None = None) -> NetworkOutput:
        self.check_input(x)
        size = x.shape[2:]
        alone = self.config.norm == "batch" and self.training and x.shape[0] == 1
        if (alone or self.config.norm == "instance") and all(n <= d for n, d in zip(size, self.divisor, strict=True)):
            raise InvresError(
                f"Windows of {'x'.join(map(str, size))} voxels shrink to a single voxel in the deepest of the "
                f"{self.config.levels} levels of {self.config.name}, where {self.config.norm} norm needs two or more.",
                hint=f"Take a patch above {max(self.divisor)} voxels along one axis, or fewer network.levels.",
            )
        readout = None
        if reduce is not None:
            parameters = [p for module in self.head_modules() for p in module.parameters()]
            readout = Readout(self.apply_head, parameters, self.config.out_channels, size, reduce)
        found, features = self.compute(self._pad(x), self.vae is not None and self.training, readout)
        logits = None if readout is not None else found[0][:, :, : size[0], : size[1], : size[2]]
        sums = found if readout is not None else None
        if self.vae is None or features is None:
            return NetworkOutput(logits, sums=sums)
        if tuple(size) != tuple(self.vae.patch):
            raise InvresError(
                f"The VAE branch was built for patches of {list(self.vae.patch)} voxels, got {list(size)}.",
                hint="Train with that patch, or set network.vae.patch to the patch in use.",
            )
        branch = self.vae(features)
        return NetworkOutput(logits, branch.reconstruction, branch.mean, branch.log_variance, sums)

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """x: padded input. Returns (logits of x's size,) or the readout's sums; and, if wanted, the bottom features."""
        raise NotImplementedError

    def apply_head(self, *maps: torch.Tensor) -> torch.Tensor:
        """Logits from the last maps, voxel by voxel."""
        raise NotImplementedError

    def head_modules(self) -> Sequence[nn.Module]:
        """The layers that `apply_head` uses."""
        raise NotImplementedError

    def bottom_width(self, config: NetworkConfig) -> int:
        """Channels of the bottom features that `compute` returns."""
        return config.channels[-1]

    def recomputed(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """part(x), whose inside is recomputed in backward under engine="checkpoint"."""
        if self.engine == "checkpoint" and torch.is_grad_enabled():
            contexts = (nullcontext(), frozen_statistics(part))
            return checkpoint(part, x, use_reentrant=False, context_fn=lambda: contexts)
        return part(x)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Repeats the border at the far ends until every axis is a multiple of the divisor."""
        extra = [(-n) % d for n, d in zip(x.shape[2:], self.divisor, strict=True)]
        if not any(extra):
            return x
        with role("input"):
            return functional.pad(x, (0, extra[2], 0, extra[1], 0, extra[0]), mode="replicate")


class ProgramNetwork(SegmentationNetwork):
    """A network of stem -> reversible program -> head; subclasses give the program's steps.

    The stem is one 3x3x3 convolution, the head a 1x1x1 convolution (both chosen); the state between them is float32
    (float64 in tests), whatever precision the functions inside the couplings compute in: a stream in bfloat16 could
    not be inverted.
    """

    engines = ("stored", "checkpoint", "recursive", "memcnn", "reversible")
    automatic_engine = "reversible"

    def __init__(self, config: NetworkConfig, steps: list[Step], tap: int, engine: str, memory: str):
        super().__init__(config, engine, memory)
        half = config.channels[0] // 2
        self.stem = Convolution(config.in_channels, config.channels[0], config.kernel, padding=config.kernel // 2)
        self.program = Program(steps, tap=tap, private=True)
        self.program.memory = memory
        # One convolution for each half: the same as one over both, without joining them first.
        self.heads = nn.ModuleList(nn.Conv3d(half, config.out_channels, 1, bias=index == 0) for index in range(2))

    @property
    def memory(self) -> str:
        return self._memory

    @memory.setter
    def memory(self, name: str) -> None:
        self._memory = name
        if "program" in self._modules:
            self.program.memory = name

    def compute(
        self, x: torch.Tensor, wants_features: bool, readout: Readout | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        found, tapped = self.program((x,), self.engine, wants_features, self.stem, readout)
        features = torch.cat(tapped, dim=1) if wants_features else None
        return (found if readout is not None else (self.apply_head(*found),)), features

    def apply_head(self, *maps: torch.Tensor) -> torch.Tensor:
        x1, x2 = maps
        return self.heads[0](x1) + self.heads[1](x2)

    def head_modules(self) -> Sequence[nn.Module]:
        return list(self.heads)
