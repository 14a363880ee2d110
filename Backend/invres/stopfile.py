"""Asking a training to stop by a file in its folder, where no signal can be sent."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .files import written_whole
from .trainer import StopRequest

__all__ = ["KEEP_BEST", "STOP", "StopFile"]

STOP = "stop"
KEEP_BEST = "keep-best"


class StopFile(StopRequest):
    """As SIGINT or SIGTERM, and as what the file `stop` in the run's folder says, which is looked at in each step.

    "stop" in it: save and stop, to be resumed later. "keep-best": end now, with the best weights so far, and do what
    follows a training. Anything else, as of a file half written, is not heeded. That the best is to be kept stays so
    once it was heeded, through any stop, until `clear` is told that it is done.
    """

    def __init__(self, folder: Path):
        self._file = folder / STOP
        self._asked = self._ending = False
        super().__init__()

    @property
    def requested(self) -> bool:
        return self._asked or self._text() == STOP

    @requested.setter
    def requested(self, value: bool) -> None:
        self._asked = value

    @property
    def finish(self) -> bool:
        self._ending = self._ending or self._text() == KEEP_BEST
        return self._ending

    @finish.setter
    def finish(self, value: bool) -> None:
        """Only a file says so."""

    def clear(self, also_keep_best: bool = True) -> None:
        """Removes the file, once what it asks for is done; without `also_keep_best` it goes on asking for that."""
        with suppress(OSError):
            if also_keep_best or not self.finish:
                self._ending = False
                self._file.unlink(missing_ok=True)
            elif self._text() != KEEP_BEST:  # a stop was asked for since
                with written_whole(self._file) as temporary:
                    temporary.write_text(KEEP_BEST, encoding="utf-8")

    def _text(self) -> str | None:
        try:
            return self._file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
