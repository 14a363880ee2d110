"""The worker as a real process: the protocol, the warm network, cancelling, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny_datasets import BACKEND, GRIDS, leftovers, phantom

from invres import __version__
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.volume import read_geometry, write_volume

SCHEME = LabelScheme((Label("upper", (1,), 1), Label("lower", (2,), 2), Label("core", (3,), 3)))
WITHOUT_PACKAGES = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "scipy", "skimage", "SimpleITK", "safetensors", "psutil", "monai", "memcnn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""  # noqa: E501


def save(path, seed, name):
    torch.manual_seed(seed)
    network = build(NetworkConfig(channels=(4, 16), out_channels=4))
    return save_package(
        path,
        name=name,
        network=network.config,
        state_dict=network.state_dict(),
        plan=PreparationPlan((ChannelPlan("T1"),), (2.5, 1.1, 0.8)),
        scheme=SCHEME,
        patch=(16, 16, 16),
    )


class Worker:
    """A worker and its events, each read when it comes."""

    def __init__(self, code="from invres.cli import main; main(['worker'])", **options):
        environment = {**os.environ, "PYTHONPATH": str(BACKEND), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, env=environment, **pipes, **options)
        self.events: queue.Queue = queue.Queue()
        self.errors: list[bytes] = []
        readers = (self._read, lambda: self.errors.extend(self.process.stderr))
        self.threads = [threading.Thread(target=read, daemon=True) for read in readers]
        for thread in self.threads:
            thread.start()

    def _read(self):
        for line in self.process.stdout:
            self.events.put(json.loads(line))

    def end(self):
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):  # what a request has left running holds the pipes open
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join(timeout=5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def send(self, message):
        self.write(json.dumps(message).encode())

    def write(self, line):
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def until(self, stop, timeout=120):
        """Events up to and with the first for which stop(event) is true."""
        events, end = [], time.monotonic() + timeout
        while not (events and stop(events[-1])):
            events.append(self.events.get(timeout=max(0.01, end - time.monotonic())))
        return events

    def run(self, identity, *arguments):
        """One request to its end: its events."""
        self.send({"id": identity, "arguments": [str(argument) for argument in arguments]})
        return self.finished(identity)

    def finished(self, identity):
        events = self.until(lambda event: event["event"] == "finished" and event["id"] == identity)
        return [event for event in events if event.get("id") == identity]


@pytest.fixture
def start():
    workers = []

    def begin(*arguments, **options):
        workers.append(Worker(*arguments, **options))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.end()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place ünï")
    save(folder / "model", 1, "One")
    save(folder / "other", 2, "Two")
    images, _ = phantom(GRIDS[0])
    write_volume(folder / "t1.nrrd", images[0])
    return folder


def segmenting(place, output, model="model", *more):
    return ("segment", "--model", place / model, "--input", f"T1={place / 't1.nrrd'}", "--output", output, *more)


def kinds(events):
    return [event["event"] for event in events]


def stages(events):
    return {event["stage"] for event in events if event["event"] == "progress"}


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


def test_a_second_segmentation_loads_neither_torch_nor_the_model(start, place, tmp_path):
    worker = start()
    ready = worker.until(lambda event: event["event"] == "ready")[0]
    version = ".".join(map(str, sys.version_info[:3]))
    assert ready == {"event": "ready", "pid": worker.process.pid, "version": __version__, "python": version}
    first = worker.run(1, *segmenting(place, tmp_path / "one.seg.nrrd"))
    second = worker.run(2, *segmenting(place, tmp_path / "two.seg.nrrd"))
    third = worker.run(3, *segmenting(place, tmp_path / "three.seg.nrrd", "other"))
    assert kinds(first)[0] == "accepted" and kinds(first)[-2:] == ["result", "finished"]
    assert [events[-1]["exit_code"] for events in (first, second, third)] == [0, 0, 0]
    assert "segment.load" in stages(first) and "segment.load" in stages(third)
    assert "segment.load" not in stages(second) and {"segment.tiles", "segment.write"} <= stages(second)
    assert second[-2]["seconds"]["load"] < 0.5
    assert (tmp_path / "one.seg.nrrd").read_bytes() == (tmp_path / "two.seg.nrrd").read_bytes()
    assert second[-2]["model_sha256"] == first[-2]["model_sha256"] != third[-2]["model_sha256"]
    assert worker.process.poll() is None
    worker.process.stdin.close()
    assert worker.process.wait(timeout=5) == 0


def test_what_is_no_request_is_told_and_survived(start):
    worker = start()
    for line in (
        b"garbage",
        b"[1]",
        b"42",
        b"{}",
        b'{"id": "x", "arguments": []}',
        b'{"id": 1, "arguments": [1]}',
        b'{"id": Infinity, "arguments": ["devices"]}',
        b'{"cancel": 1e400}',
        b"\xff",
    ):
        worker.write(line)
        event = worker.until(lambda event: event["event"] == "error")[-1]
        assert event["code"] == "protocol" and "id" not in event
    worker.write(b"")
    assert worker.run(1, "models", "list")[-1]["exit_code"] == 0
    assert worker.run(2, "segment")[-2]["code"] == "usage"
    assert worker.run(3, "worker")[-2]["code"] == "usage"
    assert worker.run(4, "--version")[-1]["exit_code"] == 0
    assert worker.run(5, "describe", "nothing of this name")[-1]["exit_code"] == 2


def test_what_libraries_print_does_not_reach_the_protocol(start):
    code = (
        "import os, sys, invres.commands as commands\n"
        "def devices(options, report):\n"
        "    print('printed'); os.write(1, b'written below Python\\n')\n"
        "    assert sys.stdin.read() == ''\n"
        "    report.result(fine=True)\n"
        "commands.devices = devices\n"
        "from invres.cli import main; main(['worker'])"
    )
    worker = start(code)
    assert kinds(worker.run(1, "devices")) == ["accepted", "result", "finished"]
    worker.process.stdin.close()
    worker.process.wait(timeout=5)
    time.sleep(0.1)
    assert b"printed" in b"".join(worker.errors) and b"written below Python" in b"".join(worker.errors)


SLOW = (
    "import subprocess, sys, time, invres.commands as commands\n"
    "def devices(options, report):\n"
    "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "    report.note('begun', child=child.pid)\n"
    "    for step in range(1000):\n"
    "        report.progress('slow', step, 1000); time.sleep({pause})\n"
    "commands.devices = devices\n"
    "from invres.cli import main; main(['worker'])"
)


def test_a_running_request_is_cancelled_at_its_next_progress_and_a_waiting_one_dropped(start):
    worker = start(SLOW.replace("{pause}", "0.02"))
    worker.send({"id": 1, "arguments": ["devices"]})
    worker.send({"id": 2, "arguments": ["models", "list"]})
    worker.send({"id": 3, "arguments": ["models", "list"]})
    worker.until(lambda event: event["event"] == "progress")
    worker.send({"cancel": 2})
    worker.send({"cancel": 1})
    worker.send({"cancel": 99})
    begun = time.monotonic()
    events = worker.until(lambda event: event["event"] == "finished" and event["id"] == 3)
    assert time.monotonic() - begun < 3
    ends = {event["id"]: event["exit_code"] for event in events if event["event"] == "finished"}
    assert ends == {1: 130, 2: 130, 3: 0}
    assert [e["code"] for e in events if e["event"] == "error"] == ["cancelled", "cancelled"]


def test_a_cancelled_segmentation_leaves_nothing_and_keeps_the_network(start, place, tmp_path):
    worker = start()
    worker.run(1, *segmenting(place, tmp_path / "one.seg.nrrd"))
    worker.send(
        {"id": 2, "arguments": [*map(str, segmenting(place, tmp_path / "two.seg.nrrd", "model", "--overlap", "0.9"))]}
    )
    worker.until(lambda event: event.get("stage") == "segment.tiles" and event["done"] > 0)
    worker.send({"cancel": 2})
    assert worker.finished(2)[-1]["exit_code"] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["one.seg.nrrd"] and leftovers(tmp_path) == []
    assert "segment.load" not in stages(worker.run(3, *segmenting(place, tmp_path / "three.seg.nrrd")))


def test_a_verb_that_listens_for_the_signal_is_told_by_it(start):
    """Training saves and ends by itself; it must not be torn out of a progress report."""
    code = (
        "import time, invres.commands as commands\n"
        "from invres import Cancelled\n"
        "from invres.trainer import StopRequest\n"
        "def devices(options, report):\n"
        "    with StopRequest().listening() as stop:\n"
        "        while not stop.requested:\n"
        "            report.progress('train', 0, 1); time.sleep(0.02)\n"
        "    report.note('saved'); raise Cancelled()\n"
        "commands.devices = devices\n"
        "from invres.cli import main; main(['worker'])"
    )
    worker = start(code)
    worker.send({"id": 1, "arguments": ["devices"]})
    worker.until(lambda event: event["event"] == "progress")
    worker.send({"cancel": 1})
    events = worker.finished(1)
    assert [e["event"] for e in events if e["event"] != "progress"] == ["note", "error", "finished"]
    assert events[-1]["exit_code"] == 130


@pytest.mark.parametrize("pause", ["0.02", "30"])
def test_it_ends_with_its_stdin_also_in_the_middle_of_a_request(start, pause):
    worker = start(SLOW.replace("{pause}", pause))
    worker.send({"id": 1, "arguments": ["devices"]})
    child = worker.until(lambda event: event["event"] == "note")[-1]["child"]
    worker.process.stdin.close()
    begun = time.monotonic()
    worker.process.wait(timeout=5)
    while not gone(child):
        assert time.monotonic() - begun < 2
        time.sleep(0.02)
    assert time.monotonic() - begun < 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are of POSIX")
def test_all_that_it_has_started_ends_with_its_group(start):
    worker = start(SLOW.replace("{pause}", "30"))
    pid = worker.until(lambda event: event["event"] == "ready")[0]["pid"]
    worker.send({"id": 1, "arguments": ["devices"]})
    child = worker.until(lambda event: event["event"] == "note")[-1]["child"]
    assert os.getpgid(pid) == os.getpgid(child) == pid != os.getpgrp()
    os.kill(pid, signal.SIGSTOP)
    os.killpg(pid, signal.SIGKILL)
    worker.process.wait(timeout=2)
    end = time.monotonic() + 2
    while not gone(child):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_catalogue_devices_and_description_need_no_package(start, place, tmp_path):
    worker = start(WITHOUT_PACKAGES + "from invres.cli import main; main(['worker'])")
    own = tmp_path / "Models"
    listed = worker.run(1, "models", "list", "--models-dir", place)[-2]["models"]
    assert [model["manifest"]["name"] for model in listed if not model["bundled"]] == ["One", "Two"]
    described = worker.run(2, "describe", place / "model")[-2]
    assert described["manifest"]["scheme"]["labels"][2]["name"] == "core" and described["bundled"] is False
    devices = worker.run(3, "devices")[-2]
    assert [device["name"] for device in devices["devices"]] == ["cpu"] == [devices["auto"]] and devices["torch"] == ""
    imported = worker.run(4, "models", "import", place / "model", "--models-dir", own)[-2]["path"]
    assert worker.run(5, "models", "verify", imported)[-2]["thorough"] is False
    assert worker.run(6, "models", "export", imported, "--output", tmp_path / "one.invres")[-1]["exit_code"] == 0
    assert worker.run(7, "models", "delete", imported, "--models-dir", own)[-1]["exit_code"] == 0
    assert list(own.iterdir()) == []
    error = worker.run(8, *segmenting(place, tmp_path / "o.seg.nrrd"))[-2]
    assert error["code"] == "missing_package" and "torch is not installed" in error["message"] and error["hint"]
    assert worker.run(9, "plan", "--model", place / "model", "--shape", 9, 9, 9, "--spacing", 1, 1, 1)[-2]["code"] == (
        "missing_package"
    )


def test_devices_are_listed_with_their_memory(start):
    result = start().run(1, "devices")[-2]
    assert result["torch"] == torch.__version__ and result["auto"] == result["devices"][0]["name"]
    cpu = result["devices"][-1]
    assert cpu["name"] == "cpu" and 0 < cpu["free_bytes"] <= cpu["total_bytes"]


def test_the_geometry_of_a_non_ascii_path_survives(start, place, tmp_path):
    output = tmp_path / "Übung 日本" / ("long" * 40) / "ö.seg.nrrd"
    result = start().run(1, *segmenting(place, output))[-2]
    assert result["output"] == str(output)
    assert read_geometry(output).same_as(read_geometry(place / "t1.nrrd"))
