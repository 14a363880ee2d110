"""The devices that can be computed on and the memory that is free on them; answers without torch as well."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import InvresError

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceInfo", "choose_device", "computation_told", "computed_as", "device_info", "list_devices"]


@dataclass(frozen=True)
class DeviceInfo:
    """One device. name: as `--device` takes it. Bytes are None where they cannot be asked for."""

    name: str
    title: str
    free_bytes: int | None
    total_bytes: int | None


def list_devices() -> tuple[list[DeviceInfo], str]:
    """All CUDA cards and the CPU, the one that "auto" takes first, and torch's version ("" where it is not there).

    A torch that cannot be imported counts as none: why it cannot is for the probe to say.
    """
    try:
        import torch
    except Exception:
        return [_cpu()], ""
    cards = [_card(torch, index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cards, _cpu()], torch.__version__


def choose_device(name: str) -> torch.device:
    """ "auto" is the first CUDA card, else the CPU. Raises InvresError for a device that is not here."""
    import torch

    cards = torch.cuda.device_count()
    there = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(cards))])
    try:
        device = torch.device(name if name != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvresError(
            f"There is no device {name!r}; here are {there}.", hint="`invres devices` tells more of each."
        )
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise InvresError(
            f"The device {name} was asked for, but torch sees {cards} CUDA card{'' if cards == 1 else 's'}; here are "
            f"{there}.",
            hint="Use --device cpu, or install a torch build with CUDA.",
        )
    return device


def device_info(device: Any) -> DeviceInfo:
    """The state of one `torch.device`."""
    if device.type != "cuda":
        return _cpu()
    import torch

    return _card(torch, device.index or 0)


def computation_told(device: Any) -> dict[str, Any]:
    """What rounding depends on, besides the make of the device: the number of threads of a CPU, which sum in another
    order, and whether a card multiplies in TF32."""
    import torch

    card = device.type == "cuda"
    tf32 = card and torch.backends.cudnn.allow_tf32
    threads = None if card else torch.get_num_threads()
    return {"device": str(device), "threads": threads, "precision": "tf32" if tf32 else "fp32"}


@contextmanager
def computed_as(told: Mapping[str, Any]) -> Iterator[None]:
    """Inside, torch computes as `computation_told` says; a number of threads or a precision that is None is left."""
    import torch

    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_num_threads(told["threads"] or threads)
        torch.backends.cudnn.allow_tf32 = tf32 if told["precision"] is None else told["precision"] == "tf32"
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32


def _card(torch: Any, index: int) -> DeviceInfo:
    free, total = torch.cuda.mem_get_info(index)
    # What this process keeps for its next tensors is as good as free.
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return DeviceInfo(f"cuda:{index}", torch.cuda.get_device_name(index), free, total)


def _cpu() -> DeviceInfo:
    free, total = _main_memory()
    return DeviceInfo("cpu", f"CPU ({os.cpu_count() or 1} threads, {platform.machine()})", free, total)


def _main_memory() -> tuple[int | None, int | None]:
    """Bytes of main memory that are available, and all."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    except ImportError:
        pass
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in stream if line.split()[1:]}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, KeyError, ValueError):
        return None, None
