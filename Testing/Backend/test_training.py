"""`invres train`: from files to a model package, whatever the data set has, and through every interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from tiny_datasets import (
    REGIONS,
    files_up_to,
    invres,
    leftovers,
    start_process,
    tiny_recipe,
    write_dataset,
    write_decathlon,
    write_recipe,
)

from invres import Cancelled, InvresError, console, validation
from invres.cases import read_dataset
from invres.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from invres.config import Label, LabelScheme, TrainingConfig
from invres.configjson import to_dict
from invres.events import Recorder
from invres.inference import load_network
from invres.metrics import score_case
from invres.modelpackage import open_package, verify_package
from invres.networks import NetworkOutput
from invres.prepared import prepare_cases
from invres.preprocessing import PreparedCase, make_plan, nonzero_box, scheme_targets
from invres.restoration import restore_probabilities
from invres.runfolder import held
from invres.trainer import StopRequest
from invres.training import train
from invres.trainingrun import TrainOptions, started_recipe
from invres.validation import card_scores, validator
from invres.volume import Geometry, Volume, read_volume, write_volume

QUICK = {"epochs": 1, "iterations_per_epoch": 1}


def warnings_of(report):
    return [event["message"] for event in report.events if event["event"] == "warning"]


def metrics_of(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def same_weights(one, other):
    first, second = (load_checkpoint(run)["weights"] for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_recipes_clip_for_ct_is_what_the_model_clips_to(tmp_path):
    write_dataset(tmp_path / "data", cases=2, channels=("CT",))
    recipe = dataclasses.replace(tiny_recipe(**QUICK), clip_hu=(60.0, 200.0))
    package = train(read_dataset(tmp_path / "data"), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    assert [channel.clip for channel in package.manifest.plan.channels] == [(60.0, 200.0)]


def test_two_processes_never_train_in_one_folder(phantoms, tmp_path):
    arguments = [read_dataset(phantoms), tiny_recipe(**QUICK), tmp_path, TrainOptions(device="cpu", fold=None)]
    for resume in (False, True):
        again = dataclasses.replace(arguments[3], resume=resume)
        with held(tmp_path), pytest.raises(InvresError, match=r"Another process .* is at work") as caught:
            train(*arguments[:3], again)
        assert caught.value.code == "in_use"
    (tmp_path / "lock").write_text("99999999\n1.00\n")  # as a killed process leaves it
    package = train(*arguments)
    assert (tmp_path / "lock").read_text() == "" and verify_package(package.path)
    with pytest.raises(InvresError, match="already a training"):
        train(*arguments)
    with held(tmp_path):  # it was let go of after the refusal, too
        pass


# --- what a training leaves ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    run, report = tmp_path_factory.mktemp("trained") / "run", Recorder()
    options = TrainOptions(device="cpu", validation_count=1, licence="CC-BY-4.0")
    recipe = tiny_recipe({"vae": {"latent": 4, "reduced_channels": 2}}, iterations_per_epoch=12, epochs=2)
    return run, train(read_dataset(phantoms), recipe, run, options, report), report


def test_a_training_leaves_a_package_that_opens_with_all_there_is_to_know(trained):
    run, package, _ = trained
    assert verify_package(run / "model") == package
    manifest = package.manifest
    assert [channel.name for channel in manifest.plan.channels] == ["T1", "T2"]
    assert manifest.scheme.names == ("upper", "lower", "core")
    assert manifest.patch == (16, 12, 16) and manifest.licence == "CC-BY-4.0"
    assert manifest.network.in_channels == 2 and manifest.network.out_channels == 4
    assert manifest.network.vae is not None and manifest.network.vae.patch == (16, 12, 16)
    summary = manifest.training
    assert (summary.recipe, summary.epochs, summary.iterations, summary.engine) == ("tiny", 2, 24, "reversible")
    assert (summary.training_cases, summary.validation_cases) == (2, 1)
    assert {"invres", "torch", "python"} <= summary.software.keys()
    assert "patient" not in (run / "model" / "manifest.json").read_text(encoding="utf-8")


def test_a_training_leaves_its_metrics_curves_and_checkpoint_and_nothing_half_written(trained):
    run, _, report = trained
    names = {"run.json", "metrics.jsonl", "checkpoint.pt", "model", "prepared"}
    assert names <= set(os.listdir(run)) <= names | {"curves.png", "lock"}
    assert leftovers(run) == []
    entries = metrics_of(run)
    assert [entry["epoch"] for entry in entries] == [1, 2] and entries[1]["loss"] < entries[0]["loss"]
    assert entries[0].keys() >= {"cross_entropy", "dice_loss", "reconstruction", "kullback_leibler", "dice"}
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert content["recipe"]["training"] == to_dict(tiny_recipe(iterations_per_epoch=12, epochs=2).training)
    assert len(content["split"]["train"]) == 2 and len(content["split"]["validation"]) == 1
    memory = {key: event[key] for event in report.events if event["event"] == "memory" for key in event}
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.3)


def test_the_package_holds_the_best_epochs_weights_and_their_dice_on_the_validation_cases(trained, phantoms, tmp_path):
    run, package, _ = trained
    checkpoint = load_checkpoint(run)
    weights = package.load_weights()
    assert all(torch.equal(weights[key], tensor) for key, tensor in checkpoint["best_weights"].items())
    means = [entry["dice"]["mean"] for entry in metrics_of(run)]
    assert checkpoint["best_epoch"] == int(np.argmax(means)) + 1
    command = ("evaluate", "--run", run, "--data", phantoms, "--output", tmp_path / "metrics.json", "--device", "cpu")
    assert invres(*command).code == 0
    scored = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["summary"]
    for name in package.manifest.scheme.names:
        spread = package.manifest.metrics[name]["Dice"]
        assert spread["mean"] == pytest.approx(scored[name]["Dice"]["mean"], abs=1e-9) and spread["mean"] > 0
        assert (spread["n"], spread["sd"]) == (1, None), "one case has no spread"


def test_the_package_is_made_of_the_best_weights_and_not_of_the_last(phantoms, tmp_path):
    dataset, recipe = read_dataset(phantoms), tiny_recipe(**QUICK)
    train(dataset, recipe, tmp_path, TrainOptions(device="cpu"))
    state = load_checkpoint(tmp_path)
    state["best_weights"] = {key: torch.full_like(tensor, 0.25) for key, tensor in state["best_weights"].items()}
    save_checkpoint(tmp_path, state)
    shutil.rmtree(tmp_path / "model")
    package = train(dataset, recipe, tmp_path, TrainOptions(device="cpu", resume=True))
    assert all(bool((tensor == 0.25).all()) for tensor in package.load_weights().values())


@pytest.mark.parametrize("regions", [False, True])
def test_the_validation_dice_is_that_of_the_definition(regions):
    """One window that is the volume, and Dice counted voxel by voxel from the network's own answer."""
    rng = np.random.default_rng(4)
    labels = tuple(Label(name, (value,), value) for value, name in enumerate("abc", start=1))
    scheme = LabelScheme(labels[:2], ignore_value=9)
    if regions:
        scheme = LabelScheme((Label("all", (1, 2), 1), Label("two", (2,), 2)), regions=True, ignore_value=9)
    grid = Geometry((9, 8, 7), (1, 1, 1), (0, 0, 0), np.eye(3))
    cases = [
        PreparedCase(
            str(index),
            rng.normal(size=(1, 9, 8, 7)).astype(np.float32),
            rng.choice([-1, 0, 1, 2], (9, 8, 7)).astype(np.int16) if index else np.zeros((9, 8, 7), np.int16),
            grid,
            grid,
        )
        for index in range(3)
    ]

    class Answer(torch.nn.Module):
        def forward(self, x):
            return NetworkOutput(torch.cat([x, 0.3 - x, x * x][-scheme.out_channels :], dim=1))

    found = validator(cases, scheme, TrainingConfig(patch=(9, 8, 7)), torch.device("cpu"))(Answer())
    scores = []
    for case in cases:
        logits = Answer()(torch.from_numpy(case.image)[None]).logits[0].numpy()
        for index in range(2):
            predicted = logits[index] > 0 if regions else logits.argmax(axis=0) == index + 1
            reference = (case.label > index) if regions else (case.label == index + 1)
            counted = case.label >= 0
            both, total = (predicted & reference & counted).sum(), (predicted & counted).sum() + reference.sum()
            scores.append(2 * both / total if total else 1.0)
    wanted = np.reshape(scores, (3, 2)).mean(axis=0)
    assert found == pytest.approx(dict(zip(scheme.names, wanted, strict=True)) | {"mean": np.mean(scores)})
    few = validator(cases, scheme, TrainingConfig(patch=(9, 8, 7), validation_cases=1), torch.device("cpu"))
    assert few(Answer())["mean"] == pytest.approx(np.mean(scores[:2]))


def test_a_label_that_no_validation_case_has_does_not_choose_the_epoch(tmp_path):
    label = np.zeros((4, 4, 4), np.int16)
    label[1] = 1
    case = PreparedCase("c", np.zeros((1, 4, 4, 4), np.float32), label, None, None)
    scheme = LabelScheme((Label("a", (1,), 1), Label("ghost", (2,), 2)))
    network = lambda x: NetworkOutput(torch.zeros(len(x), 3, *x.shape[2:]))  # noqa: E731
    scores = validator([case], scheme, TrainingConfig(patch=(4, 4, 4)), torch.device("cpu"))(network)
    assert scores == {"a": 0.0, "ghost": 1.0, "mean": 0.0}


def test_a_label_that_no_validation_case_has_is_not_on_the_card(tmp_path):
    folder = write_dataset(tmp_path / "data", cases=3, channels=("T1",))
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description["labels"]["ghost"] = 9
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    dataset = read_dataset(folder)
    package = train(dataset, tiny_recipe(epochs=1), tmp_path / "run", TrainOptions(device="cpu", validation_count=1))
    assert tuple(package.manifest.metrics) == tuple(name for name in dataset.scheme.names if name != "ghost")


def test_where_the_maps_of_a_validation_do_not_fit_the_cpu_joins_them(monkeypatch):
    case = PreparedCase("c", np.zeros((1, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.int16), None, None)
    asked, real = [], validation.predict_probabilities

    def full(*arguments, stitch_device=None):
        asked.append(stitch_device)
        if stitch_device is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, stitch_device=stitch_device)

    monkeypatch.setattr(validation, "predict_probabilities", full)
    scheme = LabelScheme((Label("a", (1,), 1),))
    network = lambda x: NetworkOutput(torch.zeros(len(x), 2, *x.shape[2:]))  # noqa: E731
    scores = validator([case], scheme, TrainingConfig(patch=(4, 4, 4)), torch.device("cpu"))(network)
    assert asked == [None, "cpu"] and scores == {"a": 1.0, "mean": 1.0}


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
def test_the_cards_dice_counts_what_the_spacing_of_the_network_destroys(tmp_path, labels):
    """A network that is perfect on its own coarse grid scores 1 there, and on the file's grid what is left of it."""
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=1, channels=("T1",), labels=labels))
    plan = make_plan(dataset, dataset.cases, (5.0, 3.0, 3.0))
    (case,) = prepare_cases(dataset, ["patient00"], plan, tmp_path / "prepared")
    shape = case.image.shape[1:]
    targets = torch.from_numpy(scheme_targets(np.asarray(case.label), dataset.scheme)).float()
    answer = targets if dataset.scheme.regions else torch.cat([0.5 * torch.ones(1, *shape), targets])
    network = lambda x: NetworkOutput((40 * answer - 20).expand(len(x), *answer.shape))  # noqa: E731
    recipe = dataclasses.replace(tiny_recipe(), window=shape)
    scores, confidences = card_scores(network, [case], dataset, recipe, torch.device("cpu"))
    own = validator([case], dataset.scheme, TrainingConfig(patch=shape), torch.device("cpu"))(network)
    assert set(own.values()) == {1.0} and scores.shape == (1, 3) and confidences[0] > 0.99
    assert (scores < 0.97).all() and (scores[0, :2] > 0.6).all()
    if labels is None:
        probabilities = torch.softmax(network(torch.zeros(1)).logits[0], 0).numpy()
        found = restore_probabilities(probabilities, case.geometry, case.original, dataset.scheme)
        reference = read_volume(dataset.cases[0].label, kind="labels").array
        wanted = [score.dice for score in score_case(found, reference, dataset.scheme, (1, 1, 1)).values()]
        assert scores[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
def test_the_card_says_what_evaluate_says_of_a_model_that_mirrors_and_leaves_pieces_out(tmp_path, labels):
    data, recipe = write_dataset(tmp_path / "data", cases=3, labels=labels), tiny_recipe(epochs=1)
    augmentation = dataclasses.replace(recipe.augmentation, flip_axes=(1, 2), channel_dropout=0.3)
    recipe = dataclasses.replace(recipe, augmentation=augmentation, mirror_axes=(1, 2), one_piece=labels is None)
    package = train(read_dataset(data), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    command = (
        "evaluate",
        "--run",
        tmp_path / "run",
        "--data",
        data,
        "--output",
        tmp_path / "m.json",
        "--device",
        "cpu",
    )
    assert invres(*command).code == 0
    scored = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["summary"]
    for name, spreads in package.manifest.metrics.items():
        assert spreads["Dice"]["mean"] == pytest.approx(scored[name]["Dice"]["mean"], abs=1e-9)
        assert {"Dice without T1", "Dice without T2"} <= spreads.keys()


def test_voxels_to_ignore_count_neither_way_in_the_files(tmp_path):
    folder = write_dataset(tmp_path / "data", cases=1, channels=("T1",))
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description["labels"]["ignore"] = 4
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    path = read_dataset(folder).cases[0].label
    label = read_volume(path, kind="labels")
    hidden = label.array.copy()
    hidden[:, :, ::2] = 4
    write_volume(path, Volume(hidden, label.geometry))
    dataset = read_dataset(folder)
    plan = make_plan(dataset, dataset.cases)
    (case,) = prepare_cases(dataset, ["patient00"], plan, tmp_path / "prepared")
    shape = case.image.shape[1:]
    answer = torch.zeros(4, *shape)
    answer[1] = 1
    network = lambda x: NetworkOutput(answer.expand(len(x), *answer.shape))  # noqa: E731
    recipe = dataclasses.replace(tiny_recipe(), window=shape)
    scores, _ = card_scores(network, [case], dataset, recipe, torch.device("cpu"))
    canonical = Volume(hidden, label.geometry).canonical().array
    found = np.zeros(canonical.shape, bool)
    found[nonzero_box([dataset.load(dataset.cases[0])[0][0].canonical().array])] = True
    found &= canonical != 4
    wanted = 2 * (found & (canonical == 1)).sum() / (found.sum() + (canonical == 1).sum())
    assert scores[0, 0] == pytest.approx(wanted)


def test_validation_needs_cases():
    assert validator([], LabelScheme(), TrainingConfig(), torch.device("cpu")) is None


# --- interruption --------------------------------------------------------------------------------------------------


LONG = {"epochs": 2, "iterations_per_epoch": 12, "checkpoint_every_s": 0.0}
RANDOM_NETWORK = {"dropout": 0.2, "vae": {"latent": 4, "reduced_channels": 2}}


@pytest.fixture(scope="module")
def undisturbed(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.json", RANDOM_NETWORK, **LONG)
    outcome = invres("train", "-d", phantoms, "-r", recipe, "-o", folder / "run", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    return recipe, folder / "run"


def interrupted(phantoms, recipe, run, number):
    """A training in a process of its own, ended by a signal at a random moment after its first checkpoint."""
    process = start_process("train", "-d", phantoms, "-r", recipe, "-o", run, "--device", "cpu", "--json")
    chance = random.SystemRandom()
    moment, lines = chance.randint(2, 18), []
    for line in process.stdout:
        lines.append(line)
        event = json.loads(line)
        if event["event"] == "progress" and event.get("iteration", 0) >= moment:
            break
    time.sleep(chance.uniform(0, 0.03))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + out, err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.slow
def test_a_training_ended_from_outside_and_resumed_equals_an_undisturbed_one(phantoms, undisturbed, tmp_path, name):
    recipe, whole = undisturbed
    number = getattr(signal, name)
    run = tmp_path / "run"
    code, out, err = interrupted(phantoms, recipe, run, number)
    reached = load_checkpoint(run)["iteration"]
    assert 1 <= reached < 24
    assert not (run / "model").exists()
    if name == "SIGKILL":
        assert code == -number
    else:
        assert code == 130, err
        error = json.loads(out.splitlines()[-1])
        assert error["event"] == "error" and error["code"] == "cancelled"
        assert f"Stopped after {reached} of 24 iterations" in error["message"] and "--resume" in error["hint"]
        assert err == ""
    given = ("-r", recipe) if name == "SIGKILL" else ()  # without it, the run's own
    again = invres("train", "-d", phantoms, *given, "-o", run, "--device", "cpu", "--resume", "--json")
    assert again.code == 0 and not again.of("warning"), again
    assert again.of("progress")[-1]["total"] == 24
    assert same_weights(run, whole)
    assert metrics_of(run) == metrics_of(whole)
    packages = [open_package(folder / "model") for folder in (run, whole)]
    assert packages[0].manifest.sha256 == packages[1].manifest.sha256
    assert packages[0].manifest.metrics == packages[1].manifest.metrics
    assert leftovers(run) == []


def test_a_training_that_was_stopped_before_its_first_checkpoint_starts_from_the_beginning(phantoms, tmp_path):
    recipe = tiny_recipe(**QUICK)
    dataset = read_dataset(phantoms)
    train(dataset, recipe, tmp_path / "whole", TrainOptions(device="cpu"))
    train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu"))
    (tmp_path / "run" / CHECKPOINT).unlink()
    train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu", resume=True))
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_training_begun_before_there_were_wavelets_goes_on_without_them(phantoms, tmp_path):
    recipe = tiny_recipe({"resampling": "shuffle"}, **QUICK)
    train(read_dataset(phantoms), recipe, tmp_path)
    content = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert content["recipe"]["network"].pop("resampling") == "shuffle"
    (tmp_path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    assert started_recipe(tmp_path).network.resampling == "shuffle"


def test_a_run_that_goes_on_remembers_what_its_package_says_and_how_long_it_is(phantoms, tmp_path):
    recipe, dataset = tiny_recipe(**QUICK), read_dataset(phantoms)
    train(dataset, recipe, tmp_path, TrainOptions(device="cpu", licence="CC0-1.0", source="Phantoms.", name="Mine"))
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=3))
    manifest = train(dataset, longer, tmp_path, TrainOptions(device="cpu", resume=True)).manifest
    assert (manifest.licence, manifest.training.data, manifest.name) == ("CC0-1.0", "Phantoms.", "Mine")
    assert manifest.training.epochs == 3 and started_recipe(tmp_path).training.epochs == 3


def test_a_finished_training_that_is_resumed_keeps_its_model(phantoms, tmp_path):
    recipe, dataset = tiny_recipe(**QUICK), read_dataset(phantoms)
    first = train(dataset, recipe, tmp_path, TrainOptions(device="cpu"))
    again = train(dataset, recipe, tmp_path, TrainOptions(device="cpu", resume=True))
    assert again.id == first.id
    shutil.rmtree(first.path)
    assert train(dataset, recipe, tmp_path, TrainOptions(device="cpu", resume=True)).id != first.id
    licensed = train(dataset, recipe, tmp_path, TrainOptions(device="cpu", resume=True, licence="CC0-1.0"))
    assert licensed.manifest.licence == "CC0-1.0"
    assert train(dataset, recipe, tmp_path, TrainOptions(device="cpu", resume=True)).id == licensed.id
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=2))
    assert train(dataset, longer, tmp_path, TrainOptions(device="cpu", resume=True)).id != licensed.id


def test_a_fold_and_a_number_of_cases_are_not_both_held_out(phantoms, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", **QUICK)
    command = ("train", "-d", phantoms, "-r", recipe, "-o", tmp_path / "run", "--validation-count", 1)
    for fold in ("0", "1", "all"):
        outcome = invres(*command, "--fold", fold)
        assert outcome.code == 2 and "Give one of them" in outcome.err
    assert not (tmp_path / "run").exists()


def test_another_split_on_resuming_is_left_out_with_a_word(phantoms, tmp_path):
    recipe, dataset = tiny_recipe(**QUICK), read_dataset(phantoms)
    train(dataset, recipe, tmp_path, TrainOptions(device="cpu", folds=3, fold=1))
    for fold, told in ((1, 0), (2, 1)):
        report = Recorder()
        train(dataset, recipe, tmp_path, TrainOptions(device="cpu", folds=3, fold=fold, resume=True), report)
        assert sum("--fold and the like" in message for message in warnings_of(report)) == told


def test_a_stop_while_the_cases_are_prepared_comes_at_the_next_case_and_the_same_command_goes_on(phantoms, tmp_path):
    stop, count = StopRequest(), 0

    class StopAtTheSecond(Recorder):
        def emit(self, event):
            nonlocal count
            super().emit(event)
            if event.get("stage") == "prepare.cases" and event["done"] == 1:
                count += 1
                stop.requested = True

    recipe = tiny_recipe(**QUICK)
    with pytest.raises(Cancelled, match="prepared"):
        train(read_dataset(phantoms), recipe, tmp_path / "run", report=StopAtTheSecond(), stop=stop)
    assert count == 1
    done = list((tmp_path / "run" / "prepared").iterdir())
    assert len(done) == 1
    train(read_dataset(phantoms), recipe, tmp_path / "run")
    assert done[0].is_dir() and (tmp_path / "run" / "model").is_dir()


def test_a_run_that_came_to_no_checkpoint_may_be_begun_again(phantoms, tmp_path):
    recipe = tiny_recipe(**QUICK)
    train(read_dataset(phantoms), recipe, tmp_path / "run")
    with pytest.raises(InvresError, match="already"):
        train(read_dataset(phantoms), recipe, tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).unlink()
    train(read_dataset(phantoms), recipe, tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).is_file()


def test_a_folder_with_a_training_is_not_written_over(phantoms, trained):
    run, _, _ = trained
    before = (run / CHECKPOINT).read_bytes()
    with pytest.raises(InvresError, match="already a training") as caught:
        train(read_dataset(phantoms), tiny_recipe(), run)
    assert "--resume" in caught.value.hint and "another folder" in caught.value.hint
    assert (run / CHECKPOINT).read_bytes() == before


def test_resuming_with_another_recipe_is_refused_or_told(phantoms, undisturbed):
    _, run = undisturbed
    dataset, options = read_dataset(phantoms), TrainOptions(device="cpu", resume=True)
    with pytest.raises(InvresError, match="is of fully_invres, the recipe asks for unet3d") as caught:
        train(dataset, tiny_recipe({"name": "unet3d", "channels": [4, 8]}), run, options)
    assert "recipe" in caught.value.hint
    report = Recorder()
    other = tiny_recipe({**RANDOM_NETWORK, "dropout": 0.5}, **LONG, precision="bf16")
    before = load_checkpoint(run)["iteration"]
    train(dataset, other, run, options, report)
    (warning,) = warnings_of(report)
    assert "goes on as it was started" in warning and "network.dropout, training.precision" in warning
    assert load_checkpoint(run)["iteration"] == before


def test_resuming_with_other_labels_is_refused(undisturbed, tmp_path):
    _, run = undisturbed
    other = write_dataset(tmp_path, cases=2, labels={"background": 0, "upper": 1, "lower": 2, "nucleus": 3})
    with pytest.raises(InvresError, match="labels of Phantoms differ"):
        train(read_dataset(other), tiny_recipe(RANDOM_NETWORK, **LONG), run, TrainOptions(device="cpu", resume=True))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": {}}', '{"recipe": {}, "plan": {}, "split": 3}'])
def test_a_damaged_run_is_told(phantoms, tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvresError, match=r"run\.json is damaged"):
        train(read_dataset(phantoms), tiny_recipe(), tmp_path, TrainOptions(device="cpu", resume=True))


@pytest.mark.parametrize("further", [(), ("--recipe",)], ids=["its recipe", "a recipe"])
def test_what_never_began_is_started_by_resuming(phantoms, tmp_path, monkeypatch, further):
    recipe, run = write_recipe(tmp_path / "default.json", **QUICK), tmp_path / "run"
    monkeypatch.setattr(console, "recipes_dir", lambda: tmp_path)
    command = ("train", "-d", phantoms, "-o", run, "--resume", "--device", "cpu", "--json")
    first = invres(*command, *((*further, recipe) if further else ()))
    assert first.code == 0, first
    assert [event["message"] for event in first.of("note") if "nothing in" in event["message"]] == [
        f"There is nothing in {run} to resume, so the training starts."
    ]
    again = invres(*command)
    assert again.code == 0 and again.events[-1]["model"] == first.events[-1]["model"]
    assert not [event for event in again.of("note") if "nothing in" in event["message"]]


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "network"), [(1, "fully_invres"), (2, "unet3d"), (3, "partially_invres"), (4, "fully_invres")]
)
def test_few_cases_are_enough(tmp_path, cases, network):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=cases))
    report = Recorder()
    recipe = tiny_recipe({"name": network}, **QUICK)
    package = train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu"), report)
    summary = package.manifest.training
    assert (summary.training_cases, summary.validation_cases) == ((cases - 1) or 1, 1)
    assert any("only one patient" in text for text in warnings_of(report)) == (cases == 1)
    assert package.manifest.metrics["upper"]["Dice"]["n"] == 1
    assert load_network(package, torch.device("cpu")).config == package.manifest.network


@pytest.mark.parametrize("channels", [("T1",), ("FLAIR", "T1w", "t1gd", "T2w")])
def test_one_to_four_channels_train_and_segment(tmp_path, channels):
    data = write_dataset(tmp_path / "data", cases=2, channels=channels)
    recipe = write_recipe(tmp_path / "recipe.json", **QUICK)
    outcome = invres("train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    case = read_dataset(data).cases[1]
    inputs = [f"--input={name}={path}" for name, path in zip(channels, case.images, strict=True)]
    output = tmp_path / "out.seg.nrrd"
    outcome = invres("segment", "-m", tmp_path / "run/model", *inputs, "-o", output, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    assert read_volume(output, kind="labels").geometry.same_as(read_volume(case.images[0]).geometry)
    assert outcome.of("result")[0]["volumes_ml"].keys() == {"upper", "lower", "core"}


def test_regions_that_overlap_train_and_segment(tmp_path):
    data = write_dataset(tmp_path / "data", cases=2, channels=("FLAIR", "T2"), labels=REGIONS)
    recipe = tiny_recipe(epochs=1, iterations_per_epoch=100, batch_size=1, schedule="constant")
    package = train(read_dataset(data), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    assert package.manifest.scheme.regions and package.manifest.network.out_channels == 3
    assert package.manifest.metrics["whole"]["Dice"]["mean"] > 0.7
    case = read_dataset(data).cases[0]
    inputs = [f"--input={name}={path}" for name, path in zip(("FLAIR", "T2"), case.images, strict=True)]
    output = tmp_path / "out.nii.gz"
    outcome = invres("segment", "-m", tmp_path / "run/model", *inputs, "-o", output, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    found, wanted = (read_volume(path, kind="labels").array for path in (output, case.label))
    assert set(np.unique(found)) <= {0, 1, 2, 3}
    dice = 2 * ((found > 0) & (wanted > 0)).sum() / ((found > 0).sum() + (wanted > 0).sum())
    assert dice > 0.7
    volumes = outcome.of("result")[0]["volumes_ml"]
    assert volumes["whole"] >= volumes["core"] >= volumes["hot"]


def test_a_decathlon_data_set_trains_and_its_4d_files_are_segmented_as_they_are(tmp_path):
    data = write_decathlon(tmp_path / "data")
    package = train(read_dataset(data), tiny_recipe(**QUICK), tmp_path / "run", TrainOptions(device="cpu"))
    assert [channel.name for channel in package.manifest.plan.channels] == ["FLAIR", "T1w"]
    image, output = read_dataset(data).cases[0].images[0], tmp_path / "out.nii.gz"
    outcome = invres("segment", "-m", package.path, "-i", image, "-o", output, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    assert read_volume(output, kind="labels").array.shape == (20, 17, 23)


def test_cases_without_a_label_are_left_out(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=4, unlabelled=2))
    package = train(dataset, tiny_recipe(**QUICK), tmp_path / "run", TrainOptions(device="cpu"))
    assert (package.manifest.training.training_cases, package.manifest.training.validation_cases) == (1, 1)


def test_no_label_at_all_is_told(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=2, unlabelled=2))
    with pytest.raises(InvresError, match="has no labelled case"):
        train(dataset, tiny_recipe(), tmp_path / "run", TrainOptions(device="cpu"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_empty_label_is_trained_on_with_a_warning(tmp_path):
    data, report = write_dataset(tmp_path / "data", cases=3, empty=(0, 2)), Recorder()
    splits = [{"train": ["patient00", "patient01"], "val": ["patient02"]}]
    (data / "splits_final.json").write_text(json.dumps(splits))
    package = train(read_dataset(data), tiny_recipe(**QUICK), tmp_path / "run", TrainOptions(device="cpu"), report)
    assert package.manifest.training.training_cases == 2
    (warning,) = warnings_of(report)
    assert warning.startswith("1 of 2 training cases have an empty label") and warning.endswith("patient00.")


def test_labels_that_are_all_empty_are_refused(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=2, empty=(0, 1)))
    with pytest.raises(InvresError, match="No training case of Phantoms has a labelled voxel") as caught:
        train(dataset, tiny_recipe(**QUICK), tmp_path / "run", TrainOptions(device="cpu"))
    assert "invres check" in caught.value.hint
    assert not (tmp_path / "run" / "run.json").exists()


def test_after_a_mistake_in_the_data_is_mended_the_same_command_trains(tmp_path):
    data = write_dataset(tmp_path / "data", cases=2, channels=("T1",))
    label = read_dataset(data).cases[0].label
    whole = label.read_bytes()
    label.write_bytes(whole[:100])
    recipe = tiny_recipe(**QUICK)
    with pytest.raises(InvresError, match="damaged"):
        train(read_dataset(data), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    assert set(os.listdir(tmp_path / "run")) <= {"lock", "prepared"} and leftovers(tmp_path / "run") == []
    label.write_bytes(whole)
    assert train(read_dataset(data), recipe, tmp_path / "run", TrainOptions(device="cpu")).path.is_dir()


def test_a_splits_file_is_kept_to_and_folds_are_counted_from_0(tmp_path):
    data = write_dataset(tmp_path / "data", cases=4, channels=("T1",))
    first = {"train": ["patient03"], "val": ["patient01"]}
    splits = [first, {"train": ["patient00", "patient02"], "val": ["patient03"]}]
    (data / "splits_final.json").write_text(json.dumps(splits))
    dataset = read_dataset(data)
    train(dataset, tiny_recipe(**QUICK), tmp_path / "run", TrainOptions(device="cpu", fold=1))
    split = json.loads((tmp_path / "run" / "run.json").read_text())["split"]
    assert split == {"train": ["patient00", "patient02"], "validation": ["patient03"]}
    for fold in (2, -1):
        with pytest.raises(InvresError, match=f"no fold {fold}; the data set has the folds 0 to 1"):
            train(dataset, tiny_recipe(**QUICK), tmp_path / str(fold), TrainOptions(device="cpu", fold=fold))


def test_every_case_can_be_trained_on_and_none_validated(tmp_path):
    data = read_dataset(write_dataset(tmp_path / "data", cases=3, channels=("T1",)))
    options = TrainOptions(device="cpu", fold=None, source="Phantoms.")
    manifest = train(data, tiny_recipe(**QUICK), tmp_path / "run", options).manifest
    assert (manifest.training.training_cases, manifest.training.validation_cases) == (3, 0)
    assert manifest.training.data == "Phantoms." and manifest.metrics == {} and manifest.expected.confidence == 0
    assert len(manifest.expected.volumes_ml) == len(manifest.scheme.labels)


@pytest.mark.parametrize("patch", [[2, 2, 2], [1, 2, 1]])
def test_a_patch_too_small_for_the_network_is_told(phantoms, tmp_path, patch):
    with pytest.raises(InvresError, match="shrink to a single voxel") as caught:
        train(read_dataset(phantoms), tiny_recipe(patch=patch), tmp_path / "run", TrainOptions(device="cpu"))
    assert "patch above 2 voxels" in caught.value.hint


def test_a_patch_larger_than_every_case_trains(phantoms, tmp_path):
    recipe = tiny_recipe(patch=[40, 24, 32], **QUICK)
    package = train(read_dataset(phantoms), recipe, tmp_path / "run", TrainOptions(device="cpu"))
    network = load_network(package, torch.device("cpu"))
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    assert 0 <= package.manifest.metrics["upper"]["Dice"]["mean"] <= 1


def test_a_full_disk_while_preparing_leaves_nothing_of_the_case(phantoms, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", **QUICK)
    with files_up_to(20_000):
        outcome = invres("train", "-d", phantoms, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--json")
    assert outcome.code == 2 and outcome.events[-1]["code"] == "write_failed"
    assert "patient" in outcome.events[-1]["message"] and "space" in outcome.events[-1]["hint"]
    assert sorted(os.listdir(tmp_path / "run")) == ["lock", "prepared"] and leftovers(tmp_path / "run") == []


def test_a_full_disk_while_training_loses_no_weights(phantoms, tmp_path):
    dataset, recipe = read_dataset(phantoms), tiny_recipe(epochs=2)
    train(dataset, tiny_recipe(epochs=1), tmp_path / "run", TrainOptions(device="cpu"))
    report, older = Recorder(), open_package(tmp_path / "run" / "model").manifest
    options = TrainOptions(device="cpu", resume=True)
    record = (tmp_path / "run" / "run.json").stat().st_size
    with files_up_to(record - 1), pytest.raises(InvresError, match=r"run\.json cannot be written"):
        train(dataset, recipe, tmp_path / "run", options, report)
    assert started_recipe(tmp_path / "run").training.epochs == 1
    with files_up_to(2 * record), pytest.raises(InvresError, match="cannot be written"):
        train(dataset, recipe, tmp_path / "run", options, report)
    assert any("checkpoint could not be saved" in text for text in warnings_of(report))
    assert open_package(tmp_path / "run" / "model").manifest == older
    assert leftovers(tmp_path / "run") == []
    train(dataset, recipe, tmp_path / "run", options)
    assert [entry["epoch"] for entry in metrics_of(tmp_path / "run")] == [1, 2]


def test_training_for_a_small_card_takes_the_memory_setting_that_fits_and_records_it(phantoms, tmp_path):
    recipe = tiny_recipe({"channels": [8, 16]}, **QUICK)
    vram_bytes = 10**9
    report = Recorder()
    package = train(
        read_dataset(phantoms), recipe, tmp_path / "run", TrainOptions(device="cpu", vram_bytes=vram_bytes), report
    )
    assert package.manifest.training.memory == "low"
    assert any("which takes" in event["message"] for event in report.events if event["event"] == "note")
    lower = tiny_recipe({"channels": [8, 16]}, memory="lowest", **QUICK)
    package = train(read_dataset(phantoms), lower, tmp_path / "other", TrainOptions(device="cpu"), report)
    assert package.manifest.training.memory == "lowest"
    with pytest.raises(InvresError, match="too little for the recipe"):
        train(read_dataset(phantoms), recipe, tmp_path / "third", TrainOptions(device="cpu", vram_bytes=10**6))
