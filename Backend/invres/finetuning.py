"""`invres finetune`: from a model and a person's own cases to a new version of the model, and the proof of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import Cancelled, InvresError
from .casecomparison import CaseComparison
from .cases import Dataset, aligned_as_begun, report_resampled
from .casesplits import Part
from .checkpoint import CHECKPOINT
from .comparison import summarise, write_comparison
from .config import Recipe
from .configjson import from_dict, to_dict
from .cropping import CROPS, REFERENCE_CROPS, cropped
from .devices import choose_device
from .events import SILENT, Reporter
from .files import written_whole
from .labelmatching import check_known, named_by_value
from .manifest import check_name
from .modelpackage import ModelPackage
from .parttraining import NOTHING_TO_KEEP, TRANSFER, PartTrainer
from .proof import Proof, manifest_metrics, read_reference
from .runfolder import RUN, RecordingReporter, held, kind_of_run
from .stopfile import StopFile
from .trainer import METRICS, StopRequest
from .trainingrun import MODEL, training_summary
from .tunedmodel import RESULT, contender_of, finished_result, save_tuned, write_result
from .tuningplan import (
    TuningOptions,
    TuningPlan,
    check_single,
    merged_scheme,
    plan_tuning,
    read_plan,
    started_labels,
    write_plan,
)

__all__ = ["finetune"]

DONE = "done.json"
OF_MODEL = "model"
OF_OTHERS = "trainings of the same kind on fewer cases"
OF_BOTH = "model and trainings of the same kind on other cases"
SHOWN_TRAINING_CASES = 3  # segmented by both models where no case could be held out


def finetune(
    base: ModelPackage,
    dataset: Dataset,
    output: Path,
    options: TuningOptions,
    report: Reporter = SILENT,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Fine-tunes `base` on `dataset` in the folder `output` and proves what it brought on held-out cases.

    Leaves run.json, transfer.json, comparison.json and .txt, comparison/ (segmentations of the scored cases), a folder
    for each training, result.json, and the tuned package: model/ where it is promoted, else candidate/.
    dataset: may come from `read_dataset(path, checked=False)`; bad cases are left out, each with a warning.
    Returns the content of result.json.
    Raises InvresError for a folder with another run and for data that do not fit; Cancelled after a stop was requested
    (everything is saved); OutOfMemory where neither a thriftier engine nor smaller patches help.
    """
    check_single(base.manifest)
    if output.exists() and not output.is_dir():
        raise InvresError(f"{output} is a file, but fine-tuning needs a folder.", hint="Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    with held(output):
        recorder = RecordingReporter(report, output)
        try:
            result = _held(base, dataset, output, options, recorder, stop or StopFile(output))
        except BaseException as error:
            recorder.ended(error)
            raise
        recorder.ended(result)
        return result


def _held(
    base: ModelPackage, dataset: Dataset, output: Path, options: TuningOptions, report: Reporter, stop: StopRequest
) -> dict[str, Any]:
    if isinstance(stop, StopFile):  # left from the stop before
        stop.clear(also_keep_best=False)
    device = choose_device(options.device)
    started = (output / RUN).exists()
    if kind_of_run(output) == "training":
        raise InvresError(
            f"{output} is the folder of a training, not of a fine-tuning.",
            hint=f"Give another --output; to fine-tune what was trained there, give --model {output / MODEL}.",
        )
    known, scheme = base.manifest.scheme, dataset.scheme
    # A run goes on with the names that it was begun with; where they were meant as they are, they are so again.
    as_begun = started and options.resume and started_labels(output) == scheme.names
    if not (options.new_labels or as_begun):
        scheme = named_by_value(scheme, known, base.name, report)
        if not started:
            check_known(scheme, known, base.name)
    # Of a model that has learned from aligned channels the data are read alike.
    aligned = dataset.aligned or base.manifest.plan.aligned
    dataset = dataclasses.replace(dataset, scheme=merged_scheme(scheme, known), aligned=aligned)
    if started and not options.resume:
        raise InvresError(
            f"There is already a fine-tuning in {output}.", hint="Add --resume to go on, or give another folder."
        )
    dataset = aligned_as_begun(dataset, output, report) if started else dataset
    report_resampled(dataset, dataset.labelled_cases, report)
    crop = base.manifest.plan.crop
    if crop is not None:
        dataset = cropped(dataset, crop, output / CROPS, report, lambda: stop.requested)
    if started:
        plan = read_plan(output, base.manifest, dataset, options, report)
    else:
        if options.resume:
            report.note(f"There is nothing in {output} to resume, so the fine-tuning starts.")
        plan = plan_tuning(base.manifest, dataset, output / "prepared", options, report)
    if started and (output / RESULT).is_file():
        return finished_result(output, options.promote, report)
    # A mistake there is told before hours of training, and before there is a run that only --resume goes on with.
    options = plan.remembered(options, report) if started else options
    check_name(options.name or base.name)
    reference = read_reference(options.check_base, base, plan.plan, report) if options.check_base else None
    if reference is not None and crop is not None:
        reference = cropped(reference, crop, output / REFERENCE_CROPS, report, lambda: stop.requested)
    plan = dataclasses.replace(plan, name=options.name, licence=options.licence)
    write_plan(output, plan)
    run = _Run(base, dataset, plan, reference, output, options, device, report, stop)
    try:
        result = run.whole()
    except InvresError as error:
        if isinstance(stop, StopFile) and (isinstance(error, Cancelled) or error.code == NOTHING_TO_KEEP):
            # Where there was nothing to keep, a run that goes on would end there again.
            stop.clear(also_keep_best=error.code == NOTHING_TO_KEEP)
        raise
    if isinstance(stop, StopFile):
        stop.clear()
    return result


class _Staged(Reporter):
    """Says of every event which of the run's trainings it belongs to, counted from 1."""

    def __init__(self, report: Reporter, part: int, parts: int):
        super().__init__()
        self._report, self._place = report, {"part": part, "parts": parts}

    def emit(self, event: dict[str, Any]) -> None:
        self._report.emit({**event, **self._place})


class _Run:
    """The trainings of one run, one after the other; each is recorded when it is done and never done again."""

    def __init__(
        self,
        base: ModelPackage,
        dataset: Dataset,
        plan: TuningPlan,
        reference: Dataset | None,
        output: Path,
        options: TuningOptions,
        device: torch.device,
        report: Reporter,
        stop: StopRequest,
    ):
        self.base, self.output, self.options = base, output, options
        self.device, self.report, self.stop = device, report, stop
        self.trainer = PartTrainer(base, dataset, plan, output, device, report, stop)
        self.proof = Proof(base, dataset, output / "comparison", device, stop)
        self.reference = reference

    def whole(self) -> dict[str, Any]:
        """All trainings, the proof and the package."""
        self.trainer.fit_memory()
        parts = self.trainer.plan.parts
        records: list[dict[str, Any]] = []
        steps: list[int] = []
        for index, part in enumerate(parts):
            self.report.progress("finetune.parts", index, len(parts))
            ended = bool(index and self.stop.finish)
            record = None if ended else self._part(index, part, max(steps, default=0))
            if record is None:
                self.report.note(f"Ended as asked: {index} of {len(parts)} trainings are done.")
                break
            records.append(record)
            steps.append(record["training"]["iterations"])
        self.report.progress("finetune.parts", len(parts), len(parts))
        # The last one has learned from all cases. Of those before it, the one that has learned longest.
        kept = len(records) - 1
        if len(records) < len(parts):
            kept = max(range(len(records)), key=lambda index: (steps[index], index))
        scored = [from_dict(CaseComparison, entry, DONE) for record in records for entry in record["scores"]]
        return self._prove_and_save(kept, records[kept]["training"], scored)

    def _part(self, index: int, part: Part, rival: int) -> dict[str, Any] | None:
        """Trains and scores; the record of it is what done.json holds. None where a training of `rival` steps, that is
        complete, is to be kept rather than this one, which was cut short.
        """
        folder = self.trainer.folder(index)
        done = folder / DONE
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        folder.mkdir(exist_ok=True)
        parts = len(self.trainer.plan.parts)
        report = _Staged(self.report, index + 1, parts)
        without = f"{_count(part.held_out)} held out" if part.held_out else "nothing held out"
        report.note(f"Training {index + 1} of {parts}: {_count(part.train)}, {without}.")
        trained = self.trainer.train(index, part, report, rival)
        if trained is None:
            return None
        result, engine = trained
        plan = self.trainer.plan  # it may have changed for want of memory
        tuned = contender_of(self.base.manifest, plan, self.options, result.weights, self.device)
        scores = self.proof.compare(part.held_out, tuned, report)
        gone = {one.case for one in plan.skipped}
        summary = training_summary(
            Recipe("finetune", network=plan.network, training=plan.training, augmentation=plan.augmentation),
            result,
            engine,
            len(set(part.train) - gone),
            len(part.validation),
        )
        record = {"training": summary, "scores": [to_dict(one) for one in scores]}
        with written_whole(done) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        return record

    def _prove_and_save(self, kept: int, training: dict[str, Any], scored: list[CaseComparison]) -> dict[str, Any]:
        """The package of the training `kept`, with what the comparisons say of it."""
        plan, options, manifest = self.trainer.plan, self.options, self.base.manifest
        part, weights = plan.parts[kept], self.trainer.trained_weights(kept)
        tuned = contender_of(manifest, plan, options, weights, self.device)
        held_out = any(one.held_out for one in plan.parts)
        if not held_out:
            scored = self.proof.compare(part.train[:SHOWN_TRAINING_CASES], tuned, self.report)
        proof = summarise(scored, held_out, plan.scheme, dropped=self.trainer.dropped_labels)
        proof["of"] = _proved(part, [one.case for one in scored]) if held_out else OF_MODEL
        check = self.proof.forgotten(tuned, self.reference, self.report) if self.reference else None
        forgotten = check is not None and (check["verdict"] == "worse" or bool(check["worse_labels"]))
        promoted = options.promote or (proof["promotable"] and not forgotten)
        proof |= {"promoted": promoted, "base_check": check}
        comparison = write_comparison(self.output, proof)
        summary = {**training, "validation_cases": len(scored) if held_out else 0}
        metrics = manifest_metrics(scored) if held_out and scored else {}
        # With one patient in its training cases, as in a training from the start.
        seen, images = self.trainer.seen(part, [one.confidence for one in scored])
        known = [*manifest.trained_on, *images]
        log = self.trainer.folder(kept) / METRICS
        package = save_tuned(
            self.output, manifest, plan, options, weights, summary, metrics, seen, known, promoted, log
        )
        result = write_result(self.output, manifest, plan, package, proof, comparison, self.output / TRANSFER)
        for index in range(len(plan.parts) - 1):
            (self.trainer.folder(index) / CHECKPOINT).unlink(missing_ok=True)
        return result


def _proved(part: Part, scored: Sequence[str]) -> str:
    """Of what the scores of these held-out cases are, where the model is that of `part`."""
    if not part.held_out:  # of the last training, where each case was held out from another one
        return OF_OTHERS
    return OF_MODEL if set(scored) <= set(part.held_out) else OF_BOTH


def _count(names: tuple[str, ...]) -> str:
    return "1 case" if len(names) == 1 else f"{len(names)} cases"
