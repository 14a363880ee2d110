"""What fits into a given amount of GPU memory: memory setting, patch, depth and width."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from . import InvresError
from .config import MEMORY_SETTINGS, Recipe, TrainingConfig
from .events import Reporter, format_bytes
from .memory import CONTEXT_BYTES, ROUNDING, TrainingMemory, card_bytes, predict_for, predict_training
from .networkconfig import NetworkConfig
from .networks import build

__all__ = ["CardPlan", "correction", "fit_recipe", "plan_for_card"]

Triple = tuple[int, int, int]
STEP = 16  # patches grow by this many voxels
LARGEST_SIDE = 640
FIRST_GUESS = 8 * STEP
WIDTH_FACTORS = (4, 3, 2)
WHOLE_VOLUME = (240, 240, 155)  # voxels of BraTS and of many 1 mm brains


@dataclass(frozen=True)
class CardPlan:
    """What fits into `vram_bytes`. patch (D, H, W) is the largest with `memory`; needed_bytes with the margin for it.

    half: about half of that patch in every direction. block_factor: by how much the blocks of every level may be
    multiplied there (0: the network has none to choose), and width_factor by how much the widths. whole_volume_bytes:
    of a training step on a volume of 240x240x155.
    """

    vram_bytes: int
    memory: str
    patch: Triple
    needed_bytes: int
    half: Triple
    block_factor: int
    width_factor: int
    whole_volume_bytes: dict[str, int]

    def sentences(self) -> list[str]:
        """The plan in words."""
        size = "x".join(map(str, self.patch))
        half = "x".join(map(str, self.half))
        room = f"{self.block_factor} times the blocks, or " if self.block_factor else ""
        lines = [
            f"{format_bytes(self.vram_bytes)} hold a patch of {size} voxels with memory {self.memory!r}: "
            f"{format_bytes(self.needed_bytes)} with {format_bytes(CONTEXT_BYTES)} for the CUDA context and workspaces "
            f"and {round(100 * (ROUNDING - 1))} % for the allocator's rounding.",
            f"At {half} voxels there is room for {room}{self.width_factor} times the width of every level.",
        ]
        whole = "x".join(map(str, WHOLE_VOLUME))
        for memory, needed in self.whole_volume_bytes.items():
            verdict = "which fits" if needed <= self.vram_bytes else "which does not fit"
            lines.append(f"A whole volume of {whole} needs {format_bytes(needed)} with memory {memory!r}, {verdict}.")
        return lines


def correction(predicted: TrainingMemory, measured: TrainingMemory) -> float:
    """By what the prediction, on a card with its margin for rounding, has to be multiplied to be what was measured."""
    if measured.allocated_bytes:
        return measured.allocated_bytes / (card_bytes(predicted.peak_bytes) - CONTEXT_BYTES)
    return measured.peak_bytes / predicted.peak_bytes


def plan_for_card(
    config: NetworkConfig,
    vram_bytes: int,
    batch_size: int = 1,
    engine: str = "auto",
    precision: str = "fp32",
    memory: str = "low",
    optimizer: str = "adam",
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    correction: float = 1.0,
    known: Mapping[Triple, TrainingMemory] = MappingProxyType({}),
) -> CardPlan:
    """The largest patch, of equal extent in mm along the axes, then blocks and width at half of it.

    correction: by which predictions are multiplied, as found by measuring. known: predictions at hand, by patch.
    Raises InvresError if not even a patch of two steps fits.
    """

    @functools.cache
    def predicted(network: NetworkConfig, patch: Triple, setting: str = memory) -> TrainingMemory:
        if network is config and setting == memory and patch in known:
            found = known[patch]
        else:
            found = predict_training(
                network, patch, batch_size, engine, precision=precision, memory=setting, optimizer=optimizer
            )
        return dataclasses.replace(found, peak_bytes=round(found.peak_bytes * correction))

    def needed(*what: Any) -> int:
        return card_bytes(predicted(*what).peak_bytes)

    def patch_of(side: int) -> Triple:
        finest = min(spacing_mm)
        d, h, w = (max(STEP, round(side * finest / s / STEP) * STEP) for s in spacing_mm)
        return d, h, w

    side = _largest_side(lambda side: predicted(config, patch_of(side)), vram_bytes)
    if side == 0:
        raise InvresError(
            f"{format_bytes(vram_bytes)} are too little to train {config.name}: a patch of {2 * STEP} voxels takes "
            f"{format_bytes(needed(config, patch_of(2 * STEP)))} with the margin for a card.",
            hint="Choose fewer network.levels or narrower network.channels, or train on the CPU.",
        )
    half = patch_of(max(2 * STEP, side // 2))
    full, reversible = _built(config, engine)
    factor = next((f for f in WIDTH_FACTORS if needed(_wider(full, f), half) <= vram_bytes), 1)
    blocks = 0
    if (deeper := _deeper(full)) is not None:
        # What every level's blocks cost once more; under no engine do later ones cost more than the first.
        each = needed(deeper, half) - needed(full, half)
        blocks = 1 + max(0, vram_bytes - needed(full, half)) // each if each > 0 else 0
    settings = dict.fromkeys((memory, _settings(config)[-1])) if reversible else (memory,)
    whole = {setting: needed(config, WHOLE_VOLUME, setting) for setting in settings}
    patch = patch_of(side)
    return CardPlan(vram_bytes, memory, patch, needed(config, patch), half, blocks, factor, whole)


def fit_recipe(recipe: Recipe, vram_bytes: int, regions: bool, report: Reporter) -> Recipe:
    """The recipe with the mildest memory setting, and failing that the largest patch, that the card holds.

    Raises InvresError if nothing fits.
    """
    training, network = recipe.training, recipe.network
    _, reversible = _built(network, training.engine)
    settings = (
        [s for s in _settings(network) if _rank(s) >= _rank(training.memory)] if reversible else [training.memory]
    )

    @functools.cache
    def predicted(memory: str, patch: Triple) -> TrainingMemory:
        changed = dataclasses.replace(training, patch=patch, memory=memory)
        return predict_for(network, changed, training.engine, regions)

    def needed(memory: str, patch: Triple) -> int:
        return card_bytes(predicted(memory, patch).peak_bytes)

    for memory in settings:
        if needed(memory, training.patch) <= vram_bytes:
            return _with(recipe, report, vram_bytes, needed(memory, training.patch), memory=memory)
    memory, longest = settings[-1], max(training.patch)

    def patch_of(side: int) -> Triple:
        d, h, w = (max(STEP, round(p * side / longest / STEP) * STEP) for p in training.patch)
        return d, h, w

    side = _largest_side(lambda side: predicted(memory, patch_of(side)), vram_bytes)
    if side == 0 or side >= longest:
        raise InvresError(
            f"{format_bytes(vram_bytes)} are too little for the recipe {recipe.name} even with memory {memory!r}.",
            hint="Choose fewer network.levels, batch_size 1 or precision bf16, or train on the CPU.",
        )
    patch = patch_of(side)
    return _with(recipe, report, vram_bytes, needed(memory, patch), memory=memory, patch=patch)


def _with(recipe: Recipe, report: Reporter, vram_bytes: int, needed: int, **changes: object) -> Recipe:
    training: TrainingConfig = dataclasses.replace(recipe.training, **changes)  # type: ignore[arg-type]
    report.note(
        f"For {format_bytes(vram_bytes)}: patch {'x'.join(map(str, training.patch))}, memory {training.memory!r}, "
        f"which takes {format_bytes(needed)} of the card."
    )
    return dataclasses.replace(recipe, training=training)


def _settings(config: NetworkConfig) -> tuple[str, ...]:
    """Those that the network can run with; a learnable resampling leaves the grid of the last."""
    return MEMORY_SETTINGS[:-1] if config.learnable_resampling else MEMORY_SETTINGS


def _rank(memory: str) -> int:
    return MEMORY_SETTINGS.index(memory)


def _largest_side(predicted: Callable[[int], TrainingMemory], vram_bytes: int) -> int:
    """The largest multiple of STEP whose cost fits, 0 if two steps do not.

    Each prediction says where the next one should be, as what does not belong to the weights grows about like the
    volume. The answer is known once a side fits and the next larger does not.
    """
    fits, too_large = STEP, LARGEST_SIDE + STEP
    side = FIRST_GUESS
    while too_large - fits > STEP:
        found = predicted(side)
        if card_bytes(found.peak_bytes) <= vram_bytes:
            fits = side
        else:
            too_large = side
        fixed = found.parameter_bytes + found.gradient_bytes + found.optimizer_bytes
        room = (vram_bytes - CONTEXT_BYTES) / ROUNDING - fixed
        guess = side * (max(0.0, room) / max(1, found.peak_bytes - fixed)) ** (1 / 3)
        side = min(max(int(guess // STEP) * STEP, fits + STEP), too_large - STEP)
    return fits if fits >= 2 * STEP else 0


def _built(config: NetworkConfig, engine: str) -> tuple[NetworkConfig, bool]:
    """The configuration with the architecture's defaults in it, without VAE branch, and whether the engine is ours."""
    with torch.device("meta"):
        network = build(dataclasses.replace(config, vae=None), engine)
    return network.config, network.engine == "reversible"


def _deeper(config: NetworkConfig) -> NetworkConfig | None:
    """Twice the blocks at every level; None for an architecture that does not leave them to choose."""
    if not config.blocks:
        return None
    blocks, decoder_blocks = (tuple(2 * b for b in given) for given in (config.blocks, config.decoder_blocks))
    deeper = dataclasses.replace(config, blocks=blocks, decoder_blocks=decoder_blocks)
    try:
        with torch.device("meta"):
            build(deeper)
    except InvresError:
        return None
    return deeper


def _wider(config: NetworkConfig, factor: int) -> NetworkConfig:
    return dataclasses.replace(config, channels=tuple(factor * c for c in config.channels))
