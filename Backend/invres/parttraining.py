"""The trainings of a fine-tuning, each with the memory that there is: less and less until it fits."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import InvresError, OutOfMemory
from .cases import Dataset
from .casesplits import Part
from .checkpoint import CHECKPOINT, load_checkpoint
from .config import TrainingConfig
from .curves import Curves
from .devices import device_info
from .events import SILENT, Reporter, format_bytes
from .expectation import Expectation, of_volumes
from .faults import is_out_of_memory
from .files import written_whole
from .freezing import freeze
from .memory import has_room, predict_for
from .modelpackage import ModelPackage
from .networks import STEMS, SegmentationNetwork, build, with_patch
from .objectives import Segmentation
from .preprocessing import PreparedCase, case_volumes_ml
from .reduction import adapt_checkpoint, lighter
from .sampling import BatchSource, CaseBatches
from .syntheticbatches import MixedBatches, SyntheticBatches
from .trainer import StopRequest, Trainer, TrainingResult
from .trainingrun import announce_memory
from .transfer import Transfer, transfer_weights
from .tuningplan import TuningPlan, prepare_readable, write_plan
from .validation import validator

__all__ = ["NOTHING_TO_KEEP", "TRANSFER", "PartTrainer"]

TRANSFER = "transfer.json"
NOTHING_TO_KEEP = "nothing_to_keep"


class PartTrainer:
    """Trains the parts of one run, in the folder `output`.

    plan: as it is by now; what is given up for want of memory is recorded in it and in run.json.
    dropped_labels: of the base model, which the tuned one no longer has; known after `fit_memory`.
    """

    def __init__(
        self,
        base: ModelPackage,
        dataset: Dataset,
        plan: TuningPlan,
        output: Path,
        device: torch.device,
        report: Reporter,
        stop: StopRequest,
    ):
        self.plan = plan
        self.dropped_labels: tuple[str, ...] = ()
        self._base, self._dataset, self._output = base, dataset, output
        self._device, self._report, self._stop = device, report, stop
        self._base_weights = base.load_weights()
        self._curves = Curves()

    def folder(self, index: int) -> Path:
        """Where the checkpoint and the record of a part are."""
        return self._output / ("final" if index == len(self.plan.parts) - 1 else f"fold{index}")

    def fit_memory(self) -> None:
        """Says what is taken over and what a step will need; on a card, gives up what does not fit before it fails."""
        network, transfer = self._begun()
        self.dropped_labels = tuple(transfer.to_json()["labels"]["dropped"])
        with written_whole(self._output / TRANSFER) as temporary:
            temporary.write_text(json.dumps(transfer.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
        self._report.note(transfer.sentence())
        while True:
            plan, config = self.plan, self.plan.training
            predicted = predict_for(plan.network, config, network.engine, plan.scheme.regions).peak_bytes
            # In main memory, where others' pages can move out, a step is tried.
            free = device_info(self._device).free_bytes if self._device.type == "cuda" else None
            if has_room(predicted, free) or lighter(network, config) is None:
                break
            self._reduce(f"A step would need {format_bytes(predicted)}, more than the card has free")
            network, _ = self._begun()
        announce_memory(plan.network.name, network.engine, predicted, self._report)

    def train(self, index: int, part: Part, report: Reporter, rival: int = 0) -> tuple[TrainingResult, str] | None:
        """Trains a part, or goes on with it. The result, and the engine that it was trained under.

        rival: steps of a training that is complete. None where this one was ended as asked before it had as many: then
        the other is the one to keep.
        Raises InvresError where it was ended before its first step and there is no other, code `nothing_to_keep`, or
        where its end cannot be saved; OutOfMemory where there is nothing left to give up.
        """
        result, engine = self._trained(index, part, report)
        if result.cut_short and result.iterations < rival:
            return None
        if not result.iterations:
            raise InvresError(
                "The training was ended before its first step, so there is nothing to keep.",
                hint="Go on with --resume.",
                code=NOTHING_TO_KEEP,
            )
        saved = (self.folder(index) / CHECKPOINT).is_file()
        if not saved or load_checkpoint(self.folder(index))["iteration"] != result.iterations:
            raise InvresError(
                f"The end of the training could not be saved in {self.folder(index)}.",
                hint="Free some space and go on with --resume.",
                code="write_failed",
            )
        return result, engine

    def trained_weights(self, index: int) -> dict[str, torch.Tensor]:
        """Of a part that is done: the best ones, or the last where nothing chose."""
        # Memory may have run out since, in a training that was not kept.
        adapt_checkpoint(self.folder(index), self._begun()[0])
        state = load_checkpoint(self.folder(index))
        return state["best_weights"] or state["weights"]

    # --- one training ---------------------------------------------------------------------------------------------

    def _trained(self, index: int, part: Part, report: Reporter) -> tuple[TrainingResult, str]:
        while True:
            try:
                return self._training(index, part, report)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback holds the tensors of the failed step.
            self._reduce("Memory ran out")

    def _training(self, index: int, part: Part, report: Reporter) -> tuple[TrainingResult, str]:
        plan, folder, config = self.plan, self.folder(index), self.plan.training
        # Fresh tensors and the VAE's samples are the same however often this training is begun again.
        torch.manual_seed((config.seed + index) % 2**32)
        network, _ = self._begun()
        network.to(self._device)
        training, watched = (self._cases(some, report) for some in (part.train, part.validation or part.held_out))
        if not training:
            raise InvresError(
                f"None of the cases of this training can be read any more: {', '.join(part.train)}.",
                hint="Put their files back and go on with --resume.",
            )
        trainer = Trainer(
            network,
            self._batches(training, config),
            config,
            folder,
            Segmentation(plan.scheme.regions, config.loss),
            validator(watched, plan.scheme, config, self._device),
            report,
            self._stop,
            # Cases that are scored afterwards may be watched but choose nothing.
            keep_best=bool(part.validation),
        )
        if (folder / CHECKPOINT).is_file():
            adapt_checkpoint(folder, network)
            trainer.resume()
        result = trainer.run()
        self._curves.draw(folder, report)
        return result, network.engine

    def seen(self, part: Part, confidences: Iterable[float]) -> tuple[Expectation, list[str]]:
        """What the cases that a part was trained on are like, and the fingerprints of their images.

        confidences: in the cases that it was compared on.
        """
        cases = self._cases(part.train, SILENT)
        volumes = [case_volumes_ml(case, self.plan.scheme) for case in cases]
        images = [image for case in cases for image in case.fingerprints]
        return of_volumes(self.plan.scheme.names, volumes, confidences), images

    def _cases(self, names: Sequence[str], report: Reporter) -> list[PreparedCase]:
        """The cases that can still be read; others may have changed since the run was begun, and are left out."""
        cases, skipped = prepare_readable(self._dataset, names, self.plan.plan, self._output / "prepared", report)
        known = {one.case for one in self.plan.skipped}
        if new := tuple(one for one in skipped if one.case not in known):
            self.plan = dataclasses.replace(self.plan, skipped=(*self.plan.skipped, *new))
            write_plan(self._output, self.plan)
        return cases

    def _begun(self) -> tuple[SegmentationNetwork, Transfer]:
        """The network with the base model's weights and its frozen part, on the CPU."""
        plan = self.plan
        network = build(plan.network, plan.training.engine, plan.training.memory)
        channels = [channel.name for channel in plan.plan.channels]
        transfer = transfer_weights(self._base_weights, self._base.manifest, network, channels, plan.scheme)
        changed = {tensor.name for tensor in transfer.tensors if tensor.outcome != "reused"}
        # The bias goes with the first convolution's weights.
        changed |= {stem.replace("weight", "bias") for stem in STEMS if stem in changed}
        freeze(network, plan.freeze, changed)
        return network, transfer

    def _batches(self, cases: list[PreparedCase], config: TrainingConfig) -> BatchSource:
        plan = self.plan
        real = CaseBatches(cases, plan.scheme, config, plan.augmentation, self._device, plan.plan)
        if not plan.synthetic:
            return real
        dropout = plan.augmentation.channel_dropout
        synthetic = SyntheticBatches(cases, plan.scheme, config, self._device, plan.plan, dropout)
        return MixedBatches(real, synthetic, plan.synthetic, config.seed)

    def _reduce(self, reason: str) -> None:
        """Goes on with a configuration that needs less memory; tells and records it."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)  # what is told from now on is of what goes on
        network, _ = self._begun()
        found = lighter(network, self.plan.training)
        if found is None:
            raise OutOfMemory(
                f"There is not enough memory to train {self.plan.network.name}, even on patches of "
                f"{'x'.join(map(str, self.plan.training.patch))} voxels.",
                hint="Close other programs, or start from a smaller model.",
            )
        config, words = found
        changes: dict[str, Any] = {"training": config, "network": with_patch(self.plan.network, config.patch)}
        self.plan = dataclasses.replace(self.plan, reductions=(*self.plan.reductions, words), **changes)
        write_plan(self._output, self.plan)
        self._report.warning(f"{reason}; the training goes on with {words}.")
