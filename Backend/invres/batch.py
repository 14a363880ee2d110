"""Segments all cases of a folder into another: what is done is kept, and a case that fails does not end the rest."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import InvresError
from .alignment import resampled_sentence
from .batchrecord import RECORD, TABLE, BatchRecord, images_of, result_name
from .caseinputs import CaseInputs
from .events import SILENT, CaseReporter, Reporter, listed
from .faults import fault_of
from .inference import Locate, NetworkKeeper, segment
from .modelpackage import ModelPackage
from .provenance import PARTS
from .runfolder import held
from .segmentoptions import SegmentOptions

__all__ = ["RECORD", "TABLE", "segment_cases"]

ENDS_ALL = ("disk_full", "missing_package")
"""Faults that every other case would meet as well."""
FIGURES = ("volumes_ml", "confidence", *PARTS)
"""What the record keeps of the result of a segmentation, beside its seconds and warnings."""


def segment_cases(
    package: ModelPackage,
    cases: Sequence[CaseInputs],
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    ending: str = ".nii.gz",
    report: Reporter = SILENT,
    keeper: NetworkKeeper | None = None,
    locate: Locate | None = None,
    locator: ModelPackage | None = None,
) -> dict[str, Any]:
    """Segments each case into `output`/CASE`ending`, with volumes of all in volumes.csv (mL) and a record in
    segmentations.json.

    Goes on where an earlier call was ended: a case whose result is there and whose images are as they were is left
    alone, and so is a result that somebody has changed since. Cases that failed are tried again.
    locate: see `inference.segment`; locator: the model that it asks.
    Returns the paths, and how many cases were segmented now or were there already.
    Raises InvresError for a folder that another model or other settings have filled, for a file there that this has
    not written, and at the end, when all others are done, for cases that failed.
    """
    options = options.mirrored_as(package.manifest.mirror_axes)
    output.mkdir(parents=True, exist_ok=True)
    with held(output):
        record = BatchRecord(output, _begun(package, options, ending, locator))
        targets = {case.name: output / result_name(case.name, ending) for case in cases}
        record.check(targets)
        keeper = keeper or NetworkKeeper()
        failed: list[str] = []
        new = 0
        for number, case in enumerate(cases):
            report.progress("segment.cases", number, len(cases))
            of_case = CaseReporter(report, case.name)
            target, images = targets[case.name], images_of(case.inputs.values())
            state = record.state(case.name, target, images)
            if state == "edited":
                of_case.warning(f"Its images have changed, but so has {target.name}, which is left as it is.")
            if state != "new":
                continue
            record.begin(case.name, target, images)
            try:
                found = segment(package, case.inputs, target, options, None, of_case, None, keeper, locate, locator)
            except Exception as error:
                fault = fault_of(error)
                if fault.code in ENDS_ALL:
                    raise
                if fault.code == "internal":
                    traceback.print_exc()
                of_case.warning(f"{fault.message} {fault.hint}".strip())
                failed.append(case.name)
                record.fail(case.name, fault.message)
            else:
                new += 1
                figures = {key: found[key] for key in FIGURES}
                rest = {"seconds": found["seconds"]["total"], "warnings": of_case.warnings}
                record.end(case.name, target, {**figures, **rest})
        report.progress("segment.cases", len(cases), len(cases))
        record.write()
    entries = {case.name: record.cases[case.name] for case in cases}
    kept = [entry["resampled_channels"] for entry in entries.values() if "resampled_channels" in entry]
    if resampled := resampled_sentence(kept):
        report.note(resampled)
    if failed:
        raise InvresError(
            f"{len(failed)} of {len(cases)} cases could not be segmented: {listed(failed)}. The others are in "
            f"{output}.",
            hint="Correct what was said of them; the same command then tries these alone.",
            code="cases_failed",
        )
    return {
        "output": str(output),
        "table": str(output / TABLE),
        "record": str(output / RECORD),
        "segmented": new,
        "there_before": len(cases) - new,
        "warned": [name for name, entry in entries.items() if entry.get("warnings")],
    }


def _begun(package: ModelPackage, options: SegmentOptions, ending: str, locator: ModelPackage | None) -> dict[str, Any]:
    """With what a folder is filled, as JSON values."""
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key != "device"}
    found = {
        "format_version": 1,
        "model": package.name,
        "model_version": package.manifest.version,
        "model_sha256": package.manifest.sha256,
        "locator_sha256": "" if locator is None else locator.manifest.sha256,
        "settings": settings,
        "ending": ending,
    }
    return json.loads(json.dumps(found))
