"""Nothing asks for the network: training, segmenting and the rest, watched by Python itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny_datasets import BACKEND, write_dataset, write_recipe

from invres.cases import read_dataset

# Python tells of each look at a name or address, whoever makes it, and an exception here ends that.
WATCHED = """
import socket, sys
def watch(event, arguments):
    named = event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
    if named or event == "socket.connect" and arguments[0].family != getattr(socket, "AF_UNIX", None):
        print("asked for the network:", event, arguments, file=sys.stderr)
        raise SystemExit(77)
sys.addaudithook(watch)
"""
RUN = """
import json
from invres.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


def watched(code: str, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request; urllib.request.urlopen('http://example.invalid')",
        "socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_the_watch_sees_a_look_at_the_network(code):
    found = watched(WATCHED + code)
    assert found.returncode == 77 and "asked for the network" in found.stderr


def test_training_and_segmenting_ask_for_no_network(tmp_path):
    data = write_dataset(tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.json", iterations_per_epoch=1, epochs=1)
    run, case = tmp_path / "run", next(iter(read_dataset(data).cases))
    inputs = [f"--input={name}={path}" for name, path in zip(("T1", "T2"), case.images, strict=True)]
    lines = (
        ("check", "--data", data),
        ("train", "--data", data, "--recipe", recipe, "--output", run, "--device", "cpu"),
        ("segment", "--model", run / "model", *inputs, "--output", tmp_path / "out.seg.nrrd", "--device", "cpu"),
        ("models", "list"),
    )
    found = watched(WATCHED + RUN, json.dumps([list(map(str, words)) for words in lines]))
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "out.seg.nrrd").is_file()
