"""The backend as a child process that stays: requests in, events out, cancelled softly or for certain."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import qt
from slicer.i18n import tr as _

from .ChildProcess import ChildProcess
from .ProcessTree import killGroup
from .Protocol import LineSplitter, Outcome, TextTail, coalesced, parsedEvent

__all__ = ["BackendProcess", "Outcome"]

SOFT_CANCEL_MS = 1500
# A scanner of viruses may look through a whole Python first.
START_LIMIT_MS = 180_000
# A request is read in a thread of its own, before anything slow begins.
ANSWER_LIMIT_MS = 8_000
LONGEST_LOG_PIECE = 65_536

# These only ask for something and end by themselves; killing a warm backend for one of them would cost seconds.
PATIENT_VERBS = ("describe", "devices", "models", "plan")


@dataclass
class _Request:
    id: int
    arguments: list[str]
    onEvent: Callable[[dict], None] | None
    onFinished: Callable[[Outcome], None] | None  # None once it was called
    sentAt: float = 0.0
    accepted: bool = False
    sentAgain: bool = False
    cancelled: bool = False
    result: dict | None = None
    error: dict = field(default_factory=dict)


class BackendProcess:
    """Runs requests on `invres worker`, which is started when it is needed and again when it has died.

    Never blocks and never raises for what goes wrong in the child: that arrives as an `Outcome`. Callbacks come from
    Qt's event loop, never from within a call (but for `stop`); an exception in one is logged. Progress that comes
    faster than it can be shown is left out but for the last.

    command: gives the worker's whole command line; it may raise OSError with a plain sentence where there is no Python.
    environment: gives (or is) the whole environment of the child, None for Slicer's own.
    onLog: gets text that is no event, in pieces.
    onDeaf: asked when the program runs but gets no requests, as a launcher may keep its input to itself; True if
    `command` gives another program now, which is then tried.
    """

    def __init__(
        self,
        command: Callable[[], list[str]],
        environment: Callable[[], dict[str, str]] | dict[str, str] | None = None,
        onLog: Callable[[str], None] | None = None,
        onDeaf: Callable[[], bool] | None = None,
    ) -> None:
        self._command = command
        self._onDeaf = onDeaf
        self._environment = environment
        self._onLog = onLog
        self._lastId = 0
        self._requests: dict[int, _Request] = {}  # in the order in which the worker runs them
        self._child: ChildProcess | None = None
        self._pid: int | None = None
        self._heard = False  # whether this worker has ever read a request
        self._lines, self._errors = LineSplitter(), TextTail()

    # ---------------------------------------------------------------- for the panel

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an outcome."""
        return any(request.onFinished is not None for request in self._requests.values())

    @property
    def running(self) -> bool:
        """Whether the child process is there."""
        return self._child is not None and self._child.running

    @property
    def pid(self) -> int | None:
        """The process id of the real Python, once it has told it."""
        return self._pid if self.running else None

    def request(
        self,
        arguments: list[str],
        onEvent: Callable[[dict], None] | None,
        onFinished: Callable[[Outcome], None],
    ) -> int:
        """Hands a command line of the backend over, starting the worker when needed. Returns the request's id.

        onEvent gets progress, warnings, notes and the like; onFinished, once, how it ended.
        """
        self._lastId += 1
        request = _Request(self._lastId, [str(argument) for argument in arguments], onEvent, onFinished)
        if self._child is not None and not self._child.running and not self._requests:
            self._child = None  # it has just died while idle
        self._requests[request.id] = request
        if self._child is None:
            self._start()
        if self._child is not None:
            self._send(request)
        return request.id

    def cancel(self, requestId: int) -> None:
        """Asks the request to stop; if it has not within 1.5 s, the whole process tree is ended. Outcome: cancelled."""
        request = self._requests.get(requestId)
        if request is None or request.cancelled or request.onFinished is None:
            return
        request.cancelled = True
        if self._child is not None:
            self._write({"cancel": requestId})
        patient = bool(request.arguments) and request.arguments[0] in PATIENT_VERBS
        if patient or not self._isRunning(request):
            # Dropped when its turn comes, or left to run out; nobody waits for that.
            qt.QTimer.singleShot(0, lambda: self._finish(request, Outcome("cancelled")))
        else:
            qt.QTimer.singleShot(SOFT_CANCEL_MS, lambda: self._enforce(request))

    def stop(self) -> None:
        """Ends the worker and all that it has started; requests have ended as cancelled when this returns."""
        waiting = list(self._requests.values())
        self._requests.clear()
        self._abandonChild(wait=True)
        for request in waiting:
            self._finish(request, Outcome("cancelled"))

    # ---------------------------------------------------------------- the child

    def _start(self) -> None:
        self._lines, self._errors, self._pid, self._heard = LineSplitter(), TextTail(), None, False
        try:
            command = self._command()
            environment = self._environment() if callable(self._environment) else self._environment
        except OSError as error:
            outcome = Outcome(
                "failed", code="no_python", message=str(error), hint=_("Open Setup in the panel and check the Python.")
            )
            waiting = list(self._requests.values())
            self._requests.clear()
            qt.QTimer.singleShot(0, lambda: self._finishAll(waiting, outcome))
            return
        child = ChildProcess(
            command,
            environment,
            onOutput=lambda data: self._onOutput(child, data),
            onErrorOutput=lambda data: self._log(self._errors.feed(data)),
            onEnd=lambda exitCode, reason: qt.QTimer.singleShot(0, lambda: self._onEnd(child, exitCode, reason)),
        )
        self._child = child
        child.start()
        qt.QTimer.singleShot(START_LIMIT_MS, lambda: self._checkReady(child))

    def _send(self, request: _Request) -> None:
        request.sentAt = time.monotonic()
        self._write({"id": request.id, "arguments": request.arguments})

    def _write(self, message: dict) -> None:
        if self._child is not None:
            # ASCII only, so that no encoding on the way can spoil a path.
            self._child.write(json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n")

    def _abandonChild(self, wait: bool = False) -> None:
        """Ends the worker's tree; from here on it is nobody's."""
        child, self._child, self._pid = self._child, None, None
        if child is not None:
            child.kill()
            if wait:
                child.waitForEnd(1000)

    def _isRunning(self, request: _Request) -> bool:
        """Whether nothing that somebody waits for stands before it."""
        return next((r for r in self._requests.values() if r.onFinished is not None), None) is request

    def _enforce(self, request: _Request) -> None:
        if request.id not in self._requests:
            return
        text = _("The backend did not stop within {seconds} s and was ended.").format(seconds=SOFT_CANCEL_MS / 1000)
        self._log(f"{text}\n")
        del self._requests[request.id]
        self._abandonChild()
        self._sendOthersAgain()
        self._finish(request, Outcome("cancelled"))

    def _sendOthersAgain(self) -> None:
        """What waited behind a request that took the worker down goes to a new worker, once."""
        for request in list(self._requests.values()):
            if request.onFinished is None or request.cancelled:
                del self._requests[request.id]
                self._finish(request, Outcome("cancelled"))
            else:
                request.accepted, request.sentAgain = False, True
        if self._requests:
            self._start()
            for request in list(self._requests.values()):
                self._send(request)

    # ---------------------------------------------------------------- what the child says

    def _onOutput(self, child: ChildProcess, data: bytes) -> None:
        events = []
        for line in self._lines.feed(data):
            event = parsedEvent(line)
            if event is None:
                if line.strip():
                    self._log(line.decode("utf-8", "replace") + "\n")
            else:
                events.append(event)
        for event in coalesced(events):
            if child is self._child:  # a callback may have ended it
                self._take(child, event)

    def _take(self, child: ChildProcess, event: dict) -> None:
        kind = event["event"]
        if kind == "ready":
            self._pid = child.alsoKill = event.get("pid") if isinstance(event.get("pid"), int) else None
            qt.QTimer.singleShot(ANSWER_LIMIT_MS, lambda: self._checkAnswered(child))
            return
        request = self._requests.get(event.get("id"))
        self._heard = self._heard or kind == "accepted"
        if request is None:
            if kind == "error":
                self._log(f"{event.get('message', '')}\n")
        elif kind == "accepted":
            request.accepted = True
        elif kind == "finished":
            del self._requests[request.id]
            self._finish(request, self._outcome(request, event.get("exit_code")))
        else:
            if kind == "result":
                request.result = {key: value for key, value in event.items() if key not in ("event", "id")}
            elif kind == "error":
                request.error = event
            if request.onEvent is not None and request.onFinished is not None and not request.cancelled:
                self._call(request.onEvent, event)

    @staticmethod
    def _outcome(request: _Request, exitCode: object) -> Outcome:
        if request.cancelled or exitCode == 130:
            return Outcome("cancelled")
        if exitCode == 0 and request.result is not None:
            return Outcome("done", request.result)
        code = str(request.error.get("code") or "no_result")
        message = str(request.error.get("message") or _("The backend ended the request without a result."))
        return Outcome("failed", code=code, message=message, hint=str(request.error.get("hint") or ""))

    def _onEnd(self, child: ChildProcess, exitCode: int, reason: str) -> None:
        if child.alsoKill:
            killGroup(child.alsoKill)
        if child is not self._child:
            return
        wasReady = self._pid is not None
        self._child, self._pid = None, None
        if not self._requests:
            return
        if exitCode == -1 and not wasReady:
            outcome = Outcome(
                "failed",
                code="not_started",
                message=_("The backend could not be started with {program}: {reason}.").format(
                    program=child.command[0], reason=reason.rstrip(".")
                ),
                hint=_("Open Setup in the panel and check the Python."),
            )
        else:
            outcome = self._crash(exitCode)
        running, *others = self._requests.values()
        if wasReady and not running.accepted and not running.sentAgain:
            self._sendOthersAgain()  # it had died before the request reached it
            return
        if not wasReady or any(request.sentAgain for request in others):
            self._requests.clear()
            self._finishAll([running, *others], outcome)
            return
        del self._requests[running.id]
        self._sendOthersAgain()
        self._finish(running, Outcome("cancelled") if running.cancelled else outcome)

    def _crash(self, exitCode: int) -> Outcome:
        last = self._errors.lastLine
        said = _("its last words: {line}").format(line=last.rstrip(".")) if last else _("it said nothing")
        return Outcome(
            "failed",
            code="crashed",
            message=_("The backend ended unexpectedly (code {code}); {said}.").format(code=exitCode, said=said),
            hint=_("Try again; if it happens again, free memory or choose a smaller window, and look at the log."),
        )

    # ---------------------------------------------------------------- limits

    def _checkReady(self, child: ChildProcess) -> None:
        if child is self._child and self._pid is None:
            self._giveUp(
                "not_started",
                _("The backend did not start within {seconds} s.").format(seconds=START_LIMIT_MS // 1000),
                _("Look at the log, or check the Python in Setup."),
            )

    def _checkAnswered(self, child: ChildProcess) -> None:
        if child is not self._child or self._heard:
            return
        oldest = min((request.sentAt for request in self._requests.values()), default=time.monotonic())
        if (time.monotonic() - oldest) * 1000 < ANSWER_LIMIT_MS - 500:
            qt.QTimer.singleShot(ANSWER_LIMIT_MS, lambda: self._checkAnswered(child))
        elif self._onDeaf is not None and self._onDeaf():
            self._log(
                _("{program} passes no requests on; another way is tried.").format(program=child.command[0]) + "\n"
            )
            self._abandonChild()
            self._sendOthersAgain()
        else:
            self._giveUp(
                "no_answer",
                _("The backend runs but gets no requests: {program} does not pass them on.").format(
                    program=child.command[0]
                ),
                _("Choose a separate Python for the backend in Setup."),
            )

    def _giveUp(self, code: str, message: str, hint: str) -> None:
        waiting = list(self._requests.values())
        self._requests.clear()
        self._abandonChild()
        self._finishAll(waiting, Outcome("failed", code=code, message=message, hint=hint))

    # ---------------------------------------------------------------- calls to the outside

    def _finishAll(self, requests: list[_Request], outcome: Outcome) -> None:
        for request in requests:
            self._finish(request, Outcome("cancelled") if request.cancelled else outcome)

    def _finish(self, request: _Request, outcome: Outcome) -> None:
        callback, request.onFinished = request.onFinished, None
        if callback is not None:
            self._call(callback, outcome)

    def _log(self, text: str) -> None:
        if self._onLog is not None and text:
            if len(text) > LONGEST_LOG_PIECE:
                half = LONGEST_LOG_PIECE // 2
                text = f"{text[:half]}\n[...]\n{text[-half:]}"
            self._call(self._onLog, text)

    @staticmethod
    def _call(callback: Callable, argument: object) -> None:
        try:
            callback(argument)
        except Exception:
            logging.exception("InvResSegment: a callback of the backend failed")
