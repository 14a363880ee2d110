"""What hangs together: the largest piece of a mask, and models whose labels are one piece of anatomy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_inference import SCHEME, Known, package_of
from tiny_datasets import tiny_recipe, write_dataset

from invres import InvresError
from invres.cases import read_dataset
from invres.config import Label, LabelScheme, Recipe
from invres.events import Recorder
from invres.inference import segment
from invres.manifest import manifest_from_json, manifest_to_json
from invres.modelpackage import bundled_models_dir
from invres.pieces import LOOSE, clear_loose_pieces, largest_piece
from invres.prediction import SegmentOptions
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.tunedmodel import _stays_one_piece, contender_of
from invres.volume import Geometry, Volume, read_volume, write_volume

BRAIN = Path(__file__).resolve().parents[2] / "Resources" / "Recipes" / "brain-any-contrast.json"


def boxes(*places, shape=(30, 30, 30)):
    """A label map with boxes, each (value, first voxel, size)."""
    labels = np.zeros(shape, np.uint8)
    for value, first, size in places:
        labels[tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))] = value
    return labels


def test_the_largest_piece_is_alone_and_a_corner_is_no_bridge():
    mask = boxes((1, (0, 0, 0), (3, 3, 3)), (1, (3, 3, 3), (4, 4, 4))) > 0
    assert np.array_equal(largest_piece(mask), boxes((1, (3, 3, 3), (4, 4, 4))) > 0)
    assert not largest_piece(np.zeros((3, 3, 3), bool)).any()


def test_labels_that_touch_are_one_piece_and_small_loose_ones_go():
    whole = [(3, (5, 5, 5), (10, 10, 10)), (7, (15, 5, 5), (2, 10, 10))]  # 1200 voxels of two labels
    labels = boxes(*whole, (7, (20, 20, 20), (3, 3, 3)), (3, (0, 0, 0), (1, 1, 2)))
    assert clear_loose_pieces(labels) == (2, 29)
    assert np.array_equal(labels, boxes(*whole))


@pytest.mark.parametrize(("length", "stays"), [(19, False), (20, True)])
def test_a_second_piece_of_a_twentieth_stays(length, stays):
    labels = boxes((1, (0, 0, 0), (4, 10, 10)), (2, (10, 0, 0), (1, 1, length)))
    assert LOOSE == 1 / 20 and clear_loose_pieces(labels) == ((0, 0) if stays else (1, length))
    assert (labels == 2).any() == stays


def test_where_nothing_was_found_nothing_is_left_out():
    labels = np.zeros((4, 4, 4), np.uint8)
    assert clear_loose_pieces(labels) == (0, 0)


@pytest.fixture
def scene(tmp_path):
    """A large piece of the labels a and c and two loose ones of b, and a package that finds exactly these."""
    grid = Geometry((24, 24, 24), (2.0, 2.0, 2.0), (3, -7, 11), np.eye(3))
    classes = boxes((1, (2, 2, 2), (16, 16, 16)), (3, (18, 2, 2), (2, 16, 16)), shape=grid.shape)
    loose = boxes((2, (21, 20, 15), (3, 4, 9)), (2, (21, 2, 2), (3, 3, 3)), shape=grid.shape)
    write_volume(tmp_path / "image.nii.gz", Volume((100.0 * (classes + loose)).astype(np.float32), grid))
    package = package_of(tmp_path / "model", spacing_mm=grid.spacing_mm, patch=(24, 24, 24))
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, one_piece=True))
    values = np.array([0, *(label.output_value for label in SCHEME.labels)])
    return package, tmp_path / "image.nii.gz", values[classes], values[loose]


@pytest.mark.parametrize("keep", [False, True], ids=["left out", "kept"])
def test_a_model_of_one_piece_leaves_out_what_hangs_loose(scene, tmp_path, keep):
    package, image, whole, loose = scene
    events = Recorder()
    options = SegmentOptions(one_piece=not keep)
    found = segment(
        package,
        {"": image},
        tmp_path / "out.nii.gz",
        options,
        tmp_path / "p.nii.gz",
        events,
        Known(4, scale=100.0),
        uncertainty_path=tmp_path / "u.nii.gz",
    )
    written = read_volume(tmp_path / "out.nii.gz", kind="labels").array
    assert np.array_equal(written, whole + loose if keep else whole)
    assert found["settings"]["one_piece"] == (not keep)
    assert found["volumes_ml"]["b"] == pytest.approx((loose > 0).sum() * 0.008 if keep else 0, abs=1e-3)
    notes = [event["message"] for event in events.events if "loose" in event.get("message", "")]
    told = "Left out: 1.1 mL in 2 loose pieces, which did not hang together with the rest."
    assert notes == ([] if keep else [told])
    of_classes = np.stack([read_volume(path).array for path in found["probabilities"]])
    values = np.array([0, *(label.output_value for label in SCHEME.labels)])
    of_written = np.take_along_axis(of_classes, np.searchsorted(values, written)[None], axis=0)[0]
    unsure = read_volume(found["uncertainty"]).array
    assert np.abs(unsure - (1 - of_written)).max() < 1e-6
    assert (unsure[loose > 0].max() < 0.1) if keep else (unsure[loose > 0].min() > 0.9)


def test_a_region_cuts_off_what_hangs_together_outside_of_it(scene, tmp_path):
    package, image, whole, loose = scene
    geometry = read_volume(image).geometry
    corner, far = (geometry.affine @ [*index, 1] for index in ((0, 0, 0), np.subtract(geometry.shape, 1)))
    ends = np.sort(np.stack([corner[:3], far[:3]]), axis=0) + np.array([[-1], [1]])
    options = SegmentOptions(roi_mm=tuple(ends.T.ravel().tolist()))
    segment(package, {"": image}, tmp_path / "out.nii.gz", options, network=Known(4, scale=100.0))
    assert np.array_equal(read_volume(tmp_path / "out.nii.gz", kind="labels").array, whole + loose)


def test_other_models_keep_all_pieces(scene, tmp_path):
    package, image, whole, loose = scene
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, one_piece=False))
    segment(package, {"": image}, tmp_path / "out.nii.gz", network=Known(4, scale=100.0))
    assert np.array_equal(read_volume(tmp_path / "out.nii.gz", kind="labels").array, whole + loose)


def test_a_manifest_says_it_and_an_older_one_does_not(tmp_path):
    manifest = dataclasses.replace(package_of(tmp_path / "model").manifest, one_piece=True)
    written = manifest_to_json(manifest)
    assert manifest_from_json(written) == manifest
    older = json.loads(written)
    del older["one_piece"]
    assert not manifest_from_json(json.dumps(older).encode()).one_piece


def test_regions_are_no_piece_and_a_training_on_them_says_so_at_once(tmp_path):
    scheme = dataclasses.replace(SCHEME, regions=True)
    with pytest.raises(InvresError, match="exclude one another"):
        dataclasses.replace(package_of(tmp_path / "model", scheme).manifest, one_piece=True)
    dataset = read_dataset(write_dataset(tmp_path / "data", labels={"background": 0, "all": [1, 2, 3], "core": [2]}))
    recipe = dataclasses.replace(tiny_recipe(), one_piece=True)
    with pytest.raises(InvresError, match="exclude one another"):
        train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu"))
    assert not (tmp_path / "run" / "prepared").exists()


def test_a_trained_model_is_of_one_piece_where_its_recipe_says_so(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data"))
    recipe = dataclasses.replace(tiny_recipe(iterations_per_epoch=1, epochs=1), one_piece=True)
    assert train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu")).manifest.one_piece


def test_a_tuned_model_stays_in_one_piece_until_it_has_a_label_of_its_own(tmp_path):
    base = dataclasses.replace(package_of(tmp_path / "model").manifest, one_piece=True)
    same = LabelScheme((Label("A", (5,), 5), Label("c", (4,), 4), Label("b", (6,), 6)))
    assert _stays_one_piece(base, same)
    assert not _stays_one_piece(base, LabelScheme((*same.labels, Label("lesion", (7,), 7))))
    assert not _stays_one_piece(base, LabelScheme(same.labels[1:])), "without a part the rest may fall apart"
    assert not _stays_one_piece(base, dataclasses.replace(same, regions=True))
    assert not _stays_one_piece(dataclasses.replace(base, one_piece=False), same)


@pytest.mark.parametrize("one_piece", [False, True])
def test_a_tuned_model_is_proved_as_it_will_segment(tmp_path, one_piece):
    """With or without loose pieces as the base model beside it, or the same network would score differently."""
    base = package_of(tmp_path / "model")
    manifest = dataclasses.replace(base.manifest, one_piece=one_piece)
    plan = SimpleNamespace(
        network=manifest.network, plan=manifest.plan, scheme=SCHEME, training=SimpleNamespace(patch=manifest.patch)
    )
    options = SimpleNamespace(name="")
    tuned = contender_of(manifest, plan, options, base.load_weights(), torch.device("cpu"))
    assert tuned.package.manifest.one_piece == one_piece


def test_the_bundled_brain_model_is_one_piece_as_its_recipe_says():
    recipe = Recipe.read(BRAIN)
    manifest = manifest_from_json((bundled_models_dir() / recipe.name / "manifest.json").read_bytes())
    assert recipe.one_piece and manifest.one_piece
