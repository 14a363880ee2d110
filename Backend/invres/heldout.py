"""The cases that a training held out: segmented by its model, and paired with their references."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from . import InvresError
from .caseinputs import inputs_of
from .cases import Dataset, report_resampled
from .cropping import CROPS, cropped
from .events import SILENT, CaseReporter, Reporter
from .files import safe_name
from .inference import NetworkKeeper, segment
from .modelpackage import open_package
from .prediction import SegmentOptions
from .trainingrun import MODEL, held_out_names

__all__ = ["segment_held_out"]

FOLDER = "held_out"


def segment_held_out(
    run: Path, dataset: Dataset, device: str = "auto", report: Reporter = SILENT
) -> tuple[list[tuple[str, Path, Path]], dict[str, str]]:
    """Segments each case that the training in the folder `run` was validated on, into `run`/held_out.

    Returns (name of the case, prediction, reference) for `evaluation.score_pairs`, and the patient of each case.
    On some of them or all (`trainingrun.choosing_names`) the best epoch was chosen, so that scores are optimistic.
    Raises InvresError for a folder without a finished training, for one that held nothing out, and for a data set
    other than that of the training.
    """
    names = held_out_names(run)
    if not names:
        raise InvresError(
            f"The training in {run} took every case and held none out.", hint="Train with --fold 0 to be able to score."
        )
    if not (run / MODEL).is_dir():
        raise InvresError(f"The training in {run} is not finished.", hint="Go on with `invres train --resume`.")
    package = open_package(run / MODEL)
    plan = package.manifest.plan
    dataset = dataclasses.replace(dataset, aligned=plan.aligned)
    report_resampled(dataset, [case for case in dataset.cases if case.name in names], report)
    if plan.crop is not None:
        dataset = cropped(dataset, plan.crop, run / CROPS, report)
    keeper = NetworkKeeper()
    pairs: list[tuple[str, Path, Path]] = []
    patients: dict[str, str] = {}
    for done, case in enumerate([dataset.case(name) for name in names]):
        report.progress("evaluate.segment", done, len(names))
        if case.label is None:
            raise InvresError(f"The case {case.name} has no label to be scored against.", hint="Restore its file.")
        output = run / FOLDER / f"{safe_name(case.name)}.nii.gz"
        # With the labels of the references.
        segment(
            package,
            inputs_of(dataset, case),
            output,
            SegmentOptions(device, sides=False, align=plan.aligned),
            report=CaseReporter(report, case.name),
            keeper=keeper,
            locate=lambda *_: ([], 0),  # for a model of crops they are crops, as large as they may be
        )
        pairs.append((case.name, output, case.label))
        patients[case.name] = case.patient or case.name
    report.progress("evaluate.segment", len(names), len(names))
    return pairs, patients
