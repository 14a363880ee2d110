"""One child process with its pipes, on qt.QProcess: the only file that uses it. Nothing here blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import qt

from .ProcessTree import killTree

__all__ = ["ChildProcess"]


class ChildProcess:
    """Starts a program; its output and its end arrive as calls from Qt's event loop.

    environment: the whole environment, or None for Slicer's own. onOutput and onErrorOutput get bytes as they come.
    onEnd(exitCode, reason) is called once; reason is "" unless the program could not be started or crashed.
    """

    _dying: set = set()  # noqa: RUF012 - held until Qt has seen them end

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str] | None = None,
        onOutput: Callable[[bytes], None] | None = None,
        onErrorOutput: Callable[[bytes], None] | None = None,
        onEnd: Callable[[int, str], None] | None = None,
    ) -> None:
        self.command = list(command)
        self._environment = environment
        self._onOutput, self._onErrorOutput, self._onEnd = onOutput, onErrorOutput, onEnd
        self._process = qt.QProcess()
        self._ended = self._released = False
        self.alsoKill: int | None = None  # the real Python behind a launcher, once it has told its id

    def start(self) -> None:
        """Begins to start the program; what goes wrong arrives at onEnd."""
        process = self._process
        if self._environment is not None:
            environment = qt.QProcessEnvironment()
            for name, value in self._environment.items():
                environment.insert(name, value)
            process.setProcessEnvironment(environment)
        process.connect("readyReadStandardOutput()", self._readOutput)
        process.connect("readyReadStandardError()", self._readErrorOutput)
        process.connect("finished(int,QProcess::ExitStatus)", self._onFinished)
        process.connect("errorOccurred(QProcess::ProcessError)", self._onError)
        process.start(self.command[0], self.command[1:])

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return not self._ended and self._process.state() != qt.QProcess.NotRunning

    def write(self, data: bytes) -> None:
        """Sends to its standard input; kept until the program is there."""
        if not self._ended:
            self._process.write(data)

    def closeInput(self) -> None:
        """Ends its standard input when all has been sent."""
        if not self._ended:
            self._process.closeWriteChannel()

    def kill(self) -> None:
        """Ends it with all that it has started. onEnd is not called any more."""
        if self._ended:
            return
        self._ended = True
        process = self._process
        launcher = int(process.processId())
        if process.state() == qt.QProcess.NotRunning:
            return
        # Qt must see the end of the process before the object goes.
        ChildProcess._dying.add(self)
        killTree([pid for pid in (launcher, self.alsoKill) if pid])
        process.kill()
        process.closeWriteChannel()

    def waitForEnd(self, milliseconds: int) -> None:
        """Blocks until it has ended, for use when the application ends."""
        if not self._released and self._process.state() != qt.QProcess.NotRunning:
            self._process.waitForFinished(milliseconds)

    # ---------------------------------------------------------------- from Qt

    def _readOutput(self) -> None:
        self._hand(self._onOutput, self._process.readAllStandardOutput())

    def _readErrorOutput(self) -> None:
        self._hand(self._onErrorOutput, self._process.readAllStandardError())

    def _hand(self, receiver: Callable[[bytes], None] | None, data) -> None:
        content = data.data()
        if content and receiver is not None and not self._ended:
            receiver(content if isinstance(content, bytes) else bytes(content))

    def _onFinished(self, exitCode: int, exitStatus: int) -> None:
        # Not at once: Qt is still inside this very object.
        qt.QTimer.singleShot(0, self._release)
        if self._ended:
            return
        self._readOutput()
        self._readErrorOutput()
        crashed = int(exitStatus) != int(qt.QProcess.NormalExit)
        self._end(exitCode, "crashed" if crashed else "")

    def _onError(self, error: int) -> None:
        if int(error) == int(qt.QProcess.FailedToStart):
            qt.QTimer.singleShot(0, self._release)
            if not self._ended:
                self._end(-1, self._process.errorString() or "not found")

    def _release(self) -> None:
        """Lets the object in Qt go; its connections would hold it, and this one, for good."""
        if not self._released:
            self._released = True
            ChildProcess._dying.discard(self)
            self._process.deleteLater()

    def _end(self, exitCode: int, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        logging.debug("InvResSegment: %s ended with %d %s", self.command[0], exitCode, reason)
        if self._onEnd is not None:
            self._onEnd(exitCode, reason)
