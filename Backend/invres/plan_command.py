"""`invres plan`: the memory of training a network, of fine-tuning a model or of segmenting with it, beforehand."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from . import InvresError
from .config import Recipe, TrainingConfig
from .console import check_sizes, load_torch, parse_bytes, recipe_named, say, segmenter_named
from .enhancementconfig import EnhancementConfig
from .events import Reporter, format_bytes
from .mirroring import check_mirror
from .networkconfig import NetworkConfig, VAEConfig
from .recipekeys import check_said_once, given_keys, with_values

__all__ = ["plan"]

# `memory.TrainingMemory.by_role` in words.
_ROLES = {
    "parameters": "parameters",
    "gradients": "their gradients",
    "optimizer": "optimizer",
    "input": "image and target",
    "state": "state and its gradient",
    "recompute": "maps kept or recomputed",
    "loss": "head and loss",
}
_CHOICES = ("engine", "precision", "memory", "optimizer")
_OPTIONS = {
    **{f"training.{key}": key for key in ("patch", *_CHOICES)},
    **{"training.batch_size": "batch", "network.name": "network", "network.vae": "vae"},
    **{"network.in_channels": "channels", "network.out_channels": "classes"},
}
"""Keys of a recipe that have an option of their own."""
CHANNELS = CLASSES = 4  # unless the recipe tells; as the networks are compared here
TENSOR = 6  # components
PATCHES = {False: (128, 128, 128), True: (11, 11, 11)}  # whether the network enhances; the second is published


_OF_STEPS = ("patch", "channels", "classes", "batch", "recipe", "network", "vram", "measure", "set")
_OF_VOLUMES = ("shape", "roi_shape", "mirror", "window", "locate")


def plan(options: argparse.Namespace, report: Reporter) -> None:
    if options.training and not options.model:
        raise InvresError(
            "`invres plan --training` needs the model: --model M.",
            hint="Without a model, leave --training out: then a network is planned.",
        )
    if options.training:
        _refuse(options, (*_OF_STEPS, *_OF_VOLUMES, "spacing"), "do not count for fine-tuning; the model has its sizes")
    elif options.model:
        of_training = (*_OF_STEPS, *_CHOICES, "vae")
        _refuse(options, of_training, "are for training a network, and --model asks for segmenting")
    else:
        _refuse(options, _OF_VOLUMES, "are for segmenting, which needs --model M")
    if options.model:
        (_plan_tuning if options.training else _plan_segmentation)(options, report)
    else:
        _plan_training(options, report)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raises InvresError where options are given that would not count: their absence in the answer is not seen."""
    given = {name: getattr(options, name) for name in names}
    # Not None alone: without the options, --window has zeros, --set nothing and --measure is False; so is --no-vae.
    asked = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if (any(value) if name == "window" else value if name in ("measure", "set") else value is not None)
    ]
    if asked:
        raise InvresError(
            f"The following options {why}: {', '.join(asked)}.", hint="Leave them out, or see `invres plan --help`."
        )


def _plan_training(options: argparse.Namespace, report: Reporter) -> None:
    spacing: tuple[float, float, float] = tuple(options.spacing or (1.0, 1.0, 1.0))
    if min(spacing) <= 0:
        raise InvresError(f"--spacing must be three lengths above 0 mm, got {options.spacing}.")
    vram_bytes = parse_bytes(options.vram) if options.vram else 0
    config, training = _wanted(options)
    if vram_bytes and config.enhances:
        raise InvresError(
            f"--vram plans networks that segment; {config.name} enhances images.",
            hint="Leave --vram out: its patches are small, and what a step needs is said.",
        )
    load_torch(report, "cardplan")
    from .cardplan import correction, plan_for_card
    from .memory import measure_enhancement, measure_training, predict_enhancement, predict_training

    predict = predict_enhancement if config.enhances else predict_training
    size, choices = training.patch, {key: getattr(training, key) for key in _CHOICES}
    found = predict(config, size, training.batch_size, **choices)
    lines = [
        f"{config.name}, {config.in_channels} channel{'' if config.in_channels == 1 else 's'}, "
        f"{'' if config.enhances else f'{config.out_channels} classes, '}patch {'x'.join(map(str, size))}, "
        f"batch {training.batch_size}, {training.precision}, memory {training.memory}, {training.optimizer}: "
        f"a training step needs {format_bytes(found.peak_bytes)}",
        "  at its peak: " + ", ".join(f"{_ROLES[role]} {format_bytes(size)}" for role, size in found.by_role.items()),
        "  plus the CUDA context and cuDNN's workspaces on a GPU",
    ]
    extra: dict[str, Any] = {}
    factor = 1.0
    if options.measure:
        from .devices import choose_device

        device = choose_device(options.device)
        measure = measure_enhancement if config.enhances else measure_training
        measured = measure(config, size, training.batch_size, device=str(device), steps=2, **choices)
        factor = correction(found, measured)
        extra |= {"measured": dataclasses.asdict(measured), "correction": factor}
        lines.append(f"  measured in two steps on {device}: {format_bytes(measured.peak_bytes)} of live tensors")
        if measured.allocated_bytes:
            lines.append(f"  the card's allocator had {format_bytes(measured.allocated_bytes)} in use at its peak")
        margin = " with its margin for the allocator" if measured.allocated_bytes else ""
        lines.append(f"  the prediction{margin} has to be multiplied by {factor:.3f} for this machine")
    if vram_bytes:
        known = {size: found}
        fitting = plan_for_card(
            config, vram_bytes, training.batch_size, **choices, spacing_mm=spacing, correction=factor, known=known
        )
        extra["card"] = dataclasses.asdict(fitting)
        lines += fitting.sentences()
    say(report, "\n".join(lines))
    report.result(**dataclasses.asdict(found), optimizer=training.optimizer, **extra)


def _wanted(options: argparse.Namespace) -> tuple[NetworkConfig, TrainingConfig]:
    """The network and how it is trained: the recipe's, or defaults, and over both what the command line says."""
    check_sizes(options)
    recipe = recipe_named(options.recipe) if options.recipe else _default(options.network or "fully_invres")
    if options.network and options.network != recipe.network.name:
        raise InvresError(
            f"The recipe {recipe.name} trains {recipe.network.name}, and --network asks for {options.network}.",
            hint="Leave one of the two out.",
        )
    check_said_once(options.set, {key: one for key, one in _OPTIONS.items() if getattr(options, one) is not None})
    recipe, given_here = with_values(recipe, options.set), given_keys(options.set)
    channels, classes = _sizes(recipe)
    if "network.in_channels" in given_here:
        channels = recipe.network.in_channels
    if "network.out_channels" in given_here:
        classes = recipe.network.out_channels
    if options.channels is not None:
        channels, classes = options.channels, options.channels if recipe.enhancement else classes
    if options.classes is not None:
        classes = options.classes
    network = dataclasses.replace(recipe.network, in_channels=channels, out_channels=classes)
    if options.vae is not None:
        network = dataclasses.replace(network, vae=VAEConfig() if options.vae else None)
    wishes = {"patch": options.patch and tuple(options.patch), "batch_size": options.batch}
    wishes |= {key: getattr(options, key) for key in _CHOICES}
    given = {key: value for key, value in wishes.items() if value is not None}
    return network, dataclasses.replace(recipe.training, **given)


def _default(name: str) -> Recipe:
    network = NetworkConfig(name=name)
    training = TrainingConfig(patch=PATCHES[network.enhances], batch_size=1)
    enhancement = EnhancementConfig("tensor") if network.enhances else None
    return Recipe(network=network, training=training, enhancement=enhancement)


def _sizes(recipe: Recipe) -> tuple[int, int]:
    """Input and output channels: of the data, which a recipe only partly tells."""
    if recipe.enhancement is not None:
        count = TENSOR if recipe.enhancement.kind == "tensor" else 1
        return count, count
    return (1, len(recipe.labels) + 1) if recipe.label_maps is not None else (CHANNELS, CLASSES)


def _plan_segmentation(options: argparse.Namespace, report: Reporter) -> None:
    if options.shape is None or options.spacing is None:
        raise InvresError(
            "`invres plan --model` needs the volume: --shape D H W and --spacing D H W.",
            hint="Give its voxels and their size in mm, superior, anterior, right.",
        )
    manifest = segmenter_named(options.model).manifest
    load_torch(report)
    from .devices import choose_device
    from .locating import crop_shape
    from .planning import plan_segmentation

    device, shape, spacing = choose_device(options.device), tuple(options.shape), tuple(options.spacing)
    roi_shape = None if options.roi_shape is None else tuple(options.roi_shape)
    cut_from = None
    if manifest.plan.crop is not None:
        # Only the crop is prepared; the files themselves are next to nothing beside what a network needs.
        crop = crop_shape(manifest.plan.crop, shape, spacing)
        if options.locate and roi_shape is None and crop != shape:
            cut_from = shape
        shape, roi_shape = roi_shape or crop, None
    axes = manifest.mirror_axes if options.mirror is None else tuple(options.mirror)
    check_mirror(manifest.scheme, axes)
    window = tuple(options.window)
    found = plan_segmentation(
        manifest, shape, spacing, device, window, roi_shape, mirror_axes=axes, cut_from=cut_from, report=report
    )
    if options.locate:
        before = plan_segmentation(
            segmenter_named(options.locate).manifest,
            tuple(options.shape),
            spacing,
            device,
            mirror_axes=(),
            report=report,
        )
        found = found.after(before)
    say(report, found.sentence)
    report.result(**dataclasses.asdict(found))


def _plan_tuning(options: argparse.Namespace, report: Reporter) -> None:
    manifest = segmenter_named(options.model).manifest
    load_torch(report)
    from .devices import choose_device
    from .tuningmemory import plan_tuning_memory

    wishes = {key: value for key in _CHOICES if (value := getattr(options, key)) is not None}
    found = plan_tuning_memory(manifest, choose_device(options.device), wishes, options.vae)
    say(report, found.sentence)
    report.result(**dataclasses.asdict(found))
