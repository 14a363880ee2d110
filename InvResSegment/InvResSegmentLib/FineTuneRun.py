"""One fine-tuning as a process of its own: it goes on without the panel and Slicer, and is found again later."""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .Disposal import GONE, dispose, sweep
from .ProcessTree import killTree
from .Protocol import parsedEvent
from .RunHolder import holderOf, isHeld
from .RunRecord import KEEP_BEST, STOP, RunRecord
from .WholeFile import readJson, writeJson, writeWhole

__all__ = ["FineTuneRun", "newRunFolder", "runsIn", "secondsPerStep"]

RECORD = "panel.json"
OUTPUT, ERRORS = "stdout.jsonl", "stderr.txt"
PAUSE = "stop"
"""What asks a process to save and stop, in the file of the same name; KEEP_BEST is the other word for it."""
_TAIL = 65_536  # bytes at the end of what a process said
_SAID_AT_THE_END = re.compile(r"^\w*(Error|Exception|Killed)\b.*|.*\b(error|killed|abort|fault)\b.*", re.IGNORECASE)


class FineTuneRun:
    """A folder of the runs folder. Its record says how it was started, so that it can be resumed in the same way."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.record: dict[str, Any] = readJson(self.folder / RECORD)
        self._process: subprocess.Popen | None = None

    @classmethod
    def begin(cls, folder: Path, record: dict[str, Any]) -> FineTuneRun:
        """A run that can be launched. record: "arguments" of the backend, and what else is to be remembered.

        Raises OSError where the disk refuses.
        """
        created = datetime.now().astimezone().isoformat(timespec="milliseconds")
        writeJson(folder / RECORD, {"created": created, **record})
        return cls(folder)

    @property
    def title(self) -> str:
        """The model that is tuned, and when that was begun."""
        created = str(self.record.get("created") or "")[:16].replace("T", " ")
        return _("{model}, {time}").format(model=self.record.get("model") or self.folder.name, time=created)

    @property
    def decision(self) -> str:
        """What became of its model: PROMOTED, DISCARDED or ROLLED_BACK, "" before that."""
        return str(RunRecord(self.folder).decision.get("decision") or "")

    @property
    def active(self) -> bool:
        """Whether a process is at work on it, or has just been started."""
        if self._process is not None and self._process.poll() is None:
            return True
        return isHeld(self.folder)

    @property
    def hasEnded(self) -> bool:
        """Whether the process that was started here is gone; False where none was."""
        return self._process is not None and self._process.poll() is not None

    def launch(self, command: list[str], environment: dict[str, str], device: str = "", resume: bool = False) -> None:
        """Starts the process. command: Python and what makes it the backend, without a verb. device: what to compute
        on now, "" for what it was started with, which may be gone when it is resumed. Raises OSError."""
        words = list(self.record["arguments"])
        if device and "--device" in words:
            words[words.index("--device") + 1] = device
        arguments = [*command, *words, *(["--resume"] if resume else []), "--json"]
        # A pause is over; that the best is to be kept has been decided.
        if _text(self.folder / STOP) != KEEP_BEST:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / STOP).unlink()
        flags = [getattr(subprocess, name, 0) for name in ("CREATE_NO_WINDOW", "CREATE_NEW_PROCESS_GROUP")]
        # Not QProcess, whose detached children get no environment and no files in every supported Slicer.
        with open(self.folder / OUTPUT, "wb") as output, open(self.folder / ERRORS, "wb") as errors:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
                creationflags=flags[0] | flags[1],
            )

    def pause(self) -> None:
        """Asks it to save and stop; it can be resumed. Raises OSError where the disk refuses."""
        writeWhole(self.folder / STOP, PAUSE)

    def keepBest(self) -> None:
        """Asks it to end the training now and to prove and pack what there is. Raises OSError."""
        writeWhole(self.folder / STOP, KEEP_BEST)

    def failure(self) -> tuple[str, str]:
        """What a process that has ended said last: a sentence and a hint; ("", "") where it said nothing."""
        for line in reversed(_tail(self.folder / OUTPUT)):
            event = parsedEvent(line.encode("utf-8"))
            if event is not None and event["event"] == "error":
                return str(event.get("message") or ""), str(event.get("hint") or "")
            if event is not None and event["event"] == "result":
                return "", ""
        lines = [line.strip() for line in _tail(self.folder / ERRORS) if line.strip()]
        told = [line for line in lines if _SAID_AT_THE_END.match(line)] or lines
        code = self._process.poll() if self._process is not None else None
        if told:
            return _("The training ended unexpectedly; its last words: {line}").format(line=told[-1]), ""
        if code:
            return _("The training ended unexpectedly (code {code}); it said nothing.").format(code=code), ""
        return "", ""

    def discard(self) -> None:
        """Ends the process, if there is one, and deletes the folder; the tuned model in it, too.

        Raises OSError where the disk refuses, and where a process is at work that may be somebody else's: it is asked
        to stop, and nothing is deleted.
        """
        if self.active:
            pids = [self._process.pid] if self._process is not None and self._process.poll() is None else []
            holder = holderOf(self.folder)
            killTree([*pids, *([holder.pid] if holder.certain else [])])
            end = time.monotonic() + 2
            while self.active and time.monotonic() < end:
                time.sleep(0.02)
        if self.active:
            self.pause()
            raise OSError(errno.EBUSY, _("a process is still at work in it, and was asked to stop"))
        dispose([self.folder], self.folder.parent)


def newRunFolder(runsFolder: Path, model: str) -> Path:
    """A path for a new run, which is not there yet: the model's name and the time. Raises OSError."""
    runsFolder.mkdir(parents=True, exist_ok=True)
    sweep(runsFolder)
    plain = re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")[:40] or "model"
    name = f"{plain}-{datetime.now():%Y%m%d-%H%M%S}"
    paths = (runsFolder / f"{name}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 100))))
    return next(path for path in paths if not path.exists())


def runsIn(runsFolder: Path) -> list[FineTuneRun]:
    """The runs of a folder, the newest first: those under way or not decided on, then those that are."""
    found = []
    with contextlib.suppress(OSError):
        for record in runsFolder.glob(f"*/{RECORD}"):
            run = FineTuneRun(record.parent)
            if not run.folder.name.startswith(GONE) and run.record.get("arguments"):
                found.append(run)
    found.sort(key=lambda run: str(run.record.get("created") or ""), reverse=True)
    return sorted(found, key=lambda run: bool(run.decision))


def secondsPerStep(runsFolder: Path, wanted: dict[str, Any]) -> float | None:
    """Seconds of a training step in the newest finished run of which the record says all of `wanted`; None without."""
    best: tuple[str, float] = ("", 0.0)
    with contextlib.suppress(OSError):
        for path in runsFolder.glob(f"*/{RECORD}"):
            record, result = readJson(path), readJson(path.parent / "result.json")
            training = result.get("training") or {}
            steps, seconds = training.get("iterations"), training.get("seconds")
            if steps and seconds and all(record.get(key) == value for key, value in wanted.items()):
                best = max(best, (str(record.get("created") or ""), seconds / steps))
    return best[1] or None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _tail(path: Path) -> list[str]:
    """The last lines of a file."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL))
            return stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
