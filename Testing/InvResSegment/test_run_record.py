"""RunRecord: what a run folder tells, while it is written, after a stop, a kill and the end."""

from __future__ import annotations

import json
import shutil

import pytest
from InvResSegmentLib import RunRecord as module
from InvResSegmentLib.RunHolder import isHeld
from InvResSegmentLib.RunRecord import DISCARDED, PROMOTED, RunRecord, decide, tidy
from tiny_run import at_work

PART = {"part": 2, "parts": 4}


def progress(stage, done, total, eta_s=None, **more):
    return {"event": "progress", "stage": stage, "done": done, "total": total, "eta_s": eta_s, **more}


def epoch(number, loss, part=2, **dice):
    said = {"dice": {**dice, "mean": 0.5}} if dice else {}
    return {"event": "epoch", "epoch": number, "loss": loss, "part": part, "parts": 4, **said}


@pytest.fixture
def working(tmp_path):
    """Starts a process that works in a folder and has said what is given; it is ended after the test."""
    begun = []

    def start(*events):
        begun.append(at_work(tmp_path, *events))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


def polled(folder, **more):
    record = RunRecord(folder, **more)
    record.poll()
    return record


def test_a_whole_run_is_read(finished_run):
    record = polled(finished_run)
    assert (record.state, record.fraction, record.etaS) == ("finished", 1.0, None)
    assert (record.part, record.parts) == (4, 4)
    assert sorted(record.epochs) == [1, 2, 3, 4]
    assert [one.number for one in record.epochs[1]] == [1, 2, 3]
    assert all(one.loss > 0 and 0 <= one.dice["ball"] <= 1 for one in record.epochs[1])
    assert set(record.epochs[1][0].dice) == {"ball"}, "the mean is no segment"
    assert record.measuredBytes > 0 and record.predictedBytes > 0
    assert record.result["verdict"] == record.comparison["verdict"]
    assert record.decision == {} and record.error == {}
    assert record.partShown == 3, "the last training held nobody out, so there is no Dice to see"
    assert not record.poll(), "nothing is new"


def test_reading_piece_by_piece_is_reading_at_once(finished_run, monkeypatch):
    whole = polled(finished_run)
    monkeypatch.setattr(module, "LONGEST_PIECE", 2000)
    pieces = RunRecord(finished_run)
    assert pieces.poll()
    assert (pieces.epochs, pieces.result, pieces.fraction) == (whole.epochs, whole.result, whole.fraction)


def test_a_line_that_is_half_written_waits_for_its_end(tmp_path):
    line = json.dumps({"event": "warning", "message": "one"}).encode()
    (tmp_path / "events.jsonl").write_bytes(line[:20])
    record = RunRecord(tmp_path)
    assert not record.poll() and record.warnings == []
    with open(tmp_path / "events.jsonl", "ab") as stream:
        stream.write(line[20:] + b"\n" + line)
    assert record.poll() and record.warnings == ["one"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    lines = [
        b'{"event": "warning", "mess',
        b'{"event": "started", "pid": 1}',
        b'{"event": "warning", "message": "two"}',
    ]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert polled(tmp_path).warnings == ["two"]


def test_a_process_at_work_is_told_from_one_that_was_killed(working, tmp_path):
    process = working(progress("finetune.parts", 0, 4), progress("train", 3, 9, 6.0, **PART))
    record = polled(tmp_path)
    assert isHeld(tmp_path) and record.state == "running" and record.stage == "train"
    (tmp_path / "stop").write_text("stop", encoding="utf-8")
    assert record.poll() and record.state == "stopping"
    process.kill()
    process.wait()
    (tmp_path / "stop").unlink()
    assert record.poll() and record.state == "failed" and not isHeld(tmp_path)
    assert "ended from outside" in record.error["message"] and "Resume" in record.error["hint"]


def test_looking_does_not_keep_a_process_from_beginning(working, tmp_path):
    working().kill()
    record = RunRecord(tmp_path)
    for _again in range(20):
        record.poll()
    process = working(progress("train", 0, 9, **PART))
    assert process.poll() is None
    assert record.poll() and record.state == "running"


def test_a_disk_too_full_for_the_last_event_hides_no_result(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:-1]))
    record = polled(run)
    assert record.state == "finished" and record.result["verdict"] == record.comparison["verdict"]


def test_a_stop_is_a_pause_and_a_fault_is_not(tmp_path):
    def ended(code):
        lines = [{"event": "started", "pid": 1}, {"event": "error", "code": code, "message": "m", "hint": "h"}]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
        return polled(tmp_path)

    assert ended("cancelled").state == "paused"
    failed = ended("out_of_memory")
    assert failed.state == "failed" and failed.error == {"code": "out_of_memory", "message": "m", "hint": "h"}


def test_a_run_that_goes_on_forgets_how_it_was_stopped(working, tmp_path):
    first = [
        {"time": "2026-01-01T10:00:00.000+00:00", "event": "started", "pid": 1},
        epoch(1, 0.9),
        epoch(2, 0.8),
        epoch(3, 0.7),
    ]
    first.append({"event": "error", "code": "cancelled", "message": "m", "hint": ""})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in first), encoding="utf-8")
    record = RunRecord(tmp_path)
    record.poll()
    assert record.state == "paused"
    assert polled(tmp_path, launched=True).state == "starting", "its process has been started and imports torch"
    process = working(progress("train", 2, 9, **PART), epoch(3, 0.6, ball=0.7))
    assert record.poll() and record.state == "running" and record.error == {}
    assert [one.loss for one in record.epochs[2]] == [0.9, 0.8, 0.6], "what was done again counts once"
    process.kill()
    process.wait()
    assert polled(tmp_path, launched=True).state == "failed", "the process that was started is gone already"


def test_the_bar_never_goes_back_and_the_time_is_that_of_all_trainings(working, tmp_path):
    working(
        progress("finetune.parts", 0, 4),
        progress("train", 5, 10, 30.0, part=1, parts=4),
        progress("finetune.compare", 1, 1, 0.0, part=1, parts=4),
    )
    record = polled(tmp_path)
    halfway = record.fraction
    assert 0.2 < halfway < 0.3
    working_again = [progress("prepare.cases", 0, 3), progress("train", 1, 10, 45.0, part=2, parts=4)]
    with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in working_again)
    record.poll()
    assert halfway <= record.fraction < 0.5
    assert record.etaS == pytest.approx(45 + 2 * 50)


def test_what_follows_the_trainings_has_a_state_a_share_of_the_bar_and_a_time_of_its_own(working, tmp_path):
    def say(*events):
        with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(one) + "\n" for one in events)
        record.poll()
        return record.state, record.fraction, record.etaS

    working(progress("finetune.parts", 0, 1))
    record = polled(tmp_path)
    assert record.state == "starting", "nothing heeds a wish to stop before the first training"
    assert say(progress("prepare.cases", 0, 2, part=1, parts=1))[0] == "running"
    assert say(progress("train", 5, 10, 30.0, part=1, parts=1))[2] == 30
    assert say(progress("prepare.cases", 0, 2))[0] == "running", "once begun it does not start again"
    state, trained, eta = say(progress("train", 10, 10, 0.0, part=1, parts=1), progress("finetune.parts", 1, 1))
    assert state == "finishing" and trained < 0.95 and eta is None
    state, first, eta = say(progress("finetune.compare", 1, 2, 7.0))
    assert state == "finishing" and trained < first < 0.98 and eta == 7
    _state, whole, _eta = say(progress("finetune.compare", 2, 2, 0.0))
    _state, second, _eta = say(progress("finetune.compare", 1, 4, 3.0))  # of the base model's own cases
    assert first < whole < second < 1
    (tmp_path / "stop").write_text("stop", encoding="utf-8")
    assert record.poll() and record.state == "stopping"


def test_a_training_that_was_asked_to_end_is_compared_and_tells_no_old_time(working, tmp_path):
    working(progress("finetune.parts", 0, 4), progress("train", 3, 9, 600.0, **PART))
    (tmp_path / "stop").write_text("keep-best", encoding="utf-8")
    record = polled(tmp_path)
    assert record.state == "stopping" and record.keepsBest
    with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(progress("finetune.compare", 0, 1, **PART)) + "\n")
    record.poll()
    assert record.state == "finishing" and record.etaS is None


def test_a_decided_run_keeps_of_its_crops_what_its_proof_shows(tmp_path):
    crops = tmp_path / "run" / "crops"
    crops.mkdir(parents=True)
    for name in ("a_image.nrrd", "a_label.nrrd", "b_image.nrrd"):
        (crops / name).write_bytes(b"of a patient")
    files = {"images": [str(crops / "a_image.nrrd")], "reference": str(crops / "a_label.nrrd")}
    (tmp_path / "run" / "comparison.json").write_text(json.dumps({"cases": [{"files": files}]}), encoding="utf-8")
    decide(tmp_path / "run", DISCARDED)
    tidy(tmp_path / "run")
    assert sorted(path.name for path in crops.iterdir()) == ["a_image.nrrd", "a_label.nrrd"]


def test_a_run_that_never_begins_is_told(tmp_path, monkeypatch):
    assert polled(tmp_path).state == "starting"
    monkeypatch.setattr(module, "START_LIMIT_S", 0)
    record = polled(tmp_path)
    assert record.state == "failed" and "did not begin" in record.error["message"]


def test_a_decision_outlives_the_record(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    decide(run, PROMOTED, model="/models/one")
    decision = polled(run).decision
    assert (decision["decision"], decision["model"]) == (PROMOTED, "/models/one")
    assert sorted(path.name for path in run.glob(".*")) == []
