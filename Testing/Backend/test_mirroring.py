"""Models that average predictions of mirrored images: which, along what, and how that is switched off."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grids import GRIDS
from test_inference import SCHEME, package_of, steps_volume
from tiny_datasets import invres, tiny_recipe, write_dataset

from invres import InvresError
from invres.cases import read_dataset
from invres.config import AugmentationConfig, Label, LabelScheme
from invres.events import Recorder
from invres.inference import load_network, segment, segment_volumes
from invres.manifest import manifest_from_json, manifest_to_json
from invres.mirroring import check_mirror, flips_of, kept_mirror
from invres.pace import remember_speed
from invres.planning import plan_segmentation
from invres.prediction import SegmentOptions
from invres.sides import is_of_one_side
from invres.training import train
from invres.trainingrun import TrainOptions, started_recipe
from invres.tunedmodel import contender_of
from invres.tuningplan import TuningOptions, plan_tuning
from invres.volume import write_volume

CPU = torch.device("cpu")
SIDED = LabelScheme((Label("Left kidney", (1,), 1), Label("right kidney", (2,), 2)))


def test_every_combination_of_axes_is_a_flip():
    assert flips_of(()) == [()]
    assert flips_of((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(set(flips_of((2, 0, 1)))) == 8


@pytest.mark.parametrize("axes", [(3,), (-1,), (1, 1)])
def test_axes_are_those_of_a_volume_each_once(axes, tmp_path):
    with pytest.raises(InvresError, match="each once"):
        check_mirror(SCHEME, axes)
    with pytest.raises(InvresError, match="mirror_axes"):
        dataclasses.replace(tiny_recipe(), mirror_axes=axes)


def test_labels_of_one_side_are_not_mirrored_across_the_middle(tmp_path):
    with pytest.raises(InvresError, match="Left kidney"):
        check_mirror(SIDED, (2,))
    check_mirror(SIDED, (0, 1))
    with pytest.raises(InvresError, match="Left kidney"):
        dataclasses.replace(package_of(tmp_path / "model", SIDED).manifest, mirror_axes=(2,))
    assert kept_mirror(SIDED, (0, 2)) == (0,) and kept_mirror(SCHEME, (0, 2)) == (0, 2)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return package_of(tmp_path_factory.mktemp("model") / "model")


def mirrored(package, axes=(2,)):
    return dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, mirror_axes=axes))


def test_a_manifest_says_it_and_an_older_one_does_not(package):
    written = manifest_to_json(mirrored(package).manifest)
    assert manifest_from_json(written) == mirrored(package).manifest
    older = json.loads(written)
    del older["mirror_axes"]
    assert manifest_from_json(json.dumps(older).encode()).mirror_axes == ()


def test_a_model_segments_as_it_wants_unless_asked_otherwise(package, tmp_path):
    volume, _ = steps_volume(GRIDS["canonical"])
    write_volume(tmp_path / "image.nii.gz", volume)
    network = load_network(package, CPU)

    def found(model, options):
        return segment_volumes(model, network, [volume], options)[1]

    plain, both = (found(package, SegmentOptions(mirror_axes=axes)) for axes in ((), (2,)))
    assert not np.allclose(plain, both)
    assert np.array_equal(found(mirrored(package), SegmentOptions()), both)
    assert np.array_equal(found(mirrored(package), SegmentOptions(mirror_axes=())), plain)
    assert np.array_equal(found(package, SegmentOptions()), plain)
    inputs = {"": tmp_path / "image.nii.gz"}
    for options, axes in ((SegmentOptions(), [2]), (SegmentOptions(mirror_axes=()), [])):
        said = segment(mirrored(package), inputs, tmp_path / "o.nii.gz", options, network=network)
        assert said["settings"]["mirror_axes"] == axes


def test_the_command_line_takes_the_models_way_and_can_be_told_otherwise(package, tmp_path):
    (package.path / "manifest.json").write_bytes(manifest_to_json(mirrored(package, (0, 2)).manifest))
    volume, _ = steps_volume(GRIDS["canonical"])
    write_volume(tmp_path / "image.nii.gz", volume)
    model = ["-m", package.path, "--device", "cpu"]
    try:
        for wish, axes in (([], [0, 2]), (["--mirror"], []), (["--mirror", "1"], [1])):
            asked = ["segment", *model, "-i", tmp_path / "image.nii.gz", "-o", tmp_path / "o.nii.gz", "--json"]
            outcome = invres(*asked, *wish)
            assert outcome.code == 0, outcome.err
            assert outcome.of("result")[0]["settings"]["mirror_axes"] == axes
            size = ["--shape", *map(str, volume.array.shape), "--spacing", "1", "1", "1"]
            assert invres("plan", *model, *size, *wish).code == 0
    finally:
        (package.path / "manifest.json").write_bytes(manifest_to_json(package.manifest))


def test_a_plan_counts_every_mirrored_prediction(package):
    remember_speed(package.manifest.sha256, "cpu", 1, (10, 10, 10), 100.0)  # 0.1 s a voxel: the rest is next to nothing
    seconds = [
        plan_segmentation(model.manifest, (8, 9, 7), (1.0, 1.0, 1.0), CPU, mirror_axes=axes).seconds
        for model, axes in ((package, None), (mirrored(package), None), (mirrored(package, (0, 2)), ()))
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.02) and seconds[2] == seconds[0]


def test_a_recipe_predicts_mirrored_only_along_what_it_trains(tmp_path):
    with pytest.raises(InvresError, match="along which it does not train"):
        dataclasses.replace(tiny_recipe(), mirror_axes=(2,))
    recipe = dataclasses.replace(
        tiny_recipe(iterations_per_epoch=1, epochs=1), augmentation=AugmentationConfig(flip_axes=(1, 2))
    )
    dataset = read_dataset(write_dataset(tmp_path / "data"))
    trained = train(dataset, dataclasses.replace(recipe, mirror_axes=(2,)), tmp_path / "run", TrainOptions("cpu"))
    assert trained.manifest.mirror_axes == (2,)


def test_a_training_of_sided_labels_mirrors_nothing_from_left_to_right(tmp_path):
    labels = {"background": 0, "Left-upper": 1, "Right-upper": 2, "core": 3}
    dataset = read_dataset(write_dataset(tmp_path / "data", labels=labels))
    small = tiny_recipe(iterations_per_epoch=1, epochs=1)
    recipe = dataclasses.replace(small, augmentation=AugmentationConfig(flip_axes=(1, 2)), mirror_axes=(1, 2))
    report = Recorder()
    manifest = train(dataset, recipe, tmp_path / "run", TrainOptions("cpu"), report).manifest
    assert manifest.mirror_axes == (1,) and started_recipe(tmp_path / "run").augmentation.flip_axes == (1,)
    told = [event["message"] for event in report.events if event["event"] == "note"]
    assert "Labels are of one side (Left-upper), so nothing is mirrored from left to right." in told
    base = package_of(tmp_path / "model", channels=("MR",))
    plan = plan_tuning(base.manifest, dataset, tmp_path / "prepared", TuningOptions(device="cpu", recipe=recipe))
    assert plan.augmentation.flip_axes == (1,)


@pytest.mark.parametrize(
    ("name", "one"),
    [
        *[(name, True) for name in ("left kidney", "Left-Hippocampus", "hippocampus_R", "ctx-lh-insula", "LeftKidney")],
        *[(name, True) for name in ("L putamen", "wm (right)", "RIGHT", "Kidney_left")],
        *[
            (name, False)
            for name in ("liver", "brain stem", "Leftover", "CSF", "tumour core", "alright", "Rl", "vertebra L1")
        ],
    ],
)
def test_names_of_one_side_are_known_in_all_usual_spellings(name, one):
    assert is_of_one_side(name) == one


def test_a_tuned_model_goes_on_to_see_mirrored_images_and_is_proved_on_them(tmp_path):
    base = mirrored(package_of(tmp_path / "model", channels=("MR",)))
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=1))
    plan = plan_tuning(base.manifest, dataset, tmp_path / "prepared", TuningOptions(device="cpu"))
    assert plan.augmentation.flip_axes == (2,)
    like = SimpleNamespace(
        network=base.manifest.network, plan=base.manifest.plan, scheme=SCHEME, training=SimpleNamespace(patch=(8, 8, 8))
    )
    tuned = contender_of(base.manifest, like, SimpleNamespace(name=""), base.load_weights(), CPU)
    assert tuned.package.manifest.mirror_axes == (2,)
