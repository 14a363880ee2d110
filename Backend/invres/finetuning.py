"""`invres finetune`: from a model and a person's own cases to a new version of the model, and the proof of it."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch

from . import Cancelled, InvresError, OutOfMemory
from .cases import Dataset
from .casesplits import Part
from .checkpoint import CHECKPOINT, load_checkpoint
from .comparison import CaseComparison, Contender, summarise, write_comparison
from .config import Recipe, TrainingConfig, from_dict, to_dict
from .curves import draw_curves
from .events import SILENT, Reporter, format_bytes
from .files import written_whole
from .freezing import freeze
from .inference import choose_device, is_out_of_memory
from .manifest import Manifest
from .memory import predict_training
from .modelpackage import ModelPackage, save_package
from .networks import SegmentationNetwork, build, with_patch
from .prepared import prepare_cases
from .preprocessing import PreparedCase
from .proof import Proof, manifest_metrics, read_reference
from .reduction import adapt_checkpoint, lighter
from .runfolder import RecordingReporter, held
from .sampling import BatchSource, CaseBatches
from .stopfile import StopFile
from .syntheticbatches import MixedBatches, SyntheticBatches
from .trainer import StopRequest, Trainer, TrainingResult
from .training import training_summary, validator
from .transfer import STEMS, Transfer, transfer_weights
from .tuningplan import RUN, TuningOptions, TuningPlan, merged_scheme, plan_tuning, read_plan, write_plan

__all__ = ["finetune"]

MODEL, CANDIDATE = "model", "candidate"
RESULT, DONE, TRANSFER = "result.json", "done.json", "transfer.json"
SHOWN_TRAINING_CASES = 3  # segmented by both models where no case could be held out
FREE_FRACTION = 0.9  # of a card's free memory that a predicted step may take


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
    dataset = dataclasses.replace(dataset, scheme=merged_scheme(dataset.scheme, base.manifest.scheme))
    started = (output / RUN).exists()
    if started and not options.resume:
        raise InvresError(
            f"There is already a fine-tuning in {output}.", hint="Add --resume to go on, or give another folder."
        )
    if started:
        plan = read_plan(output, base.manifest, dataset, options, report)
    else:
        if options.resume:
            report.note(f"There is nothing in {output} to resume, so the fine-tuning starts.")
        plan = plan_tuning(base.manifest, dataset, output / "prepared", options, report)
        if options.check_base:  # a mistake there is told before hours of training
            read_reference(options.check_base, base, plan.plan)
        write_plan(output, plan)
    if (output / RESULT).is_file():
        return _finished(output, options, report)
    run = _Run(base, dataset, plan, output, options, device, report, stop)
    try:
        result = run.whole()
    except Cancelled:
        if isinstance(stop, StopFile):
            stop.clear(also_keep_best=False)
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
        output: Path,
        options: TuningOptions,
        device: torch.device,
        report: Reporter,
        stop: StopRequest,
    ):
        self.base, self.dataset, self.plan, self.output = base, dataset, plan, output
        self.options, self.device, self.report, self.stop = options, device, report, stop
        self.proof = Proof(base, dataset, output / "comparison", device, stop)
        self.reference = read_reference(options.check_base, base, plan.plan) if options.check_base else None
        self.base_weights = base.load_weights()

    def whole(self) -> dict[str, Any]:
        """All trainings, the proof and the package."""
        self._fit_memory()
        parts = self.plan.parts
        scored: list[CaseComparison] = []
        record: dict[str, Any] = {}
        last = 0
        for index, part in enumerate(parts):
            if index and self.stop.finish:
                self.report.note(f"Ended as asked: {index} of {len(parts)} trainings are done.")
                break
            self.report.progress("finetune.parts", index, len(parts))
            record, last = self._part(index, part), index
            scored += [_comparison(entry) for entry in record["scores"]]
        self.report.progress("finetune.parts", len(parts), len(parts))
        weights = _trained_weights(self._folder(last))
        tuned = Contender(self._package_in_memory(), self._inference_network(weights))
        return self._prove_and_save(parts[last], record, weights, tuned, scored)

    # --- one training ---------------------------------------------------------------------------------------------

    def _folder(self, index: int) -> Path:
        return self.output / ("final" if index == len(self.plan.parts) - 1 else f"fold{index}")

    def _part(self, index: int, part: Part) -> dict[str, Any]:
        """Trains and scores; the record of it is what done.json holds."""
        folder = self._folder(index)
        done = folder / DONE
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        folder.mkdir(exist_ok=True)
        report = _Staged(self.report, index + 1, len(self.plan.parts))
        without = f"{_count(part.held_out)} held out" if part.held_out else "nothing held out"
        report.note(f"Training {index + 1} of {len(self.plan.parts)}: {_count(part.train)}, {without}.")
        result, engine = self._trained(index, part, report)
        if not result.iterations:
            raise InvresError(
                "The training was ended before its first step, so there is nothing to keep.",
                hint="Go on with --resume.",
            )
        if load_checkpoint(folder)["iteration"] != result.iterations:
            raise InvresError(
                f"The end of the training could not be saved in {folder}.",
                hint="Free some space and go on with --resume.",
                code="write_failed",
            )
        tuned = Contender(self._package_in_memory(), self._inference_network(result.weights))
        scores = self.proof.compare(part.held_out, tuned, report)
        summary = training_summary(
            Recipe("finetune", network=self.plan.network, training=self.plan.training),
            result,
            engine,
            len(part.train),
            len(part.validation),
        )
        record = {"training": summary, "scores": [to_dict(one) for one in scores]}
        with written_whole(done) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        return record

    def _trained(self, index: int, part: Part, report: Reporter) -> tuple[TrainingResult, str]:
        """The result and the engine that it was trained under; with less and less memory until it fits."""
        while True:
            try:
                return self._training(index, part, report)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback holds the tensors of the failed step.
            self._reduce("Memory ran out")

    def _training(self, index: int, part: Part, report: Reporter) -> tuple[TrainingResult, str]:
        plan, folder, config = self.plan, self._folder(index), self.plan.training
        # Fresh tensors and the VAE's samples are the same however often this training is begun again.
        torch.manual_seed((config.seed + index) % 2**32)
        network, _ = self._begun()
        network.to(self.device)
        prepared = self.output / "prepared"
        names = (part.train, part.validation or part.held_out)
        training, watched = (prepare_cases(self.dataset, some, plan.plan, prepared, report) for some in names)
        trainer = Trainer(
            network,
            self._batches(training, config),
            config,
            folder,
            plan.scheme.regions,
            validator(watched, plan.scheme, config, self.device),
            report,
            self.stop,
            # Cases that are scored afterwards may be watched but choose nothing.
            keep_best=bool(part.validation),
        )
        if (folder / CHECKPOINT).is_file():
            adapt_checkpoint(folder, network)
            trainer.resume()
        result = trainer.run()
        try:
            draw_curves(folder)
        except OSError as error:
            report.warning(f"The curves could not be drawn ({error.strerror or error}).")
        return result, network.engine

    def _begun(self) -> tuple[SegmentationNetwork, Transfer]:
        """The network with the base model's weights and its frozen part, on the CPU."""
        plan = self.plan
        network = build(plan.network, plan.training.engine, plan.training.memory)
        channels = [channel.name for channel in plan.plan.channels]
        transfer = transfer_weights(self.base_weights, self.base.manifest, network, channels, plan.scheme)
        changed = {tensor.name for tensor in transfer.tensors if tensor.outcome != "reused"}
        # The bias goes with the first convolution's weights.
        changed |= {stem.replace("weight", "bias") for stem in STEMS if stem in changed}
        freeze(network, plan.freeze, changed)
        return network, transfer

    def _batches(self, cases: list[PreparedCase], config: TrainingConfig) -> BatchSource:
        plan = self.plan
        real = CaseBatches(cases, plan.scheme, config, plan.augmentation, self.device)
        if not plan.synthetic:
            return real
        synthetic = SyntheticBatches(cases, plan.scheme, config, self.device)
        return MixedBatches(real, synthetic, plan.synthetic, config.seed)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _fit_memory(self) -> None:
        """Says what is taken over and what a step will need; on a card, gives up what does not fit before it fails."""
        network, transfer = self._begun()
        _write_json(self.output / TRANSFER, transfer.to_json())
        self.report.note(transfer.sentence())
        while True:
            plan, config = self.plan, self.plan.training
            predicted = predict_training(
                plan.network,
                config.patch,
                config.batch_size,
                network.engine,
                plan.scheme.regions,
                config.precision,
                config.memory,
            ).peak_bytes
            free = torch.cuda.mem_get_info(self.device)[0] * FREE_FRACTION if self.device.type == "cuda" else None
            if free is None or predicted <= free or lighter(network, config) is None:
                break
            self._reduce(f"A step would need {format_bytes(predicted)}, more than the card has free")
            network, _ = self._begun()
        self.report.emit({"event": "memory", "predicted_bytes": predicted})
        self.report.note(
            f"{plan.network.name} under the {network.engine} engine: a training step is predicted to need "
            f"{format_bytes(predicted)}."
        )

    def _reduce(self, reason: str) -> None:
        """Goes on with a configuration that needs less memory; tells and records it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        network, _ = self._begun()
        found = lighter(network, self.plan.training)
        if found is None:
            raise OutOfMemory(
                f"There is not enough memory to train {self.plan.network.name}, even on patches of "
                f"{'x'.join(map(str, self.plan.training.patch))} voxels.",
                hint="Close other programs, or start from a smaller model.",
            )
        config, words = found
        self.plan = dataclasses.replace(
            self.plan,
            training=config,
            network=with_patch(self.plan.network, config.patch),
            reductions=(*self.plan.reductions, words),
        )
        write_plan(self.output, self.plan)
        self.report.warning(f"{reason}; the training goes on with {words}.")

    # --- proof ----------------------------------------------------------------------------------------------------

    def _package_in_memory(self) -> ModelPackage:
        """The tuned model as far as segmenting needs it; it has no file yet."""
        plan = self.plan
        manifest = Manifest(
            name=self.options.name or self.base.name,
            id="0" * 32,
            created="",
            network=plan.network,
            plan=plan.plan,
            scheme=plan.scheme,
            patch=plan.training.patch,
            sha256="0" * 64,
            weights_bytes=0,
        )
        return ModelPackage(self.output, manifest)

    def _inference_network(self, weights: dict[str, torch.Tensor]) -> SegmentationNetwork:
        network = build(dataclasses.replace(self.plan.network, vae=None))
        network.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("vae.")})
        return network.to(self.device).eval()

    def _prove_and_save(
        self,
        part: Part,
        record: dict[str, Any],
        weights: dict[str, torch.Tensor],
        tuned: Contender,
        scored: list[CaseComparison],
    ) -> dict[str, Any]:
        plan, manifest = self.plan, self.base.manifest
        held_out = any(one.held_out for one in plan.parts)
        if not held_out:
            scored = self.proof.compare(part.train[:SHOWN_TRAINING_CASES], tuned, self.report)
        proof = summarise(scored, held_out, plan.scheme)
        # The last training has no held-out cases of its own where each was held out from another one.
        proof["of"] = "model" if part.held_out or not held_out else "trainings of the same kind on fewer cases"
        check = self.proof.forgotten(tuned, self.reference, self.report) if self.reference else None
        promoted = self.options.promote or (proof["promotable"] and (check is None or check["verdict"] != "worse"))
        proof |= {"promoted": promoted, "base_check": check}
        comparison = write_comparison(self.output, proof)
        summary = {**record["training"], "validation_cases": len(scored) if held_out else 0}
        package = save_package(
            self.output / (MODEL if promoted else CANDIDATE),
            name=self.options.name or manifest.name,
            version=_next_version(manifest.version),
            description=f"Fine-tuned from {manifest.name} {manifest.version}.",
            network=plan.network,
            state_dict=weights,
            plan=plan.plan,
            scheme=plan.scheme,
            patch=plan.training.patch,
            training=summary,
            metrics=manifest_metrics(scored) if held_out and scored else {},
            licence=self.options.licence or manifest.licence,
            intended_use=manifest.intended_use,
            parent=manifest.id,
        )
        result = {
            "model": str(package.path),
            "model_id": package.id,
            "name": package.name,
            "version": package.manifest.version,
            "parent": manifest.id,
            "parent_version": manifest.version,
            "promoted": promoted,
            "verdict": proof["verdict"],
            "sentence": proof["sentence"],
            "comparison": str(comparison),
            "transfer": {"path": str(self.output / TRANSFER), **_transfer_summary(self.output / TRANSFER)},
            "base_check": None if check is None else {key: check[key] for key in ("verdict", "sentence")},
            "skipped_cases": [to_dict(one) for one in plan.skipped],
            "reductions": list(plan.reductions),
            "training": package.manifest.training.__dict__,
        }
        _write_json(self.output / RESULT, result)
        for index in range(len(plan.parts) - 1):
            (self._folder(index) / CHECKPOINT).unlink(missing_ok=True)
        return result


def _finished(output: Path, options: TuningOptions, report: Reporter) -> dict[str, Any]:
    """The result of a run that is complete; a candidate is promoted if that is what is asked for now."""
    result = json.loads((output / RESULT).read_text(encoding="utf-8"))
    if options.promote and not result["promoted"]:
        if (output / CANDIDATE).is_dir():  # not there if it was killed behind this
            (output / CANDIDATE).rename(output / MODEL)
        result |= {"promoted": True, "model": str(output / MODEL)}
        _write_json(output / RESULT, result)
        report.note(f"The candidate is promoted: {output / MODEL}.")
    else:
        report.note(f"The fine-tuning in {output} is complete.")
    return result


def _count(names: tuple[str, ...]) -> str:
    return "1 case" if len(names) == 1 else f"{len(names)} cases"


def _trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a training that is done: the best ones, or the last where nothing chose."""
    state = load_checkpoint(folder)
    return state["best_weights"] or state["weights"]


def _comparison(entry: dict[str, Any]) -> CaseComparison:
    return from_dict(CaseComparison, entry, DONE)


def _next_version(version: str) -> str:
    """1.2.0 -> 1.3.0; what is no such number gets one behind it."""
    words = version.split(".")
    if len(words) == 3 and all(word.isdigit() for word in words):
        return f"{words[0]}.{int(words[1]) + 1}.0"
    return f"{version}.1"


def _transfer_summary(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: content[key] for key in ("sentence", "counts", "labels", "channels")}


def _write_json(path: Path, content: Any) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
