"""What a training gives up, step by step, when the memory does not suffice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .configjson import to_dict
from .networks import SegmentationNetwork

__all__ = ["adapt_checkpoint", "lighter"]

THRIFTY = ("reversible", "checkpoint")  # least memory first
SMALLEST_SIDE = 16
SHRINK = 0.75


def lighter(network: SegmentationNetwork, config: TrainingConfig) -> tuple[TrainingConfig, str] | None:
    """A configuration that needs less memory, and what changed in words; None where nothing is left to give up.

    First the engine and how far it goes, which change no result; then the batch; then the patch, down to twice the
    network's divisor.
    """
    thrifty = next(engine for engine in THRIFTY if engine in network.engines)
    if network.engine != thrifty:
        words = f"the engine {thrifty} instead of {network.engine}, which needs less memory and more time"
        return dataclasses.replace(config, engine=thrifty), words
    # "lowest", the next setting, keeps the state in 16 bits: no longer the same numbers, so not without being asked.
    if network.engine == "reversible" and config.memory == "low":
        words = "the memory setting lower instead of low, which needs more time"
        return dataclasses.replace(config, memory="lower"), words
    if config.batch_size > 1:
        size = config.batch_size // 2
        return dataclasses.replace(config, batch_size=size), f"batches of {size} instead of {config.batch_size}"
    sides = [
        min(side, max(int(side * SHRINK) // divisor * divisor, 2 * divisor, SMALLEST_SIDE))
        for side, divisor in zip(config.patch, network.divisor, strict=True)
    ]
    patch = (sides[0], sides[1], sides[2])
    if patch == tuple(config.patch):
        return None
    words = f"patches of {_size(patch)} instead of {_size(config.patch)} voxels"
    return dataclasses.replace(config, patch=patch), words


def adapt_checkpoint(folder: Path, network: SegmentationNetwork) -> None:
    """Makes the checkpoint in `folder` fit `network`, where a smaller patch has changed the size of some tensors.

    These begin anew; everything else, the optimizer's memory of it included, stays. Raises OSError where the disk
    refuses; the older checkpoint is then still there.
    """
    state = load_checkpoint(folder)
    if state["network"] == to_dict(network.config):
        return
    fresh = network.state_dict()
    for key in ("weights", "best_weights"):
        if state[key] is not None:
            state[key] = {name: _fitting(state[key].get(name), tensor) for name, tensor in fresh.items()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    of_parameters: dict[int, dict[str, Any]] = state["optimizer"]["state"]
    for index, values in list(of_parameters.items()):
        if values["exp_avg"].shape != trained[index].shape:
            del of_parameters[index]
    state["network"] = to_dict(network.config)
    save_checkpoint(folder, state)


def _fitting(old: torch.Tensor | None, fresh: torch.Tensor) -> torch.Tensor:
    return fresh.detach().cpu() if old is None or old.shape != fresh.shape else old


def _size(patch: tuple[int, int, int]) -> str:
    return "x".join(map(str, patch))
