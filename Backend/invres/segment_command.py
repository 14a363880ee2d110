"""`invres segment`: one case from its files, or all cases of a folder, or only the list of these."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import InvresError
from .console import load_torch, say, segmenter_named
from .events import Reporter, TerminalReporter, WhileHeard, format_seconds, listed
from .expectation import Expectation, confidence_in_words
from .modelpackage import ModelPackage
from .outputs import check_provenance, check_table
from .segmentfiles import check_locatable
from .segmentoptions import SegmentOptions

if TYPE_CHECKING:
    from .caseinputs import CaseInputs
    from .inference import Locate, NetworkKeeper

__all__ = ["segment"]

# The networks of the last segmentation, for the next one in the same process.
_kept: dict[str, NetworkKeeper] = {}


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
    if options.volumes is not None and not options.frames:
        raise InvresError(
            "--volumes is for --frames.",
            hint="The volumes of one image are printed; --data writes them by itself.",
            code="usage",
        )
    if options.ending and options.data is None:
        raise InvresError("--ending is for --data; the name of one --output has its own.", code="usage")
    run = _all_cases if options.data is not None else _all_frames if options.frames else _one_case
    run(package, choices, options, report)


def _one_case(package: ModelPackage, choices: SegmentOptions, options: argparse.Namespace, report: Reporter) -> None:
    from .segmentfiles import check_files, named_inputs

    manifest = package.manifest
    inputs = named_inputs(options.input, manifest.plan.channels)
    check_files(manifest, inputs, options.output, options.probabilities, options.uncertainty)
    _check_rest(options, report)
    other = _other_model(package, options)
    load_torch(report)
    from .inference import segment as run

    found = run(
        package,
        inputs,
        options.output,
        choices,
        options.probabilities,
        report,
        keeper=_keeper("keeper"),
        locate=_finder(package, other, options.device),
        locator=other,
        uncertainty_path=options.uncertainty,
        provenance_path=options.provenance,
    )
    _remember_speed(package, found)
    say(report, f"Segmentation: {found['output']}")
    for name, volume in found["volumes_ml"].items():
        say(report, f"  {name}: {volume:.2f} mL")
    _say_how(package, choices, found, report)
    report.result(**found)


def _all_frames(package: ModelPackage, choices: SegmentOptions, options: argparse.Namespace, report: Reporter) -> None:
    from .frames import FRAME, open_series
    from .segmentfiles import check_series_files, named_inputs

    _refuse(options, ("probabilities", "uncertainty"), "is for one image", "Leave it out, or leave --frames out.")
    manifest = package.manifest
    inputs = named_inputs(options.input, manifest.plan.channels)
    check_series_files(manifest, inputs, options.output)
    if options.volumes is not None:
        check_table(options.volumes, FRAME)
    _check_rest(options, report)
    series = open_series(manifest.plan.channels, inputs, package.name)
    report.note(f"{series.count} frames.")
    other = _other_model(package, options)
    load_torch(report)
    from .series import segment_series

    found = segment_series(
        package,
        inputs,
        options.output,
        choices,
        options.volumes,
        report,
        keeper=_keeper("keeper"),
        locate=_finder(package, other, options.device),
        locator=other,
        provenance_path=options.provenance,
    )
    _remember_speed(package, found)
    frames = found["frames"]
    say(report, f"Segmentation: {found['output']}, {len(frames)} frames")
    for name in dict.fromkeys(name for frame in frames for name in frame["volumes_ml"]):
        volumes = {frame["frame"]: frame["volumes_ml"][name] for frame in frames if name in frame["volumes_ml"]}
        least, most = min(volumes, key=volumes.__getitem__), max(volumes, key=volumes.__getitem__)
        to = f" (frame {least}) to {volumes[most]:.2f} mL (frame {most})" if volumes[least] < volumes[most] else ""
        say(report, f"  {name}: {volumes[least]:.2f} mL{to}")
    if options.volumes is not None:
        say(report, f"  Volumes of all frames: {options.volumes}")
    _say_how(package, choices, found, report)
    report.result(**found)


def _check_rest(options: argparse.Namespace, report: Reporter) -> None:
    """What one image and a series have in common."""
    if options.provenance is not None:
        check_provenance(options.provenance)
    # Said to a person only: the panel and scripts name files that they have made for this.
    if isinstance(report, TerminalReporter) and options.output.exists():
        report.note(f"{options.output} was there before and is replaced.")


def _remember_speed(package: ModelPackage, found: dict[str, Any]) -> None:
    from .pace import remember_speed

    settings = found["settings"]
    flips = 2 ** len(settings["mirror_axes"])
    remember_speed(
        package.manifest.sha256,
        found["device"],
        settings["windows"] * flips,
        tuple(settings["window"]),
        found["seconds"]["predict"],
    )


def _say_how(package: ModelPackage, choices: SegmentOptions, found: dict[str, Any], report: Reporter) -> None:
    # What is expected is of whole images; a box may have its edge anywhere.
    expected = Expectation() if choices.roi_mm else package.manifest.expected
    of_all = ", the least of all frames" if "frames" in found else ""
    say(report, f"  {confidence_in_words(found['confidence'], expected)}{of_all}")
    say(report, f"  {format_seconds(found['seconds']['total'])} on {found['device']}")


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
    if options.frames:
        raise InvresError("--frames is for one case.", hint="Segment series by series, with --input.", code="usage")
    _refuse(options, ("probabilities", "uncertainty"), "is for one case", "Leave it out, or segment case by case.")
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

    locate = _finder(package, other, options.device)
    ending = options.ending or ".nii.gz"
    found = segment_cases(package, cases, options.output, choices, ending, heard, locate=locate, locator=other)
    before = f" ({found['there_before']} were there before)" if found["there_before"] else ""
    say(report, f"Segmentations: {len(cases)}{before}, in {found['output']}")
    say(report, f"Volumes: {found['table']}")
    if warned := found["warned"]:
        say(report, f"Look at {listed(warned)}: see the remarks there.")
    report.result(**found)


def _refuse(options: argparse.Namespace, flags: Sequence[str], why: str, hint: str) -> None:
    for flag in flags:
        if getattr(options, flag) is not None:
            raise InvresError(f"--{flag} {why}.", hint=hint, code="usage")


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


def _finder(package: ModelPackage, other: ModelPackage | None, device: str) -> Locate | None:
    from .locating import finder

    return finder(package, other, device, _keeper("locator")) if other else None


def _keeper(of: str) -> NetworkKeeper:
    from .inference import NetworkKeeper

    return _kept.setdefault(of, NetworkKeeper())
