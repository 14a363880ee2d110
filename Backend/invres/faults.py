"""What an error is called, in the same words on the command line and in the record of a run."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from . import InvresError

__all__ = ["Fault", "fault_of", "is_out_of_memory"]

_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    # cuDNN, where no way to compute a convolution fits: https://github.com/pytorch/pytorch/issues/108645
    "unable to find an engine to execute this computation",
    # MONAI's sliding windows, which put this in the place of what torch said.
    "seems to be oom",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Fault:
    """code: a stable word for programs, "internal" where the fault is ours. message, hint: a sentence each.

    exit_code: what the command line returns.
    """

    code: str
    message: str
    hint: str = ""
    exit_code: int = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a card or on the CPU, or Python had no memory left."""
    # By name and text: torch is not imported here, and its CPU allocator and a card's libraries raise RuntimeErrors.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def fault_of(error: BaseException) -> Fault:
    """The fault that an error stands for."""
    if isinstance(error, InvresError):
        return Fault(error.code, error.message, error.hint, error.exit_code)
    if isinstance(error, ModuleNotFoundError) and (error.name or "invres").partition(".")[0] != "invres":
        hint = "Install it (in Slicer: Install in the Setup section of the panel), then try again."
        return Fault("missing_package", f"The package {error.name} is not installed.", hint)
    if isinstance(error, KeyboardInterrupt):
        return Fault("cancelled", "Cancelled.", exit_code=130)
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f", {error.filename} could not be written" if error.filename else ""
        return Fault("disk_full", f"The disk is full{where}.", "Free some space and try again.")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        message = f"{error.filename} cannot be used: {(error.strerror or type(error).__name__).lower()}."
        hint = "Check the path and that you may read and write there."
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "Change its permissions (or those of its folder), or choose another place."
        return Fault("bad_input", message, hint)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        hint = "Use a smaller patch or crop the volume."
        return Fault("out_of_memory", "Main memory ran out.", hint, exit_code=3)
    if is_out_of_memory(error):
        hint = "Use a smaller patch, batch size 1 or bf16."
        return Fault("out_of_memory", "The GPU's memory ran out.", hint, exit_code=3)
    hint = "This is a fault in InvResSegment; please report it with the lines above."
    return Fault("internal", f"{type(error).__name__}: {error}", hint, exit_code=1)
