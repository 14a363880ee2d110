"""What a running command tells the outside: JSON lines for programs, a bar and sentences for people."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

__all__ = [
    "SCORES",
    "SILENT",
    "CaseReporter",
    "FilteredReporter",
    "JsonReporter",
    "Recorder",
    "Reporter",
    "TerminalReporter",
    "WhileHeard",
    "aligned",
    "format_bytes",
    "format_seconds",
    "listed",
]

SCORES = {"dice": "Dice", "rmse": "RMSE"}
"""Keys of an `epoch` event with the figures of its validation, in words."""


def format_bytes(count: float) -> str:
    """Bytes as a person reads them, in binary units: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines with left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def listed(names: Sequence[str], shown: int = 10) -> str:
    """Names for a sentence; a long list is cut short."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


class Reporter:
    """Receives what happens. The base class is silent; subclasses override `emit`."""

    def __init__(self) -> None:
        self._stage = ("", 0)
        self._stage_start = (0.0, 0)

    def emit(self, event: dict[str, Any]) -> None:
        """Takes one event: a dictionary with the key "event"."""

    def progress(self, stage: str, done: int, total: int, **fields: Any) -> None:
        """`done` of `total` units of `stage` are finished; the time left is extrapolated from the stage's start.

        A stage may start with work done before (a resumed training): that tells nothing about the speed.
        """
        now = time.monotonic()
        if (stage, total) != self._stage or done == 0:
            self._stage, self._stage_start = (stage, total), (now, done)
        start, before = self._stage_start
        eta_s = (now - start) / (done - before) * (total - done) if done > before else None
        self.emit(
            {
                "event": "progress",
                "stage": stage,
                "done": int(done),
                "total": int(total),
                "eta_s": None if eta_s is None else round(eta_s, 1),
                **fields,
            }
        )

    def warning(self, message: str, **fields: Any) -> None:
        """Something was repaired, skipped or done otherwise than asked; one sentence."""
        self.emit({"event": "warning", "message": message, **fields})

    def note(self, message: str, **fields: Any) -> None:
        """Something worth knowing that needs no action; one sentence."""
        self.emit({"event": "note", "message": message, **fields})

    def result(self, **fields: Any) -> None:
        """The work is complete; paths and figures."""
        self.emit({"event": "result", **fields})

    def error(self, code: str, message: str, hint: str = "") -> None:
        """The work failed; nothing half-written is left."""
        self.emit({"event": "error", "code": code, "message": message, "hint": hint})


SILENT = Reporter()


class FilteredReporter(Reporter):
    """Passes on the events whose kind (their key "event") `keep` says yes to."""

    def __init__(self, report: Reporter, keep: Callable[[str], bool]) -> None:
        super().__init__()
        self._report, self._keep = report, keep

    def emit(self, event: dict[str, Any]) -> None:
        if self._keep(event["event"]):
            self._report.emit(event)


class CaseReporter(Reporter):
    """Passes warnings on with the name of their case, and keeps them in `warnings`; all else is left out: progress is
    that of the cases, not of the windows of each."""

    def __init__(self, report: Reporter, case: str) -> None:
        super().__init__()
        self._report, self._case = report, case
        self.warnings: list[str] = []

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            self.warnings.append(event["message"])
            self._report.emit({**event, "message": f"{self._case}: {event['message']}", "case": self._case})


class WhileHeard(Reporter):
    """Passes events on as long as that works: a pipe that nobody reads any more, a terminal that is gone, or a full
    disk behind standard output must not end hours of work."""

    def __init__(self, report: Reporter) -> None:
        super().__init__()
        self._report, self._heard = report, True

    def emit(self, event: dict[str, Any]) -> None:
        if self._heard:
            try:
                self._report.emit(event)
            except OSError:
                self._heard = False


class Recorder(Reporter):
    """Keeps every event in `events`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class JsonReporter(Reporter):
    """One JSON object a line, flushed at once; this is what Slicer reads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stdout
        self._lock = threading.Lock()

    def emit(self, event: dict[str, Any]) -> None:
        line = json.dumps(event, ensure_ascii=True, default=str, allow_nan=False)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class TerminalReporter(Reporter):
    """A progress bar on a terminal, a line now and then elsewhere; sentences for the rest."""

    BAR_CELLS = 28
    LINE_EVERY_S = 10.0  # where there is no terminal to redraw a bar on

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._line_open = False
        self._last_line_s = 0.0

    def emit(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self._draw(event)
        elif kind == "epoch":
            self.line(_epoch_line(event))
        elif kind in ("warning", "error", "note"):
            # A stop that was asked for is no error.
            plain = kind == "note" or event.get("code") == "cancelled"
            label = "" if plain else f"{kind.capitalize()}: "
            self.line(label + f"{event['message']} {event.get('hint', '')}".strip())

    def line(self, text: str) -> None:
        """A whole line, after closing an open bar."""
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def _draw(self, event: dict[str, Any]) -> None:
        done, total = event["done"], max(1, event["total"])
        left = f", {format_seconds(event['eta_s'])} left" if event["eta_s"] and done < total else ""
        extra = f", loss {event['loss']:.4g}" if event.get("loss") is not None else ""
        count = f"{done} of {total} {unit}" if (unit := event.get("unit")) else f"{done}/{total}"
        text = f"{event['stage']}  {count}{left}{extra}"
        if self._live:
            filled = round(self.BAR_CELLS * min(done, total) / total)
            bar = "█" * filled + "░" * (self.BAR_CELLS - filled)
            self._stream.write(f"\r\x1b[K{bar}  {text}" + ("\n" if done >= total else ""))
            self._line_open = done < total
            self._stream.flush()
        elif (now := time.monotonic()) - self._last_line_s > self.LINE_EVERY_S:
            self._last_line_s = now
            self.line(text)


def _epoch_line(event: dict[str, Any]) -> str:
    parts = [f"epoch {event['epoch']}"]
    if "loss" in event:
        parts.append(f"loss {event['loss']:.4f}")
    for key, word in SCORES.items():
        if found := event.get(key):
            parts_of = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "mean")
            parts.append(f"{word} {found['mean']:.3f}" + (f" ({parts_of})" if parts_of else ""))
    return "  ".join([*parts, format_seconds(event["seconds"])])
