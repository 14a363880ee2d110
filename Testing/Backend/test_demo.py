"""The demo, shortened: the same real volume and the same parts, a few seconds of training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from invres import demo
from invres.events import Recorder
from invres.modelpackage import verify_package
from invres.volume import read_volume


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    pytest.importorskip("nilearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    report = Recorder()
    # Long enough for two steps on a busy machine: the first has no optimizer state yet.
    return folder, demo.run(folder, 15.0, "cpu", report), report


def test_the_segmentation_lies_on_the_grid_of_the_t1_and_nowhere_outside_the_head(outcome):
    folder, found, _ = outcome
    t1 = read_volume(demo.template_files()["t1"])
    labels = read_volume(found["segmentation"], kind="labels")
    assert labels.geometry.difference(t1.geometry) == ""
    assert set(np.unique(labels.array)) <= {0, 1, 2, 3}
    copy = read_volume(folder / "icbm152_t1.nii.gz")
    assert copy.geometry.difference(t1.geometry) == "" and (copy.array == t1.array).all()
    plain = read_volume(folder / "icbm152_t1_labels.nii.gz", kind="labels")
    assert (plain.array == labels.array).all()


def test_the_memory_was_predicted(outcome):
    _, found, _ = outcome
    assert found["measured_bytes"] == pytest.approx(found["predicted_bytes"], rel=0.02)


def test_the_dice_is_that_of_the_written_files(outcome):
    _, found, _ = outcome
    labels = read_volume(found["segmentation"], kind="labels").array
    _, _, reference = demo._template(demo.template_files())
    for value, name in enumerate(("CSF", "grey matter", "white matter"), start=1):
        one, other = labels == value, reference == value
        assert found["dice"][name] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_model_and_picture_are_whole(outcome):
    folder, found, _ = outcome
    assert verify_package(found["model"]).manifest.intended_use == "Demonstration only."
    assert (folder / "overlay.png").stat().st_size > 10_000
    json.dumps(found)  # as the command line's result event


def test_training_images_are_repeatable_and_never_the_t1():
    pytest.importorskip("nilearn")
    maps = np.zeros((3, 50, 52, 54), np.float32)
    maps[0, 5:45, 5:45, 5:45] = 1
    maps[1, 10:40, 10:40, 10:40], maps[0, 10:40, 10:40, 10:40] = 1, 0
    maps[2, 15:30, 15:30, 15:30], maps[1, 15:30, 15:30, 15:30] = 1, 0
    batches = demo._TissueBatches(maps, demo.CONFIG, torch.device("cpu"))
    image, label = batches.batch(7)
    again, _ = batches.batch(7)
    other, _ = batches.batch(8)
    assert torch.equal(image, again) and not torch.equal(image, other)
    assert image.shape == (2, 1, 40, 40, 40) and label.shape == (2, 40, 40, 40)
    assert set(label.unique().tolist()) <= {0, 1, 2, 3}
