"""Models that can do without some of their channels: how they are trained, fed, stored, tuned and refused."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grids import RAS
from tiny_datasets import GRIDS as PHANTOM_GRIDS
from tiny_datasets import invres, phantom, tiny_recipe, write_dataset, write_recipe

from invres import Cancelled, InvresError
from invres.augmentation import blank_channels, draw_presence
from invres.casecomparison import Contender, can_segment, compare_case
from invres.cases import case_problems, read_dataset, write_dataset_json
from invres.checkpoint import load_checkpoint
from invres.config import AugmentationConfig, ChannelPlan, LabelScheme, PreparationPlan, TrainingConfig
from invres.configjson import to_dict
from invres.dataset_json import plain_scheme
from invres.events import Recorder, Reporter
from invres.finetuning import finetune
from invres.inference import load_network, segment, segment_volumes
from invres.metrics import score_case
from invres.modelpackage import open_package, save_package, verify_package
from invres.prediction import SegmentOptions, predict_probabilities
from invres.prepared import prepare_cases
from invres.preprocessing import PreparedCase, make_plan, prepare, with_dropout
from invres.sampling import CaseBatches
from invres.syntheticbatches import SyntheticBatches
from invres.trainer import StopRequest
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.tuningplan import TuningOptions
from invres.volume import Geometry

CPU = torch.device("cpu")
STILL = {
    f"{kind}_probability": 0.0
    for kind in ("spatial", "elastic", "gamma", "noise", "bias_field", "brightness", "low_resolution")
}
EVERYTHING = dict.fromkeys(STILL, 1.0)
GRID = Geometry((24, 20, 22), (1, 1, 1), (0, 0, 0), RAS)
SCHEME = plain_scheme([("a", (1,))])
TWO = with_dropout(PreparationPlan((ChannelPlan("T1"), ChannelPlan("T2"))), 0.5)


def recipe(dropout, augmentation=STILL, **training):
    chosen = AugmentationConfig(**augmentation, channel_dropout=dropout)
    return dataclasses.replace(tiny_recipe(**training), name="Phantom", augmentation=chosen)


@pytest.fixture(scope="module", autouse=True)
def without_forecast():
    """The forecast of memory takes seconds a training; `test_memory` is about it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training", "parttraining"):
            patch.setattr(f"invres.{module}.predict_for", lambda *_: SimpleNamespace(peak_bytes=0))
        yield


@pytest.fixture(scope="module")
def able(phantoms, tmp_path_factory):
    """A model that was trained with channels blanked until it finds most with either of them."""
    long = recipe(0.4, epochs=1, iterations_per_epoch=110, warmup_iterations=5)
    run = tmp_path_factory.mktemp("able")
    return train(read_dataset(phantoms), long, run, TrainOptions(device="cpu", validation_count=1))


@pytest.fixture(scope="module")
def unable(phantoms, tmp_path_factory):
    """A model that needs both of its channels."""
    short = recipe(0.0, epochs=1, iterations_per_epoch=2)
    run = tmp_path_factory.mktemp("unable")
    return train(read_dataset(phantoms), short, run, TrainOptions(device="cpu", validation_count=1))


def without(folder, case, *channels):
    """Removes the image files of these channels (by number) of a case."""
    for channel in channels:
        (folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz").unlink()
    return folder


def hints(outcome):
    return outcome.of("error")[0]["hint"]


def test_the_model_has_the_name_of_its_recipe(able):
    assert able.name == able.manifest.training.recipe != able.manifest.scheme.names[-1]


# --- which channels stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_channel_always_stays_and_one_that_is_not_there_never_comes(probability, channels):
    generator = torch.Generator().manual_seed(channels)
    present = torch.rand((300, channels), generator=generator) < 0.6
    present[~present.any(dim=1), 0] = True
    stays = draw_presence(present, probability, generator)
    assert bool(stays.any(dim=1).all()) and not bool((stays & ~present).any())
    if probability == 0:
        assert torch.equal(stays, present)


def test_channels_go_with_the_probability_asked_for_and_the_last_one_is_any_of_them():
    present = torch.ones((20_000, 3), dtype=torch.bool)
    stays = draw_presence(present, 0.3, torch.Generator().manual_seed(1)).float()
    # One of three is put back where all would go: 0.3 - 0.3^3 / 3.
    assert stays.mean(dim=0).tolist() == pytest.approx([1 - 0.3 + 0.009] * 3, abs=0.01)
    alone = draw_presence(present, 0.999, torch.Generator().manual_seed(1)).float()
    assert alone.mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5])
def test_a_probability_that_makes_no_sense_is_refused(probability):
    with pytest.raises(InvresError, match="0 or more and below 1"):
        AugmentationConfig(channel_dropout=probability)


# --- batches -------------------------------------------------------------------------------------------------------


def random_cases(absent=((), (), ())):
    found = []
    for seed, gone in enumerate(absent):
        random = np.random.RandomState(seed)
        image = random.normal(0, 1, (2, *GRID.shape)).astype(np.float32)
        image[list(gone)] = 0
        label = (random.uniform(size=GRID.shape) < 0.3).astype(np.int16)
        found.append(PreparedCase(f"c{seed}", image, label, GRID, GRID, tuple(gone)))
    return found


def batches(cases, dropout, augmentation=EVERYTHING):
    config = TrainingConfig(patch=(12, 10, 14), batch_size=3, seed=5)
    return CaseBatches(cases, SCHEME, config, AugmentationConfig(**augmentation, channel_dropout=dropout), CPU, TWO)


def test_dropout_blanks_whole_channels_and_changes_nothing_else():
    plain, dropped = batches(random_cases(), 0.0), batches(random_cases(), 0.5)
    blanked = 0
    for iteration in range(12):
        (image, target), (other, same) = plain.batch(iteration), dropped.batch(iteration)
        gone = (other == 0).flatten(2).all(dim=2)
        assert torch.equal(other, blank_channels(image.clone(), ~gone)) and torch.equal(target, same)
        assert not bool(gone.all(dim=1).any()) and not bool((image == 0).flatten(2).all(dim=2).any())
        blanked += int(gone.sum())
    assert 12 < blanked < 40  # of 72; half of them less those put back are 27


def test_a_batch_is_a_function_of_its_iteration_alone():
    first, again = batches(random_cases(), 0.5), batches(random_cases(), 0.5)
    later = again.batch(7)
    for iteration in range(8):
        found = first.batch(iteration)
    assert all(torch.equal(one, other) for one, other in zip(found, later, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_a_case_lacks_is_zero_after_every_augmentation_and_what_it_has_stays(dropout):
    source = batches(random_cases(((0,), (0,), (0,))), dropout)
    for iteration in range(6):
        image, _ = source.batch(iteration)
        assert not bool(image[:, 0].any()) and bool(image[:, 1].flatten(1).any(dim=1).all())


def test_synthetic_batches_blank_channels_too_and_need_no_first_channel():
    config = TrainingConfig(patch=(12, 10, 14), batch_size=3, seed=5)
    source = SyntheticBatches(random_cases(((0,), (), ())), SCHEME, config, CPU, TWO, channel_dropout=0.5)
    source.channels = 2
    gone = [(source.batch(i)[0] == 0).flatten(2).all(dim=2) for i in range(8)]
    assert 0 < int(torch.stack(gone).sum()) < 24 and not any(bool(one.all(dim=1).any()) for one in gone)


class _StopAt(Reporter):
    def __init__(self, stop, iteration):
        super().__init__()
        self.stop, self.iteration = stop, iteration

    def emit(self, event):
        self.stop.requested |= event["event"] == "progress" and event.get("iteration") == self.iteration


def test_a_stopped_and_resumed_training_with_dropout_equals_an_undisturbed_one(phantoms, tmp_path):
    chosen, dataset = recipe(0.5, {}, epochs=2, iterations_per_epoch=4), read_dataset(phantoms)
    options = TrainOptions(device="cpu", validation_count=1)
    whole = train(dataset, chosen, tmp_path / "whole", options)
    stop = StopRequest()
    with pytest.raises(Cancelled):
        train(dataset, chosen, tmp_path / "run", options, _StopAt(stop, 3), stop)
    assert load_checkpoint(tmp_path / "run")["iteration"] == 3
    again = train(dataset, chosen, tmp_path / "run", dataclasses.replace(options, resume=True))
    assert again.manifest.sha256 == whole.manifest.sha256


# --- preparing and segmenting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", PHANTOM_GRIDS)
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("crop", [True, False])
def test_an_absent_channel_is_the_same_as_a_blanked_one_bit_for_bit(able, grid, gone, crop):
    images, _ = phantom(grid, 2, seed=3)
    plan = dataclasses.replace(able.manifest.plan, crop_to_nonzero=crop)
    given = [None if place == gone else image for place, image in enumerate(images)]
    absent = prepare(given, None, plan, able.manifest.scheme)
    whole = prepare(images, None, plan, able.manifest.scheme)
    blanked = blank_channels(torch.from_numpy(whole.image[None].copy()), torch.tensor([[gone != 0, gone != 1]]))[0]
    assert absent.absent == (gone,) and whole.absent == ()
    assert np.array_equal(absent.image, blanked.numpy()) and not np.signbit(absent.image[gone]).any()
    assert absent.geometry.same_as(whole.geometry) and absent.original == given[1 - gone].geometry
    network = load_network(able, CPU)
    window, options = able.manifest.patch, SegmentOptions()
    found, wanted = (
        predict_probabilities(network, image, window, False, options)
        for image in (torch.from_numpy(absent.image), blanked)
    )
    assert torch.equal(found, wanted)
    if crop:
        assert np.array_equal(segment_volumes(able, network, given)[1], found.numpy())


def test_a_channel_that_is_needed_or_all_of_them_cannot_be_left_out():
    images, _ = phantom(PHANTOM_GRIDS[0], 2)
    needs = with_dropout(TWO, 0.0)
    with pytest.raises(InvresError, match="the case eve has no T2 volume, which the model needs") as caught:
        prepare([images[0], None], None, needs, LabelScheme(), "eve")
    assert "channel dropout" in caught.value.hint
    with pytest.raises(InvresError, match="has 0 volumes, but 2 are wanted"):
        prepare([None, None], None, TWO, LabelScheme())
    with pytest.raises(InvresError, match="needs two channels or more"):
        with_dropout(PreparationPlan(), 0.3)


def dice(package, dataset, gone=None):
    """Mean over labels and cases with one channel left out."""
    network, scores = load_network(package, CPU), []
    for case in dataset.cases:
        volumes, label = dataset.load(case)
        given = [None if place == gone else volume for place, volume in enumerate(volumes)]
        found, _, _ = segment_volumes(package, network, given)
        each = score_case(found.array, label.array, dataset.scheme, label.geometry.spacing_mm)
        scores += [score.dice for score in each.values()]
    return float(np.mean(scores))


def test_a_model_trained_with_dropout_keeps_its_dice_and_another_is_refused_not_silently_worse(able, unable, phantoms):
    dataset = read_dataset(phantoms)
    whole = dice(able, dataset)
    assert whole > 0.75
    assert dice(able, dataset, gone=1) > whole - 0.15
    assert dice(able, dataset, gone=0) > 0.5
    with pytest.raises(InvresError, match="has no T2 volume, which the model needs"):
        dice(unable, dataset, gone=1)


def test_segment_takes_what_is_there_from_a_model_that_can_do_without(able, unable, phantoms, tmp_path):
    first, second = read_dataset(phantoms).cases[0].images
    output = tmp_path / "out.nii.gz"
    common = ("--output", output, "--device", "cpu", "--json")
    outcome = invres("segment", "--model", able.path, "--input", f"T2={second}", *common)
    assert outcome.code == 0 and outcome.of("result")[0]["missing_channels"] == ["T1"]
    assert [event["message"] for event in outcome.of("note")] == [
        "There is no T1; the model was trained to do without."
    ]
    assert output.is_file()
    both = segment(able, {"T1": first, "t2": second}, tmp_path / "both.nii.gz")
    assert both["missing_channels"] == []
    refused = invres("segment", "--model", unable.path, "--input", f"T1={first}", *common)
    assert refused.code == 2 and "takes the 2 channels T1, T2; got T1." in refused.of("error")[0]["message"]
    assert "--input T1=FILE --input T2=FILE" in hints(refused) and "without" not in hints(refused)
    for wrong in (f"PD={first}", str(first)):
        outcome = invres("segment", "--model", able.path, "--input", wrong, *common)
        assert outcome.code == 2 and "--input T1=FILE" in hints(outcome)


# --- packages ------------------------------------------------------------------------------------------------------


def test_the_package_says_what_may_be_missing_through_every_door(able, unable, tmp_path):
    verify_package(able.path)
    assert able.manifest.training.channel_dropout == 0.4
    assert set(able.manifest.metrics["upper"]) == {"Dice", "Dice without T1", "Dice without T2"}
    assert set(unable.manifest.metrics["upper"]) == {"Dice"}
    assert "Dice       upper without T2: " in invres("describe", able.path).out
    for package, optional in ((able, True), (unable, False)):
        outcome = invres("models", "import", package.path, "--models-dir", tmp_path / str(optional), "--json")
        assert outcome.code == 0
        outcome = invres("models", "list", "--models-dir", tmp_path / str(optional), "--json")
        (listed,) = [one for one in outcome.of("result")[0]["models"] if not one["bundled"]]
        described = invres("describe", package.path, "--json").of("result")[0]
        for manifest in (listed["manifest"], described["manifest"], to_dict(open_package(package.path).manifest)):
            assert [channel["optional"] for channel in manifest["plan"]["channels"]] == [optional] * 2
        assert ("optional   T1, T2; one channel must be there" in invres("describe", package.path).out) is optional


def test_a_package_from_before_needs_its_channels_and_a_single_one_cannot_be_optional(able, tmp_path):
    weights = able.load_weights()
    fields = {name: getattr(able.manifest, name) for name in ("name", "network", "plan", "scheme", "patch")}
    old = save_package(tmp_path / "old", state_dict=weights, **fields).path / "manifest.json"
    content = json.loads(old.read_text(encoding="utf-8"))
    for channel in content["plan"]["channels"]:
        del channel["optional"]
    del content["training"]["channel_dropout"]
    old.write_text(json.dumps(content), encoding="utf-8")
    assert not any(channel.optional for channel in open_package(tmp_path / "old").manifest.plan.channels)
    fields |= {
        "plan": PreparationPlan((ChannelPlan("T1", optional=True),)),
        "network": dataclasses.replace(able.manifest.network, in_channels=1),
    }
    with pytest.raises(InvresError, match="single channel, which cannot be optional"):
        save_package(tmp_path / "new", state_dict=weights, **fields)


# --- data sets -----------------------------------------------------------------------------------------------------


def listed(folder, case, images):
    path = folder / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["dataset"][case]["images"] = images
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_channel_may_be_null_in_the_list_or_have_no_file(tmp_path):
    data = listed(write_dataset(tmp_path / "data"), "patient01", ["imagesTr/patient01_0000.nii.gz", None])
    without(data, "patient02", 0)
    with pytest.raises(InvresError, match="The case patient01 has no file of T2") as caught:
        read_dataset(data)
    assert "--channel-dropout" in caught.value.hint
    dataset = read_dataset(data, partial=True)
    assert [dataset.present(case) for case in dataset.cases] == [(True, True), (True, False), (False, True)]
    assert [code for _, code, _ in case_problems(dataset)] == ["missing_channel"] * 2
    volumes, label = dataset.load(dataset.case("patient02"))
    assert volumes[0] is None and volumes[1].geometry.same_as(label.geometry)
    assert dataset.geometry(dataset.case("patient02")).same_as(label.geometry)
    write_dataset_json(dataset, tmp_path / "copy.json")
    assert read_dataset(tmp_path / "copy.json", partial=True).case("patient01").images[1] is None
    findings = invres("check", "--data", data, "--json").of("result")[0]["findings"]
    assert [(one["case"], one["code"]) for one in findings] == [
        ("patient01", "missing_channel"),
        ("patient02", "missing_channel"),
    ]


def test_the_files_of_nnunet_are_counted_by_their_numbers(tmp_path):
    data = without(write_dataset(tmp_path / "data"), "patient00", 0)
    content = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    del content["dataset"]
    (data / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    dataset = read_dataset(data, partial=True)
    assert dataset.present(dataset.case("patient00")) == (False, True)


def test_a_case_without_any_image_or_a_channel_that_nobody_has_is_refused(tmp_path):
    data = without(write_dataset(tmp_path / "data"), "patient01", 0, 1)
    with pytest.raises(InvresError, match=r"patient01_0000.nii.gz of patient01 does not exist"):
        read_dataset(data, partial=True)
    empty = listed(write_dataset(tmp_path / "empty", cases=1), "patient00", [None, None])
    with pytest.raises(InvresError, match="patient00 has no file of T1"):
        read_dataset(empty, partial=True)
    other = write_dataset(tmp_path / "other")
    for case in ("patient00", "patient01", "patient02"):
        without(other, case, 1)
    with pytest.raises(InvresError, match="No case has the channel T2"):
        train(read_dataset(other, partial=True), recipe(0.3), tmp_path / "run", TrainOptions())


def test_hounsfield_figures_come_from_the_cases_that_have_the_channel(tmp_path):
    data = write_dataset(tmp_path / "data", channels=("CT", "MR"))
    whole = read_dataset(data)
    wanted = make_plan(whole, ["patient00", "patient02"]).channels[0]
    dataset = read_dataset(without(data, "patient01", 0), partial=True)
    plan = make_plan(dataset, [case.name for case in dataset.cases])
    assert plan.channels[0].clip == pytest.approx(wanted.clip, rel=0.02) and plan.channels[0].mean != 0
    with pytest.raises(InvresError, match="CT"):
        make_plan(dataset, ["patient01"])


def test_a_prepared_case_keeps_what_it_lacks_and_is_prepared_anew_when_the_file_comes(tmp_path):
    data = write_dataset(tmp_path / "data", cases=1)
    file = data / "imagesTr" / "patient00_0001.nii.gz"
    file.rename(tmp_path / "aside.nii.gz")
    dataset = read_dataset(data, partial=True)
    for _ in range(2):
        (case,) = prepare_cases(dataset, ["patient00"], TWO, tmp_path / "prepared")
        assert case.absent == (1,) and not case.image[1].any() and case.image[0].any()
    (tmp_path / "aside.nii.gz").rename(file)
    (case,) = prepare_cases(dataset, ["patient00"], TWO, tmp_path / "prepared")
    assert case.absent == () and case.image[1].any()


def test_train_takes_cases_that_lack_a_channel_where_dropout_is_on(tmp_path):
    data = without(write_dataset(tmp_path / "data"), "patient01", 1)
    file = write_recipe(tmp_path / "recipe.json", epochs=1)
    common = ("train", "-d", data, "-r", file, "--device", "cpu", "--json")
    refused = invres(*common, "-o", tmp_path / "refused")
    assert refused.code == 2 and "--channel-dropout" in hints(refused)
    outcome = invres(*common, "-o", tmp_path / "run", "--channel-dropout", "0.3")
    assert outcome.code == 0, outcome.out
    manifest = open_package(outcome.of("result")[0]["model"]).manifest
    assert all(channel.optional for channel in manifest.plan.channels)
    assert any("lack a channel; there are T1 " in event["message"] for event in outcome.of("note"))
    again = invres(*common, "-o", tmp_path / "run", "--resume")
    assert again.code == 0 and "augmentation.channel_dropout" in again.of("warning")[0]["message"]
    assert open_package(again.of("result")[0]["model"]).manifest.plan == manifest.plan
    single = write_dataset(tmp_path / "single", channels=("T1",))
    outcome = invres(*common[:2], single, *common[3:], "-o", tmp_path / "no", "--channel-dropout", "0.3")
    assert outcome.code == 2 and "two channels or more" in outcome.of("error")[0]["message"]


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def test_fine_tuning_makes_a_model_that_can_do_without_and_its_children_stay_so(unable, tmp_path):
    data = without(write_dataset(tmp_path / "data", cases=4), "patient01", 1)
    file = write_recipe(tmp_path / "recipe.json", iterations_per_epoch=2, epochs=1)
    tune = ("finetune", "-d", data, "-r", file, "--validation-count", "1", "--promote", "--device", "cpu", "--json")

    def tuned(base, name, *more):
        outcome = invres(*tune, "-m", base, "-o", tmp_path / name, *more)
        assert outcome.code == 0, outcome.out
        result = outcome.of("result")[0]
        run = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
        return result, open_package(result["model"]).manifest, run

    result, manifest, _ = tuned(unable.path, "strict")
    assert [one["case"] for one in result["skipped_cases"]] == ["patient01"]
    assert not any(channel.optional for channel in manifest.plan.channels)

    result, manifest, run = tuned(unable.path, "loose", "--channel-dropout", "0.4")
    assert result["skipped_cases"] == [] and run["augmentation"]["channel_dropout"] == 0.4
    assert all(channel.optional for channel in manifest.plan.channels)
    assert manifest.training.channel_dropout == 0.4 and manifest.network == unable.manifest.network

    _, manifest, _ = tuned(result["model"], "child")
    assert manifest.training.channel_dropout == 0.4 and manifest.plan.channels[1].optional
    other, manifest, _ = tuned(result["model"], "undone", "--channel-dropout", "0")
    assert [one["case"] for one in other["skipped_cases"]] == ["patient01"]
    assert not any(channel.optional for channel in manifest.plan.channels)


def test_a_held_out_case_that_the_base_model_cannot_take_has_no_difference(unable, tmp_path):
    data = without(write_dataset(tmp_path / "data", cases=2), "patient01", 0)
    report = Recorder()
    options = TuningOptions(device="cpu", recipe=recipe(0.5, epochs=1, iterations_per_epoch=1))
    result = finetune(unable, read_dataset(data, checked=False), tmp_path / "run", options, report)
    proof = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    found = {one["case"]: one for one in proof["cases"]}
    assert found["patient01"]["base"] == {} and found["patient01"]["difference"] is None
    assert found["patient00"]["difference"] is not None
    assert set(found["patient01"]["tuned"]) == {"upper", "lower", "core"}
    assert result["verdict"] == "not enough data to tell" and proof["difference"]["n"] == 1
    # patient01 has nothing else that it could do without.
    assert found["patient01"]["without"] == {} and set(found["patient00"]["without"]) == {"T1", "T2"}
    assert proof["without"]["T2"]["with"]["n"] == 1
    assert "where a channel is left out" in (tmp_path / "run" / "comparison.txt").read_text(encoding="utf-8")
    manifest = open_package(result["model"]).manifest
    assert [manifest.metrics["core"][name]["n"] for name in ("Dice", "Dice without T1")] == [2, 1]
    assert not [event for event in report.events if event["event"] == "warning"]


def test_the_dice_without_a_channel_is_that_of_a_case_that_lacks_it(able, tmp_path):
    data = write_dataset(tmp_path / "data", cases=2)
    contender = Contender(able, load_network(able, CPU))
    dataset = read_dataset(data)
    left_out = compare_case(dataset, dataset.cases[1], None, contender, leave_out=True)
    assert left_out.tuned == compare_case(dataset, dataset.cases[1], None, contender).tuned
    lacking = read_dataset(without(data, "patient01", 0), partial=True)
    found = compare_case(lacking, lacking.cases[1], None, contender)
    assert left_out.without["T1"] == {name: score["Dice"] for name, score in found.tuned.items()}


def test_which_cases_a_model_can_take(able, unable, tmp_path):
    data = without(write_dataset(tmp_path / "data", channels=("T1", "PD")), "patient01", 0)
    dataset = read_dataset(data, partial=True)
    for package, wanted in ((able, [True, False, True]), (unable, [False] * 3)):
        channels = package.manifest.plan.channels
        assert [can_segment(channels, dataset, case) for case in dataset.cases] == wanted
    contender = Contender(able, load_network(able, CPU))
    assert compare_case(dataset, dataset.case("patient00"), None, contender).tuned
    with pytest.raises(InvresError):
        compare_case(dataset, dataset.case("patient01"), None, contender)
