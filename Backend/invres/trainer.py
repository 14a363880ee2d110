"""The training loop: steps, schedule, validation, checkpoints, early stop; knows nothing of files with images."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import Cancelled, InvresError
from .checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from .config import TrainingConfig
from .configjson import to_dict
from .events import SCORES, SILENT, Reporter
from .files import written_whole
from .guard import DriftGuard
from .interruption import stoppable
from .livebytes import LiveBytes
from .networkconfig import NetworkConfig
from .networks import Network
from .objectives import Objective
from .sampling import BatchSource
from .step import make_optimizer

__all__ = ["StopRequest", "Trainer", "TrainingResult", "Validation", "learning_rate_factor"]

METRICS = "metrics.jsonl"
ENOUGH_STEPS = 10  # that are all left out, to give up
MEASURED_STEPS = 2  # after each start: the second already has the optimizer's state

Validation = Callable[[Any], dict[str, float]]


class StopRequest:
    """Set by SIGINT, SIGTERM or SIGHUP inside `listening()`, or by hand; the loop saves and stops at the next step.

    finish: the loop ends at the next step as if the training were complete, with the best weights so far.
    """

    def __init__(self) -> None:
        self.requested = False
        self.finish = False

    def __call__(self, *_: Any) -> None:
        if self.requested:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        self.requested = True

    def ask(self) -> None:
        """By hand, any number of times."""
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        with stoppable(self.ask):
            if threading.current_thread() is not threading.main_thread():
                yield self
                return
            numbers = [signal.SIGINT, signal.SIGTERM]
            # The terminal is gone; `nohup` has it ignored, which stays so.
            hangup = getattr(signal, "SIGHUP", None)
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
                numbers.append(hangup)
            previous = {number: signal.signal(number, self) for number in numbers}
            try:
                yield self
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)


def learning_rate_factor(config: TrainingConfig, iteration: int, progress: float) -> float:
    """The factor on the learning rate. progress: 0 at the start, 1 at the planned end."""
    if iteration < config.warmup_iterations:
        return (iteration + 1) / config.warmup_iterations
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "poly":
        return max(1 - progress, 1e-3) ** 0.9
    return 1.0


@dataclass
class TrainingResult:
    """weights: of the epoch with the best score in validation (of the last epoch where nothing was validated).

    peak_bytes: live tensor bytes of a step, as it was trained last. cut_short: ended as asked (`StopRequest.finish`)
    before its steps, its time or its patience were over.
    """

    weights: dict[str, torch.Tensor]
    best_score: float | None
    best_epoch: int
    epochs: int
    iterations: int
    seconds: float
    peak_bytes: int
    stopped_early: bool = False
    cut_short: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a network on batches and keeps everything needed to go on after any interruption in `folder`.

    batches: a pure function of the iteration (`sampling.BatchSource`), so that a checkpoint needs no sampler state.
    objective: what a step lowers, and which figure validation gives.
    validate: gives that figure as "mean", and of what it is the mean by name (the Dice of each label); or None.
    keep_best: the result has the weights of the best epoch; False (for a validation that must choose nothing, as the
    same cases are scored afterwards): those of the last one.
    On the CPU an interrupted and resumed training ends with the very weights of an undisturbed one, provided that no
    time budget steers the schedule.
    """

    def __init__(
        self,
        network: Network,
        batches: BatchSource,
        config: TrainingConfig,
        folder: Path,
        objective: Objective,
        validate: Validation | None = None,
        report: Reporter = SILENT,
        stop: StopRequest | None = None,
        keep_best: bool = True,
    ):
        self.network = network
        self.batches = batches
        self.config = config
        self.folder = folder
        self.objective = objective
        self.validate = validate
        self.report = report
        self.stop = stop or StopRequest()
        self.guard = DriftGuard(network, report)
        self.keep_best = keep_best
        self.device = next(network.parameters()).device
        self.optimizer = make_optimizer(network, config.learning_rate, config.weight_decay, config.optimizer)
        # Without it the gradients of a large patch vanish in float16, on every device.
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.iteration = 0
        self.elapsed_s = 0.0
        self.peak_bytes = 0
        self._unmeasured = MEASURED_STEPS  # steps that are still to be measured
        self.history: list[dict[str, Any]] = []
        self.epoch_losses: list[list[float]] = []
        self.best_score: float | None = None
        self.best_epoch = 0
        self.best_weights: dict[str, torch.Tensor] | None = None
        self._diverged = False  # no step of the last epoch could be taken
        self._started = 0.0
        self._saved = 0.0
        self._kept: int | None = None  # the iteration of the checkpoint on disk

    # --- interruption ---------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on where the checkpoint in `folder` was written. Raises InvresError if it is of another network."""
        state = load_checkpoint(self.folder)
        # What a newer version has added stands in no older checkpoint, and counts with its default.
        if {**to_dict(NetworkConfig()), **(state.get("network") or {})} != to_dict(self.network.config):
            raise InvresError(
                f"The checkpoint in {self.folder} belongs to another network.",
                hint="Resume with the recipe it was started with, or train in a new folder.",
            )
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"], self.device)
        self.iteration = self._kept = state["iteration"]
        self.elapsed_s = state["elapsed_s"]
        self.history = state["history"]
        self.epoch_losses = state["epoch_losses"]
        # Older checkpoints are all of segmentations and call it so.
        self.best_score = state["best_score"] if "best_score" in state else state["best_dice"]
        self.best_epoch = state["best_epoch"]
        self.best_weights = state["best_weights"]
        self.peak_bytes = state["peak_bytes"]
        self._diverged = state.get("diverged", False)
        self._write_metrics()

    def save(self) -> bool:
        """Writes a checkpoint. If the disk refuses, says so, keeps the older one and returns False."""
        state = {
            "network": to_dict(self.network.config),
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "random": random_state(self.device),
            "iteration": self.iteration,
            "elapsed_s": self._elapsed(),
            "history": self.history,
            "epoch_losses": self.epoch_losses,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
            "peak_bytes": self.peak_bytes,
            "diverged": self._diverged,
        }
        try:
            save_checkpoint(self.folder, state)
        except OSError as error:
            kept = "there is none before it" if self._kept is None else "the one before it is kept"
            self.report.warning(f"The checkpoint could not be saved ({error.strerror or error}); {kept}.")
            return False
        finally:
            self._saved = time.monotonic()
        self._kept = self.iteration
        return True

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Trains to the end of the epochs, of the time budget or of the patience, and returns the best weights.

        Raises Cancelled, after saving, when a stop was requested.
        """
        config = self.config
        self._started = self._saved = time.monotonic()
        per_epoch, total = config.iterations_per_epoch, config.iterations_per_epoch * config.epochs
        self.network.train()
        # A training that had ended early and is resumed must not go on.
        early = bool(self.history) and not self.epoch_losses and (self._diverged or self._impatient())
        self._report_progress()
        while self.iteration < total and not early and not self._must_end():
            self._one_step()
            if self.iteration % per_epoch == 0 or self._must_end():
                self._end_epoch()
                early = self._diverged or self._impatient()
            if self.stop.requested:
                if not self.save():
                    raise self._unsaved(total)
                raise Cancelled(
                    f"Stopped after {self.iteration} of {total} iterations; everything is saved in {self.folder}.",
                    hint="Go on with the same command and --resume.",
                )
            if time.monotonic() - self._saved > config.checkpoint_every_s:
                self.save()
        cut_short = self.iteration < total and not early and not self._time_is_over()
        if self.epoch_losses:
            self._end_epoch()
        self.save()
        return TrainingResult(
            weights=self.best_weights or _cpu_copy(self.network),
            best_score=self.best_score,
            best_epoch=self.best_epoch,
            epochs=len(self.history),
            iterations=self.iteration,
            seconds=self._elapsed(),
            peak_bytes=self.peak_bytes,
            stopped_early=early,
            cut_short=cut_short,
            history=self.history,
        )

    def _unsaved(self, total: int) -> InvresError:
        """Of a training that was stopped when the disk was full."""
        kept = "nothing is saved" if self._kept is None else f"what is saved is of iteration {self._kept}"
        return InvresError(
            f"Stopped after {self.iteration} of {total} iterations, but the checkpoint could not be written to "
            f"{self.folder}: {kept}.",
            hint="Free some space, and go on with the same command and --resume.",
            code="write_failed",
        )

    def _one_step(self) -> None:
        config = self.config
        total = config.iterations_per_epoch * config.epochs
        progress = self.iteration / total
        if config.time_s > 0:
            progress = max(progress, self._elapsed() / config.time_s)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, self.iteration, progress)
        image, target = self.batches.batch(self.iteration)
        self.guard.before(self.iteration)

        def step() -> list[float]:
            losses = self.objective.step(self.network, self.optimizer, image, target, config, self.scaler)
            return [float("nan") if part is None else float(part) for part in losses]

        values = self._measured(step, [image, target]) if self._unmeasured else step()
        self.guard.after()
        self.epoch_losses.append(values)
        self.iteration += 1
        self._report_progress(loss=round(values[0], 5) if math.isfinite(values[0]) else None)

    def _report_progress(self, **fields: Any) -> None:
        """In seconds of the time budget where there is one and it will end first, else in iterations."""
        total = self.config.iterations_per_epoch * self.config.epochs
        elapsed, budget = self._elapsed(), self.config.time_s
        if budget > 0 and elapsed / budget >= self.iteration / total:
            done, of = int(min(elapsed, budget)), math.ceil(budget)
            fields["unit"] = "s"
        else:
            done, of = self.iteration, total
        self.report.progress("train", done, of, iteration=self.iteration, **fields)

    def _measured(self, step: Callable[[], list[float]], batch: list[torch.Tensor]) -> list[float]:
        probe = LiveBytes()
        held = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        probe.watch([*batch, *self.network.parameters(), *self.network.buffers(), *held])
        with probe:
            values = step()
        # What was measured before this start may have been with another engine, batch or patch.
        self.peak_bytes = probe.peak if self._unmeasured == MEASURED_STEPS else max(self.peak_bytes, probe.peak)
        self._unmeasured -= 1
        if not self._unmeasured:
            self._report_memory()
        return values

    def _report_memory(self) -> None:
        event: dict[str, Any] = {"event": "memory", "measured_bytes": self.peak_bytes}
        if self.device.type == "cuda":
            event["cuda_max_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.report.emit(event)

    def _end_epoch(self) -> None:
        epoch = len(self.history) + 1
        columns = list(zip(*self.epoch_losses, strict=True))
        means = [_mean(column) for column in columns]
        left_out = sum(not math.isfinite(value) for value in columns[0])
        entry: dict[str, Any] = {"epoch": epoch, "iteration": self.iteration}
        terms = zip(self.objective.terms, means, strict=True)
        entry |= {name: round(mean, 6) for name, mean in terms if math.isfinite(mean)}
        entry["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        # A scaler begins far too large, and is halved by every step that it leaves out.
        settling = self.scaler is not None and self.scaler.get_scale() >= 1
        if left_out and not settling:
            self.report.warning(
                f"In {left_out} of {len(columns[0])} steps of epoch {epoch} the loss or its gradient was not finite; "
                "these steps were left out."
            )
        self.epoch_losses = []
        self._diverged = left_out == len(columns[0]) >= ENOUGH_STEPS and not settling
        if self._diverged and self.best_weights is None:
            raise InvresError(
                f"Not one of {left_out} steps could be taken: the loss or its gradient was never finite.",
                hint="Train with --precision fp32 or a lower learning rate, and look at the data with `invres check`.",
            )
        total = self.config.iterations_per_epoch * self.config.epochs
        last = self.iteration >= total or self._diverged or self._must_end()
        if self._diverged:
            self.report.warning(f"The training ends here; the weights of epoch {self.best_epoch} are kept.")
        if self.validate is not None and (epoch % self.config.validate_every == 0 or last):
            self.network.eval()
            scores = self.validate(self.network)
            self.network.train()
            entry[self.objective.score] = {name: round(value, 5) for name, value in scores.items()}
            if self.keep_best and self._is_better(scores["mean"]):
                self.best_score, self.best_epoch = scores["mean"], epoch
                self.best_weights = _cpu_copy(self.network)
        entry["seconds"] = round(self._elapsed(), 2)
        self.history.append(entry)
        self._write_metrics()
        self.report.emit({"event": "epoch", **entry})
        if not self._unmeasured:
            self._report_memory()

    def _is_better(self, score: float) -> bool:
        if self.best_score is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > self.best_score if self.objective.larger_is_better else score < self.best_score

    def _impatient(self) -> bool:
        patience = self.config.early_stop_epochs
        name = self.objective.score
        # Epochs in which nobody looked are no reason to end: patience is over when a look was in vain.
        if not patience or self.best_score is None or name not in self.history[-1]:
            return False
        if len(self.history) - self.best_epoch < patience:
            return False
        self.report.note(f"Stopped early: no better {SCORES.get(name, name)} in the last {patience} epochs.")
        return True

    def _elapsed(self) -> float:
        return self.elapsed_s + (time.monotonic() - self._started if self._started else 0.0)

    def _must_end(self) -> bool:
        """The time budget is spent, or the end was asked for."""
        return self.stop.finish or self._time_is_over()

    def _time_is_over(self) -> bool:
        return 0 < self.config.time_s <= self._elapsed()

    def _write_metrics(self) -> None:
        """All epochs so far, one JSON object a line; written anew so that a resumed run has no line twice."""
        path = self.folder / METRICS
        try:
            with written_whole(path) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), encoding="utf-8")
        except OSError as error:
            self.report.warning(f"{METRICS} could not be written ({error}).")


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _cpu_copy(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
