"""A fine-tuning as a process of its own: detached, told of its end in words, found again, deleted as a whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from InvResSegmentLib.FineTuneRun import FineTuneRun, newRunFolder, runsIn, secondsPerStep
from InvResSegmentLib.RunHolder import startOf
from InvResSegmentLib.RunOptions import DROPOUT, PATIENCE, RunOptions, proofSentence
from InvResSegmentLib.RunRecord import DISCARDED, decide, tidy

from invres import cli, tuningplan

MODULE = Path(__file__).resolve().parents[2] / "InvResSegment"
SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def begun(folder: Path, program: str, arguments=("finetune",), **record) -> FineTuneRun:
    folder.mkdir(parents=True)
    run = FineTuneRun.begin(folder, {"arguments": list(arguments), **record})
    run.launch([sys.executable, "-c", program], dict(os.environ))
    return run


def test_the_options_are_a_command_line_that_the_backend_takes(tmp_path):
    options = RunOptions(90, 3, "lowest", "encoder", 0.5, False, 3e-4, "mine", str(tmp_path), "cpu", 7, DROPOUT)
    parsed = cli._parser().parse_args(options.arguments("model", "data", "run"))
    assert (parsed.time, parsed.epochs, parsed.memory, parsed.freeze) == ("5400s", 3, "lowest", "encoder")
    assert (parsed.synthetic, parsed.vae, parsed.lr, parsed.name) == (0.5, False, 3e-4, "mine")
    assert (parsed.check_base, parsed.device, parsed.resume) == (tmp_path, "cpu", False)
    assert (parsed.patience, parsed.channel_dropout) == (7, DROPOUT)
    assert parsed.new_labels, "a person has said what each name stands for"
    assert tuningplan.DEFAULTS.early_stop_epochs == PATIENCE, "what the panel shows is what is done"
    plain = cli._parser().parse_args(RunOptions(minutes=0).arguments("model", "data", "run"))
    assert (plain.patience, plain.channel_dropout) == (None, None)
    assert (plain.time, plain.epochs, plain.vae, plain.lr, plain.check_base) == (None, None, None, None, None)
    planned = cli._parser().parse_args(options.planArguments("model"))
    assert planned.training and planned.memory == "lowest" and planned.vae is False


@pytest.mark.parametrize("patients, held, words", [(1, 0, "nothing"), (4, 0, "5 trainings"), (9, 0, "6 trainings")])
def test_how_the_proof_will_be_is_said_before(patients, held, words):
    assert words in proofSentence(patients, held)
    assert "Held out for the proof: 3" in proofSentence(patients, 3) and "quarter" in proofSentence(11, 0)


def test_a_run_outlives_the_process_that_began_it(tmp_path):
    program = f"""
import sys, types
sys.path.insert(0, {str(MODULE)!r})
sys.modules["slicer"], i18n = types.ModuleType("slicer"), types.ModuleType("slicer.i18n")
i18n.tr = str
sys.modules["slicer.i18n"] = i18n
import os
from pathlib import Path
from InvResSegmentLib.FineTuneRun import FineTuneRun
folder = Path({str(tmp_path / "run")!r})
folder.mkdir()
run = FineTuneRun.begin(folder, {{"arguments": ["finetune"]}})
run.launch([sys.executable, "-c", {SLEEPER!r}], dict(os.environ, MARK="kept"))
print(run._process.pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    try:
        wait(lambda: (tmp_path / "run" / "stdout.jsonl").read_text() == "up\n")
        if os.name != "nt":
            assert os.getsid(pid) == pid, "a session of its own, which no closing of a window or terminal ends"
    finally:
        os.kill(pid, 9)


def test_its_end_is_told_with_its_last_words(tmp_path):
    event = json.dumps({"event": "error", "code": "x", "message": "There is no model.", "hint": "Choose one."})
    told = begun(tmp_path / "told", f"print({event!r}); raise SystemExit(2)")
    crashed = begun(tmp_path / "crashed", "import sys; sys.stderr.write('noise\\nRuntimeError: it broke\\n\\n'); 1 / 0")
    silent = begun(tmp_path / "silent", "import os; os._exit(7)")
    good = begun(tmp_path / "good", 'print(\'{"event": "result"}\')')
    wait(lambda: not any(run.active for run in (told, crashed, silent, good)))
    assert told.failure() == ("There is no model.", "Choose one.")
    assert "ZeroDivisionError" in crashed.failure()[0]
    assert "code 7" in silent.failure()[0]
    assert good.failure() == ("", "")
    assert FineTuneRun(tmp_path / "crashed").failure() == crashed.failure(), "another Slicer knows it, too"


def test_a_run_is_resumed_with_what_it_was_begun_with(tmp_path):
    run = begun(tmp_path / "a", "import sys, json; print(json.dumps(sys.argv[1:]))", ("finetune", "--epochs", "2"))
    output = tmp_path / "a" / "stdout.jsonl"
    wait(lambda: not run.active)
    assert json.loads(output.read_text()) == ["finetune", "--epochs", "2", "--json"]
    run.pause()
    assert (tmp_path / "a" / "stop").read_text() == "stop"
    run.keepBest()
    assert (tmp_path / "a" / "stop").read_text() == "keep-best"
    again = FineTuneRun(tmp_path / "a")
    again.launch(
        [sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))"], dict(os.environ), resume=True
    )
    wait(lambda: not again.active)
    assert json.loads(output.read_text()) == ["finetune", "--epochs", "2", "--resume", "--json"]
    assert (tmp_path / "a" / "stop").read_text() == "keep-best", "that is decided, whatever came between"
    again.pause()
    again.launch([sys.executable, "-c", ""], dict(os.environ), resume=True)
    wait(lambda: not again.active)
    assert not (tmp_path / "a" / "stop").exists()


def test_a_run_goes_on_with_the_device_that_there_is_now(tmp_path):
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    run = begun(tmp_path / "a", program, ("finetune", "--device", "cuda:1", "--epochs", "2"))
    wait(lambda: not run.active)
    run.launch([sys.executable, "-c", program], dict(os.environ), "cpu", resume=True)
    wait(lambda: not run.active)
    words = json.loads((tmp_path / "a" / "stdout.jsonl").read_text())
    assert words == ["finetune", "--device", "cpu", "--epochs", "2", "--resume", "--json"]


def test_deleting_a_run_ends_it_and_leaves_nothing(tmp_path):
    run = begun(tmp_path / "runs" / "a", SLEEPER)
    assert run.active
    run.discard()
    assert not run.active and not (tmp_path / "runs" / "a").exists()
    wait(lambda: not list((tmp_path / "runs").iterdir()))


@pytest.mark.skipif(os.name == "nt", reason="flock")
@pytest.mark.parametrize("said", ["nothing", "another start", "its start"])
def test_deleting_a_run_kills_only_the_process_that_its_lock_surely_names(tmp_path, said):
    program = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
print("up", flush=True)
time.sleep(60)
"""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    FineTuneRun.begin(folder, {"arguments": ["finetune"]})
    command = [sys.executable, "-c", program, str(folder / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"up\n"
        began = {"nothing": "", "another start": "\n1000.5", "its start": f"\n{startOf(process.pid)}"}[said]
        (folder / "lock").write_text(f"{process.pid}{began}")
        run = FineTuneRun(folder)  # found by another Slicer than the one that began it
        if said == "its start":
            run.discard()
            assert process.wait(10) < 0 and not folder.exists()
            return
        with pytest.raises(OSError, match="still at work"):
            run.discard()
        assert process.poll() is None and (folder / "stop").read_text() == "stop"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nobody_waits_for_gigabytes_to_be_deleted(tmp_path, monkeypatch):
    removed = shutil.rmtree

    def slow(path, **options):
        time.sleep(0.5)
        removed(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    for name in (".gone-0", ".gone-1", "a"):
        (tmp_path / "runs" / name / "prepared").mkdir(parents=True)
    begun_at = time.monotonic()
    newRunFolder(tmp_path / "runs", "m")
    tidy(tmp_path / "runs" / "a")
    assert time.monotonic() - begun_at < 0.4 and not (tmp_path / "runs" / "a" / "prepared").exists()
    wait(lambda: [path.name for path in (tmp_path / "runs").iterdir()] == ["a"])


def test_runs_are_found_the_newest_first_and_behind_them_those_that_are_decided_on(tmp_path):
    folders = []
    for index in range(3):
        folder = newRunFolder(tmp_path / "runs", "Größe: 1/2")
        folder.mkdir()
        FineTuneRun.begin(folder, {"arguments": ["finetune"], "created": f"2026-01-0{index + 1}", "model": "m"})
        folders.append(folder)
    assert len(set(folders)) == 3 and all(folder.name.isascii() for folder in folders)
    (tmp_path / "runs" / "something else").mkdir()
    shutil.copytree(folders[0], tmp_path / "runs" / ".gone-0")  # being deleted
    assert [run.folder for run in runsIn(tmp_path / "runs")] == folders[::-1]
    assert runsIn(tmp_path / "runs")[0].title.startswith("m, 2026-01-03")
    decide(folders[2], DISCARDED)
    found = runsIn(tmp_path / "runs")
    assert [run.folder for run in found] == [folders[1], folders[0], folders[2]]
    assert [run.decision for run in found] == ["", "", DISCARDED]
    assert runsIn(tmp_path / "nowhere") == []


def test_the_time_of_a_step_is_that_of_the_last_run_of_the_same_kind(tmp_path):
    for index, (memory, seconds) in enumerate((("low", 10), ("low", 30), ("lowest", 90))):
        folder = tmp_path / str(index)
        folder.mkdir()
        FineTuneRun.begin(folder, {"arguments": ["x"], "memory": memory, "created": f"2026-01-0{index + 1}"})
        (folder / "result.json").write_text(json.dumps({"training": {"iterations": 100, "seconds": seconds}}))
    assert secondsPerStep(tmp_path, {"memory": "low"}) == 0.3
    assert secondsPerStep(tmp_path, {"memory": "low", "device": "cpu"}) is None
