"""Segments all cases of a folder into another: what is done is kept, and a case that fails does not end the rest."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import InvresError
from .alignment import resampled_sentence
from .caseinputs import CaseInputs
from .events import SILENT, CaseReporter, Reporter
from .faults import fault_of
from .files import safe_name, stamps_of, write_changed
from .inference import Locate, NetworkKeeper, segment
from .modelpackage import ModelPackage
from .runfolder import held
from .segmentoptions import SegmentOptions

__all__ = ["RECORD", "TABLE", "segment_cases"]

RECORD = "segmentations.json"
TABLE = "volumes.csv"
ENDS_ALL = ("disk_full", "missing_package")
"""Faults that every other case would meet as well."""


def segment_cases(
    package: ModelPackage,
    cases: Sequence[CaseInputs],
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    ending: str = ".nii.gz",
    report: Reporter = SILENT,
    keeper: NetworkKeeper | None = None,
    locate: Locate | None = None,
) -> dict[str, Any]:
    """Segments each case into `output`/CASE`ending`, with volumes of all in volumes.csv (mL) and a record in
    segmentations.json.

    Goes on where an earlier call was ended: a case whose result is there and whose images are as they were is left
    alone, and so is a result that somebody has changed since. Cases that failed are tried again.
    Returns the paths, and how many cases were segmented now, were there already, or failed.
    Raises InvresError for a folder that another model or other settings have filled, for a result there that this has
    not written, and at the end, when all others are done, for cases that failed.
    """
    options = options.mirrored_as(package.manifest.mirror_axes)
    output.mkdir(parents=True, exist_ok=True)
    with held(output):
        record = _record(output, package, options)
        done: dict[str, Any] = record["cases"]
        targets = {case.name: output / f"{safe_name(case.name)}{ending}" for case in cases}
        _check_targets(targets, done)
        keeper = keeper or NetworkKeeper()
        failed: dict[str, str] = {}
        new = 0
        for number, case in enumerate(cases):
            report.progress("segment.cases", number, len(cases))
            of_case = CaseReporter(report, case.name)
            target, stamps = targets[case.name], json.loads(json.dumps(stamps_of(case.inputs.values())))
            before = done.get(case.name)
            if before is not None and target.is_file():
                if before["images"] == stamps:
                    continue
                if before["stamp"] != _stamp(target):
                    of_case.warning(f"Its images have changed, but so has {target.name}, which is left as it is.")
                    continue
            try:
                found = segment(package, case.inputs, target, options, None, of_case, keeper=keeper, locate=locate)
            except Exception as error:
                fault = fault_of(error)
                if fault.code in ENDS_ALL:
                    raise
                if fault.code == "internal":
                    traceback.print_exc()
                of_case.warning(f"{fault.message} {fault.hint}".strip())
                failed[case.name] = fault.message
                done.pop(case.name, None)
            else:
                new += 1
                done[case.name] = {
                    "output": target.name,
                    "volumes_ml": found["volumes_ml"],
                    "confidence": found["confidence"],
                    "seconds": found["seconds"]["total"],
                    "resampled_channels": found["resampled_channels"],
                    "software": found["software"],
                    "device_title": found["device_title"],
                    "warnings": of_case.warnings,
                    "images": stamps,
                    "stamp": _stamp(target),
                }
            _write(output, record, failed)
        report.progress("segment.cases", len(cases), len(cases))
        _write(output, record, failed)
    kept = [done[case.name].get("resampled_channels", []) for case in cases if case.name in done]
    if resampled := resampled_sentence(kept):
        report.note(resampled)
    if failed:
        names = ", ".join(list(failed)[:5]) + (" and more" if len(failed) > 5 else "")
        raise InvresError(
            f"{len(failed)} of {len(cases)} cases could not be segmented: {names}. The others are in {output}.",
            hint="Correct what was said of them; the same command then tries these alone.",
            code="cases_failed",
        )
    return {
        "output": str(output),
        "table": str(output / TABLE),
        "record": str(output / RECORD),
        "segmented": new,
        "there_before": len(cases) - new,
        "warned": [case.name for case in cases if done[case.name]["warnings"]],
    }


def _record(output: Path, package: ModelPackage, options: SegmentOptions) -> dict[str, Any]:
    """What was done in the folder before. Raises InvresError where it was done otherwise."""
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key != "device"}
    if not options.align:
        del settings["align"]  # a record of the time before this option stays good
    manifest = package.manifest
    begun = {
        "format_version": 1,
        "model": package.name,
        "model_version": manifest.version,
        "model_sha256": manifest.sha256,
        "settings": json.loads(json.dumps(settings)),
    }
    path = output / RECORD
    if not path.is_file():
        return {**begun, "cases": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = {key: record[key] for key in begun}
        cases = {str(name): dict(entry) for name, entry in record["cases"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvresError(
            f"{path} is damaged, so nobody can tell what in {output} is done.", hint="Give another --output."
        ) from None
    if before != begun:
        other = f"{before['model']} {before['model_version']}"
        same = before["model_sha256"] == begun["model_sha256"]
        raise InvresError(
            f"{output} holds what {other} has segmented{' with other settings' if same else ''}.",
            hint="Give another --output.",
        )
    return {**begun, "cases": cases}


def _check_targets(targets: Mapping[str, Path], done: Mapping[str, Any]) -> None:
    for name, target in targets.items():
        if target.exists() and done.get(name, {}).get("output") != target.name:
            raise InvresError(
                f"{target} is there already, was not written by this command, and would be overwritten.",
                hint="Give another --output, or move the file away.",
                code="output_is_input",
            )


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _write(output: Path, record: Mapping[str, Any], failed: Mapping[str, str]) -> None:
    """The record, and a table with a line for each case, also for those that failed."""
    write_changed(output / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    done = record["cases"]
    labels = list(dict.fromkeys(label for entry in done.values() for label in entry["volumes_ml"]))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *(f"{label} (mL)" for label in labels), "confidence", "remarks"])
    for name in sorted(done.keys() | failed.keys()):
        if name in failed:
            table.writerow([name, *("" for _ in labels), "", failed[name]])
        else:
            entry = done[name]
            volumes = [entry["volumes_ml"].get(label, "") for label in labels]
            table.writerow([name, *volumes, entry["confidence"], " ".join(entry["warnings"])])
    write_changed(output / TABLE, text.getvalue())
