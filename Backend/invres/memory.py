"""How much memory a training step takes: measured in live tensor bytes, and predicted without allocating any.

On a card the peak of the allocator is reported beside the live bytes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_iter

from .config import LossWeights, TrainingConfig
from .hollow import run_without_values
from .livebytes import LiveBytes
from .networkconfig import NetworkConfig
from .networks import BORDER, build, build_enhancer, build_predictor, with_patch
from .reversible import abridged, role
from .slidingwindow import mirrored_logits
from .step import enhancement_step, make_optimizer, training_step

__all__ = [
    "CONTEXT_BYTES",
    "ROUNDING",
    "PeakResident",
    "TrainingMemory",
    "card_bytes",
    "has_room",
    "measure_enhancement",
    "measure_step",
    "measure_training",
    "predict_enhancement",
    "predict_for",
    "predict_forward",
    "predict_training",
]

Triple = tuple[int, int, int]

CONTEXT_BYTES = 800 * 2**20
"""Of a card, besides live tensors: the CUDA context with its kernels, and cuDNN's workspaces."""
ROUNDING = 1.08
"""The allocator's blocks are larger than the tensors in them."""
MARGIN = 1.1
"""Of what a running process sees free, part goes to the same two and to the rest of the machine."""


def card_bytes(peak_bytes: int) -> int:
    """Bytes that a whole card must have for so many live ones: with rounding, context and workspaces."""
    return round(peak_bytes * ROUNDING) + CONTEXT_BYTES


def has_room(peak_bytes: int, free_bytes: int | None) -> bool:
    """Whether so many live bytes fit into what is free now; where that is not known, they are taken to."""
    return free_bytes is None or peak_bytes * MARGIN <= free_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step. activation_bytes: peak_bytes less parameters, gradients and the optimizer's state.

    by_role: what is alive at the peak, by what it is for (`reversible.ROLES`); the sum is peak_bytes. Gradients and the
    optimizer's temporaries that are not there at that moment are not in it. gradients: of the parameters; input: image,
    its padded copy, and target; state: the reversible engine's, and its gradient; recompute: maps that functions keep
    for backward (all of them under `stored`), recompute or work on; loss: head and loss.
    allocated_bytes, reserved_bytes: peaks of a CUDA card's allocator in the same step, workspaces included; else 0.
    card_used_bytes: what the driver counts as used on the whole card after it: the allocator's, the CUDA context, and
    other programs, if there are any; else 0.
    """

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_op: str
    by_role: dict[str, int] = field(default_factory=dict)
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    card_used_bytes: int = 0


@functools.lru_cache(maxsize=256)
def predict_training(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int = 1,
    engine: str = "auto",
    regions: bool = False,
    precision: str = "fp32",
    memory: str = "low",
    optimizer: str = "adam",
) -> TrainingMemory:
    """The peak of one training step, by running it on hollow tensors: no memory is allocated, nothing is computed.

    What was asked for before is remembered: a search for what fits comes back to the same sizes, and so does a slider.
    So all that ask get the same object, and none may change its `by_role`.
    Raises InvresError if the configuration does not describe a network.
    """

    def step() -> TrainingMemory:
        with abridged():
            return measure_training(
                config, patch, batch_size, engine, regions, precision, memory=memory, optimizer=optimizer
            )

    return run_without_values(step)


def predict_for(network: NetworkConfig, config: TrainingConfig, engine: str, regions: bool) -> TrainingMemory:
    """`predict_training` of a network with the patch, batch, precision and memory setting of a training."""
    return predict_training(
        network,
        config.patch,
        config.batch_size,
        engine,
        regions,
        config.precision,
        config.memory,
        config.optimizer,
    )


def measure_training(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int = 1,
    engine: str = "auto",
    regions: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    memory: str = "low",
    steps: int = 1,
    optimizer: str = "adam",
) -> TrainingMemory:
    """The peak of training steps with the optimizer's state in place, on made-up data, in live tensor bytes."""
    with torch.device(device):
        network = build(with_patch(config, patch), engine, memory).train()
    image = torch.zeros(batch_size, config.in_channels, *patch, device=device)
    shape = (batch_size, config.out_channels, *patch) if regions else (batch_size, *patch)
    target = torch.zeros(shape, dtype=torch.bool if regions else torch.int16, device=device)
    weights = LossWeights()

    def step(adapt: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            training_step(network, adapt, image, target, regions, weights, precision, check_finite=False)

    return measure_step(network, image, target, step, optimizer)


def predict_enhancement(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int,
    engine: str = "auto",
    precision: str = "fp32",
    memory: str = "low",
    optimizer: str = "adam",
) -> TrainingMemory:
    """`predict_training` for a network of image quality transfer."""

    def step() -> TrainingMemory:
        with abridged():
            return measure_enhancement(config, patch, batch_size, engine, precision, memory=memory, optimizer=optimizer)

    return run_without_values(step)


def measure_enhancement(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    memory: str = "low",
    steps: int = 1,
    optimizer: str = "adam",
) -> TrainingMemory:
    """`measure_training` for a network of image quality transfer. patch: of the input, (D, H, W)."""
    with torch.device(device):
        network = build_enhancer(config, engine, memory).train()
    image = torch.zeros(batch_size, config.in_channels, *patch, device=device)
    channels = config.out_channels * math.prod(network.config.strides[0])
    target = torch.zeros(batch_size, channels, *(size - 2 * BORDER for size in patch), device=device)

    def step(adapt: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            enhancement_step(network, adapt, image, target, precision, check_finite=False)

    return measure_step(network, image, target, step, optimizer)


def measure_step(
    network: torch.nn.Module,
    image: torch.Tensor,
    target: torch.Tensor,
    step: Callable[[torch.optim.Optimizer], None],
    kind: str = "adam",
) -> TrainingMemory:
    """The peak of `step(optimizer)` with the optimizer's state in place, for any network, on real or hollow tensors."""
    on_card = image.is_cuda
    optimizer = make_optimizer(network, learning_rate=1e-4, kind=kind)
    probe = LiveBytes()
    probe.watch([image, target], "input")
    probe.watch([*network.parameters(), *network.buffers()], "parameters")
    with probe:
        # A step of zero gradients makes the state; a whole training step for that would double the time.
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with role("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        probe.reset_peak()
        if on_card:
            torch.cuda.synchronize(image.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(image.device)
        step(optimizer)
        probe.note("gradients", tuple(p.grad for p in network.parameters() if p.grad is not None))
    parameters = sum(_nbytes(p) for p in network.parameters())
    gradients = sum(_nbytes(p) for p in network.parameters() if p.requires_grad)
    state = sum(_nbytes(t) for t in tree_iter(optimizer.state_dict()["state"]) if isinstance(t, torch.Tensor))
    return TrainingMemory(
        probe.peak,
        parameters,
        gradients,
        state,
        probe.peak - parameters - gradients - state,
        probe.peak_op,
        probe.peak_by_role(),
        torch.cuda.max_memory_allocated(image.device) if on_card else 0,
        torch.cuda.max_memory_reserved(image.device) if on_card else 0,
        _used_bytes(image.device) if on_card else 0,
    )


def _used_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@functools.lru_cache(maxsize=256)
def predict_forward(
    config: NetworkConfig, window: Triple, batch_size: int = 1, members: int = 1, mirrored: bool = False
) -> tuple[int, int]:
    """Bytes of the network's parameters and buffers, and the peak that segmenting one batch of windows adds to them.

    members: of an ensemble. mirrored: whether predictions of mirrored windows are averaged. Found on hollow tensors
    like `predict_training`. The VAE branch takes no part in segmenting.
    """

    def pass_through() -> tuple[int, int]:
        with torch.no_grad():
            network = build_predictor(config, members).eval()
            tiles = torch.zeros(batch_size, config.in_channels, *window)
            held = [*network.parameters(), *network.buffers()]
            probe = LiveBytes()
            probe.watch([tiles, *held])
            with probe:
                mirrored_logits(network, tiles, [(), (0,)] if mirrored else [()])  # more flips hold no more
            weights = sum(_nbytes(tensor) for tensor in held)
            return weights, probe.peak - weights

    return run_without_values(pass_through)


class PeakResident:
    """How far this process's main memory grows from here on at its peak; None where the system does not tell."""

    def __init__(self) -> None:
        self._start = None
        with contextlib.suppress(OSError):
            # Linux sets the peak back to what is used now.
            with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
                stream.write("5")
            self._start = _peak_resident_bytes()

    def growth_bytes(self) -> int | None:
        peak = _peak_resident_bytes()
        return None if self._start is None or peak is None else max(0, peak - self._start)


def _peak_resident_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="utf-8") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
