"""`invres describe` and `invres models`: what is installed, and what becomes of it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import InvresError
from .configjson import to_dict
from .console import load_torch, package_named, say, spread, user_models_dir
from .events import Reporter
from .files import SEGMENTATION
from .interruption import postponed
from .lineage import active_members, read_active
from .manifest import Manifest, check_name
from .modelpackage import (
    ModelPackage,
    bundled_models_dir,
    delete_package,
    export_package,
    fitting,
    import_package,
    is_bundled,
    list_packages,
    verify_hash,
    verify_package,
)
from .outputs import same_file
from .provenance import provenance_told, read_provenance

__all__ = ["describe", "models"]


def describe(options: argparse.Namespace, report: Reporter) -> None:
    if options.model.lower().endswith(SEGMENTATION):
        record = read_provenance(Path(options.model))
        say(report, "\n".join([f"{Path(options.model).name}: a segmentation.", *provenance_told(record)]))
        report.result(provenance=record)
        return
    package = package_named(options.model)
    manifest = package.manifest
    optional = [channel.name for channel in manifest.plan.channels if channel.optional]
    lines = [
        f"{manifest.name} {manifest.version}: {manifest.description}".rstrip(": "),
        f"  network    {_network(manifest)}, {manifest.weights_bytes / 1e6:.1f} MB of weights",
        f"  channels   {', '.join(f'{c.name} ({c.modality})' for c in manifest.plan.channels)}",
        *([f"  optional   {', '.join(optional)}; one channel must be there"] if optional else []),
        *(["  grids      channels were resampled to the grid of the first (--align)"] if manifest.plan.aligned else []),
        *_purpose(manifest),
        f"  spacing    {' x '.join(f'{s:g}' for s in manifest.plan.spacing_mm)} mm (superior, anterior, right)",
        f"  window     {' x '.join(map(str, manifest.patch))} voxels",
        f"  licence    {manifest.licence or 'not stated'}",
        *([f"  data       {manifest.training.data}"] if manifest.training.data else []),
        f"  use        {manifest.intended_use}",
    ]
    for name, values in manifest.metrics.items():
        for metric, found in values.items():
            if metric.startswith("RMSE"):
                lines.append(f"  {metric}: {found['mean']:.4g} ({found['n']} {name})")
            if metric.startswith("Dice"):
                lines.append(f"  Dice       {name}{metric.removeprefix('Dice')}: {spread(found)}")
    say(report, "\n".join(lines))
    report.result(**_described(package))


def models(options: argparse.Namespace, report: Reporter) -> None:
    folder = options.models_dir or user_models_dir()
    if options.name is not None and options.action != "join":
        raise InvresError(
            f"--name names what `invres models join` makes; `invres models {options.action}` has no use for it.",
            hint="Leave it out.",
            code="usage",
        )
    if options.action == "list":
        found = list_packages([bundled_models_dir(), folder], report)
        current = {m.id for m in active_members([p.manifest for p in found], read_active([folder]))}
        meant = {name: fitting(name, found, [bundled_models_dir(), folder]) for name in {p.name for p in found}}
        for package in found:
            # What `-m NAME` takes; of unrelated models of one name it takes none.
            mark = "*" if [package.id] == [fit.id for fit in meant[package.name]] else " "
            names = ", ".join(package.manifest.scheme.names) or "enhances images"
            say(report, f"{mark} {package.name} {package.manifest.version}  {names}  {package.path}")
        for name, fits in sorted(meant.items()):
            if len(fits) > 1:
                report.note(f"{len(fits)} models have the name {name}, so `-m` needs {_one_of(fits)}.")
        if not found:
            say(report, f"There are no models yet in {bundled_models_dir()} and {folder}.")
        report.result(models=[{**_described(package), "active": package.id in current} for package in found])
        return
    if not options.model:
        raise InvresError(f"`invres models {options.action}` needs a model: its name or its path.")
    if options.action != "join" and len(options.others) > (options.action == "diff"):
        raise InvresError(f"`invres models {options.action}` cannot do with {options.others[-1]}.", code="usage")
    if options.action == "import":
        package = import_package(options.model, folder)
        say(report, f"Imported: {package.path}")
        _note_name(package, folder, report)
        report.result(path=str(package.path))
    elif options.action == "join":
        _join(options, folder, report)
    elif options.action in ("history", "diff", "rollback"):
        _versions(options, folder, report)
    elif options.action == "export":
        if options.output is None:
            raise InvresError("`invres models export` needs --output FILE.invres.")
        path = export_package(package_named(options.model, folder), options.output)
        say(report, f"Exported: {path}")
        report.result(path=str(path))
    elif options.action == "delete":
        package = package_named(options.model, folder)
        delete_package(package, folder)
        say(report, f"Deleted: {package.path}")
        report.result(path=str(package.path))
    else:
        package = package_named(options.model, folder)
        thorough = _importable("torch") and _importable("safetensors.torch")
        if thorough:
            verify_package(package.path)
        else:
            verify_hash(package)
            report.note("torch is not installed, so shapes and values were not checked, only the hash of the weights.")
        what = "hash, shapes and finite weights are right" if thorough else "the hash of its weights is right"
        say(report, f"{package.name} is intact: {what}.")
        report.result(path=str(package.path), sha256=package.manifest.sha256, thorough=thorough)


def _note_name(package: ModelPackage, folder: Path, report: Reporter) -> None:
    """Says of a name that other models have too which of them it stands for."""
    folders = [bundled_models_dir(), folder]
    installed = list_packages(folders)
    name = package.name
    if not any(one.id != package.id and one.name.casefold() == name.casefold() for one in installed):
        return
    fits = fitting(name, installed, folders)
    if len(fits) == 1:
        report.note(
            f"Other models have the name {name} too; `-m {name}` takes version {fits[0].manifest.version}, "
            f"{fits[0].path}."
        )
    else:
        report.note(f"Another model has the name {name} too, so `-m` needs {_one_of(fits)}.")


def _one_of(packages: Sequence[ModelPackage]) -> str:
    return " or ".join(f"{package.id[:8]} ({package.path})" for package in packages)


def _join(options: argparse.Namespace, folder: Path, report: Reporter) -> None:
    packages = [package_named(model, folder) for model in (options.model, *options.others)]
    if options.output is None:
        raise InvresError("`invres models join` needs --output: a folder, or FILE.invres.")
    if any(same_file(options.output, package.path) for package in packages):
        raise InvresError(
            f"{options.output} is one of the models that are joined and would be overwritten.",
            hint="Choose another name.",
            code="output_is_input",
        )
    load_torch(report, "joining")
    from .joining import join_packages

    name = options.name or packages[0].name
    check_name(name)
    joined = join_packages(packages, options.output, name)
    say(report, f"Joined {joined.manifest.members} networks: {joined.path}")
    for label, values in joined.manifest.metrics.items():
        if "Dice" in values:
            say(report, f"  {label}: Dice {spread(values['Dice'])}, of the members, each on what it held out")
    if not joined.manifest.metrics:
        report.note(
            "The joined model has no figures, for its members are not known to have learned from different cases each, "
            "as the folds of a cross-validation have."
        )
    report.result(path=str(joined.path), members=joined.manifest.members, metrics=joined.manifest.metrics)


def _versions(options: argparse.Namespace, folder: Path, report: Reporter) -> None:
    from .versions import difference, difference_table, history, history_table, rollback

    package = package_named(options.model, folder)
    installed = list_packages([bundled_models_dir(), folder], report)
    if options.action == "history":
        found = history(package, installed, [bundled_models_dir(), folder])
        say(report, history_table(found))
        report.result(versions=found)
    elif options.action == "diff":
        other = package_named(options.others[0], folder) if options.others else None
        compared = difference(package, other, installed)
        say(report, difference_table(compared))
        report.result(**compared)
    else:
        parent = rollback(package, installed, folder)
        say(report, f"{package.name} now stands for version {parent.manifest.version} ({parent.path}) again.")
        report.result(active=parent.id, path=str(parent.path), version=parent.manifest.version, before=package.id)


def _network(manifest: Manifest) -> str:
    name = manifest.network.name
    return name if manifest.members == 1 else f"average of {manifest.members} networks {name}"


def _purpose(manifest: Manifest) -> list[str]:
    """What a model gives: its labels, or an image of finer voxels."""
    if manifest.enhancement is None:
        labels = ", ".join(f"{label.name} = {label.output_value}" for label in manifest.output_scheme.labels)
        return [f"  labels     {labels}"]
    what = "diffusion tensors" if manifest.enhancement.kind == "tensor" else "a plain image"
    finer = " x ".join(map(str, manifest.network.strides[0]))
    return [f"  enhances   {what}: {finer} times as many voxels (superior, anterior, right); no labels"]


def _described(package: ModelPackage) -> dict[str, Any]:
    return {"path": str(package.path), "bundled": is_bundled(package), "manifest": to_dict(package.manifest)}


def _importable(name: str) -> bool:
    try:
        with postponed():
            importlib.import_module(name)
    except Exception:  # a half-installed package fails in many ways
        return False
    return True
