"""The backend process on real Qt: outcomes, crashes, floods, cancelling softly and for certain, and its end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standins

standins.install()

import qt  # noqa: E402
from InvResSegmentLib.BackendProcess import BackendProcess, Outcome  # noqa: E402
from InvResSegmentLib.ProcessTree import descendants, killTree  # noqa: E402
from InvResSegmentLib.Protocol import LineSplitter, TextTail, coalesced, parsedEvent  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "Backend"), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}

# A worker that does as it is told: the first word of a request is what it does.
FAKE = r"""
import json, os, subprocess, sys, threading, time
def say(**event): sys.stdout.write(json.dumps(event) + "\n"); sys.stdout.flush()
say(event="ready", pid=os.getpid(), version="0", python="3")
cancelled = set()
import queue
requests = queue.Queue()
def read():
    for line in sys.stdin:
        message = json.loads(line)
        if "cancel" in message: cancelled.add(message["cancel"])
        else: say(event="accepted", id=message["id"]); requests.put(message)
    os._exit(0)
threading.Thread(target=read, daemon=True).start()
while True:
    request = requests.get(); i = request["id"]; what, *more = request["arguments"]
    if what == "echo": say(event="result", id=i, arguments=more, pid=os.getpid()); code = 0
    elif what == "quiet": code = 0
    elif what == "bad": say(event="error", id=i, code="bad_input", message="It is wrong.", hint="Mend it."); code = 2
    elif what == "lie": say(event="result", id=i); code = 1
    elif what == "die": sys.stderr.write("first\nValueError: the reason\n\n"); sys.stderr.flush(); os._exit(9)
    elif what == "garbage":
        sys.stdout.write("hello\n{not json}\n[1, 2]\n{\"no\": 1}\n\n"); sys.stdout.flush()
        sys.stdout.buffer.write(b"\xff\xfe\n" + b"x" * 300000 + b"\n"); sys.stdout.flush()
        line = json.dumps({"event": "result", "id": i, "text": "\u00e4\u65e5"}, ensure_ascii=False).encode()
        for part in (line[:17], line[17:-4], line[-4:] + b"\n"):
            sys.stdout.buffer.write(part); sys.stdout.flush(); time.sleep(0.05)
        code = 0
    elif what == "flood":
        for n in range(20000): say(event="progress", id=i, stage="s", done=n, total=20000, eta_s=None)
        sys.stderr.write("e" * 2000000); sys.stderr.flush()
        say(event="result", id=i); code = 0
    elif what == "soft":
        say(event="note", id=i, message="begun")
        while i not in cancelled: time.sleep(0.01)
        say(event="error", id=i, code="cancelled", message="Cancelled.", hint=""); code = 130
    elif what in ("hard", "plan"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        lost = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
        say(event="note", id=i, pids=[os.getpid(), child.pid, lost.pid])
        time.sleep(float(more[0]) if more else 100); code = 0
    say(event="finished", id=i, exit_code=code)
"""

# PythonSlicer is a launcher: the real Python is its child and gets its pipes.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


class Told:
    """What the callbacks of one request were told."""

    def __init__(self):
        self.events, self.outcomes = [], []

    def __call__(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def wait(self, timeout=60) -> Outcome:
        standins.waitUntil(lambda: self.outcomes, timeout)
        return self.outcomes[0]


@pytest.fixture
def start(tmp_path):
    """Makes backends on the fake worker, or another program; they are ended after the test."""
    backends = []

    def begin(*command, environment=None, onLog=None):
        script = tmp_path / "fake.py"
        script.write_text(FAKE, encoding="utf-8")
        words = list(command) or [sys.executable, str(script)]
        backends.append(BackendProcess(lambda: words, environment or ENVIRONMENT, onLog))
        return backends[-1]

    yield begin
    for backend in backends:
        backend.stop()
    assert standins.pythonqt.slotErrors == []


def ask(backend, *arguments):
    told = Told()
    told.id = backend.request(list(arguments), told, told.outcomes.append)
    assert told.outcomes == [], "callbacks come from the event loop only"
    return told


# --- plain data -----------------------------------------------------------------------------------------------------


def test_lines_are_put_together_from_any_pieces():
    text = b'{"a": 1}\r\n\nlast\nhalf'
    for size in range(1, len(text) + 1):
        splitter, lines = LineSplitter(), []
        for start in range(0, len(text), size):
            lines += splitter.feed(text[start : start + size])
        assert lines == [b'{"a": 1}', b"", b"last"]


def test_lines_without_end_do_not_fill_the_memory():
    splitter = LineSplitter(longest=10)
    assert splitter.feed(b"x" * 8) == splitter.feed(b"x" * 8) == splitter.feed(b"x" * 100) == []
    assert splitter.feed(b"xx\nshort\n" + b"y" * 11 + b"\nz\n") == [b"short", b"z"]


@pytest.mark.parametrize("line", [b"", b"hello", b"[1]", b'{"event": 1}', b'{"x": 1}', b"{", b'{"event": "\xff"}'])
def test_what_is_no_event_is_none(line):
    assert parsedEvent(line) is None


def test_of_fast_progress_the_last_of_each_stage_is_kept():
    def progress(stage, done, identity=1):
        return {"event": "progress", "id": identity, "stage": stage, "done": done}

    events = [progress("a", 1), progress("a", 2), progress("b", 1), {"event": "note", "id": 1}, progress("b", 2)]
    events += [progress("b", 3), progress("b", 3, identity=2)]
    assert coalesced(events) == [events[1], events[2], events[3], events[5], events[6]]


def test_characters_that_are_cut_are_put_together():
    tail, data = TextTail(remembered=20), "ä日本\nlast line  \n\n".encode()
    assert "".join(tail.feed(data[i : i + 1]) for i in range(len(data))) == "ä日本\nlast line  \n\n"
    assert tail.lastLine == "last line"
    tail.feed(b"x" * 100)
    assert tail.text == "x" * 20


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_requests_run_in_order_on_one_process(start):
    backend = start()
    assert not backend.busy and not backend.running
    told = [ask(backend, "echo", "ä", str(number)) for number in range(3)]
    assert backend.busy and backend.running and [one.id for one in told] == [1, 2, 3]
    outcomes = [one.wait() for one in told]
    assert [outcome.state for outcome in outcomes] == ["done"] * 3
    assert [outcome.result["arguments"] for outcome in outcomes] == [["ä", "0"], ["ä", "1"], ["ä", "2"]]
    assert {outcome.result["pid"] for outcome in outcomes} == {backend.pid}
    assert not backend.busy and backend.running


def test_only_a_result_with_exit_code_0_is_believed(start):
    backend = start()
    assert ask(backend, "bad").wait() == Outcome("failed", {}, "bad_input", "It is wrong.", "Mend it.")
    for words in ("quiet", "lie"):
        outcome = ask(backend, words).wait()
        assert (outcome.state, outcome.code) == ("failed", "no_result") and outcome.message.endswith(".")


def test_garbage_partial_and_endless_lines_do_no_harm(start):
    log = []
    backend = start(onLog=log.append)
    outcome = ask(backend, "garbage").wait()
    assert outcome.state == "done" and outcome.result["text"] == "ä日"
    text = "".join(log)
    assert "hello" in text and "{not json}" in text
    assert max(map(len, log)) < 70_000


def test_a_flood_is_taken_without_blocking_the_window(start):
    log, ticks = [], []
    timer = qt.QTimer()
    timer.setInterval(10)
    timer.connect("timeout()", lambda: ticks.append(time.monotonic()))
    timer.start()
    backend = start(onLog=log.append)
    told = ask(backend, "flood")
    assert told.wait().state == "done"
    timer.stop()
    assert told.of("progress")[-1]["done"] == 19999 and len(told.of("progress")) < 20000
    assert max(map(len, log)) < 70_000
    assert max(b - a for a, b in itertools.pairwise(ticks)) < 1.0


def test_an_exception_in_a_callback_does_not_end_the_others(start, caplog):
    backend = start()

    def fail(_argument):
        raise RuntimeError("a bug of the panel")

    backend.request(["soft"], fail, fail)
    backend.cancel(1)
    assert ask(backend, "echo").wait().state == "done"
    assert "a bug of the panel" in caplog.text


def test_a_callback_may_ask_again_and_stop(start):
    backend, outcomes = start(), []

    def again(outcome):
        outcomes.append(outcome)
        if len(outcomes) < 3:
            backend.request(["echo"], None, again)
        else:
            backend.stop()

    backend.request(["echo"], None, again)
    standins.waitUntil(lambda: len(outcomes) == 3 and not backend.running, 30)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_crash_is_told_with_its_last_words_and_the_next_request_works(start):
    backend = start()
    first = ask(backend, "echo").wait().result["pid"]
    told, waiting = ask(backend, "die"), ask(backend, "echo", "behind")
    outcome = told.wait()
    assert (outcome.state, outcome.code) == ("failed", "crashed")
    assert "ValueError: the reason" in outcome.message and outcome.hint
    assert waiting.wait().result["arguments"] == ["behind"], "what waited behind it is not lost"
    assert ask(backend, "echo").wait().result["pid"] != first


@pytest.mark.skipif(os.name == "nt", reason="signals are of POSIX")
@pytest.mark.parametrize("idle", [True, False])
def test_a_killed_worker_is_started_again(start, idle):
    backend = start()
    first = ask(backend, "echo").wait().result["pid"]
    told = None if idle else ask(backend, "hard")
    if told:
        standins.waitUntil(lambda: told.events, 20)
    os.kill(first, signal.SIGKILL)
    if told:
        assert told.wait(10).code == "crashed"
        standins.waitUntil(lambda: gone(told.events[0]["pids"][1]) or True, 1)
    assert ask(backend, "echo").wait().result["pid"] != first


def test_a_worker_that_dies_at_once_fails_each_request_once(start):
    backend = start(sys.executable, "-c", "raise SystemExit('ModuleNotFoundError: No module named invres')")
    told = [ask(backend, "echo"), ask(backend, "echo")]
    for one in told:
        outcome = one.wait()
        assert outcome.code == "crashed" and "No module named invres" in outcome.message
    standins.pump(0.2)
    assert [len(one.outcomes) for one in told] == [1, 1] and not backend.running


def test_a_program_that_is_not_there_is_told(start, tmp_path):
    outcome = ask(start(str(tmp_path / "no python")), "echo").wait()
    assert (outcome.state, outcome.code) == ("failed", "not_started") and "no python" in outcome.message


def test_a_python_that_cannot_be_found_is_told():
    def command():
        raise FileNotFoundError("Slicer's Python (PythonSlicer) was not found.")

    backend = BackendProcess(command)
    told = ask(backend, "echo")
    outcome = told.wait()
    assert (outcome.code, outcome.message) == ("no_python", "Slicer's Python (PythonSlicer) was not found.")
    assert outcome.hint and not backend.busy


def test_a_launcher_that_does_not_pass_requests_on_is_told(start, monkeypatch):
    monkeypatch.setattr("InvResSegmentLib.BackendProcess.ANSWER_LIMIT_MS", 600)
    code = (
        "import json, os, time; print(json.dumps({'event': 'ready', 'pid': os.getpid()}), flush=True); time.sleep(60)"
    )
    backend = start(sys.executable, "-c", code)
    outcome = ask(backend, "echo").wait(10)
    assert outcome.code == "no_answer" and "separate Python" in outcome.hint and not backend.running


def test_behind_a_launcher_that_passes_nothing_on_the_real_python_is_tried(start, monkeypatch, tmp_path):
    monkeypatch.setattr("InvResSegmentLib.BackendProcess.ANSWER_LIMIT_MS", 600)
    code = (
        "import json, os, time; print(json.dumps({'event': 'ready', 'pid': os.getpid()}), flush=True); time.sleep(60)"
    )
    commands, started = [[sys.executable, "-c", code], [sys.executable, str(tmp_path / "fake.py")]], []
    start()  # writes the fake worker

    def command():
        started.append(commands[0])
        return commands[0]

    backend = BackendProcess(command, ENVIRONMENT, onDeaf=lambda: len(commands) > 1 and bool(commands.pop(0)))
    first, second = ask(backend, "echo"), ask(backend, "echo")
    standins.waitUntil(lambda: backend.pid, 30)
    deaf = backend.pid
    assert (first.wait(20).state, second.wait(20).state) == ("done", "done")
    assert len(started) == 2 and gone(deaf)
    backend.stop()


def test_a_backend_that_never_gets_ready_is_given_up(start, monkeypatch):
    monkeypatch.setattr("InvResSegmentLib.BackendProcess.START_LIMIT_MS", 500)
    backend = start(sys.executable, "-c", "import time; time.sleep(60)")
    assert ask(backend, "echo").wait(10).code == "not_started" and not backend.running


# --- cancelling and ending ------------------------------------------------------------------------------------------


def timed(call):
    begun = time.monotonic()
    result = call()
    return result, time.monotonic() - begun


def test_a_soft_cancel_keeps_the_process(start):
    backend = start()
    told = ask(backend, "soft")
    standins.waitUntil(lambda: told.events, 20)
    pid = backend.pid
    backend.cancel(told.id)
    backend.cancel(told.id)
    outcome, seconds = timed(told.wait)
    assert outcome == Outcome("cancelled") and seconds < 1.5
    assert ask(backend, "echo").wait().result["pid"] == pid
    assert len(told.outcomes) == 1


def test_a_waiting_request_is_cancelled_at_once(start):
    backend = start()
    first, second = ask(backend, "soft"), ask(backend, "echo")
    backend.cancel(second.id)
    assert second.outcomes == []
    outcome, seconds = timed(second.wait)
    assert outcome.state == "cancelled" and seconds < 0.5 and backend.busy
    backend.cancel(first.id)
    assert first.wait().state == "cancelled" and not backend.busy


@pytest.mark.skipif(os.name == "nt", reason="signals are of POSIX")
@pytest.mark.parametrize("launched", [False, True], ids=["direct", "launcher"])
@pytest.mark.parametrize("frozen", [False, True], ids=["busy", "frozen"])
def test_a_hard_cancel_ends_the_whole_tree_within_two_seconds(start, tmp_path, launched, frozen):
    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    launcher = [sys.executable, "-c", LAUNCHER] if launched else [sys.executable]
    backend = start(*launcher, str(tmp_path / "fake.py"))
    told, behind = ask(backend, "hard"), ask(backend, "echo", "behind")
    standins.waitUntil(lambda: told.events, 20)
    pids = told.events[0]["pids"]
    if frozen:
        os.kill(pids[0], signal.SIGSTOP)
    tree = descendants([backend._child._process.processId()])
    assert set(pids) <= tree and len(tree) == len(pids) + launched
    backend.cancel(told.id)
    outcome, seconds = timed(lambda: told.wait(5))
    assert outcome == Outcome("cancelled") and seconds < 2
    standins.waitUntil(lambda: all(map(gone, tree)), 2 - seconds)
    assert behind.wait().result["arguments"] == ["behind"]


def test_asking_for_a_plan_no_more_does_not_end_a_warm_backend(start):
    backend = start()
    pid = ask(backend, "echo").wait().result["pid"]
    told = ask(backend, "plan", "2")
    standins.waitUntil(lambda: told.events, 20)
    backend.cancel(told.id)
    assert told.wait(0.5).state == "cancelled" and not backend.busy
    assert ask(backend, "echo").wait().result["pid"] == pid
    killTree(told.events[0]["pids"][1:])


@pytest.mark.skipif(os.name == "nt", reason="signals are of POSIX")
def test_stop_ends_everything_and_the_next_request_starts_anew(start):
    backend = start()
    told, behind = ask(backend, "hard"), ask(backend, "echo")
    standins.waitUntil(lambda: told.events, 20)
    _, seconds = timed(backend.stop)
    assert seconds < 1 and not backend.running and not backend.busy
    assert told.outcomes == behind.outcomes == [Outcome("cancelled")]
    standins.waitUntil(lambda: all(map(gone, told.events[0]["pids"])), 2)
    assert ask(backend, "echo").wait().state == "done"


def test_killing_a_tree_spares_oneself_and_what_is_not_there():
    killTree([0, 1, os.getpid(), 2**22 - 1])
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        killTree([process.pid])
        assert process.wait(timeout=5) != 0


# --- the real backend -----------------------------------------------------------------------------------------------


def test_the_real_backend_answers_survives_its_death_and_ends_with_slicer(start, tmp_path):
    backend = start(sys.executable, "-m", "invres", "worker")
    outcome = ask(backend, "models", "list", "--models-dir", str(tmp_path)).wait()
    assert outcome.state == "done" and all(model["bundled"] for model in outcome.result["models"])
    outcome = ask(backend, "describe", "nothing").wait()
    assert outcome.state == "failed" and "There is no model 'nothing'" in outcome.message and outcome.hint
    pid = backend.pid
    assert ask(backend, "models", "list", "--models-dir", str(tmp_path)).wait().state == "done"
    assert backend.pid == pid
    os.kill(pid, signal.SIGTERM)
    standins.waitUntil(lambda: not backend.running, 10)
    assert ask(backend, "models", "list", "--models-dir", str(tmp_path)).wait().state == "done"
    pid = backend.pid
    assert pid is not None and not gone(pid)
    backend._child.closeInput()  # as when Slicer is killed
    standins.waitUntil(lambda: gone(pid), 5)
