"""`invres enhance`, and `train` and `evaluate` for image quality transfer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from typing import TYPE_CHECKING, Any

from . import InvresError
from .config import Recipe
from .configjson import to_dict
from .console import load_torch, package_named, say
from .events import Reporter, WhileHeard, format_seconds
from .files import written_whole
from .modelpackage import ModelPackage

if TYPE_CHECKING:
    from .enhancementconfig import EnhancementPlan

__all__ = ["enhance", "evaluate_enhancement", "train_enhancement"]

_UNITS = {"tensor": ("10^-3 mm2/s", 1000.0), "image": ("the image's own unit", 1.0)}


def enhance(options: argparse.Namespace, report: Reporter) -> None:
    package = _enhancer_named(options.model)
    from .outputs import check_outputs
    from .scans import scan_of

    plan = _plan(package)
    if (options.bval is None) != (options.bvec is None):
        raise InvresError("--bval and --bvec belong together, but only one of them is given.")
    if plan.kind == "image" and options.bval is not None:
        raise InvresError(
            f"{package.name} enhances plain images, which have no --bval and --bvec.",
            hint="Leave them out, or choose a model of diffusion tensors.",
        )
    files = scan_of(options.input, plan.kind)
    if options.bval is not None:
        files = dataclasses.replace(files, gradients=(options.bval, options.bvec))
    if options.mask is not None:
        files = dataclasses.replace(files, mask=options.mask)
    reference = None if options.reference is None else scan_of(options.reference, plan.kind)
    given = [*files.all(), *(reference.all() if reference else ())]
    for path in given:
        if not path.exists():
            raise InvresError(f"There is no file {path}.", hint="Check the spelling and the folder.")
    check_outputs([options.output], given, also="")
    load_torch(report)
    from .enhancement import EnhanceOptions
    from .enhancement import enhance as run

    choices = EnhanceOptions(options.device, options.overlap)
    found = run(package, files, options.output, choices, reference, report)
    say(report, f"Enhanced: {found['output']}")
    say(report, f"  {' x '.join(f'{s:g}' for s in found['spacing_mm'])} mm (file axes k, j, i)")
    say(report, f"  {format_seconds(found['seconds'])} on {found['device']}")
    if "errors" in found:
        say(report, _table([found["errors"]], plan))
    report.result(**found)


def train_enhancement(recipe: Recipe, options: argparse.Namespace, report: Reporter) -> None:
    """`invres train` with a recipe that has `enhancement`."""
    if options.vram or options.validation_count or options.fold is not None or recipe.augmentation.channel_dropout:
        raise InvresError(
            "--vram, --fold, --validation-count and --channel-dropout are for segmentation.",
            hint="How many patches are validated on is enhancement.held_out of the recipe.",
        )
    from .enhancementtraining import train_enhancer
    from .scans import find_scans
    from .trainer import StopRequest
    from .trainingrun import TrainOptions

    assert recipe.enhancement is not None  # the caller has looked
    scans = find_scans(options.data, recipe.enhancement.kind, report)
    choices = TrainOptions(
        options.device,
        options.resume,
        licence=options.licence,
        source=options.source,
        name=options.name,
        data=str(options.data.absolute()),
    )
    with StopRequest().listening() as stop:
        package = train_enhancer(scans, recipe, options.output, choices, WhileHeard(report), stop)
    unit, factor = _UNITS[recipe.enhancement.kind]
    if recipe.enhancement.kind == "image":
        unit = "standard deviations of an image"
    say(report, f"Model: {package.path}")
    for name, values in package.manifest.metrics.items():
        for metric, spread in values.items():
            say(report, f"  {metric}: {spread['mean'] * factor:.4g} ({unit}), {spread['n']} {name}")
    say(report, f"Use it: invres enhance --model {shlex.quote(str(package.path))} --input FILE --output FILE.nii.gz")
    report.result(model=str(package.path), metrics=package.manifest.metrics, **to_dict(package.manifest.training))


def evaluate_enhancement(options: argparse.Namespace, report: Reporter) -> None:
    """`invres evaluate --model M --data SCANS`: each scan reduced, enhanced, and compared with itself."""
    package = _enhancer_named(options.model)
    if options.data is None:
        raise InvresError("`invres evaluate --model` needs --data: scans of high resolution.", code="usage")
    from .scans import find_scans

    plan = _plan(package)
    scans = find_scans(options.data, plan.kind, report)
    load_torch(report)
    from .enhancement import EnhanceOptions, errors_of_scans
    from .enhancementscores import summary_of

    subjects = errors_of_scans(package, scans, EnhanceOptions(device=options.device), report)
    summary = summary_of(subjects)
    content = {"model": package.name, "model_id": package.id, "scans": subjects, "summary": summary}
    with written_whole(options.output) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    say(report, _table(subjects, plan))
    say(report, f"\nWritten: {options.output}")
    report.result(output=str(options.output), summary=summary)


def _enhancer_named(model: str) -> ModelPackage:
    package = package_named(model)
    if package.manifest.enhancement is None:
        raise InvresError(
            f"{package.name} segments images; it does not enhance them.", hint="Use `invres segment` with this model."
        )
    return package


def _plan(package: ModelPackage) -> EnhancementPlan:
    assert package.manifest.enhancement is not None  # `_enhancer_named` has looked
    return package.manifest.enhancement


def _table(subjects: list[dict[str, Any]], plan: EnhancementPlan) -> str:
    from .enhancementscores import scores_table, summary_of

    return scores_table(subjects, summary_of(subjects), *_UNITS[plan.kind])
