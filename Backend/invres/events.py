"""What a running command tells the outside: JSON lines for programs, a bar and sentences for people."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, TextIO

__all__ = ["SILENT", "JsonReporter", "Recorder", "Reporter", "TerminalReporter", "format_bytes", "format_seconds"]


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


class Reporter:
    """Receives what happens. The base class is silent; subclasses override `emit`."""

    def __init__(self) -> None:
        self._stage = ""
        self._stage_start = 0.0

    def emit(self, event: dict[str, Any]) -> None:
        """Takes one event: a dictionary with the key "event"."""

    def progress(self, stage: str, done: int, total: int, **fields: Any) -> None:
        """`done` of `total` units of `stage` are finished; the time left is extrapolated from the stage's start."""
        now = time.monotonic()
        if stage != self._stage or done == 0:
            self._stage, self._stage_start = stage, now
        eta_s = (now - self._stage_start) / done * (total - done) if done else None
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
    """A progress bar on a terminal, a line for each tenth of the work elsewhere; sentences for the rest."""

    BAR_CELLS = 28
    _LABELS = {"warning": "Warning: ", "error": "Error: ", "note": ""}

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._line_open = False
        self._last_tenth: tuple[str, int] = ("", -1)

    def emit(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self._draw(event)
        elif kind in self._LABELS:
            self.line(self._LABELS[kind] + f"{event['message']} {event.get('hint', '')}".strip())

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
        extra = "".join(f", {key} {event[key]:.4g}" for key in ("loss", "dice") if event.get(key) is not None)
        text = f"{event['stage']}  {done}/{total}{left}{extra}"
        if self._live:
            filled = round(self.BAR_CELLS * min(done, total) / total)
            bar = "█" * filled + "░" * (self.BAR_CELLS - filled)
            self._stream.write(f"\r\x1b[K{bar}  {text}" + ("\n" if done >= total else ""))
            self._line_open = done < total
            self._stream.flush()
        elif self._last_tenth != (tenth := (event["stage"], 10 * done // total)):
            self._last_tenth = tenth
            self.line(text)
