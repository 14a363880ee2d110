"""What a run folder of `invres finetune` tells of its run: read again and again, each time only what is new."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .Disposal import dispose
from .Protocol import parsedEvent
from .RunHolder import isHeld
from .WholeFile import readJson, writeJson

__all__ = ["DATA", "DISCARDED", "PROMOTED", "ROLLED_BACK", "Epoch", "RunRecord", "decide", "tidy"]

EVENTS, STOP, KEEP_BEST = "events.jsonl", "stop", "keep-best"
DATA, CROPS, PREPARED_DATA, CHECKPOINTS = "data", "crops", "prepared", "*/checkpoint.pt"
RESULT, COMPARISON, DECISION = "result.json", "comparison.json", "decision.json"
PROMOTED, DISCARDED, ROLLED_BACK = "promoted", "discarded", "rolled back"
START_LIMIT_S = 120
"""So long a child may take to import torch, on a slow disk, before it is missed."""
SPAWNING_S = 10
"""A process that began so long before it was asked about is the one that was launched, and not an earlier one."""
LONGEST_PIECE = 4 * 1024**2  # bytes of events that are read at a time
PREPARED = 0.03  # of the bar, before the first training
TRAINED = 0.9  # of a training's part of the bar; comparing is the rest
FINISHING = 0.05  # of the bar, after the last training: what is compared then, and saving
TRAIN, COMPARE = "train", "finetune.compare"


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training. loss: None where it was not finite; dice: by segment, empty where none was watched."""

    number: int
    loss: float | None
    dice: dict[str, float]


@dataclass
class RunRecord:
    """A run of `invres finetune`, as its folder tells it; `poll` brings it up to date.

    launched: a process was started for it just now, which has not said anything yet. hasEnded: asked whether that
    process is gone already, where somebody knows it.
    state: "starting", "running", "finishing" (nothing is trained any more), "stopping" (a process is at work),
    "paused", "finished", "failed" (none is). keepsBest: the training was asked to end with the best that it has.
    stage: the backend's name of what is done at the moment; part of parts: which training, 0 outside of them.
    fraction: of the whole, never smaller than before; etaS: seconds that are left to train, or to compare after the
    last training, None where not known.
    epochs: part -> its epochs. error: "code", "message", "hint" of a failure. result: content of the result event.
    """

    folder: Path
    launched: bool = False
    hasEnded: Callable[[], bool] = lambda: False
    state: str = "starting"
    stage: str = ""
    part: int = 0
    parts: int = 0
    keepsBest: bool = False
    fraction: float = 0.0
    etaS: float | None = None
    predictedBytes: int = 0
    measuredBytes: int = 0
    warnings: list[str] = field(default_factory=list)
    epochs: dict[int, list[Epoch]] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    _offset: int = 0
    _ended: bool = False  # whether the process that began last has said how it ended
    _begun: bool = False  # whether any process has begun
    _training: bool = False  # whether the one at work has come to its first training
    _trained: bool = False  # whether it is behind its last one
    _compared: tuple[int, float] = (0, 0.0)  # which comparison after the trainings, and how much of it is done
    _made: float = field(default_factory=time.monotonic)
    _madeAt: str = field(default_factory=lambda: _now(-SPAWNING_S))
    _comparison: tuple[float, dict] = (0.0, {})

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    def poll(self) -> bool:
        """Reads what is new; returns whether anything changed."""
        before, news = self.state, False
        gone = self.hasEnded()  # asked first: whatever it has said is read below
        while self._read():
            news = True
        self.state = self._state(gone)
        return news or self.state != before

    @property
    def partShown(self) -> int:
        """The training whose curves are worth seeing: the one under way; afterwards the last one that was watched."""
        watched = [part for part, epochs in self.epochs.items() if any(epoch.dice for epoch in epochs)]
        return max((watched if self.result and watched else self.epochs), default=0)

    @property
    def epochsShown(self) -> list[Epoch]:
        """The epochs of that training."""
        return self.epochs.get(self.partShown, [])

    @property
    def comparison(self) -> dict[str, Any]:
        """The proof (`comparison.json`), or {} while there is none."""
        path = self.folder / COMPARISON
        with contextlib.suppress(OSError, ValueError):
            changed = path.stat().st_mtime
            if changed != self._comparison[0]:
                content = json.loads(path.read_text(encoding="utf-8"))
                self._comparison = changed, content if isinstance(content, dict) else {}
            return self._comparison[1]
        return {}

    @property
    def decision(self) -> dict[str, Any]:
        """What became of the tuned model ("decision": promoted, discarded or rolled back...), or {}."""
        return readJson(self.folder / DECISION)

    # ---------------------------------------------------------------- state

    def _state(self, gone: bool) -> str:
        if self.result:
            return "finished"
        if self._begun and not self._ended and isHeld(self.folder):
            return self._stateAtWork()
        if self._begun and not self._ended and (told := readJson(self.folder / RESULT)):
            # The disk was too full for the last event.
            self._take({**told, "event": "result"})
            return "finished"
        # A launcher may be gone, and the Python behind it at work.
        gone = gone and not isHeld(self.folder)
        if gone and (self.launched or not (self._begun or self._ended)):
            return self._notStarted(_("The training ended before it began."))
        if self._ended or self._begun:
            if self.launched and time.monotonic() - self._made < START_LIMIT_S:
                return "starting"
            if self.error.get("code") == "cancelled":
                return "paused"
            if not self._ended:
                self.error = {
                    "code": "killed",
                    "message": _("The training was ended from outside, without a word."),
                    "hint": _("Resume it; it goes on from its last checkpoint."),
                }
            return "failed"
        if isHeld(self.folder) or time.monotonic() - self._made < START_LIMIT_S:
            return "starting"
        return self._notStarted(_("The training did not begin within {count} s.").format(count=START_LIMIT_S))

    def _stateAtWork(self) -> str:
        asked = None
        with contextlib.suppress(OSError, UnicodeDecodeError):
            asked = (self.folder / STOP).read_text(encoding="utf-8").strip()
        self.keepsBest = asked == KEEP_BEST
        # The file lies there until all is done, also when what it asks for has been heeded.
        if self._trained or (self.keepsBest and self.stage == COMPARE):
            return "stopping" if asked and not self.keepsBest else "finishing"
        if asked is not None:
            return "stopping"
        return "running" if self._training else "starting"

    def _notStarted(self, message: str) -> str:
        self.error = {
            "code": "not_started",
            "message": message,
            "hint": _("Look at the log of the run, in its folder."),
        }
        return "failed"

    # ---------------------------------------------------------------- events

    def _read(self) -> bool:
        """Takes the next piece; returns whether there was one."""
        path = self.folder / EVENTS
        try:
            if path.stat().st_size < self._offset:  # another run took the folder
                self.__init__(self.folder, self.launched, self.hasEnded)
            with open(path, "rb") as stream:
                stream.seek(self._offset)
                data = stream.read(LONGEST_PIECE)
        except OSError:
            return False
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == LONGEST_PIECE:
            whole = len(data)  # no event is as long
        self._offset += whole
        for line in data[:whole].split(b"\n"):
            # A line that a killed process left half is no event.
            if (event := parsedEvent(line)) is not None:
                self._take(event)
        return whole > 0

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started":
            self.launched = self.launched and str(event.get("time") or "") < self._madeAt
            self._ended, self._begun = False, True
            self.error, self.result, self.etaS = {}, {}, None
            self.part, self.stage = 0, ""
            self._training, self._trained, self._compared = False, False, (0, 0.0)
        elif kind == "progress":
            self._progress(event)
        elif kind == "epoch":
            self._epoch(event)
        elif kind == "memory":
            self.predictedBytes = int(event.get("predicted_bytes") or self.predictedBytes)
            measured = event.get("cuda_max_allocated_bytes") or event.get("measured_bytes")
            self.measuredBytes = int(measured or self.measuredBytes)
        elif kind == "warning":
            text = str(event.get("message") or "")
            if text and text not in self.warnings:
                self.warnings.append(text)
        elif kind == "error":
            self._ended = True
            self.error = {key: str(event.get(key) or "") for key in ("code", "message", "hint")}
        elif kind == "result":
            self._ended, self.fraction, self.etaS = True, 1.0, None
            self.result = {key: value for key, value in event.items() if key not in ("event", "time")}

    def _progress(self, event: dict[str, Any]) -> None:
        stage, done, total = str(event.get("stage") or ""), event.get("done"), event.get("total")
        if not isinstance(done, (int, float)) or not isinstance(total, (int, float)):
            return
        within = min(1.0, done / total) if total else 1.0
        if stage == "finetune.parts":
            self.parts = int(total)
            self._trained = done >= total > 0
            return
        self.stage, self.etaS = stage, None
        self.part, self.parts = int(event.get("part") or 0), int(event.get("parts") or self.parts)
        self._training = self._training or self.part > 0
        eta = event.get("eta_s")
        if not self.part:
            self.fraction = max(self.fraction, self._finished(within) if self._trained else PREPARED * within)
            if self._trained and isinstance(eta, (int, float)):
                self.etaS = eta
            return
        share = {TRAIN: TRAINED * within, COMPARE: TRAINED + (1 - TRAINED) * within}.get(stage, 0.0)
        whole = PREPARED + (1 - PREPARED - FINISHING) * (self.part - 1 + share) / max(1, self.parts)
        self.fraction = max(self.fraction, whole)
        if stage == TRAIN and isinstance(eta, (int, float)) and within < 1:
            # The trainings that are still to come take as long as this one.
            self.etaS = eta + max(0, self.parts - self.part) * eta / (1 - within)

    def _finished(self, within: float) -> float:
        """Of the bar, in a comparison after the trainings: each of them takes half of what is left."""
        count, before = self._compared
        count += count == 0 or within < before
        self._compared = count, within
        left = FINISHING / 2**count
        return 1 - 2 * left + left * within

    def _epoch(self, event: dict[str, Any]) -> None:
        number = event.get("epoch")
        if not isinstance(number, int):
            return
        dice = event.get("dice")
        scores = dice.items() if isinstance(dice, dict) else ()
        named = {name: float(value) for name, value in scores if name != "mean" and isinstance(value, (int, float))}
        loss = event.get("loss")
        entry = Epoch(number, float(loss) if isinstance(loss, (int, float)) else None, named)
        # What was done again after an interruption takes the place of what it was before.
        kept = [one for one in self.epochs.get(int(event.get("part") or 1), []) if one.number < number]
        self.epochs[int(event.get("part") or 1)] = [*kept, entry]


# ---------------------------------------------------------------- the folder


def decide(folder: Path, decision: str, **fields: Any) -> None:
    """Writes down what became of the tuned model. Raises OSError where the disk refuses."""
    writeJson(folder / DECISION, {"decision": decision, "time": _now(), **fields})


def tidy(folder: Path, *more: str) -> None:
    """Deletes what only training needed, in the background; what the proof shows, and the model, stay.

    more: names of further folders of the run to be deleted. What cannot be moved stays as well.
    """
    shown = set()
    for case in readJson(folder / COMPARISON).get("cases") or []:
        files = case.get("files") or {}
        named = [*(files.get("images") or [])[:1], files.get("reference")]  # the first image is what is looked at
        shown |= {os.path.realpath(path) for path in named if path}
    images = [path for name in (DATA, CROPS) for path in (folder / name).rglob("*") if path.is_file()]
    data = [path for path in images if os.path.realpath(path) not in shown]
    folders = [folder / name for name in (PREPARED_DATA, *more)]
    with contextlib.suppress(OSError):
        dispose([*folders, *folder.glob(CHECKPOINTS), *data], folder.parent)


def _now(shift_s: float = 0.0) -> str:
    """The time as `events.jsonl` writes it, so that texts compare as times do."""
    return (datetime.now(timezone.utc) + timedelta(seconds=shift_s)).isoformat(timespec="milliseconds")
