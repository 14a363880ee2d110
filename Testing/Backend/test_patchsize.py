"""The patch of a training: cut to what its cases have, rounded up to what the network divides by, and never more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import RAS
from tiny_datasets import tiny_recipe, write_dataset

from invres.cases import read_dataset
from invres.config import Recipe
from invres.events import Recorder
from invres.networks import build
from invres.patchsize import within_cases
from invres.training import train
from invres.trainingrun import TrainOptions, started_recipe
from invres.volume import Geometry

RECIPES = Path(__file__).resolve().parents[2] / "Resources" / "Recipes"
DEFAULT = Recipe.read(RECIPES / "default.json")


def grids(*shapes, spacing_mm=(1.0, 1.0, 1.0)):
    return [Geometry(shape, spacing_mm, (0, 0, 0), RAS) for shape in shapes]


def notes(report):
    return [event["message"] for event in report.events if event["event"] == "note"]


@pytest.mark.parametrize(
    ("shapes", "spacing_mm", "patch"),
    [
        ([(20, 512, 512)] * 3, (1.0, 1.0, 1.0), (32, 96, 96)),
        ([(10, 200, 200), (20, 200, 200), (64, 200, 200)], (1.0, 1.0, 1.0), (32, 96, 96)),
        ([(40, 100, 240)] * 2, (2.0, 1.0, 2.0), (32, 96, 96)),  # 20 x 100 x 120 once they are resampled
        ([(97, 96, 300)], (1.0, 1.0, 1.0), (96, 96, 96)),
        ([(95, 81, 80)], (1.0, 1.0, 1.0), (96, 96, 80)),
        ([(7, 9, 11)], (1.0, 1.0, 1.0), (32, 32, 32)),  # in 16 the coarsest maps would be a single voxel
        ([(7, 9, 17)], (1.0, 1.0, 1.0), (16, 16, 32)),
    ],
)
def test_the_default_patch_is_cut_to_the_median_case(shapes, spacing_mm, patch):
    report = Recorder()
    fitted = within_cases(DEFAULT, grids(*shapes), spacing_mm, report)
    assert fitted.training.patch == patch
    assert len(notes(report)) == (patch != (96, 96, 96))
    if patch != (96, 96, 96):
        assert "x".join(map(str, patch)) in notes(report)[0] and "96x96x96" in notes(report)[0]
    network = build(fitted.network)
    image = torch.zeros(1, 1, *patch)
    assert torch.isfinite(network.train()(image).logits).all() if max(patch) <= 32 else True


def test_recipes_of_label_maps_and_data_without_images_keep_their_patch():
    recipe = Recipe.read(RECIPES / "brain-any-contrast.json")
    assert within_cases(recipe, grids((20, 30, 40)), (1.0, 1.0, 1.0)) is recipe
    assert within_cases(DEFAULT, [], (1.0, 1.0, 1.0)) is DEFAULT


def test_the_hippocampus_recipe_is_as_large_as_its_crops_already():
    """The median of the Decathlon's Task04 is about 36 x 50 x 36 voxels."""
    recipe = Recipe.read(RECIPES / "hippocampus-t1.json")
    assert within_cases(recipe, grids((36, 50, 36)), (1.0, 1.0, 1.0)) is recipe


def test_a_training_says_that_its_patch_is_smaller_and_goes_on_with_it_in_silence(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=2))
    recipe = tiny_recipe({"vae": {"latent": 4, "reduced_channels": 2}}, patch=[48, 12, 48], epochs=1)
    options, report = TrainOptions(device="cpu", fold=None), Recorder()
    manifest = train(dataset, recipe, tmp_path / "run", options, report).manifest
    files = [dataset.geometry(case).canonical() for case in dataset.cases]
    sizes = np.median([grid.with_spacing(manifest.plan.spacing_mm).shape for grid in files], axis=0)
    wanted = tuple(min(p, -int(-size // 2) * 2) for p, size in zip((48, 12, 48), sizes, strict=True))
    assert manifest.patch == wanted == manifest.network.vae.patch and max(wanted) < 48
    assert started_recipe(tmp_path / "run").training.patch == wanted
    assert any("instead of 48x12x48" in note for note in notes(report))
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=2))
    train(dataset, longer, tmp_path / "run", dataclasses.replace(options, resume=True), report := Recorder())
    assert [event for event in report.events if event["event"] == "warning"] == []
    other = dataclasses.replace(longer, training=dataclasses.replace(longer.training, patch=(8, 8, 8)))
    train(dataset, other, tmp_path / "run", dataclasses.replace(options, resume=True), report := Recorder())
    assert ["training.patch" in event["message"] for event in report.events if event["event"] == "warning"] == [True]
