"""How much memory a training step takes: measured in live tensor bytes, and predicted without allocating any.

Live tensor bytes count every storage that Python or autograd can still reach, exactly and on any machine. Outside the
count are the allocator's rounding, the CUDA context and cuDNN's workspaces; on a card
`torch.cuda.max_memory_allocated` is reported beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .config import LossWeights, NetworkConfig
from .networks import SegmentationNetwork, build, with_patch
from .reversible import SETTINGS, abridged
from .step import AUTOCAST_DTYPES, make_optimizer, training_step

__all__ = [
    "CONTEXT_BYTES",
    "ROUNDING",
    "LiveBytes",
    "PeakResident",
    "TrainingMemory",
    "card_bytes",
    "has_room",
    "measure_step",
    "measure_training",
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


class LiveBytes(TorchDispatchMode):
    """Context that follows the bytes of all live tensor storages: `current`, `peak`, and `peak_op` that reached it.

    Tensors made before the context are counted if given to `watch`. Works with real and with fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0
        self.peak = 0
        self.peak_op = ""
        self._known: dict[int, tuple[Any, int]] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts these tensors' storages too, each once."""
        for tensor in tensors:
            self._count(tensor, "")

    @property
    def current(self) -> int:
        self._recount()
        return self._bytes

    def reset_peak(self) -> None:
        self.peak, self.peak_op = self.current, ""

    def _count(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            reference, counted = known
            if counted == size:
                return
            self._bytes += size - counted
            self._known[key] = (reference, size)
        else:
            self._known[key] = (weakref.ref(storage, partial(self._forget, key)), size)
            self._bytes += size
        if self._bytes > self.peak and self.current > self.peak:
            self.peak, self.peak_op = self._bytes, name

    def _recount(self) -> None:
        """Storages may have been resized where no operator is seen: memcnn empties its inputs so."""
        for key, (reference, counted) in list(self._known.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != counted:
                self._bytes += storage.nbytes() - counted
                self._known[key] = (reference, storage.nbytes())

    def _forget(self, key: int, _: Any) -> None:
        _, size = self._known.pop(key)
        self._bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._count(value, name)
        if "resize" in name:
            for value in args:
                if isinstance(value, torch.Tensor):
                    self._count(value, name)
        return result


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step. activation_bytes = peak_bytes less parameters, their gradients and Adam's state.

    Of the activations, input_bytes are image and target, state_bytes the reversible engine's state and its gradient (0
    under other engines), working_bytes all the rest: what is stored, recomputed, or in work at the moment of the peak.
    allocated_bytes, reserved_bytes: peaks of a CUDA card's allocator in the same step, workspaces included; else 0.
    """

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_op: str
    input_bytes: int = 0
    state_bytes: int = 0
    working_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0


def predict_training(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int = 1,
    engine: str = "auto",
    regions: bool = False,
    precision: str = "fp32",
    memory: str = "low",
) -> TrainingMemory:
    """The peak of one training step, by running it on fake tensors: no memory is allocated, nothing is computed.

    Raises InvresError if the configuration does not describe a network.
    """
    with FakeTensorMode(), abridged():
        return measure_training(config, patch, batch_size, engine, regions, precision, memory=memory)


def measure_training(
    config: NetworkConfig,
    patch: Triple,
    batch_size: int = 1,
    engine: str = "auto",
    regions: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    memory: str = "low",
) -> TrainingMemory:
    """The peak of one training step with Adam's state in place, on made-up data, in live tensor bytes."""
    with torch.device(device):
        network = build(with_patch(config, patch), engine, memory).train()
    image = torch.zeros(batch_size, config.in_channels, *patch, device=device)
    shape = (batch_size, config.out_channels, *patch) if regions else (batch_size, *patch)
    target = torch.zeros(shape, dtype=torch.bool if regions else torch.int16, device=device)
    weights = LossWeights()

    def step(optimizer: torch.optim.Optimizer) -> None:
        training_step(network, optimizer, image, target, regions, weights, precision, check_finite=False)

    return measure_step(network, image, target, step, _state_bytes(network, image, precision))


def measure_step(
    network: torch.nn.Module,
    image: torch.Tensor,
    target: torch.Tensor,
    step: Callable[[torch.optim.Optimizer], None],
    state_bytes: int = 0,
) -> TrainingMemory:
    """The peak of `step(optimizer)` with Adam's state in place, for any network, on real or fake tensors."""
    on_card = image.is_cuda
    optimizer = make_optimizer(network, learning_rate=1e-4)
    probe = LiveBytes()
    probe.watch([image, target, *network.parameters(), *network.buffers()])
    with probe:
        # A step of zero gradients makes Adam's state; a whole training step for that would double the time.
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        probe.reset_peak()
        if on_card:
            torch.cuda.synchronize(image.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(image.device)
        step(optimizer)
    parameters = sum(_nbytes(p) for p in network.parameters())
    gradients = sum(_nbytes(p) for p in network.parameters() if p.requires_grad)
    state = sum(_nbytes(t) for t in tree_iter(optimizer.state_dict()["state"]) if isinstance(t, torch.Tensor))
    rest = probe.peak - parameters - gradients - state
    given = _nbytes(image) + _nbytes(target)
    return TrainingMemory(
        probe.peak,
        parameters,
        gradients,
        state,
        rest,
        probe.peak_op,
        given,
        state_bytes,
        max(0, rest - given - state_bytes),
        torch.cuda.max_memory_allocated(image.device) if on_card else 0,
        torch.cuda.max_memory_reserved(image.device) if on_card else 0,
    )


def _state_bytes(network: SegmentationNetwork, image: torch.Tensor, precision: str) -> int:
    if network.engine != "reversible":
        return 0
    setting = SETTINGS[network.memory]
    values = image.shape[0] * network.config.channels[0]
    for size, divisor in zip(image.shape[2:], network.divisor, strict=True):
        values *= size + (-size) % divisor
    short = setting.short_gradients and precision in AUTOCAST_DTYPES
    return values * ((2 if setting.fixed_point else 4) + (2 if short else 4))


def predict_forward(config: NetworkConfig, window: Triple, batch_size: int = 1) -> tuple[int, int]:
    """Bytes of the network's parameters and buffers, and the peak that segmenting one batch of windows adds to them.

    Found on fake tensors like `predict_training`. The VAE branch takes no part in segmenting.
    """
    with FakeTensorMode(), torch.no_grad():
        network = build(dataclasses.replace(config, vae=None)).eval()
        tiles = torch.zeros(batch_size, config.in_channels, *window)
        held = [*network.parameters(), *network.buffers()]
        probe = LiveBytes()
        probe.watch([tiles, *held])
        with probe:
            # The average over mirrored predictions is a second map of the logits' size.
            logits = network(tiles).logits.float()
            logits = logits / 1
    weights = sum(_nbytes(tensor) for tensor in held)
    return weights, probe.peak - weights


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
