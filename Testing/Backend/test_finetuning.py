"""`invres finetune`: from one case up, across labels and channels, with proof, and through every interruption."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from tiny_datasets import files_up_to, invres, leftovers, start_process, tiny_recipe, write_dataset, write_recipe

from invres import Cancelled, InvresError, OutOfMemory, finetuning, objectives, parttraining, proof, tuningplan
from invres.cases import read_dataset
from invres.checkpoint import load_checkpoint
from invres.config import Recipe
from invres.configjson import to_dict
from invres.events import Recorder
from invres.finetuning import finetune
from invres.fingerprints import fingerprints
from invres.inference import load_network, segment
from invres.memory import has_room
from invres.modelpackage import find_package, import_package, open_package, save_package, verify_package
from invres.networkconfig import VAEConfig
from invres.networks import build, with_patch
from invres.preprocessing import make_plan
from invres.reduction import lighter
from invres.runfolder import RecordingReporter, held
from invres.stopfile import StopFile
from invres.trainer import StopRequest
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.tuningplan import TuningOptions, merged_scheme, plan_tuning, prepare_readable, read_plan, write_plan
from invres.volume import Volume, read_channels, read_volume, write_channels, write_volume

QUICK = {"epochs": 1, "iterations_per_epoch": 2}


@pytest.fixture(scope="module")
def base(phantoms, tmp_path_factory):
    """A model that knows the phantoms a little."""
    recipe = dataclasses.replace(tiny_recipe(iterations_per_epoch=20, epochs=2), name="Phantom")
    return train(read_dataset(phantoms), recipe, tmp_path_factory.mktemp("base"), TrainOptions(device="cpu"))


@pytest.fixture(autouse=True)
def without_forecast(monkeypatch):
    """The forecast of memory takes seconds a run; `tuned` has it, and `test_memory` is about it."""
    monkeypatch.setattr(parttraining, "predict_for", lambda *_: SimpleNamespace(peak_bytes=0))


def options(**wishes):
    settings = {
        key: wishes.pop(key) for key in list(wishes) if key in {f.name for f in dataclasses.fields(TuningOptions)}
    }
    recipe = settings.pop("recipe", None) or tiny_recipe(**{**QUICK, **wishes})
    return TuningOptions(device="cpu", recipe=recipe, **settings)


def tune(base, data, output, report=None, stop=None, **wishes):
    chosen = options(**wishes)
    return finetune(base, read_dataset(data, checked=False), output, chosen, report or Recorder(), stop)


def told(report, kind="warning"):
    return [event["message"] for event in report.events if event["event"] == kind]


def same_weights(one, other):
    first, second = (open_package(path).load_weights() for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- what a fine-tuning leaves -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(base, phantoms, tmp_path_factory):
    run, report = tmp_path_factory.mktemp("tuned") / "run", Recorder()
    return run, tune(base, phantoms, run, report, epochs=2), report


def test_three_cases_are_each_held_out_once_and_a_version_is_made_of_all(base, tuned):
    run, result, report = tuned
    folder = run / ("model" if result["promoted"] else "candidate")
    package = verify_package(folder)
    assert str(package.path) == result["model"]
    manifest = package.manifest
    assert (manifest.parent, manifest.name, manifest.version) == (base.id, "Phantom", "1.1.0")
    assert set(manifest.expected.volumes_ml) == set(manifest.scheme.names)
    content = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    surest = [one["confidence"] for one in content["cases"]]
    assert len(surest) == 3 and 0 < min(surest) == pytest.approx(manifest.expected.confidence, abs=1e-4)
    assert manifest.training.training_cases == 3 and manifest.training.validation_cases == 3
    assert manifest.metrics["upper"]["Dice"]["n"] == 3
    assert "patient0" not in (folder / "manifest.json").read_text(encoding="utf-8"), "no identity leaves with the model"
    assert {event["part"] for event in report.events if event["event"] == "epoch"} == {1, 2, 3, 4}
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [event for event in report.events if event["event"] == "epoch" and event["part"] == 4]
    assert [entry["loss"] for entry in log] == [event["loss"] for event in last]
    assert leftovers(run) == []
    (predicted,) = [event["predicted_bytes"] for event in report.events if "predicted_bytes" in event]
    measured = [event["measured_bytes"] for event in report.events if "measured_bytes" in event]
    assert len(measured) == 4 + 8, "in the second step of each training, and at the end of each epoch"
    assert all(value == pytest.approx(predicted, rel=0.3) for value in measured)
    assert not same_weights(folder, base.path)


def test_cases_that_the_base_model_has_learned_from_are_told(base, phantoms, tuned, tmp_path):
    run, result, _ = tuned
    data = read_dataset(phantoms)
    learned = {name: fingerprints(data.load(data.case(name))[0]) for name in ("patient00", "patient01", "patient02")}
    known = [name for name, images in learned.items() if {*images} <= {*base.manifest.trained_on}]
    assert len(known) == 2, "one was held out from the base model"
    proof = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    assert sorted(one["case"] for one in proof["cases"] if one["base_knows"]) == sorted(known)
    assert "The base model was itself trained on 2 of these 3 cases, which flatters it (" in result["sentence"]
    package = open_package(result["model"])
    assert {*package.manifest.trained_on} == {image for images in learned.values() for image in images}
    stranger = write_dataset(tmp_path / "other", cases=2)
    for path in (stranger / "imagesTr").iterdir():
        volume = read_volume(path)
        write_volume(path, Volume(volume.array + 1, volume.geometry))
    again = tune(package, stranger, tmp_path / "run")
    assert "flatters" not in again["sentence"]
    assert {*package.manifest.trained_on} < {*open_package(again["model"]).manifest.trained_on}, "none is forgotten"


def test_a_run_of_several_trainings_says_once_that_there_are_no_curves(base, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("invres.curves.draw_curves", lambda folder: None)
    report = Recorder()
    tune(base, phantoms, tmp_path / "run", report)
    assert {event["part"] for event in report.events if event["event"] == "epoch"} == {1, 2, 3, 4}
    assert len([message for message in told(report, "note") if "`pip install matplotlib`" in message]) == 1


def test_the_proof_is_in_the_result_and_in_files(tuned):
    run, result, _ = tuned
    proof = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    assert result["verdict"] == proof["verdict"] and result["sentence"] == proof["sentence"]
    assert proof["held_out"] and proof["n_patients"] == 3 and result["promoted"] is proof["promoted"]
    assert proof["of"] == "trainings of the same kind on fewer cases"
    assert sorted(one["case"] for one in proof["cases"]) == ["patient00", "patient01", "patient02"]
    differences = [one["difference"] for one in proof["cases"]]
    assert differences == sorted(differences)
    for one in proof["cases"]:
        assert all(os.path.isfile(one["files"][which]) for which in ("base", "tuned"))
        assert len(one["worst_point_mm"]) == 3
        assert os.path.isfile(one["files"]["reference"]) and len(one["files"]["images"]) == 2
        assert one["reference_values"] == {"upper": [1], "lower": [2], "core": [3]}
    assert (run / "comparison.txt").read_text(encoding="utf-8").startswith(proof["sentence"])
    transfer = json.loads((run / "transfer.json").read_text(encoding="utf-8"))
    assert transfer["counts"] == result["transfer"]["counts"] and transfer["counts"]["reused"] == len(
        transfer["tensors"]
    )


def test_every_case_is_scored_by_a_training_that_has_not_seen_it(tuned):
    run, _, _ = tuned
    plan = json.loads((run / "run.json").read_text(encoding="utf-8"))
    *folds, final = plan["parts"]
    assert [len(fold["held_out"]) for fold in folds] == [1, 1, 1] and final["held_out"] == []
    for index, fold in enumerate(folds):
        assert not set(fold["train"]) & set(fold["held_out"])
        scores = json.loads((run / f"fold{index}" / "done.json").read_text(encoding="utf-8"))["scores"]
        assert [one["case"] for one in scores] == fold["held_out"]


def test_spacing_and_normalisation_are_the_base_models_unless_asked_otherwise(base, phantoms, tuned, tmp_path):
    run, _, _ = tuned
    plan = json.loads((run / "run.json").read_text(encoding="utf-8"))["plan"]
    assert plan == to_dict(base.manifest.plan)
    result = tune(base, phantoms, tmp_path, spacing_mm=(3.0, 2.0, 2.0), validation_count=1)
    assert open_package(result["model"]).manifest.plan.spacing_mm == (3.0, 2.0, 2.0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("normalisation", ["base", "data"])
def test_intensities_are_scaled_in_the_base_models_order(base, phantoms, tmp_path, first, normalisation):
    older = dataclasses.replace(base.manifest.plan, normalise_first=first)
    manifest, wishes = dataclasses.replace(base.manifest, plan=older), TuningOptions(normalisation=normalisation)
    plan = plan_tuning(manifest, read_dataset(phantoms), tmp_path, wishes)
    assert plan.plan.normalise_first is first
    assert base.manifest.plan.normalise_first


def test_one_case_is_enough_but_proves_nothing(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=1)
    result = tune(base, data, tmp_path / "run")
    assert result["verdict"] == "not enough data to tell" and not result["promoted"]
    assert "no case can be held out" in result["sentence"]
    candidate = open_package(tmp_path / "run" / "candidate")
    assert candidate.manifest.metrics == {}
    # Segmented again, the case that it was trained on is as sure as is expected.
    case = read_dataset(data).cases[0]
    inputs = dict(zip(("T1", "T2"), case.images, strict=True))
    found = segment(candidate, inputs, tmp_path / "found.nrrd")
    assert 0 < found["confidence"] == pytest.approx(candidate.manifest.expected.confidence, abs=2e-4)
    assert not (tmp_path / "run" / "model").exists()
    again = tune(base, data, tmp_path / "run", resume=True, promote=True)
    assert again["promoted"] and verify_package(tmp_path / "run" / "model").id == result["model_id"]
    assert tune(base, data, tmp_path / "run", resume=True, promote=True) == again


def test_a_model_that_got_worse_is_a_candidate_unless_it_is_promoted(base, phantoms, tmp_path):
    ruinous = {"learning_rate": 30.0, "iterations_per_epoch": 10, "validation_count": 1}
    result = tune(base, phantoms, tmp_path / "run", **ruinous)
    proof = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert proof["difference"]["mean"] < 0 and not result["promoted"]
    assert result["model"].endswith("candidate")
    assert tune(base, phantoms, tmp_path / "other", promote=True, **ruinous)["promoted"]


def test_many_cases_have_a_single_training_whose_own_model_is_proved(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=11)
    report = Recorder()
    result = tune(base, data, tmp_path / "run", report)
    proof = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert proof["of"] == "model" and proof["n_patients"] == 3
    assert result["training"]["training_cases"] == 7
    (entry,) = [event for event in report.events if event["event"] == "epoch"]
    assert set(entry["dice"]) == {"upper", "lower", "core", "mean"}


def test_roles_of_cases_may_be_given_beside_the_data(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=4)
    read_dataset(data).case("patient01").images[0].write_bytes(b"no image")
    split = [{"train": ["patient03", "patient01"], "val": ["patient00"]}]
    (data / "splits_final.json").write_text(json.dumps(split), encoding="utf-8")
    tune(base, data, tmp_path / "run")
    (part,) = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["parts"]
    assert part == {"train": ["patient03"], "validation": [], "held_out": ["patient00"]}


def test_other_labels_and_channels_go_by_name(base, tmp_path):
    labels = {"background": 0, "tumour": 1, "lower": 2, "Upper": 3}
    data = write_dataset(tmp_path / "data", cases=2, channels=("FLAIR", "T1"), labels=labels)
    result = tune(base, data, tmp_path / "run")
    manifest = open_package(result["model"]).manifest
    assert [channel.name for channel in manifest.plan.channels] == ["FLAIR", "T1"]
    assert manifest.scheme.names == ("tumour", "lower", "Upper") and manifest.network.in_channels == 2
    assert result["transfer"]["labels"] == {
        "reused": ["lower", "Upper"],
        "initialised": ["tumour"],
        "dropped": ["core"],
    }
    assert result["transfer"]["channels"]["averaged"] == ["FLAIR"]
    assert result["verdict"] == "nothing to compare", "the base model cannot run without T2"
    assert result["dropped_labels"] == ["core"] and not result["promoted"], "whoever promotes it must know"
    assert result["sentence"].endswith("Labels of the base model that it no longer has: core.")
    images = {c.name: read_dataset(data).cases[0].images[i] for i, c in enumerate(manifest.plan.channels)}
    inputs = [part for name, path in images.items() for part in ("-i", f"{name}={path}")]
    segmented = invres("segment", "-m", result["model"], *inputs, "-o", tmp_path / "s.nii.gz", "--device", "cpu")
    assert segmented.code == 0, segmented.err


def test_the_defaults_are_gentle_unless_the_head_begins_anew(base, phantoms, tmp_path):
    renamed = write_dataset(tmp_path / "data", labels={"background": 0, "upper": 1, "new": 2, "core": 3})
    for data, rate in ((phantoms, 1e-4), (renamed, 1e-3)):
        dataset = read_dataset(data)
        plan = plan_tuning(base.manifest, dataset, tmp_path / "prepared", TuningOptions())
        assert (plan.training.learning_rate, plan.training.patch) == (rate, base.manifest.patch)


def test_a_label_that_the_base_lacks_is_shown_and_those_in_common_are_compared(base, tmp_path):
    labels = {"background": 0, "upper": 1, "new": 2, "core": 3}
    data = write_dataset(tmp_path / "data", cases=2, labels=labels)
    tune(base, data, tmp_path / "run")
    proof = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert proof["labels"]["new"]["Dice"]["base"]["n"] == 0 and proof["labels"]["new"]["Dice"]["tuned"]["n"] == 2
    assert proof["labels"]["upper"]["Dice"]["difference"]["n"] == 2


def unnamed(source, folder, values=(1, 2, 3)):
    """The cases of `source` as folders of images and labels, which name nothing; with other values of the labels."""
    for case in read_dataset(source).cases:
        first, second = (read_channels(image)[0] for image in case.images)
        write_channels(folder / "images" / f"{case.name}.nii.gz", [first, second])
        label = read_volume(case.label, kind="labels")
        array = np.array([0, *values], np.uint8)[label.array]
        write_volume(folder / "labels" / f"{case.name}.nii.gz", Volume(array, label.geometry))
    return folder


def test_labels_without_names_are_the_models_of_the_same_values(base, phantoms, tmp_path):
    data, report = unnamed(phantoms, tmp_path / "data"), Recorder()
    assert read_dataset(data).scheme.names == ("label_1", "label_2", "label_3")
    result = tune(base, data, tmp_path / "run", report, validation_count=1)
    assert result["transfer"]["labels"] == {"reused": ["upper", "lower", "core"], "initialised": [], "dropped": []}
    assert [text for text in told(report, "note") if "do not name their labels" in text] == [
        "The data do not name their labels, so their values are taken as those of Phantom: 1 upper, 2 lower, 3 core."
    ]
    assert tune(base, data, tmp_path / "run", validation_count=1, resume=True) == result
    meant = tune(base, data, tmp_path / "meant", validation_count=1, new_labels=True)
    assert meant["transfer"]["labels"]["dropped"] == ["upper", "lower", "core"]
    assert tune(base, data, tmp_path / "meant", validation_count=1, resume=True) == meant, "as it was begun"


def test_labels_that_are_all_strangers_are_refused_unless_they_are_meant(base, phantoms, tmp_path):
    data = unnamed(phantoms, tmp_path / "data", values=(1, 2, 7))
    with pytest.raises(InvresError) as caught:
        tune(base, data, tmp_path / "run")
    assert caught.value.code == "other_labels" and not (tmp_path / "run" / "run.json").exists()
    assert caught.value.message == (
        "None of the labels of the data (label_1, label_2, label_7) is one of Phantom (upper, lower, core)."
    )
    assert '"labels": {"background": 0, "upper": 1, "lower": 2, "core": 3}' in caught.value.hint
    assert "--new-labels" in caught.value.hint
    outcome = invres(
        *("finetune", "-m", base.path, "-d", data, "-o", tmp_path / "run", "--new-labels", "--epochs", 1),
        *("--time", "1s", "--validation-count", 1, "--device", "cpu"),
    )
    assert outcome.code == 0, outcome
    scheme = json.loads((tmp_path / "run/run.json").read_text())["scheme"]
    assert [label["name"] for label in scheme["labels"]] == ["label_1", "label_2", "label_7"]


def test_colours_and_codes_of_the_base_models_labels_are_kept(base, phantoms, tmp_path):
    manifest = base.manifest
    first, *rest = manifest.scheme.labels
    first = dataclasses.replace(first, colour=(1, 2, 3), terminology="a~b")
    coloured = save_package(
        tmp_path / "base",
        name="Coloured",
        network=manifest.network,
        state_dict=base.load_weights(),
        plan=manifest.plan,
        scheme=dataclasses.replace(manifest.scheme, labels=(first, *rest)),
        patch=manifest.patch,
        licence="CC-BY-4.0",
    )
    found = open_package(tune(coloured, phantoms, tmp_path / "run", validation_count=1)["model"]).manifest
    assert (found.scheme.labels[0].colour, found.scheme.labels[0].terminology) == ((1, 2, 3), "a~b")
    assert found.licence == "CC-BY-4.0"


@pytest.mark.parametrize("part", ["encoder", "all-but-head"])
def test_frozen_weights_are_the_base_models_to_the_bit(base, phantoms, tmp_path, part):
    result = tune(base, phantoms, tmp_path, freeze=part, validation_count=1)
    old, new = base.load_weights(), open_package(result["model"]).load_weights()
    same = {key for key in new if torch.equal(new[key], old[key])}
    assert "stem.weight" in same and "heads.0.weight" not in same
    assert (same == {key for key in new if not key.startswith("heads")}) is (part == "all-but-head")


def test_the_vae_branch_may_be_added_and_left_out(base, phantoms, tmp_path):
    first = tune(base, phantoms, tmp_path / "1", vae=True, validation_count=1)
    package = open_package(first["model"])
    assert package.manifest.network.vae == VAEConfig(patch=(16, 12, 16))
    kept = open_package(tune(package, phantoms, tmp_path / "2", validation_count=1)["model"])
    assert kept.manifest.network.vae is not None and kept.manifest.version == "1.2.0"
    left = open_package(tune(package, phantoms, tmp_path / "3", vae=False, validation_count=1)["model"])
    assert left.manifest.network.vae is None


def test_synthetic_batches_train_too(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=1)
    result = tune(base, data, tmp_path / "run", synthetic=1.0)
    plain = tune(base, data, tmp_path / "plain")
    assert not same_weights(result["model"], plain["model"])


def test_a_forgetting_check_can_forbid_the_promotion(base, phantoms, tmp_path, monkeypatch):
    real, read = proof.read_dataset, []
    monkeypatch.setattr(proof, "read_dataset", lambda path, **rest: read.append(path) or real(path, **rest))
    result = tune(base, phantoms, tmp_path / "run", validation_count=1, check_base=phantoms)
    assert read == [phantoms], "once is enough"
    content = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert content["base_check"]["n_cases"] == 3
    assert result["base_check"]["sentence"].startswith("On 3 cases of the base model's own kind the Dice went from")
    report, found = Recorder(), finetuning.summarise

    def forgotten(cases, *rest, **named):
        return found(cases, *rest, **named) | ({"verdict": "worse"} if len(cases) == 3 else {"promotable": True})

    monkeypatch.setattr(finetuning, "summarise", forgotten)
    monkeypatch.setattr("invres.proof.summarise", forgotten)
    result = tune(base, phantoms, tmp_path / "again", report, validation_count=1, check_base=phantoms)
    assert not result["promoted"] and any("forgotten" in message for message in told(report))


def test_check_base_takes_labels_without_names_by_their_values(base, tmp_path):
    numbers = write_dataset(tmp_path / "numbers", labels={"background": 0, "label_1": 1, "label_2": 2, "label_3": 3})
    report = Recorder()
    reference = proof.read_reference(numbers, base, base.manifest.plan, report)
    assert reference.scheme.names == ("upper", "lower", "core")
    assert any("their values are taken as those of Phantom" in message for message in told(report, "note"))


def test_a_run_that_goes_on_keeps_its_check_name_and_length(base, phantoms, tmp_path, monkeypatch):
    run, first = tmp_path / "run", StopRequest()
    first.requested = True
    wishes = {"validation_count": 1, "check_base": phantoms, "name": "Mine", "wishes": {"epochs": 2}}
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=first, **wishes)
    again = StopRequest()
    again.requested = True
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=again, resume=True, wishes={"epochs": 3}, licence="CC0-1.0")
    report = Recorder()
    result = tune(base, phantoms, run, report, resume=True, validation_count=2)
    manifest = open_package(result["model"]).manifest
    assert (manifest.name, manifest.licence, manifest.training.epochs) == ("Mine", "CC0-1.0", 3)
    assert result["base_check"] is not None
    assert any("left out: validation_count" in message for message in told(report))


def test_a_check_whose_cases_are_gone_does_not_keep_a_run_from_its_end(base, phantoms, tmp_path):
    run, first, report = tmp_path / "run", StopRequest(), Recorder()
    moved = write_dataset(tmp_path / "moved")
    first.requested = True
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=first, validation_count=1, check_base=moved)
    moved.rename(tmp_path / "away")
    result = tune(base, phantoms, run, report, resume=True, check_base=moved)
    assert result["base_check"] is None
    assert any("is not there any more" in message for message in told(report))
    with pytest.raises(InvresError, match="moved"):
        tune(base, phantoms, tmp_path / "new", validation_count=1, check_base=moved)


def test_a_disk_that_is_full_from_the_start_is_told_as_that(base, phantoms, tmp_path):
    with files_up_to(20_000), pytest.raises(InvresError) as caught:
        tune(base, phantoms, tmp_path / "run")
    assert caught.value.code == "write_failed" and "leave --resume out" not in (caught.value.hint or "")


def test_a_training_and_a_fine_tuning_leave_each_others_folders_alone(base, phantoms, tuned):
    run, result, _ = tuned
    before = (run / "run.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(InvresError, match="the folder of a fine-tuning, not of a training"):
            train(read_dataset(phantoms), tiny_recipe(**QUICK), run, TrainOptions(device="cpu", resume=resume))
        with pytest.raises(InvresError, match="the folder of a training, not of a fine-tuning"):
            tune(base, phantoms, base.path.parent, resume=resume)
    outcome = invres("evaluate", "--run", run, "--data", phantoms, "--output", run.parent / "metrics.json")
    assert outcome.code == 2 and "folder of a fine-tuning" in outcome.err and "damaged" not in outcome.err
    assert (run / "run.json").read_bytes() == before and open_package(result["model"]).id == result["model_id"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": {"background": 0, "nose": 1, "ear": 2, "eye": 4}}, "its labels are nose"),
        ({"unlabelled": 3}, "no case there"),
    ],
)
def test_check_base_without_a_label_of_the_model_is_refused(base, tmp_path, change, sentence):
    with pytest.raises(InvresError, match=sentence):
        proof.read_reference(write_dataset(tmp_path / "data", **change), base, base.manifest.plan)


def test_check_base_wants_the_channels_of_both(base, phantoms, tmp_path):
    other = write_dataset(tmp_path / "other", cases=1, channels=("PD", "T2"))
    with pytest.raises(InvresError, match="lack a channel of the base model"):
        tune(base, phantoms, tmp_path / "run", validation_count=1, check_base=other)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_tuned_model_becomes_the_one_that_its_name_stands_for_and_can_be_taken_back(base, tuned, tmp_path):
    _, result, _ = tuned
    folder = tmp_path / "models"
    import_package(base.path, folder)
    assert invres("models", "import", result["model"], "--models-dir", folder).code == 0
    assert find_package("Phantom", [folder]).id == result["model_id"]
    history = invres("models", "history", "Phantom", "--models-dir", folder, "--json").of("result")[0]["versions"]
    assert [(one["version"], one["active"]) for one in history] == [("1.0.0", False), ("1.1.0", True)]
    different = invres("models", "diff", "Phantom", "--models-dir", folder, "--json").of("result")[0]
    assert different["configuration"]["version"] == ["1.0.0", "1.1.0"]
    assert max(one["change"] for one in different["tensors"]) > 0
    back = invres("models", "rollback", "Phantom", "--models-dir", folder, "--json")
    assert back.code == 0 and back.of("result")[0]["active"] == base.id
    assert find_package("Phantom", [folder]).id == base.id
    again = invres("models", "rollback", "Phantom", "--models-dir", folder)
    assert again.code == 2 and "was not tuned from another model" in again.err
    for action in ("history", "diff"):
        assert invres("models", action, "Phantom", "--models-dir", folder).code in (0, 2)


# --- bad data and mistakes -----------------------------------------------------------------------------------------


def test_a_corrupt_case_is_skipped_and_reported(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=4)
    dataset = read_dataset(data)
    broken, cut, shifted, _ = dataset.cases
    broken.images[0].write_bytes(b"no image")
    cut.label.unlink()
    image = sitk.ReadImage(str(shifted.images[1]))
    image.SetOrigin([origin + 5 for origin in image.GetOrigin()])
    sitk.WriteImage(image, str(shifted.images[1]))
    report = Recorder()
    result = tune(base, data, tmp_path / "run", report)
    assert [one["case"] for one in result["skipped_cases"]] == [cut.name, broken.name, shifted.name]
    assert all(one["reason"].endswith(".") for one in result["skipped_cases"])
    left_out = [message for message in told(report) if "is left out" in message]
    assert len(left_out) == 3 and result["training"]["training_cases"] == 1


def test_no_usable_case_is_one_sentence(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=1)
    read_dataset(data).cases[0].images[0].write_bytes(b"no image")
    outcome = invres("finetune", "-m", base.path, "-d", data, "-o", tmp_path / "run", "--device", "cpu", "--json")
    assert outcome.code == 2
    assert outcome.events[-1]["message"].startswith("No case of Phantoms can be trained on: patient00:")
    assert not (tmp_path / "run" / "run.json").exists(), "the same command works once the data are mended"


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"freeze": "everything"}, "no part 'everything'"),
        ({"synthetic": 2.0}, "from 0 to 1"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "three sizes of 0.01 mm or more"),
        ({"freeze": "all-but-head", "vae": True}, "nothing to regularise"),
        ({"folds": 7}, "3 patients"),
        ({"validation_count": 3}, "leave no patient"),
    ],
)
def test_mistakes_are_one_sentence_with_a_next_step(base, phantoms, tmp_path, wishes, told):
    with pytest.raises(InvresError, match=told) as caught:
        tune(base, phantoms, tmp_path / "run", **wishes)
    assert caught.value.hint and not (tmp_path / "run" / "run.json").exists()


def test_empty_labels_are_refused_where_there_is_nothing_else(base, tmp_path):
    data = write_dataset(tmp_path / "data", cases=2, empty=(0, 1))
    with pytest.raises(InvresError, match="has a labelled voxel"):
        tune(base, data, tmp_path / "run")


def test_a_run_is_not_written_over_and_only_its_own_model_and_labels_resume_it(base, phantoms, tuned, tmp_path):
    run, _, _ = tuned
    with pytest.raises(InvresError, match="already a fine-tuning"):
        tune(base, phantoms, run)
    manifest = base.manifest
    other = save_package(
        tmp_path / "other",
        name="Other",
        network=manifest.network,
        state_dict=base.load_weights(),
        plan=manifest.plan,
        scheme=manifest.scheme,
        patch=manifest.patch,
    )
    with pytest.raises(InvresError, match="another model than"):
        tune(other, phantoms, run, resume=True)
    relabelled = write_dataset(tmp_path / "data", labels={"background": 0, "a": 1, "b": 2, "c": 3})
    with pytest.raises(InvresError, match="labels of Phantoms differ"):
        tune(base, relabelled, run, resume=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InvresError, match="damaged"):
        tune(base, phantoms, tmp_path / "damaged", resume=True)


def test_wishes_that_a_resumed_run_leaves_out_are_told(base, phantoms, tuned):
    run, _, _ = tuned
    dataset, spacing = read_dataset(phantoms), base.manifest.plan.spacing_mm
    dataset = dataclasses.replace(dataset, scheme=merged_scheme(dataset.scheme, base.manifest.scheme))
    report = Recorder()
    same = TuningOptions(wishes={"epochs": 9}, vae=False, spacing_mm=spacing, channel_dropout=0.0)
    plan = read_plan(run, base.manifest, dataset, same, report)
    assert plan.training.epochs == 9 and not report.events
    other = TuningOptions(wishes={"seed": 5}, vae=True, spacing_mm=(9.0, 9.0, 9.0), freeze="encoder")
    plan = read_plan(run, base.manifest, dataset, other, report)
    assert plan.plan.spacing_mm == spacing and plan.network.vae is None and plan.freeze == "none"
    assert told(report)[0].endswith("left out: seed, freeze, vae, spacing.")


# --- stopping ------------------------------------------------------------------------------------------------------


class AtStep(StopFile):
    """Does something when the training asks at its nth step whether to stop."""

    def __init__(self, folder, step, action):
        super().__init__(folder)
        self.step, self.action = step, action

    @property
    def requested(self):
        self.step -= 1
        if self.step == 0:
            self.action()
        return super().requested

    @requested.setter
    def requested(self, value):
        self._asked = value


def test_a_stop_file_saves_and_stops_and_resuming_gives_the_same_model(base, phantoms, tuned, tmp_path):
    _, result, _ = tuned
    run = tmp_path / "run"
    stop = AtStep(run, 3, lambda: (run / "stop").write_text("stop", encoding="utf-8"))
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=stop, epochs=2)
    assert not (run / "stop").exists() and load_checkpoint(run / "fold0")["iteration"] == 3
    again = tune(base, phantoms, run, epochs=2, resume=True)
    assert same_weights(again["model"], result["model"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
@pytest.mark.slow
def test_a_signal_saves_and_stops_with_exit_code_130(base, phantoms, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", epochs=2000, iterations_per_epoch=2)
    run = tmp_path / "run"
    command = ("finetune", "-m", base.path, "-d", phantoms, "-o", run, "-r", recipe, "--device", "cpu", "--json")
    process = start_process(*command)
    for line in process.stdout:
        if json.loads(line)["event"] == "epoch":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    error = json.loads(out.splitlines()[-1])
    assert error["code"] == "cancelled" and "--resume" in error["hint"]
    assert load_checkpoint(run / "fold0")["iteration"] >= 2


def test_how_long_to_wait_for_a_better_epoch_may_be_chosen(base, tmp_path):
    data, run = write_dataset(tmp_path / "data", cases=1), tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.json", **QUICK)
    command = ("finetune", "-m", base.path, "-d", data, "-o", run, "-r", recipe, "--device", "cpu", "--json")
    outcome = invres(*command, "--patience", 3)
    assert outcome.code == 0, outcome
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["training"]["early_stop_epochs"] == 3
    refused = invres(*command[:6], tmp_path / "other", *command[7:], "--patience", -1)
    assert refused.code == 2 and "early_stop_epochs must be 0 or more" in refused.events[-1]["message"]


def test_any_value_of_training_and_augmentation_is_set_and_stays_when_the_run_is_resumed(base, phantoms, tmp_path):
    run, recipe = tmp_path / "run", write_recipe(tmp_path / "recipe.json", **QUICK)
    command = ("finetune", "-m", base.path, "-d", phantoms, "-o", run, "-r", recipe, "--device", "cpu", "--json")
    outcome = invres(
        *(*command, "--set", "training.batch_size=1", "--set", "training.optimizer=muon"),
        *("--set", "augmentation.noise_std=0.25", "--set", "training.time_s=400", "--lr", 0.003),
    )
    assert outcome.code == 0, outcome
    plan = json.loads((run / "run.json").read_text(encoding="utf-8"))
    training, before = plan["training"], to_dict(Recipe.read(recipe).training)
    wanted = {"batch_size": 1, "optimizer": "muon", "weight_decay": 0.1, "learning_rate": 0.003, "time_s": 100}
    assert len(plan["parts"]) == 4 and training == before | wanted | {"patch": training["patch"]}
    assert plan["augmentation"]["noise_std"] == 0.25
    again = invres(
        *(*command, "--resume", "--set", "training.batch_size=3", "--set", "training.optimizer=adam"),
        *("--set", "augmentation.gamma=[0.5,2]"),
    )
    assert again.code == 0, again
    (warning,) = [event["message"] for event in again.of("warning") if "left out" in event["message"]]
    assert warning.endswith("left out: training.batch_size, training.optimizer, augmentation.gamma.")
    report = Recorder()
    asked = TuningOptions(given=("training.epochs=2", "training.time_s=800"))
    longer = read_plan(run, base.manifest, read_dataset(phantoms), asked, report).training
    assert (longer.epochs, longer.time_s, longer.batch_size) == (2, 200, 1) and report.events == []


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (["spacing_mm=[1,1,1]"], "Use --spacing."),
        (["crop={}"], "--set crop: a fine-tuning takes that from its model"),
        (["network.vae={}"], "--set network.vae: a fine-tuning takes that from its model"),
        (["training.batch=2"], "a recipe has no key 'training.batch'"),
        (["training.epochs=-1"], "epochs must be"),
        (["training.seed=1", "--seed", 2], "--seed and --set both give training.seed"),
    ],
)
def test_what_cannot_be_set_is_told_before_anything_is_read(base, tmp_path, asked, wanted):
    outcome = invres("finetune", "-m", base.path, "-d", "nowhere", "-o", tmp_path / "run", "--json", "--set", *asked)
    said = outcome.events[-1]
    assert outcome.code == 2 and wanted in f"{said['message']} {said['hint']}"


@pytest.mark.parametrize(
    ("given", "dropout", "flips", "notes"),
    [
        ((), 0.3, (0, 2), 0),
        (("augmentation.channel_dropout=0",), 0.0, (0, 2), 0),
        (('augmentation={"channel_dropout": 0.2, "flip_axes": [1]}',), 0.2, (0, 1), 1),
        (("augmentation.flip_axes=[]",), 0.3, (0,), 1),
        (("augmentation.flip_axes=[1,0]",), 0.3, (0, 1), 0),
    ],
)
def test_what_is_set_goes_above_the_model_but_for_the_axes_that_it_segments_mirrored_along(
    base, phantoms, tmp_path, given, dropout, flips, notes
):
    training = dataclasses.replace(base.manifest.training, channel_dropout=0.3)
    mirrored = dataclasses.replace(base.manifest, mirror_axes=(0,), training=training)
    augmentation = dataclasses.replace(tiny_recipe().augmentation, flip_axes=(2,))
    recipe = dataclasses.replace(tiny_recipe(), augmentation=augmentation, mirror_axes=(2,))
    dataset, report = read_dataset(phantoms), Recorder()
    asked = TuningOptions(recipe=recipe, given=given)
    plan = plan_tuning(mirrored, dataset, tmp_path / "prepared", asked, report)
    assert (plan.augmentation.channel_dropout, plan.augmentation.flip_axes) == (dropout, flips)
    assert len([note for note in told(report, "note") if "flipped along 0 as well" in note]) == notes
    write_plan(tmp_path, plan)
    report = Recorder()
    assert read_plan(tmp_path, mirrored, dataset, asked, report) == plan and told(report) == []


def test_time_is_shared_among_the_trainings(base, phantoms, tmp_path):
    started = time.monotonic()
    result = tune(base, phantoms, tmp_path / "run", epochs=10000, wishes={"time_s": 2.0})
    assert time.monotonic() - started < 40
    plan = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert plan["training"]["time_s"] == 0.5
    assert 0 < result["training"]["iterations"] < 20000


# --- memory and disk -----------------------------------------------------------------------------------------------


def test_less_memory_is_engine_then_setting_then_batch_then_patch_and_ends():
    config = tiny_recipe().network
    recipe = tiny_recipe({"levels": 0}, patch=[64, 48, 17], batch_size=4, engine="stored").training
    network = build(dataclasses.replace(config, in_channels=1), "stored")
    seen, memory = [], []
    while (found := lighter(network, recipe)) is not None:
        recipe, words = found
        network.engine = recipe.engine
        network.memory = recipe.memory
        seen.append((recipe.engine, recipe.batch_size, recipe.patch))
        memory.append(recipe.memory)
        assert words
    assert seen[0] == ("reversible", 4, (64, 48, 17))
    assert memory[:2] == ["low", "lower"] and set(memory[2:]) == {"lower"}
    assert [batch for _, batch, _ in seen[:4]] == [4, 4, 2, 1]
    assert seen[-1] == ("reversible", 1, (16, 16, 16))


@pytest.mark.parametrize("vae", [False, True])
def test_when_memory_runs_out_the_training_goes_on_with_less_and_says_so(base, phantoms, tmp_path, monkeypatch, vae):
    """Memory that is taken away in the middle: from the 4th step on only patches below 16 x 16 x 24 fit."""
    real, steps = objectives.training_step, []

    def step(network, optimizer, image, *rest):
        steps.append(image.shape)
        if len(steps) > 3 and image[0, 0].numel() * image.shape[0] > 16**3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(network, optimizer, image, *rest)

    monkeypatch.setattr(objectives, "training_step", step)
    report, run = Recorder(), tmp_path / "run"
    recipe = tiny_recipe(epochs=3, iterations_per_epoch=2, patch=[16, 16, 32], engine="stored", checkpoint_every_s=0.0)
    result = tune(base, phantoms, run, report, recipe=recipe, vae=vae, validation_count=1)
    words = [message for message in told(report) if message.startswith("Memory ran out; the training goes on with")]
    assert len(words) == len(result["reductions"]) >= 4
    for part, sentence in zip(
        ("engine reversible", "memory setting lower", "batches of 1", "patches of"), words, strict=False
    ):
        assert part in sentence
    assert result["training"]["iterations"] == 6
    assert len([shape for shape in steps if shape[0] == 2 and shape[-1] == 32]) <= 3 + 3, "no step is done again"
    package = verify_package(result["model"])
    assert package.manifest.patch[2] < 32 and package.manifest.training.engine == "reversible"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["reductions"] == result["reductions"]


def test_on_a_card_what_does_not_fit_is_given_up_before_the_first_step(base, phantoms, tmp_path, monkeypatch):
    """A card with room for one patch of 16 x 16 x 24 and no more, by a forecast that is made up."""
    dataset, report = read_dataset(phantoms), Recorder()
    recipe = tiny_recipe(patch=[16, 16, 32], engine="stored")
    plan = plan_tuning(base.manifest, dataset, tmp_path / "prepared", options(recipe=recipe))
    cost = {"stored": 4, "reversible": 2}

    def forecast(_, config, engine, __):
        return SimpleNamespace(peak_bytes=cost[engine] * config.batch_size * math.prod(config.patch))

    monkeypatch.setattr(parttraining, "predict_for", forecast)
    free = SimpleNamespace(free_bytes=5 * 16 * 16 * 24 // 2)
    monkeypatch.setattr(parttraining, "device_info", lambda device: free if device.type == "cuda" else None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    trainer = parttraining.PartTrainer(base, dataset, plan, tmp_path, torch.device("cuda"), report, StopFile(tmp_path))
    trainer.fit_memory()
    found = trainer.plan.training
    assert (found.engine, found.batch_size, found.memory) == ("reversible", 1, "lower") and found.patch[2] < 32
    assert has_room(forecast(0, found, found.engine, 0).peak_bytes, free.free_bytes)
    assert len(trainer.plan.reductions) == 4 == len(told(report))
    assert all("more than the card has free" in message for message in told(report))
    on_disk = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert on_disk["reductions"] == list(trainer.plan.reductions)
    (memory,) = [event for event in report.events if event["event"] == "memory"]
    assert memory["predicted_bytes"] == forecast(0, found, found.engine, 0).peak_bytes


def test_a_case_too_large_to_prepare_is_skipped(phantoms, tmp_path, monkeypatch):
    real, report = tuningplan.prepare_cases, Recorder()

    def prepare(dataset, names, *rest):
        if names == ["patient01"]:
            raise MemoryError
        return real(dataset, names, *rest)

    monkeypatch.setattr(tuningplan, "prepare_cases", prepare)
    dataset = read_dataset(phantoms)
    plan = make_plan(dataset, dataset.cases, (3.0, 3.0, 3.0))
    cases, skipped = prepare_readable(dataset, [case.name for case in dataset.cases], plan, tmp_path, report)
    assert [case.name for case in cases] == ["patient00", "patient02"]
    assert [(one.case, one.reason) for one in skipped] == [
        ("patient01", "To prepare it takes more main memory than there is.")
    ]
    assert told(report) == [
        "The case patient01 is left out: To prepare it takes more main memory than there is.",
    ]


def test_when_nothing_is_left_to_give_up_it_is_told(base, phantoms, tmp_path, monkeypatch):
    def step(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(objectives, "training_step", step)
    with pytest.raises(OutOfMemory, match="not enough memory to train") as caught:
        tune(base, phantoms, tmp_path / "run")
    assert caught.value.hint and caught.value.exit_code == 3


def test_another_error_is_not_taken_for_want_of_memory(base, phantoms, tmp_path, monkeypatch):
    def step(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(objectives, "training_step", step)
    with pytest.raises(RuntimeError, match="something else"):
        tune(base, phantoms, tmp_path / "run")


def test_a_full_disk_loses_nothing_and_is_told(base, phantoms, tuned, tmp_path):
    _, result, _ = tuned
    run = tmp_path / "run"
    stop = AtStep(run, 3, lambda: (run / "stop").write_text("stop", encoding="utf-8"))
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=stop, epochs=2)
    size = (run / "fold0" / "checkpoint.pt").stat().st_size
    report = Recorder()
    with files_up_to(size // 2), pytest.raises(InvresError, match="could not be saved") as caught:
        tune(base, phantoms, run, report, epochs=2, resume=True)
    assert "Free some space" in caught.value.hint and caught.value.code == "write_failed"
    assert load_checkpoint(run / "fold0")["iteration"] == 3
    again = tune(base, phantoms, run, epochs=2, resume=True)
    assert same_weights(again["model"], result["model"]) and leftovers(run) == []


def test_a_disk_that_is_full_behind_the_training_is_told_as_that_and_loses_nothing(base, tmp_path, monkeypatch):
    """While comparing, while packing, and when the result is written: one after the other in one run."""
    data, run = write_dataset(tmp_path / "data", cases=1), tmp_path / "run"
    whole = tune(base, data, tmp_path / "whole")
    full, renaming = set(), {name: getattr(os, name) for name in ("replace", "rename")}

    def renamed(how, source, target):
        if os.path.basename(target) in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        renaming[how](source, target)

    for how in renaming:
        monkeypatch.setattr(os, how, functools.partial(renamed, how))
    for name in ("patient00_tuned.seg.nrrd", "comparison.json", "candidate", "result.json"):
        full.clear()
        full.add(name)
        with pytest.raises((InvresError, OSError)):
            tune(base, data, run, resume=True)
        last = json.loads((run / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        assert last["event"] == "error" and last["code"] in ("write_failed", "disk_full"), name
        assert "space" in last["hint"] and not (run / "result.json").exists() and leftovers(run) == []
    full.clear()
    assert same_weights(tune(base, data, run, resume=True)["model"], whole["model"])


# --- ended, but not recorded -----------------------------------------------------------------------------------------


def test_an_ended_training_that_was_not_recorded_does_not_go_on(base, phantoms, tmp_path):
    """Killed between the end of a training (by its patience, say) and the record of it."""
    recipe = tiny_recipe(epochs=50, iterations_per_epoch=1, early_stop_epochs=1, learning_rate=1e-9)
    first = tune(base, write_dataset(tmp_path / "d", cases=12), tmp_path / "run", recipe=recipe, validation_count=2)
    iterations = first["training"]["iterations"]
    assert iterations < 50
    for name in ("result.json", "final/done.json"):
        (tmp_path / "run" / name).unlink()
    again = tune(base, tmp_path / "d", tmp_path / "run", recipe=recipe, resume=True)
    assert again["training"]["iterations"] == iterations and same_weights(first["model"], again["model"])


def test_networks_of_a_run_segment_like_their_package(tuned):
    """What was compared is what is packed."""
    run, result, _ = tuned
    package = open_package(result["model"])
    network = load_network(package, torch.device("cpu"))
    weights = load_checkpoint(run / "final")["weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert with_patch(package.manifest.network, (8, 8, 8)).vae is None
    assert np.isfinite(result["training"]["seconds"])


# --- the folder of a run -------------------------------------------------------------------------------------------


def test_two_processes_never_work_in_one_folder(base, phantoms, tuned, tmp_path):
    run = tmp_path / "run"

    def meddle():
        with pytest.raises(InvresError, match=r"Another process .* is at work") as caught:
            tune(base, phantoms, run, resume=True)
        assert caught.value.hint and caught.value.code == "in_use"

    result = tune(base, phantoms, run, stop=AtStep(run, 2, meddle), epochs=2)
    assert same_weights(result["model"], tuned[1]["model"])
    assert tune(base, phantoms, run, resume=True) == result, "the lock went with its holder"


def test_the_lock_tells_who_has_it_and_since_when_and_nothing_once_nobody_has(tmp_path):
    lock = tmp_path / "lock"
    with held(tmp_path):
        number, began = lock.read_text(encoding="ascii").splitlines()
        assert int(number) == os.getpid() and float(began) == pytest.approx(psutil.Process().create_time(), abs=0.01)
        with pytest.raises(InvresError, match=rf"Another process \({number}\) is at work"), held(tmp_path):
            pass
        assert lock.read_text(encoding="ascii").startswith(number)
    assert lock.read_text(encoding="ascii") == ""
    with pytest.raises(ValueError, match="told"), held(tmp_path):
        raise ValueError("told")
    assert lock.read_text(encoding="ascii") == ""


def test_who_comes_back_later_reads_what_happened(tuned):
    run, _, report = tuned
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["event"] == "started" and lines[0]["pid"] == os.getpid() and all(line["time"] for line in lines)
    for kind in ("epoch", "warning", "note", "memory"):
        wanted = [event for event in report.events if event["event"] == kind]
        assert [{k: v for k, v in line.items() if k != "time"} for line in lines if line["event"] == kind] == wanted
    # The first: other tests have come back to this run since.
    result = next(line for line in lines if line["event"] == "result")
    assert result == {"time": result["time"], "event": "result", **tuned[1]}
    progress = [line for line in lines if line["event"] == "progress"]
    assert 0 < len(progress) < len([event for event in report.events if event["event"] == "progress"])


def test_a_line_cut_by_a_kill_spoils_only_itself_and_a_reader_that_went_away_nothing(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "epo')

    class Gone(Recorder):
        def emit(self, event):
            raise BrokenPipeError

    report = RecordingReporter(Gone(), tmp_path)
    report.note("Still here.")
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"event": "epo'
    assert [json.loads(line)["event"] for line in lines[1:]] == ["started", "note"]


def test_a_case_that_vanishes_during_the_run_is_not_compared_and_reported(base, tmp_path):
    data, run, report = write_dataset(tmp_path / "data", cases=2), tmp_path / "run", Recorder()
    plan = {}

    def vanish():
        plan.update(json.loads((run / "run.json").read_text(encoding="utf-8")))
        (held,) = plan["parts"][0]["held_out"]
        read_dataset(data).case(held).images[0].write_bytes(b"no image")

    result = tune(base, data, run, report, AtStep(run, 1, vanish), epochs=1, folds=0, validation_count=1)
    assert any("is not compared" in message for message in told(report))
    assert "no proof" in result["sentence"] and not result["promoted"]


def test_a_case_that_breaks_during_the_run_is_left_out_of_the_trainings_that_follow(base, tmp_path):
    data, run, report = write_dataset(tmp_path / "data"), tmp_path / "run", Recorder()
    broken = read_dataset(data).case("patient01")
    result = tune(base, data, run, report, AtStep(run, 1, lambda: broken.images[0].write_bytes(b"no image")))
    assert [one["case"] for one in result["skipped_cases"]] == ["patient01"]
    assert result["training"]["training_cases"] == 2 and verify_package(result["model"])
    assert any(message.startswith("The case patient01 is left out") for message in told(report))


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(base, phantoms, tmp_path):
    run = tmp_path / "run"
    (run / "prepared" / "patient00-0123456789abcdef.tmp").mkdir(parents=True)
    (run / "fold0").mkdir()
    (run / ".model.0123456789ab.tmp").mkdir()
    for name in (".0123456789ab.json", "fold0/checkpoint.pt.tmp", "fold0/.0123456789ab"):
        (run / name).write_bytes(b"half")
    (run / ".notes").write_text("mine", encoding="utf-8")
    (run / "fold0" / "my.tmp").write_text("mine", encoding="utf-8")
    tune(base, phantoms, run, validation_count=1)
    assert sorted(leftovers(run)) == [".notes", os.path.join("fold0", "my.tmp")]


def test_how_a_run_ended_is_on_record_too(base, phantoms, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop = AtStep(run, 1, lambda: (run / "stop").write_text("stop", encoding="utf-8"))
    with pytest.raises(Cancelled):
        tune(base, phantoms, run, stop=stop)

    def step(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(objectives, "training_step", step)
    with pytest.raises(RuntimeError):
        tune(base, phantoms, run, resume=True)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    errors = [(line["code"], line["message"]) for line in lines if line["event"] == "error"]
    assert [code for code, _ in errors] == ["cancelled", "internal"] and "something else" in errors[1][1]
    assert [line["event"] for line in lines].count("started") == 2
