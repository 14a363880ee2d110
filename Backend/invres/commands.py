"""What each verb of the command line does; heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from . import InvresError
from .config import NetworkConfig, Recipe, VAEConfig, to_dict
from .events import JsonReporter, Reporter, format_bytes, format_seconds
from .lineage import active_members, read_active
from .modelpackage import (
    ModelPackage,
    bundled_models_dir,
    export_package,
    find_package,
    import_package,
    list_packages,
    verify_package,
)

__all__ = ["bench", "check", "demo", "describe", "evaluate", "finetune", "models", "plan", "segment", "train"]


def recipes_dir() -> Path:
    """The named recipes that come with InvResSegment."""
    return bundled_models_dir().parent / "Recipes"


def user_models_dir() -> Path:
    """Where `models import` puts packages unless told otherwise."""
    return Path.home() / "InvResSegment" / "Models"


def _say(report: Reporter, text: str) -> None:
    """The human form of a result; programs read the result event instead."""
    if not isinstance(report, JsonReporter):
        print(text)


def segment(options: argparse.Namespace, report: Reporter) -> None:
    package = _package(options.model)
    from .inference import SegmentOptions
    from .inference import segment as run

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
    choices = SegmentOptions(options.device, options.overlap, tuple(options.mirror), tuple(options.window))
    found = run(package, inputs, options.output, choices, options.probabilities, report)
    _say(report, f"Segmentation: {found['output']}")
    for name, volume in found["volumes_ml"].items():
        _say(report, f"  {name}: {volume:.2f} mL")
    _say(report, f"  {format_seconds(found['seconds']['total'])} on {found['device']}")
    report.result(**found)


def train(options: argparse.Namespace, report: Reporter) -> None:
    recipe = _changed(_recipe(options.recipe), options)
    from .cases import read_dataset
    from .trainer import StopRequest
    from .training import TrainOptions
    from .training import train as run

    dataset = read_dataset(options.data)
    choices = TrainOptions(options.device, options.resume, options.fold, 5, options.validation_count, options.licence)
    with StopRequest().listening() as stop:
        package = run(dataset, recipe, options.output, choices, report, stop)
    _say(report, f"Model: {package.path}")
    for name, values in package.manifest.metrics.items():
        _say(report, f"  {name}: Dice {_spread(values['Dice'])} in validation")
    report.result(model=str(package.path), metrics=package.manifest.metrics, **to_dict(package.manifest.training))


def finetune(options: argparse.Namespace, report: Reporter) -> None:
    package = _package(options.model)
    wishes = {
        field: value
        for field, value in (
            ("epochs", options.epochs),
            ("learning_rate", options.lr),
            ("seed", options.seed),
            ("engine", options.engine),
            ("precision", options.precision),
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
    _say(report, (options.output / "comparison.txt").read_text(encoding="utf-8").rstrip())
    if found["promoted"]:
        _say(report, f"\nModel {found['version']}: {found['model']}")
        _say(report, "`invres models import` makes it the one that its name stands for.")
    else:
        _say(report, f"\nNot promoted, for it is not shown to be as good as before. Candidate: {found['model']}")
        _say(report, "The same command with --resume --promote takes it all the same.")
    report.result(**found)


def evaluate(options: argparse.Namespace, report: Reporter) -> None:
    from .cases import read_dataset
    from .evaluation import evaluate as run
    from .evaluation import summary_table, write_metrics

    scheme = read_dataset(options.data, checked=False).scheme if options.data else None
    metrics = run(options.predictions, options.references, scheme, report, options.tolerance)
    write_metrics(options.output, metrics)
    _say(report, summary_table(metrics))
    _say(report, f"\nWritten: {options.output}")
    report.result(output=str(options.output), summary=metrics["summary"])


def check(options: argparse.Namespace, report: Reporter) -> None:
    from .cases import read_dataset
    from .doctor import check_dataset, findings_table

    dataset = read_dataset(options.data, checked=False)
    findings = check_dataset(dataset, report)
    _say(report, f"{dataset.name}: {len(dataset.cases)} cases, {dataset.layout}.")
    _say(report, f"Channels: {', '.join(dataset.channel_names)}. Labels: {', '.join(dataset.scheme.names)}.")
    _say(report, findings_table(findings))
    report.result(
        dataset=dataset.name,
        layout=dataset.layout,
        cases=len(dataset.cases),
        findings=[dataclasses.asdict(finding) for finding in findings],
    )


def plan(options: argparse.Namespace, report: Reporter) -> None:
    from .memory import predict_training

    _check_sizes(options)
    config = NetworkConfig(
        name=options.network,
        in_channels=options.channels,
        out_channels=options.classes,
        vae=VAEConfig() if options.vae else None,
    )
    found = predict_training(config, tuple(options.patch), options.batch, options.engine, precision=options.precision)
    size = "x".join(map(str, options.patch))
    _say(
        report,
        f"{options.network}, {options.channels} channels, {options.classes} classes, patch {size}, "
        f"batch {options.batch}, {options.precision}: a training step needs {format_bytes(found.peak_bytes)}\n"
        f"  parameters {format_bytes(found.parameter_bytes)}, gradients {format_bytes(found.gradient_bytes)}, "
        f"optimizer {format_bytes(found.optimizer_bytes)}, activations {format_bytes(found.activation_bytes)}\n"
        "  plus the CUDA context and cuDNN's workspaces on a GPU",
    )
    report.result(**dataclasses.asdict(found))


def describe(options: argparse.Namespace, report: Reporter) -> None:
    package = _package(options.model)
    manifest = package.manifest
    lines = [
        f"{manifest.name} {manifest.version}: {manifest.description}".rstrip(": "),
        f"  network    {manifest.network.name}, {manifest.weights_bytes / 1e6:.1f} MB of weights",
        f"  channels   {', '.join(f'{c.name} ({c.modality})' for c in manifest.plan.channels)}",
        f"  labels     {', '.join(f'{label.name} = {label.output_value}' for label in manifest.scheme.labels)}",
        f"  spacing    {' x '.join(f'{s:g}' for s in manifest.plan.spacing_mm)} mm (superior, anterior, right)",
        f"  window     {' x '.join(map(str, manifest.patch))} voxels",
        f"  licence    {manifest.licence or 'not stated'}",
        f"  use        {manifest.intended_use}",
    ]
    for name, values in manifest.metrics.items():
        if dice := values.get("Dice"):
            lines.append(f"  Dice       {name}: {_spread(dice)}")
    _say(report, "\n".join(lines))
    report.result(path=str(package.path), manifest=to_dict(manifest))


def models(options: argparse.Namespace, report: Reporter) -> None:
    folder = options.models_dir or user_models_dir()
    if options.action == "list":
        found = list_packages([bundled_models_dir(), folder], report)
        current = {m.id for m in active_members([p.manifest for p in found], read_active([folder]))}
        for package in found:
            mark = "*" if package.id in current else " "
            names = ", ".join(package.manifest.scheme.names)
            _say(report, f"{mark} {package.name} {package.manifest.version}  {names}  {package.path}")
        if not found:
            _say(report, f"There are no models yet in {bundled_models_dir()} and {folder}.")
        report.result(
            models=[{"path": str(p.path), "active": p.id in current, "manifest": to_dict(p.manifest)} for p in found]
        )
        return
    if not options.model:
        raise InvresError(f"`invres models {options.action}` needs a model: its name or its path.")
    if options.action == "import":
        package = import_package(options.model, folder)
        _say(report, f"Imported: {package.path}")
        report.result(path=str(package.path))
    elif options.action in ("history", "diff", "rollback"):
        _versions(options, folder, report)
    elif options.action == "export":
        if options.output is None:
            raise InvresError("`invres models export` needs --output FILE.invres.")
        path = export_package(_package(options.model, folder), options.output)
        _say(report, f"Exported: {path}")
        report.result(path=str(path))
    else:
        package = verify_package(_package(options.model, folder).path)
        _say(report, f"{package.name} is intact: hash, shapes and finite weights are right.")
        report.result(path=str(package.path), sha256=package.manifest.sha256)


def _versions(options: argparse.Namespace, folder: Path, report: Reporter) -> None:
    from .versions import difference, difference_table, history, history_table, rollback

    package = _package(options.model, folder)
    installed = list_packages([bundled_models_dir(), folder], report)
    if options.action == "history":
        found = history(package, installed, [bundled_models_dir(), folder])
        _say(report, history_table(found))
        report.result(versions=found)
    elif options.action == "diff":
        other = _package(options.other, folder) if options.other else None
        compared = difference(package, other, installed)
        _say(report, difference_table(compared))
        report.result(**compared)
    else:
        parent = rollback(package, installed, folder)
        _say(report, f"{package.name} now stands for version {parent.manifest.version} ({parent.path}) again.")
        report.result(active=parent.id, path=str(parent.path), version=parent.manifest.version, before=package.id)


def bench(options: argparse.Namespace, report: Reporter) -> None:
    from .benchmark import bench_gradients, bench_memory, bench_time, describe_machine, table

    _check_sizes(options)
    patch = tuple(options.patch)
    size = (patch, options.channels, options.classes)
    device = "cuda:0" if options.device == "cuda" else options.device
    results: dict[str, Any] = {"machine": describe_machine(device), "date": date.today().isoformat()}
    texts = []

    def section(what: str, title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
        results[what] = rows
        texts.append(f"### {title}\n\n{table(rows, columns)}\n")

    words = f"{'x'.join(map(str, patch))}, {options.channels} channels, {options.classes} classes, batch 1, float32"
    if options.what in ("memory", "all"):
        rows = bench_memory(*size, device, options.measure, report)
        columns = ["network", "engine", "peak_bytes", "ratio", "activation_bytes", "activation_ratio"]
        if "cuda_max_allocated_bytes" in rows[0]:
            columns.append("cuda_max_allocated_bytes")
        kind = "measured" if options.measure or device.startswith("cuda") else "predicted on fake tensors"
        section("memory", f"Peak live tensor bytes of a training step ({kind}; {words})", rows, columns)
    if options.what in ("time", "all"):
        rows = bench_time(*size, device, options.rounds, report)
        section("time", f"Median seconds of a training step ({words})", rows, ["network", "engine", "seconds", "ratio"])
    if options.what in ("gradients", "all"):
        small = (tuple(min(p, 32) for p in patch), options.channels, options.classes)
        rows = bench_gradients(*small, report)
        columns = ["network", "engine", "dtype", "relative_error"]
        section("gradients", "Largest relative gradient difference to `stored`", rows, columns)
    text = f"{results['machine']}, {results['date']}\n\n" + "\n".join(texts)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (options.output / "bench.md").write_text(text, encoding="utf-8")
    _say(report, text)
    report.result(**results)


def demo(options: argparse.Namespace, report: Reporter) -> None:
    from .demo import run

    found = run(options.output, _seconds(options.time), options.device, report)
    _say(report, found["text"])
    report.result(**found)


def _spread(values: dict[str, Any]) -> str:
    """Mean, standard deviation and number of cases, as far as a manifest has them."""
    mean, sd = (f"{value:.4f}" if isinstance(value := values.get(key), (int, float)) else "" for key in ("mean", "sd"))
    return f"{mean or 'not known'}{f' ± {sd}' if sd else ''} (n = {values.get('n', 'not known')})"


def _package(model: str, folder: Path | None = None) -> ModelPackage:
    """A model by path or by name."""
    return find_package(model, [bundled_models_dir(), folder or user_models_dir()])


def _check_sizes(options: argparse.Namespace) -> None:
    if min(options.patch) < 1:
        raise InvresError(f"--patch must be three sizes of 1 voxel or more, got {options.patch}.")
    if vars(options).get("batch", 1) < 1:
        raise InvresError(f"--batch must be 1 or more, got {options.batch}.")


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
    wishes: dict[str, Any] = {
        key: getattr(options, key)
        for key in ("epochs", "seed", "engine", "precision")
        if getattr(options, key) is not None
    }
    if options.time:
        wishes["time_s"] = _seconds(options.time)
    return dataclasses.replace(recipe, network=network, training=dataclasses.replace(training, **wishes))


def _seconds(text: str) -> float:
    """90s, 30m, 2h or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"A time is given as 90s, 30m or 2h, got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
