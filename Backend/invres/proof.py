"""The proof of a fine-tuning: base and tuned model on the cases that tell, read one by one, stopped when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import Cancelled, InvresError
from .casecomparison import CaseComparison, Contender, can_segment, channels_for, compare_case
from .cases import Case, Dataset, read_dataset
from .comparison import summarise
from .config import PreparationPlan
from .events import SILENT, FilteredReporter, Reporter
from .inference import load_network
from .intervals import spread_over_patients
from .labelmatching import named_by_value, shared_labels
from .modelpackage import ModelPackage
from .networks import SegmentationNetwork
from .trainer import StopRequest

__all__ = ["Proof", "manifest_metrics", "read_reference"]


class Proof:
    """Compares the base model with tuned ones. folder: where segmentations are written."""

    def __init__(self, base: ModelPackage, dataset: Dataset, folder: Path, device: torch.device, stop: StopRequest):
        self._model, self._dataset, self._folder = base, dataset, folder
        self._device, self._stop = device, stop
        self._network: SegmentationNetwork | None = None

    def compare(
        self, names: Sequence[str], tuned: Contender, report: Reporter, dataset: Dataset | None = None
    ) -> list[CaseComparison]:
        """Base and tuned model on the run's own cases, with their segmentations written and channels left out one by
        one, or on those of a data set.

        A case that cannot be read (any more) is left out with a warning.
        """
        # The windows of a comparison are no progress of the run.
        quiet = FilteredReporter(report, lambda kind: kind == "warning")
        folder = self._folder if dataset is None else None
        dataset = dataset or self._dataset
        found = []
        for done, name in enumerate(names):
            if self._stop.requested:
                raise Cancelled(
                    f"Stopped; everything that was trained is saved in {self._folder.parent}.",
                    hint="Go on with the same command and --resume.",
                )
            report.progress("finetune.compare", done, len(names))
            try:
                case = dataset.case(name)
                base = self._base(dataset, case)
                # A case for which the card was too small has moved both to the CPU.
                tuned.network.to(self._device)
                own = folder is not None
                found.append(compare_case(dataset, case, base, tuned, folder, quiet, leave_out=own))
            except InvresError as error:
                if error.code in ("write_failed", "out_of_memory"):
                    raise
                report.warning(f"The case {name} is not compared: {error.message}", case=name)
        report.progress("finetune.compare", len(names), len(names))
        return found

    def forgotten(self, tuned: Contender, reference: Dataset, report: Reporter) -> dict[str, Any]:
        """Both models on cases of the base model's own kind; what `comparison.summarise` gives."""
        names = [case.name for case in reference.labelled_cases]
        found = self.compare(names, tuned, report, reference)
        check = summarise(found, True, reference.scheme, "of the base model's own kind")
        if check["verdict"] == "worse" or check["worse_labels"]:
            report.warning(f"The tuned model has forgotten something of the base model's task: {check['sentence']}")
        return check

    def _base(self, dataset: Dataset, case: Case) -> Contender | None:
        """The base model, if the case has its channels."""
        if not can_segment(self._model.manifest.plan.channels, dataset, case):
            return None
        if self._network is None:
            self._network = load_network(self._model, self._device)
        return Contender(self._model, self._network.to(self._device))


def read_reference(path: Path, base: ModelPackage, plan: PreparationPlan, report: Reporter = SILENT) -> Dataset:
    """Cases of the base model's own kind, which it and a model of this plan must be able to segment.

    Labels without names are taken as the base model's, as those of the run's own data are.
    Raises InvresError where they lack a channel of one of the two, have no label, or none that the base model has.
    """
    partial = all(channel.optional for channel in (*base.manifest.plan.channels, *plan.channels))
    reference = read_dataset(path, partial=partial, aligned=plan.aligned)
    for who, channels in (("base", base.manifest.plan.channels), ("tuned", plan.channels)):
        if channels_for(channels, reference.channel_names) is None:
            raise InvresError(
                f"The cases in {path} lack a channel of the {who} model, which takes "
                f"{', '.join(channel.name for channel in channels)}.",
                hint="Give other cases to --check-base, or leave it out.",
            )
    known = base.manifest.scheme
    reference = dataclasses.replace(reference, scheme=named_by_value(reference.scheme, known, base.name, report))
    if not reference.labelled_cases or not shared_labels(reference.scheme, known):
        names = ", ".join(reference.scheme.names)
        what = f"its labels are {names}" if reference.labelled_cases else "no case there has a label"
        raise InvresError(
            f"The cases in {path} cannot tell what {base.name} ({', '.join(known.names)}) knew: {what}.",
            hint="Name its labels in dataset.json as the model does, or give other cases to --check-base.",
        )
    return reference


def manifest_metrics(cases: list[CaseComparison]) -> dict[str, Any]:
    """Of the tuned model on held-out cases, by label and metric, for the manifest."""
    metrics: dict[str, Any] = {}
    patients = [one.patient for one in cases]
    for name in cases[0].tuned:
        metrics[name] = {}
        for metric, key, most in (("Dice", "Dice", 1.0), ("HD95", "HD95_mm", float("inf"))):
            values = [one.tuned[name][key] for one in cases]
            metrics[name][metric] = spread_over_patients(values, patients, (0.0, most))
        for channel in dict.fromkeys(channel for one in cases for channel in one.without):
            some = [one for one in cases if channel in one.without]
            values = [one.without[channel][name] for one in some]
            of_patients = [one.patient for one in some]
            metrics[name][f"Dice without {channel}"] = spread_over_patients(values, of_patients, (0.0, 1.0))
    return metrics
