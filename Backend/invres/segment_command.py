"""`invres segment`: one case from its files, or all cases of a folder, or only the list of these."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import InvresError
from .console import load_torch, say, segmenter_named
from .events import Reporter, TerminalReporter, WhileHeard, format_seconds, listed
from .expectation import Expectation, confidence_in_words
from .modelpackage import ModelPackage
from .outputs import check_provenance
from .segmentfiles import check_locatable
from .segmentoptions import SegmentOptions

if TYPE_CHECKING:
    from .caseinputs import CaseInputs

__all__ = ["segment"]

# The network of the last segmentation, for the next one in the same process.
_kept: dict[str, Any] = {}


def segment(options: argparse.Namespace, report: Reporter) -> None:
    package = segmenter_named(options.model)
    if options.data is None and not options.input:
        raise InvresError(
            "Nothing to segment was named.",
            hint="Give the files of one case (--input), or a folder with cases (--data).",
            code="usage",
        )
    if options.list:
        _list_cases(package, options, report)
        return
    # All that can be told before torch is imported, which takes seconds.
    choices = SegmentOptions(
        options.device,
        options.overlap,
        None if options.mirror is None else tuple(options.mirror),
        tuple(options.window),
        tuple(options.roi or ()),
        options.sides,
        options.one_piece,
        options.align,
    )
    (_one_case if options.data is None else _all_cases)(package, choices, options, report)


def _one_case(package: ModelPackage, choices: SegmentOptions, options: argparse.Namespace, report: Reporter) -> None:
    from .segmentfiles import check_files, named_inputs

    manifest = package.manifest
    if options.ending:
        raise InvresError("--ending is for --data; the name of one --output has its own.", code="usage")
    inputs = named_inputs(options.input, manifest.plan.channels)
    check_files(manifest, inputs, options.output, options.probabilities, options.uncertainty)
    if options.provenance is not None:
        check_provenance(options.provenance)
    # Said to a person only: the panel and scripts name files that they have made for this.
    if isinstance(report, TerminalReporter) and options.output.exists():
        report.note(f"{options.output} was there before and is replaced.")
    other = _other_model(package, options)
    load_torch(report)
    from .inference import NetworkKeeper
    from .inference import segment as run
    from .locating import finder
    from .pace import remember_speed

    keeper = _kept.setdefault("keeper", NetworkKeeper())
    locate = finder(package, other, options.device, _kept.setdefault("locator", NetworkKeeper())) if other else None
    found = run(
        package,
        inputs,
        options.output,
        choices,
        options.probabilities,
        report,
        keeper=keeper,
        locate=locate,
        locator=other,
        uncertainty_path=options.uncertainty,
        provenance_path=options.provenance,
    )
    settings = found["settings"]
    flips = 2 ** len(settings["mirror_axes"])
    remember_speed(
        manifest.sha256,
        found["device"],
        settings["windows"] * flips,
        tuple(settings["window"]),
        found["seconds"]["predict"],
    )
    say(report, f"Segmentation: {found['output']}")
    for name, volume in found["volumes_ml"].items():
        say(report, f"  {name}: {volume:.2f} mL")
    # What is expected is of whole images; a box may have its edge anywhere.
    say(report, f"  {confidence_in_words(found['confidence'], Expectation() if choices.roi_mm else manifest.expected)}")
    say(report, f"  {format_seconds(found['seconds']['total'])} on {found['device']}")
    report.result(**found)


def _list_cases(package: ModelPackage, options: argparse.Namespace, report: Reporter) -> None:
    if options.data is None:
        raise InvresError("--list is for --data; without it there is one case only.", code="usage")
    cases = _cases_of(package, options, report)
    for case in cases:
        say(report, _described(case))
    say(report, f"{len(cases)} case{'' if len(cases) == 1 else 's'}; nothing was segmented.")
    files = [{name: str(path) for name, path in case.inputs.items()} for case in cases]
    report.result(cases=[{"name": case.name, "inputs": one} for case, one in zip(cases, files, strict=True)])


def _cases_of(package: ModelPackage, options: argparse.Namespace, report: Reporter) -> list[CaseInputs]:
    from .caseinputs import cases_to_segment, chosen_channels

    channels = package.manifest.plan.channels
    chosen = chosen_channels(options.input or (), channels, package.name)
    return cases_to_segment(options.data, channels, package.name, chosen, report)


def _all_cases(package: ModelPackage, choices: SegmentOptions, options: argparse.Namespace, report: Reporter) -> None:
    from .mirroring import check_mirror

    manifest = package.manifest
    for flag in ("probabilities", "uncertainty"):
        if getattr(options, flag) is not None:
            raise InvresError(f"--{flag} is for one case.", hint="Leave it out, or segment case by case.", code="usage")
    if options.provenance is not None:
        raise InvresError(
            "--provenance is for one case.",
            hint="With --data, segmentations.json in the folder of the results says how each was made.",
            code="usage",
        )
    check_mirror(manifest.scheme, choices.mirrored_as(manifest.mirror_axes).mirror_axes or ())
    _check_folder(options.output, options.data)
    cases = _cases_of(package, options, report)
    report.note(f"{len(cases)} case{'' if len(cases) == 1 else 's'} in {options.data}: {_described(cases[0])}.")
    other = _other_model(package, options)
    heard = WhileHeard(report)
    load_torch(heard)
    from .batch import segment_cases
    from .inference import NetworkKeeper
    from .locating import finder

    locate = finder(package, other, options.device, _kept.setdefault("locator", NetworkKeeper())) if other else None
    ending = options.ending or ".nii.gz"
    found = segment_cases(package, cases, options.output, choices, ending, heard, locate=locate, locator=other)
    before = f" ({found['there_before']} were there before)" if found["there_before"] else ""
    say(report, f"Segmentations: {len(cases)}{before}, in {found['output']}")
    say(report, f"Volumes: {found['table']}")
    if warned := found["warned"]:
        say(report, f"Look at {listed(warned)}: see the remarks there.")
    report.result(**found)


def _described(case: CaseInputs) -> str:
    files = ", ".join(f"{name + '=' if name else ''}{path.name}" for name, path in case.inputs.items())
    return f"{case.name} is {files or 'without any file'}"


def _check_folder(output: Path, data: Path) -> None:
    """Raises InvresError for a file, and for a folder in which the results would be taken for cases the next time."""
    if output.is_file():
        raise InvresError(
            f"{output} is a file, but with --data the results need a folder.", hint="Give another --output."
        )
    folder = data if data.is_dir() else data.parent
    if folder.resolve() in (output.resolve(), output.resolve().parent):
        raise InvresError(
            f"The results would lie among the data, in {output}.",
            hint=f"Give another --output, such as {shlex.quote(folder.name + '_segmented')}.",
            code="output_is_input",
        )


def _other_model(package: ModelPackage, options: argparse.Namespace) -> ModelPackage | None:
    """The model that finds the boxes for the package. Raises InvresError where there is nothing to find for it."""
    if not options.locate:
        return None
    check_locatable(package.manifest)
    return segmenter_named(options.locate)
