"""`invres finetune` killed in every phase, by SIGKILL, again and again: it ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_finetuning import options, same_weights
from test_locating import saved
from tiny_datasets import BACKEND, leftovers, write_dataset

from invres import checkpoint, curves, parttraining
from invres.cases import read_dataset
from invres.checkpoint import load_checkpoint
from invres.events import Reporter
from invres.finetuning import finetune
from invres.modelpackage import open_package

LENGTH = {"epochs": 2, "iterations_per_epoch": 3, "checkpoint_every_s": 0.0}
ROUNDS = 3
PLANNED = ("begin", "begin", *["train"] * 2, *["half"] * 2, *["compare"] * 3, *["pack"] * 3)
"""Where the lives of a round end. half: in the middle of writing a checkpoint."""
MOMENTS = {"begin": 12, "train": 20, "half": 4, "compare": 8, "pack": 9}
"""Of so many moments of a phase one is drawn: an event, or just before or behind a renaming."""
LATEST_S = 0.02  # behind that moment


class _Life(Reporter):
    """Knows the phase of the run and counts its moments; ends the process at the one that was drawn."""

    def __init__(self, folder, phase, moment, delay_s):
        super().__init__()
        self.folder, self.phase, self.left, self.delay_s = folder, phase, moment, delay_s
        self.now = "begin"

    def emit(self, event):
        stage, part = event.get("stage"), event.get("part")
        if stage == "finetune.parts" and event["done"] == event["total"]:
            self.now = "pack"
        elif part:
            self.now = "compare" if stage == "finetune.compare" else "train" if stage else self.now
        self.passed(self.now)

    def passed(self, phase):
        if phase == self.phase:
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.delay_s, self.die).start() if self.delay_s else self.die()

    def die(self, phase=""):
        with open(self.folder / "deaths.txt", "a", encoding="ascii") as stream:
            stream.write(f"{phase or self.now}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, rename):
        def renamed(*paths, **more):
            self.passed(self.now)
            rename(*paths, **more)
            self.passed(self.now)

        return renamed

    def saving(self, save):
        def half_saved(state, stream):
            if self.phase == "half" and self.left == 1:
                stream.write(b"half of a checkpoint" * 500)
                stream.flush()
                self.die("half")
            self.left -= self.phase == "half"
            save(state, stream)

        return half_saved


def _live(base, data, run, phase="", moment=0, delay_s=0.0):
    """A run, or what is left of it, in a process of its own."""
    torch.set_num_threads(1)
    life = _Life(run.parent, phase, moment, delay_s)
    os.replace, os.rename = life.around(os.replace), life.around(os.rename)
    checkpoint.torch.save = life.saving(checkpoint.torch.save)
    # What takes seconds in each life and writes nothing that is resumed from.
    stubs = (
        (curves, "draw_curves", lambda folder: folder),
        (parttraining, "predict_for", lambda *_: SimpleNamespace(peak_bytes=0)),
    )
    for module, name, stub in stubs:
        assert hasattr(module, name)
        setattr(module, name, stub)
    finetune(open_package(base), read_dataset(data, checked=False), run, options(resume=True, **LENGTH), life)


def _result(run):
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
@pytest.mark.slow
def test_thirty_kills_in_every_phase_end_with_the_very_weights_of_an_undisturbed_run(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", cases=2)
    base = saved(tmp_path / "base", read_dataset(data).scheme, "MR", channels=2, spacing_mm=(3.0, 2.0, 2.0)).path
    # Forked from a process that has imported all this but computed nothing: a life costs no import. The second is
    # what torch imports at the first step of an optimizer.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, BACKEND, BACKEND.parent))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    moments, run, whole = random.Random(0), tmp_path / "run", tmp_path / "whole"

    def live(folder, *how):
        life = context.Process(target=_live, args=(base, data, folder, *how))
        life.start()
        life.join(300)
        assert life.exitcode in (0, -signal.SIGKILL), "it ends well or is killed"
        return life.exitcode

    def same_as_undisturbed():
        assert same_weights(_result(run)["model"], _result(whole)["model"])
        assert _result(run)["sentence"] == _result(whole)["sentence"]
        assert load_checkpoint(run / "final")["iteration"] == 6
        assert leftovers(run) == []

    assert live(whole) == 0
    for _ in range(ROUNDS):
        # Packing comes last, so that there is something left to do for the others.
        plan = sorted(moments.sample(PLANNED, len(PLANNED)), key=lambda phase: phase == "pack")
        for phase in plan:
            late_s = moments.choice((0.0, moments.uniform(0, LATEST_S)))
            if live(run, phase, moments.randint(1, MOMENTS[phase]), late_s) == 0:  # it had too little left to do
                same_as_undisturbed()
                shutil.rmtree(run)
        if run.exists():
            assert live(run) == 0
            same_as_undisturbed()
            shutil.rmtree(run)
    deaths = Counter((tmp_path / "deaths.txt").read_text(encoding="ascii").split())
    assert deaths.total() >= 30 and min(deaths[phase] for phase in ("train", "half", "compare", "pack")) >= 5, deaths
