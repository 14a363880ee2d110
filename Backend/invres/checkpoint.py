"""Saving and restoring a training so that nothing is lost and a continued one equals an undisturbed one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from . import InvresError

__all__ = ["CHECKPOINT", "load_checkpoint", "random_state", "restore_random_state", "save_checkpoint"]

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors, numbers, texts, lists, dictionaries) whole or not at all.

    Raises OSError when the disk refuses; the older checkpoint is then still there.
    """
    path = folder / CHECKPOINT
    # Always the same name, so that what a killed process left is overwritten and never adds up.
    temporary = folder / (CHECKPOINT + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            try:
                torch.save(state, stream)
            except RuntimeError as error:  # torch's zip writer hides the disk's own error
                raise OSError(f"the checkpoint could not be written: {error}") from error
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, all of it on the CPU. Opening it never runs code.

    Raises InvresError if there is none, or if it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise InvresError(
            f"There is no checkpoint in {folder} to resume from.",
            hint="Give the folder of an earlier training, or leave --resume out.",
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
    except Exception as error:
        raise InvresError(
            f"The checkpoint {path} is damaged or is none of InvResSegment's ({type(error).__name__}).",
            hint="Train again in a new folder; the damaged file cannot be mended.",
        ) from error
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators (dropout and the VAE's sampling draw from them)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the generators back to a state from `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
