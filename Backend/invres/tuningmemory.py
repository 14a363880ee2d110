"""What a step of fine-tuning will need of a device, before it is begun, and what would be given up to make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .devices import device_info
from .events import format_bytes
from .manifest import Manifest
from .memory import has_room, predict_for
from .networks import build, with_patch
from .reduction import lighter
from .tuningplan import DEFAULTS, check_single, wanted_vae

__all__ = ["TuningMemory", "plan_tuning_memory"]

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class TuningMemory:
    """predicted_bytes: peak of a step of what would be begun; its patch (D, H, W), batch_size, memory and engine.

    fits: whether that is what was asked for, and there is room for it. reductions: what would be given up first, in
    words. free_bytes, total_bytes: of the device, None where it does not tell. sentence: all of it in words.
    """

    predicted_bytes: int
    free_bytes: int | None
    total_bytes: int | None
    fits: bool
    patch: Triple
    batch_size: int
    memory: str
    engine: str
    reductions: tuple[str, ...]
    device: str
    device_title: str
    sentence: str


def plan_tuning_memory(
    manifest: Manifest, device: torch.device, wishes: Mapping[str, Any], vae: bool | None = None
) -> TuningMemory:
    """The plan for a fine-tuning of this model. wishes: fields of `TrainingConfig`; vae: None as the model has it.

    On a card a fine-tuning gives up what does not fit before it begins; on the CPU it begins as asked.
    Raises InvresError for wishes that make no sense.
    """
    check_single(manifest)
    config = dataclasses.replace(DEFAULTS, patch=manifest.patch, **wishes)
    wanted = dataclasses.replace(manifest.network, vae=wanted_vae(manifest.network, vae))
    here = device_info(device)
    reductions: tuple[str, ...] = ()
    while True:
        with torch.device("meta"):
            network = build(with_patch(wanted, config.patch), config.engine, config.memory)
        needed = predict_for(network.config, config, network.engine, manifest.scheme.regions).peak_bytes
        enough = has_room(needed, here.free_bytes)
        found = lighter(network, config)
        if enough or device.type != "cuda" or found is None:
            break
        config, words = found
        reductions = (*reductions, words)
    plan = TuningMemory(
        predicted_bytes=needed,
        free_bytes=here.free_bytes,
        total_bytes=here.total_bytes,
        fits=enough and not reductions,
        patch=config.patch,
        batch_size=config.batch_size,
        memory=config.memory,
        engine=network.engine,
        reductions=reductions,
        device=here.name,
        device_title=here.title,
        sentence="",
    )
    return dataclasses.replace(plan, sentence=_sentence(plan, enough))


def _sentence(plan: TuningMemory, enough: bool) -> str:
    free = "" if plan.free_bytes is None else f" of {format_bytes(plan.free_bytes)} free"
    size = "x".join(map(str, plan.patch))
    text = (
        f"A training step needs about {format_bytes(plan.predicted_bytes)}{free} on {plan.device_title}, with patches "
        f"of {size} voxels."
    )
    if plan.reductions:
        text += f" What was asked for does not fit; it would begin with {', '.join(plan.reductions)}."
    if not enough:
        text += " That is more than there is: choose less memory, a smaller model, or another device."
    return text
