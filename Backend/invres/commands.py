"""What each verb of the command line does; heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
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
    delete_package,
    export_package,
    find_package,
    import_package,
    is_bundled,
    list_packages,
    verify_hash,
    verify_package,
)

__all__ = [
    "bench",
    "check",
    "demo",
    "describe",
    "devices",
    "evaluate",
    "finetune",
    "models",
    "plan",
    "segment",
    "train",
    "worker",
]

# The network of the last segmentation, for the next one in the same process.
_kept: dict[str, Any] = {}


BENCH_SECONDS = 420.0  # after which `bench` starts no further try for the largest cube


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
    _load_torch(report)
    from .inference import NetworkKeeper, SegmentOptions
    from .inference import segment as run
    from .planning import remember_speed

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
    found = run(package, inputs, options.output, choices, options.probabilities, report, keeper=keeper)
    settings = found["settings"]
    flips = 2 ** len(options.mirror)
    remember_speed(
        package.manifest,
        found["device"],
        settings["windows"] * flips,
        tuple(settings["window"]),
        found["seconds"]["predict"],
    )
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
    vram_bytes = _bytes(options.vram) if options.vram else 0
    choices = TrainOptions(
        options.device, options.resume, options.fold, 5, options.validation_count, options.licence, vram_bytes
    )
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
    if options.model:
        _plan_segmentation(options, report)
        return
    from .cardplan import plan_for_card
    from .inference import choose_device
    from .memory import measure_training, predict_training

    _check_sizes(options)
    spacing: tuple[float, float, float] = tuple(options.spacing or (1.0, 1.0, 1.0))
    if min(spacing) <= 0:
        raise InvresError(f"--spacing must be three lengths above 0 mm, got {options.spacing}.")
    vram_bytes = _bytes(options.vram) if options.vram else 0
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
        f"  parameters {format_bytes(found.parameter_bytes)}, gradients {format_bytes(found.gradient_bytes)}, "
        f"optimizer {format_bytes(found.optimizer_bytes)}, activations {format_bytes(found.activation_bytes)}",
        f"  (of these: image and target {format_bytes(found.input_bytes)}, state and its gradient "
        f"{format_bytes(found.state_bytes)}, stored or in work {format_bytes(found.working_bytes)})",
        "  plus the CUDA context and cuDNN's workspaces on a GPU",
    ]
    extra: dict[str, Any] = {}
    if options.measure:
        device = choose_device("cuda")
        measured = measure_training(config, size, options.batch, device=str(device), **choices)
        extra["measured"] = dataclasses.asdict(measured)
        lines.append(f"  measured on {device}: {format_bytes(measured.peak_bytes)}")
        if measured.allocated_bytes:
            lines.append(f"  the card's allocator had {format_bytes(measured.allocated_bytes)} in use at its peak")
    if vram_bytes:
        fitting = plan_for_card(config, vram_bytes, options.batch, **choices, spacing_mm=spacing)
        extra["card"] = dataclasses.asdict(fitting)
        lines += fitting.sentences()
    _say(report, "\n".join(lines))
    report.result(**dataclasses.asdict(found), **extra)


def _plan_segmentation(options: argparse.Namespace, report: Reporter) -> None:
    if options.shape is None or options.spacing is None:
        raise InvresError(
            "`invres plan --model` needs the volume: --shape D H W and --spacing D H W.",
            hint="Give its voxels and their size in mm, superior, anterior, right.",
        )
    manifest = _package(options.model).manifest
    _load_torch(report)
    from .inference import choose_device
    from .planning import plan_segmentation

    found = plan_segmentation(
        manifest,
        tuple(options.shape),
        tuple(options.spacing),
        choose_device(options.device),
        tuple(options.window),
        None if options.roi_shape is None else tuple(options.roi_shape),
        report=report,
    )
    _say(report, found.sentence)
    report.result(**dataclasses.asdict(found))


def devices(options: argparse.Namespace, report: Reporter) -> None:
    from .devices import list_devices

    found, torch_version = list_devices()
    for device in found:
        free = "" if device.free_bytes is None else f", {format_bytes(device.free_bytes)} free"
        _say(report, f"{device.name}  {device.title}{free}")
    if not torch_version:
        report.note("torch is not installed or cannot be imported, so only the CPU is listed.")
    report.result(devices=[dataclasses.asdict(device) for device in found], auto=found[0].name, torch=torch_version)


def worker(options: argparse.Namespace, report: Reporter) -> None:
    from .worker import serve

    serve(options.run_command)


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
    report.result(**_described(package))


def _described(package: ModelPackage) -> dict[str, Any]:
    return {"path": str(package.path), "bundled": is_bundled(package), "manifest": to_dict(package.manifest)}


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
        report.result(models=[{**_described(package), "active": package.id in current} for package in found])
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
    elif options.action == "delete":
        package = _package(options.model, folder)
        delete_package(package)
        _say(report, f"Deleted: {package.path}")
        report.result(path=str(package.path))
    else:
        package = _package(options.model, folder)
        thorough = _importable("torch") and _importable("safetensors.torch")
        if thorough:
            verify_package(package.path)
        else:
            verify_hash(package)
            report.note("torch is not installed, so shapes and values were not checked, only the hash of the weights.")
        what = "hash, shapes and finite weights are right" if thorough else "the hash of its weights is right"
        _say(report, f"{package.name} is intact: {what}.")
        report.result(path=str(package.path), sha256=package.manifest.sha256, thorough=thorough)


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
    from .cube import bench_cube
    from .depth import bench_depth, draw_depth

    _check_sizes(options)
    deadline = time.monotonic() + BENCH_SECONDS
    patch = tuple(options.patch)
    size = (patch, options.channels, options.classes)
    device = "cuda:0" if options.device == "cuda" else options.device
    on_card = device.startswith("cuda")
    results: dict[str, Any] = {"machine": describe_machine(device), "date": date.today().isoformat()}
    texts = [f"{results['machine']}, {results['date']}\n"]

    def section(what: str, title: str, make: Callable[[], list[dict[str, Any]]], columns: list[str]) -> None:
        """Runs one part; in a run of all parts, one that fails is recorded and does not cost the others."""
        if options.what not in (what, "all"):
            return
        try:
            rows = make()
        except Exception as error:
            if options.what != "all" or isinstance(error, InvresError):
                raise
            results[what] = {"error": f"{type(error).__name__}: {error}"}
            report.warning(f"The part {what} failed: {type(error).__name__}: {error}")
            rows = []
        else:
            results[what] = rows
        shown = [c for c in columns if any(row.get(c) not in (None, "", 0) for row in rows)]
        if rows:
            texts.append(f"### {title}\n\n{table(rows, shown)}\n")
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "bench.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
            (options.output / "bench.md").write_text("\n".join(texts), encoding="utf-8")

    words = f"{'x'.join(map(str, patch))}, {options.channels} channels, {options.classes} classes, batch 1"
    kind = "measured" if options.measure or on_card else "predicted on fake tensors"
    row = ["network", "engine", "memory", "precision"]
    section(
        "memory",
        f"Peak live tensor bytes of a training step ({kind}; {words})",
        lambda: bench_memory(*size, device, options.measure, report),
        [
            *row,
            *("parameter_bytes", "peak_bytes", "ratio", "activation_bytes", "activation_ratio", "flops_ratio"),
            *("allocated_bytes", "reserved_bytes", "error"),
        ],
    )
    section(
        "time",
        f"Median seconds of a training step ({words})",
        lambda: bench_time(*size, device, options.rounds, report),
        [*row, "seconds", "ratio", "error"],
    )
    small = (tuple(min(p, 32) for p in patch), options.channels, options.classes)
    section(
        "gradients",
        "Largest relative difference of any gradient to `stored` (CPU)",
        lambda: bench_gradients(*small, report),
        ["network", "engine", "memory", "dtype", "relative_error", "error_to_float64"],
    )
    if on_card:
        section(
            "cube",
            "Largest cube whose training step fits a card",
            lambda: bench_cube(options.channels, options.classes, device, deadline, report),
            ["card_gib", *row, "side", "complete", "error"],
        )
    section(
        "depth",
        "Peak memory and operations against depth, by strategy",
        lambda: bench_depth(report=report),
        ["strategy", "blocks", "peak_states", "flops_ratio"],
    )
    if options.output and isinstance(results.get("depth"), list):
        draw_depth(results["depth"], options.output / "depth.png")
    _say(report, "\n".join(texts))
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


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a half-installed package fails in many ways
        return False
    return True


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
        for key in ("epochs", "seed", "engine", "precision", "memory")
        if getattr(options, key) is not None
    }
    if options.time:
        wishes["time_s"] = _seconds(options.time)
    return dataclasses.replace(recipe, network=network, training=dataclasses.replace(training, **wishes))


def _bytes(text: str) -> int:
    """8GB, 8GiB, 500MB or plain bytes; as on the boxes of graphics cards, a GB has 2^30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])i?b?)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"An amount of memory is given as 8GB or 500MB, got {text!r}.")
    return round(float(match[1]) * 2 ** {None: 0, "k": 10, "m": 20, "g": 30}[match[2]])


def _seconds(text: str) -> float:
    """90s, 30m, 2h or plain seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise InvresError(f"A time is given as 90s, 30m or 2h, got {text!r}.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
