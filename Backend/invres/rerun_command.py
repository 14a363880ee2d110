"""`invres rerun`: segmentations made again from their record, and whether they are the same."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import InvresError
from .console import load_torch, say, segmenter_named, user_models_dir
from .events import CaseReporter, Reporter, listed
from .modelpackage import ModelPackage, bundled_models_dir, list_packages
from .outputs import check_outputs
from .rerunrecord import InputFinder, Record, differences_told, model_of, read_records, settings_of

if TYPE_CHECKING:
    from .inference import NetworkKeeper

__all__ = ["rerun"]


@dataclass(frozen=True)
class _Plan:
    """A segmentation to be made again. locator: the model that finds the boxes; None where the record has none."""

    record: Record
    package: ModelPackage
    locator: ModelPackage | None
    inputs: Mapping[str, Path]
    output: Path | None


def rerun(options: argparse.Namespace, report: Reporter) -> None:
    records = read_records(options.record, options.case)
    several = len(records) > 1
    if several and options.output is not None and options.output.is_file():
        raise InvresError(
            f"{options.output} is a file, but {len(records)} cases need a folder.", hint="Give another --output."
        )
    reports = [CaseReporter(report, record.name) if several else report for record in records]
    failed: dict[str, InvresError] = {}
    plans = _planned(records, reports, options, several, report, failed)
    cases = []
    if plans:
        load_torch(report)
        from .inference import NetworkKeeper

        keepers = NetworkKeeper(), NetworkKeeper()
        for number, (plan, of_case) in enumerate(plans):
            if several:
                report.progress("rerun.cases", number, len(plans))
            try:
                cases.append(_made_again(plan, options.device, keepers, of_case))
            except InvresError as error:
                _failed(plan.record.name, error, several, of_case, failed)
            else:
                say(report, _told(cases[-1]))
        if several:
            report.progress("rerun.cases", len(plans), len(plans))
    if failed:
        raise InvresError(
            f"{len(failed)} of {len(records)} cases could not be made again: {listed(list(failed))}.",
            hint="See what was said of each.",
            code="cases_failed",
        )
    compared = [case["same"] for case in cases if case["same"] is not None]
    report.result(record=str(options.record), cases=cases, same=all(compared) if compared else None)


def _planned(
    records: Sequence[Record],
    reports: Sequence[Reporter],
    options: argparse.Namespace,
    several: bool,
    report: Reporter,
    failed: dict[str, InvresError],
) -> list[tuple[_Plan, Reporter]]:
    """All that can be told before torch is imported and anything is computed."""
    given = segmenter_named(options.model) if options.model else None
    locating = segmenter_named(options.locate) if options.locate else None
    installed = list_packages([bundled_models_dir(), user_models_dir()])
    finder = InputFinder(options.input or [options.record.absolute().parent], bool(options.input), report)
    plans = []
    for record, of_case in zip(records, reports, strict=True):
        told = record.provenance
        try:
            settings_of(told, "cpu")
            package = model_of(told, installed, given, "--model", of_case)
            located = told["locator"]
            locator = model_of(located, installed, locating, "--locate", of_case) if located else None
            inputs = finder.inputs_of(told)
            output = options.output / record.output if several and options.output else options.output
            if output is not None:
                kept = [*inputs.values(), options.record, *([record.stored] if record.stored else [])]
                check_outputs([output], kept)
        except InvresError as error:
            _failed(record.name, error, several, of_case, failed)
        else:
            plans.append((_Plan(record, package, locator, inputs, output), of_case))
    return plans


def _failed(name: str, error: InvresError, several: bool, report: Reporter, failed: dict[str, InvresError]) -> None:
    """One of several does not end the others."""
    if not several or error.code == "cancelled":
        raise error
    report.warning(str(error))
    failed[name] = error


def _made_again(
    plan: _Plan, device: str | None, keepers: tuple[NetworkKeeper, NetworkKeeper], report: Reporter
) -> dict[str, Any]:
    from .agreement import compare
    from .devices import computed_as
    from .inference import Locate, segment_inputs
    from .locating import finder

    record, told = plan.record, plan.record.provenance
    chosen = device or _device_of(told, report)
    locate: Locate | None = None
    if plan.locator is not None:
        locate = finder(plan.package, plan.locator, chosen, keepers[1])
    elif (boxes := told["settings"].get("boxes_mm")) and not told["settings"]["roi_mm"]:
        report.note("The record does not say which model found the place, so the boxes that it has are taken.")
        recorded = [tuple(box) for box in boxes]

        def locate(*_: Any) -> tuple[list[tuple[float, ...]], int]:
            return recorded, 0

    with computed_as(told):
        found = segment_inputs(
            plan.package,
            plan.inputs,
            settings_of(told, chosen),
            report,
            keeper=keepers[0],
            locate=locate,
            locator=plan.locator,
        )
    for sentence in differences_told(told, found.provenance):
        report.warning(f"{sentence} Voxels may differ by rounding, or by more.")
    agreement = compare(record.stored, found) if record.stored is not None else None
    if plan.output is not None:
        report.progress("segment.write", 0, 1)
        found.save(plan.output)
        report.progress("segment.write", 1, 1)
    return {
        "name": record.name,
        "output": None if plan.output is None else str(plan.output),
        "stored": None if record.stored is None else str(record.stored),
        "same": None if agreement is None else agreement.same,
        "voxels": found.array.size,
        "different_voxels": None if agreement is None or agreement.other_grid else agreement.different,
        "dice": {} if agreement is None else agreement.dice,
        "other_grid": "" if agreement is None else agreement.other_grid,
        "volumes_ml": found.volumes_ml,
        **found.provenance,
    }


def _device_of(told: Mapping[str, Any], report: Reporter) -> str:
    """That of the record, as far as there is one of its kind here."""
    from .devices import list_devices

    if told["device"] == "cpu" or (told["device"] is None and told["device_title"].startswith("CPU")):
        return "cpu"
    best = list_devices()[0][0].name
    if best == "cpu":
        report.warning("The record is of a graphics card, which is not here; the CPU takes its place.")
    return best


def _told(case: Mapping[str, Any]) -> str:
    """For people."""
    if case["same"] is None:
        text = "made again; the segmentation that the record tells of is not beside it, so nothing was compared."
    elif case["other_grid"]:
        text = f"NOT the same, for the grid is another one: {case['other_grid']}."
    elif case["same"]:
        text = f"the same, in each of {case['voxels']} voxels."
    else:
        dice = ", ".join(f"{name} {value:.4f}" for name, value in case["dice"].items() if value < 1)
        text = f"NOT the same: other labels in {case['different_voxels']} of {case['voxels']} voxels. Dice: {dice}."
    return f"{case['name']}: {text}" + (f"\nSegmentation: {case['output']}" if case["output"] else "")
