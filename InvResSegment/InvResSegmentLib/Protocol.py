"""The backend's JSON lines as plain data: from bytes to events, and what becomes of a request."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LineSplitter", "Outcome", "TextTail", "coalesced", "parsedEvent"]

# A list of many models is long; what is longer is no event of ours.
LONGEST_LINE = 64 * 1024 * 1024


@dataclass(frozen=True)
class Outcome:
    """How a request ended. state: "done" (exit code 0 and a result), "failed" or "cancelled".

    result: the fields of the result event. code, message, hint: of the error; one plain sentence and the next step.
    """

    state: str
    result: dict = field(default_factory=dict)
    code: str = ""
    message: str = ""
    hint: str = ""


class LineSplitter:
    """Cuts a stream that arrives in pieces into whole lines; lines too long to be an event are dropped."""

    def __init__(self, longest: int = LONGEST_LINE) -> None:
        self._longest = longest
        self._rest = bytearray()
        self._dropping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n") if b"\n" in data else (self._rest,)
        self._rest = bytearray(rest)
        if lines and self._dropping:
            del lines[0]
            self._dropping = False
        if len(self._rest) > self._longest:
            self._rest.clear()
            self._dropping = True
        return [bytes(line).rstrip(b"\r") for line in lines if len(line) <= self._longest]


def parsedEvent(line: bytes) -> dict[str, Any] | None:
    """The event in a line, or None: libraries print to standard output as well."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        event = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def coalesced(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, but of progress reports that follow one another in a stage only the last."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if kept and event["event"] == kept[-1]["event"] == "progress":
            same = all(event.get(key) == kept[-1].get(key) for key in ("id", "stage"))
            if same:
                kept.pop()
        kept.append(event)
    return kept


class TextTail:
    """Text that arrives in pieces of UTF-8: whole characters go on, the last lines are remembered."""

    def __init__(self, remembered: int = 4000) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._remembered = remembered
        self.text = ""

    def feed(self, data: bytes) -> str:
        """The new text."""
        new = self._decoder.decode(data)
        self.text = (self.text + new)[-self._remembered :]
        return new

    @property
    def lastLine(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
