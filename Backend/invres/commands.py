"""What each verb of the command line does; heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import InvresError
from .bench_command import bench
from .config import NetworkConfig, Recipe, VAEConfig, to_dict
from .console import check_sizes, parse_bytes, recipes_dir, say, segmenter_named, spread
from .enhance_command import enhance, train_enhancement
from .evaluate_command import evaluate
from .events import Reporter, format_bytes, format_seconds
from .model_commands import describe, models
from .modelpackage import ModelPackage
from .reproduce_command import reproduce

__all__ = [
    "bench",
    "check",
    "demo",
    "describe",
    "devices",
    "enhance",
    "evaluate",
    "finetune",
    "models",
    "plan",
    "reproduce",
    "segment",
    "train",
    "worker",
]

# The network of the last segmentation, for the next one in the same process.
_kept: dict[str, Any] = {}
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


def segment(options: argparse.Namespace, report: Reporter) -> None:
    package = segmenter_named(options.model)
    _load_torch(report)
    from .inference import NetworkKeeper
    from .inference import segment as run
    from .planning import remember_speed
    from .prediction import SegmentOptions

    each = " ".join(f"--input {channel.name}=FILE" for channel in package.manifest.plan.channels)
    inputs: dict[str, Path] = {}
    for text in options.input:
        channel, separator, path = text.partition("=")
        # A path may hold "=" itself.
        if not separator or Path(text).exists():
            channel, path = "", text
        if channel in inputs:
            raise InvresError(
                f"The channel {channel} is given twice." if channel else "Two inputs have no channel name.",
                hint=f"Give each channel once, with its name: {each}.",
            )
        inputs[channel] = Path(path)
    choices = SegmentOptions(
        options.device, options.overlap, tuple(options.mirror), tuple(options.window), tuple(options.roi or ())
    )
    keeper = _kept.setdefault("keeper", NetworkKeeper())
    locate = _locator(package, options.locate, options.device) if options.locate else None
    found = run(package, inputs, options.output, choices, options.probabilities, report, keeper=keeper, locate=locate)
    settings = found["settings"]
    flips = 2 ** len(options.mirror)
    remember_speed(
        package.manifest,
        found["device"],
        settings["windows"] * flips,
        tuple(settings["window"]),
        found["seconds"]["predict"],
    )
    say(report, f"Segmentation: {found['output']}")
    for name, volume in found["volumes_ml"].items():
        say(report, f"  {name}: {volume:.2f} mL")
    say(report, f"  {format_seconds(found['seconds']['total'])} on {found['device']}")
    report.result(**found)


def _locator(package: ModelPackage, model: str, device: str) -> Callable[..., Any]:
    """Finds the boxes that the package wants to see in a whole image, with another model."""
    crop = package.manifest.plan.crop
    if crop is None:
        raise InvresError(
            f"{package.name} segments whole images, so there is nothing to locate.", hint="Leave --locate out."
        )
    other = segmenter_named(model)
    from .inference import NetworkKeeper
    from .locating import locate
    from .prediction import choose_device

    keeper = _kept.setdefault("locator", NetworkKeeper())

    def find(volumes: Any, report: Reporter) -> Any:
        return locate(other, keeper.network(other, choose_device(device)), volumes, crop, report)

    return find


def train(options: argparse.Namespace, report: Reporter) -> None:
    of_run = options.resume and options.recipe is None
    recipe = None if of_run else _changed(_recipe(options.recipe or "default"), options)
    from .cases import read_dataset
    from .labelmaps import read_label_maps
    from .trainer import StopRequest
    from .training import TrainOptions, started_recipe
    from .training import train as run

    if recipe is None:
        recipe = _changed(started_recipe(options.output), options)
    if recipe.enhancement is not None:
        train_enhancement(recipe, options, report)
        return
    if recipe.label_maps is not None:
        dataset = read_label_maps(options.data, recipe.labels)
    else:
        # A run that is resumed goes on as it was started, whatever is asked for now.
        partial = recipe.augmentation.channel_dropout > 0 or options.resume
        dataset = read_dataset(options.data, partial=partial)
    vram_bytes = parse_bytes(options.vram) if options.vram else 0
    choices = TrainOptions(
        device=options.device,
        resume=options.resume,
        fold=options.fold,
        validation_count=options.validation_count,
        licence=options.licence,
        source=options.source,
        vram_bytes=vram_bytes,
    )
    with StopRequest().listening() as stop:
        package = run(dataset, recipe, options.output, choices, report, stop)
    say(report, f"Model: {package.path}")
    for name, values in package.manifest.metrics.items():
        say(report, f"  {name}: Dice {spread(values['Dice'])} in validation")
    report.result(model=str(package.path), metrics=package.manifest.metrics, **to_dict(package.manifest.training))


def finetune(options: argparse.Namespace, report: Reporter) -> None:
    package = segmenter_named(options.model)
    wishes = {
        field: value
        for field, value in (
            ("epochs", options.epochs),
            ("early_stop_epochs", options.patience),
            ("learning_rate", options.lr),
            ("seed", options.seed),
            ("engine", options.engine),
            ("precision", options.precision),
            ("memory", options.memory),
            ("time_s", _seconds(options.time) if options.time else None),
        )
        if value is not None
    }
    recipe = _recipe(options.recipe) if options.recipe else None
    from .cases import read_dataset
    from .finetuning import finetune as run
    from .stopfile import StopFile
    from .tuningplan import TuningOptions

    choices = TuningOptions(
        device=options.device,
        resume=options.resume,
        recipe=recipe,
        wishes=wishes,
        folds=options.folds,
        validation_count=options.validation_count,
        freeze=options.freeze,
        vae=options.vae,
        synthetic=options.synthetic,
        channel_dropout=options.channel_dropout,
        spacing_mm=tuple(options.spacing) if options.spacing else None,
        normalisation=options.normalisation,
        name=options.name,
        licence=options.licence,
        promote=options.promote,
        check_base=options.check_base,
    )
    dataset = read_dataset(options.data, checked=False)
    with StopFile(options.output).listening() as stop:
        found = run(package, dataset, options.output, choices, report, stop)
    say(report, (options.output / "comparison.txt").read_text(encoding="utf-8").rstrip())
    if found["promoted"]:
        say(report, f"\nModel {found['version']}: {found['model']}")
        say(report, "`invres models import` makes it the one that its name stands for.")
    else:
        say(report, f"\nNot promoted, for it is not shown to be as good as before. Candidate: {found['model']}")
        say(report, "The same command with --resume --promote takes it all the same.")
    report.result(**found)


def check(options: argparse.Namespace, report: Reporter) -> None:
    from .cases import channels_told, described, read_dataset
    from .doctor import check_dataset, findings_table

    dataset = read_dataset(options.data, checked=False)
    findings = check_dataset(dataset, report)
    say(report, f"{dataset.name}: {len(dataset.cases)} cases, {dataset.layout}.")
    say(report, f"Channels: {', '.join(channels_told(dataset))}. Labels: {', '.join(dataset.scheme.names)}.")
    say(report, findings_table(findings))
    report.result(
        dataset=dataset.name,
        layout=dataset.layout,
        cases=len(dataset.cases),
        contents=described(dataset),
        findings=[dataclasses.asdict(finding) for finding in findings],
    )


def plan(options: argparse.Namespace, report: Reporter) -> None:
    if options.training and not options.model:
        raise InvresError(
            "`invres plan --training` needs the model: --model M.",
            hint="Without a model, leave --training out: then a network is planned.",
        )
    if options.model:
        (_plan_tuning if options.training else _plan_segmentation)(options, report)
        return
    from .cardplan import correction, plan_for_card
    from .memory import measure_training, predict_training

    check_sizes(options)
    spacing: tuple[float, float, float] = tuple(options.spacing or (1.0, 1.0, 1.0))
    if min(spacing) <= 0:
        raise InvresError(f"--spacing must be three lengths above 0 mm, got {options.spacing}.")
    vram_bytes = parse_bytes(options.vram) if options.vram else 0
    config = NetworkConfig(
        name=options.network,
        in_channels=options.channels,
        out_channels=options.classes,
        vae=VAEConfig() if options.vae else None,
    )
    size: tuple[int, int, int] = tuple(options.patch)
    choices = {"engine": options.engine, "precision": options.precision, "memory": options.memory}
    found = predict_training(config, size, options.batch, **choices)
    lines = [
        f"{options.network}, {options.channels} channels, {options.classes} classes, patch {'x'.join(map(str, size))}, "
        f"batch {options.batch}, {options.precision}, memory {options.memory}: "
        f"a training step needs {format_bytes(found.peak_bytes)}",
        "  at its peak: " + ", ".join(f"{_ROLES[role]} {format_bytes(size)}" for role, size in found.by_role.items()),
        "  plus the CUDA context and cuDNN's workspaces on a GPU",
    ]
    extra: dict[str, Any] = {}
    factor = 1.0
    if options.measure:
        from .prediction import choose_device

        device = choose_device(options.device)
        measured = measure_training(config, size, options.batch, device=str(device), steps=2, **choices)
        factor = correction(found, measured)
        extra |= {"measured": dataclasses.asdict(measured), "correction": factor}
        lines.append(f"  measured in two steps on {device}: {format_bytes(measured.peak_bytes)} of live tensors")
        if measured.allocated_bytes:
            lines.append(f"  the card's allocator had {format_bytes(measured.allocated_bytes)} in use at its peak")
        margin = " with its margin for the allocator" if measured.allocated_bytes else ""
        lines.append(f"  the prediction{margin} has to be multiplied by {factor:.3f} for this machine")
    if vram_bytes:
        fitting = plan_for_card(
            config, vram_bytes, options.batch, **choices, spacing_mm=spacing, correction=factor, known={size: found}
        )
        extra["card"] = dataclasses.asdict(fitting)
        lines += fitting.sentences()
    say(report, "\n".join(lines))
    report.result(**dataclasses.asdict(found), **extra)


def _plan_segmentation(options: argparse.Namespace, report: Reporter) -> None:
    if options.shape is None or options.spacing is None:
        raise InvresError(
            "`invres plan --model` needs the volume: --shape D H W and --spacing D H W.",
            hint="Give its voxels and their size in mm, superior, anterior, right.",
        )
    manifest = segmenter_named(options.model).manifest
    _load_torch(report)
    from .locating import crop_shape
    from .planning import plan_segmentation
    from .prediction import choose_device

    device, shape, spacing = choose_device(options.device), tuple(options.shape), tuple(options.spacing)
    roi_shape = None if options.roi_shape is None else tuple(options.roi_shape)
    if manifest.plan.crop is not None:
        # Only the crop is prepared; the files themselves are next to nothing beside what a network needs.
        shape, roi_shape = roi_shape or crop_shape(manifest.plan.crop, shape, spacing), None
    found = plan_segmentation(manifest, shape, spacing, device, tuple(options.window), roi_shape, report=report)
    if options.locate:
        before = plan_segmentation(
            segmenter_named(options.locate).manifest, tuple(options.shape), spacing, device, report=report
        )
        found = found.after(before)
    say(report, found.sentence)
    report.result(**dataclasses.asdict(found))


def _plan_tuning(options: argparse.Namespace, report: Reporter) -> None:
    manifest = segmenter_named(options.model).manifest
    _load_torch(report)
    from .prediction import choose_device
    from .tuningmemory import plan_tuning_memory

    wishes = {key: getattr(options, key) for key in ("engine", "precision", "memory")}
    found = plan_tuning_memory(manifest, choose_device(options.device), wishes, options.vae)
    say(report, found.sentence)
    report.result(**dataclasses.asdict(found))


def devices(options: argparse.Namespace, report: Reporter) -> None:
    from .devices import list_devices

    found, torch_version = list_devices()
    for device in found:
        free = "" if device.free_bytes is None else f", {format_bytes(device.free_bytes)} free"
        say(report, f"{device.name}  {device.title}{free}")
    if not torch_version:
        report.note("torch is not installed or cannot be imported, so only the CPU is listed.")
    report.result(devices=[dataclasses.asdict(device) for device in found], auto=found[0].name, torch=torch_version)


def worker(options: argparse.Namespace, report: Reporter) -> None:
    from .worker import serve

    serve(options.run_command)


def demo(options: argparse.Namespace, report: Reporter) -> None:
    from .demo import run

    found = run(segmenter_named(options.model), options.output, options.device, report)
    say(report, found["text"])
    report.result(**found)


def _load_torch(report: Reporter) -> None:
    """The first import takes seconds, and in a damaged installation it fails in many ways."""
    report.progress("start", 0, 1)
    try:
        importlib.import_module("torch")
        importlib.import_module(f"{__package__}.inference")
    except Exception as error:
        package = "torch" if "torch" not in sys.modules else getattr(error, "name", None) or "monai"
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InvresError(
            f"The package {package} is not installed or damaged: {reason}.",
            hint="Install it (in Slicer: Install in the Setup section of the panel), then try again.",
            code="missing_package",
        ) from None
    report.progress("start", 1, 1)


def _recipe(name: str) -> Recipe:
    """A recipe by file or by name."""
    if name.endswith(".json") or Path(name).is_file():
        return Recipe.read(Path(name))
    path = recipes_dir() / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in recipes_dir().glob("*.json"))
        raise InvresError(f"There is no recipe {name!r}; the recipes are {', '.join(known)}, or give a JSON file.")
    return Recipe.read(path)


def _changed(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with the command line's wishes."""
    network, training = recipe.network, recipe.training
    if options.network and options.network != network.name:
        if network.channels or network.blocks or network.decoder_blocks:
            raise InvresError(
                f"The recipe {recipe.name} fixes the widths of {network.name} and cannot serve {options.network}.",
                hint="Choose the recipe's own network, or leave channels and blocks out of the recipe.",
            )
        network = dataclasses.replace(network, name=options.network)
    if options.vae is not None and options.vae != (network.vae is not None):
        network = dataclasses.replace(network, vae=VAEConfig() if options.vae else None)
    wishes: dict[str, Any] = {
        key: getattr(options, key)
        for key in ("epochs", "seed", "engine", "precision", "memory")
        if getattr(options, key) is not None
    }
    if options.time:
        wishes["time_s"] = _seconds(options.time)
    augmentation = recipe.augmentation
    if options.channel_dropout is not None:
        augmentation = dataclasses.replace(augmentation, channel_dropout=options.channel_dropout)
    training = dataclasses.replace(training, **wishes)
    return dataclasses.replace(recipe, network=network, training=training, augmentation=augmentation)


def _seconds(text: str) -> float:
    """90s, 30m, 2h or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"A time is given as 90s, 30m or 2h, got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
