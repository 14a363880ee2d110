"""Ending a fine-tuning early with what there is: what is kept, what its proof is of, and that it stays decided."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_finetuning import told, tune
from test_locating import saved
from tiny_datasets import leftovers

from invres import InvresError, objectives, parttraining
from invres.cases import read_dataset
from invres.events import Recorder
from invres.modelpackage import verify_package
from invres.stopfile import StopFile

COMPLETE = 4  # steps of a training here


@pytest.fixture(scope="module")
def base(phantoms, tmp_path_factory):
    scheme = read_dataset(phantoms).scheme
    path = tmp_path_factory.mktemp("base") / "Phantom"
    return saved(path, scheme, "MR", channels=2, spacing_mm=(3.0, 2.0, 2.0))


@pytest.fixture(autouse=True)
def without_forecast(monkeypatch):
    monkeypatch.setattr(parttraining, "predict_for", lambda *_: SimpleNamespace(peak_bytes=0))


class When(Recorder):
    """Writes a word into the stop file when a training of the run comes to a stage, or to a step of it."""

    def __init__(self, run, word, part, stage, iteration=None):
        super().__init__()
        self.file, self.word, self.moment = run / "stop", word, (part, stage, iteration)

    def emit(self, event):
        super().emit(event)
        if (event.get("part"), event.get("stage"), event.get("iteration")) == self.moment:
            self.file.write_text(self.word, encoding="utf-8")
            self.moment = None


def run_of(base, data, run, report, stop=None, **wishes):
    result = tune(base, data, run, report, stop, epochs=2, **wishes)
    proof = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    return result, proof


@pytest.mark.parametrize(
    ("part", "stage", "iteration", "kept", "of"),
    [
        (1, "train", 2, 0, "model"),
        (2, "prepare.cases", None, 0, "model"),
        (3, "train", 1, 1, "model and trainings of the same kind on other cases"),
        (4, "train", 1, 2, "model and trainings of the same kind on other cases"),
    ],
)
def test_the_longest_training_is_kept_with_the_proof_that_there_is_of_it(
    base, phantoms, tmp_path, part, stage, iteration, kept, of
):
    run = tmp_path / "run"
    report = When(run, "keep-best", part, stage, iteration)
    result, proof = run_of(base, phantoms, run, report)
    cut = part == 1 and stage == "train"
    assert result["training"]["iterations"] == (iteration if cut else COMPLETE)
    assert result["training"]["training_cases"] == 2
    package = verify_package(result["model"])
    log = (run / f"fold{kept}" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (package.path / "training.jsonl").read_text(encoding="utf-8") == log
    plan = json.loads((run / "run.json").read_text(encoding="utf-8"))["parts"]
    assert {one["case"] for one in proof["cases"]} == {one["held_out"][0] for one in plan[: kept + 1]}
    assert proof["of"] == of and proof["held_out"]
    if of == "model":
        assert not {one["case"] for one in proof["cases"]} & set(plan[kept]["train"])
    assert f"Ended as asked: {kept + 1} of 4 trainings are done." in told(report, "note")
    assert not (run / "stop").exists() and leftovers(run) == []


def test_before_the_first_step_there_is_nothing_to_keep_and_the_run_goes_on(base, phantoms, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InvresError, match="before its first step") as caught:
        run_of(base, phantoms, run, When(run, "keep-best", 1, "prepare.cases"))
    assert caught.value.code == "nothing_to_keep" and not (run / "stop").exists()
    result, proof = run_of(base, phantoms, run, Recorder(), resume=True)
    assert proof["n_cases"] == 3 and result["training"]["training_cases"] == 3


def test_a_stop_after_the_best_was_to_be_kept_does_not_undo_that(tmp_path):
    stop, file = StopFile(tmp_path), tmp_path / "stop"
    file.write_text("keep-best", encoding="utf-8")
    assert stop.finish
    file.write_text("stop", encoding="utf-8")
    assert stop.finish and stop.requested
    stop.clear(also_keep_best=False)
    assert StopFile(tmp_path).finish and not StopFile(tmp_path).requested, "whoever goes on finds it"
    stop.clear()
    assert not stop.finish and not file.exists()


def test_what_memory_a_training_lacked_that_is_not_kept_does_not_spoil_the_one_that_is(
    base, phantoms, tmp_path, monkeypatch
):
    real, steps, run = objectives.training_step, [], tmp_path / "run"

    def step(network, optimizer, image, *rest):
        steps.append(image.shape)
        if len(steps) > COMPLETE and image[0, 0].numel() * image.shape[0] > 16**3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(network, optimizer, image, *rest)

    monkeypatch.setattr(objectives, "training_step", step)
    tuned, _ = run_of(base, phantoms, run, When(run, "keep-best", 2, "train", 1), vae=True, patch=[16, 16, 24])
    assert tuned["training"]["iterations"] == COMPLETE and tuned["reductions"]
    verify_package(tuned["model"])


def test_half_written_stop_files_are_not_heeded(tmp_path):
    stop = StopFile(tmp_path)
    for text in ("", "keep", "st", "\x00"):
        (tmp_path / "stop").write_text(text, encoding="utf-8")
        assert not stop.requested and not stop.finish
    (tmp_path / "stop").write_bytes(b"\xff\xfe")
    assert not stop.requested and not stop.finish
    (tmp_path / "stop").write_text("keep-best\n", encoding="utf-8")
    assert stop.finish and not stop.requested
    stop.clear(also_keep_best=False)
    assert stop.finish
    stop.clear()
    assert not (tmp_path / "stop").exists()
