"""What each verb of the command line does; heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from typing import Any

from . import InvresError
from .bench_command import bench
from .compare_command import compare
from .config import Recipe
from .configjson import to_dict
from .console import load_torch, parse_bytes, recipe_named, say, segmenter_named, spread
from .enhance_command import enhance, train_enhancement
from .evaluate_command import evaluate
from .events import Reporter, WhileHeard, format_bytes
from .interruption import postponed
from .manifest import check_name
from .model_commands import describe, models
from .modelpackage import ModelPackage
from .networkconfig import VAEConfig
from .plan_command import plan
from .recipekeys import check_said_once, check_tunable, with_values
from .reproduce_command import reproduce
from .rerun_command import rerun
from .segment_command import segment

__all__ = [
    "bench",
    "check",
    "compare",
    "demo",
    "describe",
    "devices",
    "enhance",
    "evaluate",
    "finetune",
    "models",
    "plan",
    "reproduce",
    "rerun",
    "segment",
    "train",
    "worker",
]

NOTHING_LEARNED = 0.1  # mean Dice (chosen)
_OF_TRAINING = {
    **{key: key for key in ("epochs", "seed", "engine", "precision", "memory", "optimizer")},
    **{"early_stop_epochs": "patience", "learning_rate": "lr", "time_s": "time"},
}
_OPTIONS = {
    **{f"training.{key}": option for key, option in _OF_TRAINING.items()},
    **{"network.name": "network", "network.vae": "vae", "augmentation.channel_dropout": "channel-dropout"},
}
"""Keys of a recipe that have an option of their own."""


def train(options: argparse.Namespace, report: Reporter) -> None:
    from .runfolder import RUN

    _check_alone()
    # A run that ended before its first step has nothing to go on from, so the same command starts it.
    resumed = options.resume and (options.output / RUN).is_file()
    of_run = resumed and options.recipe is None
    recipe = None if of_run else _changed(recipe_named(options.recipe or "default"), options)
    vram_bytes = parse_bytes(options.vram) if options.vram else 0
    if options.name:
        check_name(options.name)
    _check_counts(options)
    if options.fold is not None and options.validation_count:
        raise InvresError(
            "--fold and --validation-count both say which cases are held out.", hint="Give one of them.", code="usage"
        )
    from .cases import read_dataset

    dataset = None
    if recipe is not None and recipe.enhancement is None and recipe.label_maps is None:
        # A run that is resumed goes on as it was started, whatever is asked for now.
        partial = recipe.augmentation.channel_dropout > 0 or resumed
        dataset = read_dataset(options.data, partial=partial, aligned=options.align)
    heard = WhileHeard(report)
    load_torch(heard)
    from .labelmaps import read_label_maps
    from .segmentfiles import each_channel
    from .trainer import StopRequest
    from .training import train as run
    from .trainingrun import TrainOptions, started_recipe

    if resumed:
        started = started_recipe(options.output)
        recipe = _changed(started, options) if recipe is None else _with_budget(recipe, started, options)
    assert recipe is not None
    if options.align and (recipe.enhancement is not None or recipe.label_maps is not None):
        raise InvresError(
            f"--align is for images of several channels, which the recipe {recipe.name} does not train on.",
            hint="Leave it out.",
            code="usage",
        )
    if recipe.enhancement is not None:
        train_enhancement(recipe, options, report)
        return
    if recipe.label_maps is not None:
        dataset = read_label_maps(options.data, recipe.labels)
    elif dataset is None:
        dataset = read_dataset(options.data, partial=True, aligned=options.align)
    choices = TrainOptions(
        device=options.device,
        resume=options.resume,
        fold={None: 0, "all": None}.get(options.fold, options.fold),
        validation_count=options.validation_count or 0,
        licence=options.licence,
        source=options.source,
        vram_bytes=vram_bytes,
        name=options.name,
        data=str(options.data.absolute()),
    )
    with StopRequest().listening() as stop:
        package = run(dataset, recipe, options.output, choices, heard, stop)
    say(report, f"Model: {package.path}")
    for name, values in package.manifest.metrics.items():
        say(report, f"  {name}: Dice {spread(values['Dice'])} in validation")
    _say_if_learned_nothing(package, report)
    plan = package.manifest.plan
    inputs = each_channel(plan.channels) + (" --align" if plan.aligned else "")
    say(report, f"Use it: invres segment --model {shlex.quote(str(package.path))} {inputs} --output FILE.seg.nrrd")
    report.result(model=str(package.path), metrics=package.manifest.metrics, **to_dict(package.manifest.training))


def _with_budget(recipe: Recipe, started: Recipe, options: argparse.Namespace) -> Recipe:
    """A run that is resumed keeps its time budget, unless another one is asked for."""
    if options.time or recipe.training.time_s:
        return recipe
    training = dataclasses.replace(recipe.training, time_s=started.training.time_s)
    return dataclasses.replace(recipe, training=training)


def _say_if_learned_nothing(package: ModelPackage, report: Reporter) -> None:
    means = [values["Dice"]["mean"] for values in package.manifest.metrics.values()]
    if means and (dice := sum(means) / len(means)) < NOTHING_LEARNED:
        report.warning(
            f"The mean Dice in validation is {dice:.2f}: this training was too short to learn. Go on with --resume and "
            "more time (--time) or epochs (--epochs), or look at the data with `invres check`."
        )


def _check_alone() -> None:
    """Raises InvresError where a launcher of torch (torchrun) has begun several processes for one training."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdigit() and int(count) > 1:
        raise InvresError(
            f"This is one of {count} processes (WORLD_SIZE), but a training is one process on one device.",
            hint="Start it without torchrun, and choose the device with --device.",
            code="usage",
        )


def _check_counts(options: argparse.Namespace) -> None:
    """Raises InvresError for numbers of cases or groups that would hold nothing out."""
    count, folds = options.validation_count, vars(options).get("folds")
    if count is not None and count < 1:
        every = "to train on every case use --fold all" if "fold" in options else "or leave it out"
        raise InvresError(f"--validation-count must be at least 1, got {count}.", hint=f"Give 1 or more; {every}.")
    if folds is not None and folds < 2:
        raise InvresError(f"--folds must be at least 2, got {folds}.", hint="Give 2 or more, or leave it out.")


def finetune(options: argparse.Namespace, report: Reporter) -> None:
    _check_alone()
    _check_counts(options)
    package = segmenter_named(options.model)
    wishes = _wishes(options)
    _check_said_once(options)
    recipe = recipe_named(options.recipe) if options.recipe else None
    check_tunable(options.set, recipe)
    if options.name:
        check_name(options.name)
    from .cases import read_dataset

    dataset = read_dataset(options.data, checked=False, aligned=options.align)
    load_torch(report)
    from .finetuning import finetune as run
    from .stopfile import StopFile
    from .tuningplan import TuningOptions

    choices = TuningOptions(
        device=options.device,
        resume=options.resume,
        recipe=recipe,
        wishes=wishes,
        given=options.set,
        folds=options.folds or 0,
        validation_count=options.validation_count or 0,
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
        new_labels=options.new_labels,
    )
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
    from .cases import WITHOUT_LABELS, channels_told, described, read_dataset
    from .doctor import check_dataset, findings_table

    dataset = read_dataset(options.data, checked=False, aligned=options.align)
    findings = check_dataset(dataset, report)
    count = len(dataset.cases)
    say(report, f"{dataset.name}: {count} case{'' if count == 1 else 's'}, {dataset.layout}.")
    labels = ", ".join(dataset.scheme.names) or "none"
    say(report, f"Channels: {', '.join(channels_told(dataset))}. Labels: {labels}.")
    if not dataset.labelled_cases:
        report.note(f"No case has a label. {WITHOUT_LABELS}")
    say(report, findings_table(findings))
    report.result(
        dataset=dataset.name,
        layout=dataset.layout,
        cases=len(dataset.cases),
        contents=described(dataset),
        findings=[dataclasses.asdict(finding) for finding in findings],
    )


def devices(options: argparse.Namespace, report: Reporter) -> None:
    from .devices import list_devices

    with postponed():
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
    package = segmenter_named(options.model)
    load_torch(report)
    from .demo import run

    found = run(package, options.output, options.device, report)
    say(report, found["text"])
    report.result(**found)


def _wishes(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the training, by the keys of `TrainingConfig`."""
    wishes = {key: value for key, option in _OF_TRAINING.items() if (value := getattr(options, option)) is not None}
    if "time_s" in wishes:
        wishes["time_s"] = _seconds(wishes["time_s"])
    return wishes


def _check_said_once(options: argparse.Namespace) -> None:
    given = {key: one for key, one in _OPTIONS.items() if getattr(options, one.replace("-", "_"), None) is not None}
    check_said_once(options.set, given)


def _changed(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with the command line's wishes. Raises InvresError where `--set` and another option say the same."""
    _check_said_once(options)
    wishes = _wishes(options)
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
    augmentation = recipe.augmentation
    if options.channel_dropout is not None:
        augmentation = dataclasses.replace(augmentation, channel_dropout=options.channel_dropout)
    training = training.with_optimizer(wishes.get("optimizer", training.optimizer))
    training = dataclasses.replace(training, **wishes)
    changed = dataclasses.replace(recipe, network=network, training=training, augmentation=augmentation)
    return with_values(changed, options.set)


def _seconds(text: str) -> float:
    """90s, 30m, 2h or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"A time is given as 90s, 30m or 2h, got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
