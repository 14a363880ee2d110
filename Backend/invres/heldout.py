"""The cases that trainings held out: segmented by the model of each, and paired with their references."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from . import InvresError
from .caseinputs import inputs_of
from .cases import Dataset, read_dataset, report_resampled
from .config import LabelScheme
from .configjson import from_dict
from .cropping import CROPS, cropped
from .events import SILENT, CaseReporter, Reporter
from .files import safe_name
from .inference import NetworkKeeper, segment
from .modelpackage import open_package
from .prediction import SegmentOptions
from .trainingrun import MODEL, data_of_run, held_out_names, started_run

__all__ = ["segment_folds", "segment_held_out"]

FOLDER = "held_out"
Pair = tuple[str, Path, Path]


def segment_folds(
    runs: Sequence[Path], data: Path | None = None, device: str = "auto", report: Reporter = SILENT
) -> tuple[list[Pair], dict[str, str], LabelScheme]:
    """Segments what each of several trainings held out, by its own model: all cases of a cross-validation together.

    data: the data set of all; None takes for each run the one that its run.json names.
    Returns what `segment_held_out` does, of all runs, and the labels to score.
    Raises InvresError before any work for a case that two runs held out, for runs of other labels, for a run that held
    out no images, and for data that are not found; and as `segment_held_out` does.
    """
    for run in runs:
        _check_images(run)
    _check_each_once(runs)
    _check_labels(runs, [_scheme_of(run) for run in runs])
    datasets = [_dataset_of(run, data) for run in runs]
    _check_labels(runs, [dataset.scheme for dataset in datasets])
    pairs: list[Pair] = []
    patients: dict[str, str] = {}
    for run, dataset in zip(runs, datasets, strict=True):
        found, of_cases = segment_held_out(run, dataset, device, report)
        pairs += found
        patients |= of_cases
    return pairs, patients, datasets[0].scheme


def segment_held_out(
    run: Path, dataset: Dataset, device: str = "auto", report: Reporter = SILENT
) -> tuple[list[Pair], dict[str, str]]:
    """Segments each case that the training in the folder `run` was validated on, into `run`/held_out.

    Returns (name of the case, prediction, reference) for `evaluation.score_pairs`, and the patient of each case.
    On some of them or all (`trainingrun.choosing_names`) the best epoch was chosen, so that scores are optimistic.
    Raises InvresError for a folder without a finished training, for one that held nothing out, and for a data set
    other than that of the training.
    """
    names = _finished(run)
    package = open_package(run / MODEL)
    if package.manifest.members > 1:
        raise InvresError(
            f"The model in {run} was joined from several, which have learned from what this run held out.",
            hint="Score a run with the model that it trained.",
        )
    plan = package.manifest.plan
    dataset = dataclasses.replace(dataset, aligned=plan.aligned)
    report_resampled(dataset, [case for case in dataset.cases if case.name in names], report)
    if plan.crop is not None:
        dataset = cropped(dataset, plan.crop, run / CROPS, report)
    keeper = NetworkKeeper()
    pairs: list[Pair] = []
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


def _finished(run: Path) -> tuple[str, ...]:
    """The cases that it held out. Raises InvresError where there are none, and where no model is there to be scored."""
    names = held_out_names(run)
    if not names:
        raise InvresError(
            f"The training in {run} took every case and held none out.", hint="Train with --fold 0 to be able to score."
        )
    if not (run / MODEL).is_dir():
        raise InvresError(f"The training in {run} is not finished.", hint="Go on with `invres train --resume`.")
    return names


def _check_images(run: Path) -> None:
    """Raises InvresError for a training that did not hold out images with labels, or is not finished."""
    held_out_names(run)  # says of a folder without a training that it is none
    recipe = started_run(run)[0]
    if recipe.label_maps is not None:
        raise InvresError(
            f"The training in {run} learned from label maps and held no image out that could be segmented.",
            hint=f"`invres describe {run / MODEL}` has its Dice on synthetic images.",
        )
    if recipe.enhancement is not None:
        raise InvresError(
            f"The training in {run} is of a model that enhances images; it does not segment them.",
            hint=f"Score it by `invres evaluate --model {run / MODEL} --data SCANS`.",
        )
    _finished(run)


def _check_each_once(runs: Sequence[Path]) -> None:
    held: dict[str, Path] = {}
    for run in runs:
        for name in held_out_names(run):
            if name in held:
                raise InvresError(
                    f"The case {name} was held out in {held[name]} and in {run}, and can be scored only once.",
                    hint="Give each fold of one cross-validation once.",
                )
            held[name] = run


def _check_labels(runs: Sequence[Path], schemes: Sequence[LabelScheme]) -> None:
    for run, scheme in zip(runs, schemes, strict=True):
        if scheme != schemes[0]:
            raise InvresError(
                f"The labels of {run} ({_labels(scheme)}) are not those of {runs[0]} ({_labels(schemes[0])}), so that "
                "their cases cannot be scored together.",
                hint="Score each run by itself.",
            )


def _dataset_of(run: Path, data: Path | None) -> Dataset:
    """The data set that is given, or else the one that the run names. Raises InvresError where there is none."""
    if data is not None:
        return read_dataset(data, checked=False)
    named = data_of_run(run)
    if named is None:
        raise InvresError(
            f"The training in {run} does not say where its data set is, for it is of an earlier version.",
            hint="Add --data with the data set that it was trained on.",
        )
    if not named.exists():
        raise InvresError(
            f"The data set of the training in {run} is not at {named} any more.", hint="Say where it is now by --data."
        )
    return read_dataset(named, checked=False)


def _scheme_of(run: Path) -> LabelScheme:
    return from_dict(LabelScheme, started_run(run)[2], "run.json: scheme")


def _labels(scheme: LabelScheme) -> str:
    """As "liver = 1, tumour = 2 3"."""
    told = [f"{label.name} = {' '.join(map(str, label.values))}" for label in scheme.labels]
    return ", ".join(told if scheme.ignore_value is None else [*told, f"ignored = {scheme.ignore_value}"])
