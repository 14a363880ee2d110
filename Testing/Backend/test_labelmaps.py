"""Training on label maps alone: batches, data set, recipe and the whole training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_datasets import invres

from invres import InvresError
from invres.config import Label, LabelScheme, Recipe, TrainingConfig
from invres.configjson import from_dict, to_dict
from invres.labelmapbatches import LabelMapBatches
from invres.labelmaps import read_label_maps
from invres.modelpackage import open_package
from invres.networkconfig import NetworkConfig
from invres.sides import Side
from invres.synthesisconfig import LabelMapConfig, SynthesisConfig
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.volume import Geometry, Volume, write_volume

LEFT, RIGHT, MIDDLE, SKULL = 2, 41, 16, 507
LABELS = (
    Label("middle", (MIDDLE,), MIDDLE),
    Label("left", (LEFT,), LEFT),
    Label("right", (RIGHT,), RIGHT),
)
SCHEME = LabelScheme(LABELS)
CONFIG = TrainingConfig(patch=(16, 16, 16), batch_size=2)
SETTINGS = LabelMapConfig(mirrored=((LEFT, RIGHT),), finer=2)
CPU = torch.device("cpu")


def head(size=40, seed=0):
    """A ball of skull with a middle and, unequal in size, a left (low W) and a right ball inside."""
    d, h, w = np.indices((size, size, size)) - (size - 1) / 2
    labels = np.zeros((size, size, size), np.int16)
    labels[d**2 + h**2 + w**2 < 18**2] = SKULL
    labels[d**2 + h**2 + w**2 < 4**2] = MIDDLE
    labels[d**2 + h**2 + (w + 9) ** 2 < (5 + seed) ** 2] = LEFT
    labels[d**2 + h**2 + (w - 9) ** 2 < 3**2] = RIGHT
    return labels


def batches(settings=SETTINGS, maps=None, scheme=SCHEME, config=CONFIG):
    return LabelMapBatches(maps or [head()], scheme, settings, config, CPU)


def test_a_batch_is_a_function_of_seed_and_iteration():
    first, second = batches(), batches()
    second.batch(7)
    for one, other in zip(first.batch(3), second.batch(3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.batch(3)[0], first.batch(4)[0])
    image, target = first.batch(0)
    assert image.shape == (2, 1, 16, 16, 16) and image.dtype == torch.float32
    assert target.shape == (2, 16, 16, 16) and target.dtype == torch.int16
    assert set(target.unique().tolist()) <= {0, 1, 2, 3}


def test_left_stays_left_when_the_head_is_mirrored():
    source = batches()
    larger_is_left = []
    for iteration in range(8):
        for target in source.batch(iteration)[1]:
            where = [(target == number).nonzero().float() for number in (2, 3)]
            if all(len(found) for found in where):
                assert where[0][:, 2].mean() < where[1][:, 2].mean()
                larger_is_left.append(len(where[0]) > len(where[1]))
    # The left ball is the larger one in the map, the right one in its mirror image.
    assert True in larger_is_left and False in larger_is_left


def test_without_pairs_nothing_is_mirrored():
    source = batches(LabelMapConfig(finer=2))
    for iteration in range(6):
        for target in source.batch(iteration)[1]:
            assert (target == 2).sum() > (target == 3).sum()


STILL = SynthesisConfig(
    scale=0.0,
    rotation_degrees=0.0,
    shear=0.0,
    elastic_voxels=0.0,
    std=(0.0, 0.0),
    blur_voxels=0.0,
    bias_field=0.0,
    gamma_std=0.0,
    low_resolution_probability=0.0,
    noise_std=0.0,
    zero_background_probability=0.0,
    textured_background_probability=0.0,
)


def test_gain_and_offset_are_uniform_within_what_the_configuration_says():
    plain = batches(dataclasses.replace(SETTINGS, gain=0.0, offset=0.0))
    varied = batches(dataclasses.replace(SETTINGS, gain=0.5, offset=2.0))
    gains, offsets = [], []
    for iteration in range(12):
        for one, other in zip(plain.batch(iteration)[0], varied.batch(iteration)[0], strict=True):
            slope, start = np.polyfit(one.numpy().ravel(), other.numpy().ravel(), 1)
            gains.append(np.log(slope) / 0.5)
            offsets.append(start / 2.0)
    for drawn in (gains, offsets):
        assert 0.6 < np.abs(drawn).max() <= 1 + 1e-4 and min(drawn) < 0 < max(drawn)


def test_an_image_voxel_is_the_mean_of_the_finer_voxels_in_it():
    labels = np.full((32, 32, 32), MIDDLE, np.int16)
    labels[:, :, 15:] = LEFT  # the border lies in the middle of an image voxel
    scheme = LabelScheme((Label("middle", (MIDDLE,), 1), Label("left", (LEFT,), 2)))
    settings = LabelMapConfig(finer=2, gain=0.0, offset=0.0, synthesis=STILL)
    image, target = batches(settings, [labels], scheme).batch(0)
    row, kind = image[0, 0, 8, 8], target[0, 8, 8]
    ends = row[0], row[-1]
    mixed = [value for value in row if min(ends) + 1e-3 < value < max(ends) - 1e-3]
    assert len(mixed) == 1 and torch.isclose(mixed[0], (ends[0] + ends[1]) / 2, atol=1e-4)
    assert kind[0] == 1 and kind[-1] == 2


def test_pairs_share_their_contrast():
    settings = LabelMapConfig(mirrored=((LEFT, RIGHT),), gain=0.0, offset=0.0, synthesis=STILL)
    config = dataclasses.replace(CONFIG, patch=(36, 36, 36), batch_size=1)
    image, target = batches(settings, config=config).batch(0)
    left, right, middle = (image[0, 0][target[0] == number].unique() for number in (2, 3, 1))
    assert len(left) == len(right) == 1 and torch.equal(left, right) and not torch.equal(left, middle)


def test_similar_values_lie_around_one_mean():
    values = [(LEFT, MIDDLE)]
    close = dataclasses.replace(STILL, tissue_probability=1.0, tissue_spread=1.0)
    settings = LabelMapConfig(similar=tuple(values), gain=0.0, offset=0.0, synthesis=close)
    config = dataclasses.replace(CONFIG, patch=(36, 36, 36), batch_size=1)
    source = batches(settings, config=config)
    near, far = [], []
    for iteration in range(6):
        image, target = source.batch(iteration)
        middle, left, right = (image[0, 0][target[0] == number].mean() for number in (1, 2, 3))
        near.append((left - middle).abs())
        far.append((right - middle).abs())
    assert max(near) < 0.2 and torch.stack(far).mean() > 5 * torch.stack(near).mean()


def test_a_label_that_no_map_has_is_named():
    scheme = LabelScheme((*LABELS, Label("amygdala", (18, 54), 18)))
    with pytest.raises(InvresError, match=r"No label map has a value of amygdala \(18, 54\)"):
        batches(scheme=scheme)


def test_regions_are_refused():
    with pytest.raises(InvresError, match="exclude one another"):
        batches(scheme=dataclasses.replace(SCHEME, regions=True))


def write_maps(folder, count=3):
    for number in range(count):
        # Stored as the real ones are: axes other than canonical.
        geometry = Geometry((40, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.diag([-1.0, -1.0, 1.0]))
        array = head(seed=number % 2)[:, ::-1, ::-1]
        write_volume(folder / f"person_{number}.nii.gz", Volume(np.ascontiguousarray(array), geometry))


def test_a_folder_of_label_maps_is_a_data_set(tmp_path):
    write_maps(tmp_path)
    dataset = read_label_maps(tmp_path, LABELS)
    assert [case.name for case in dataset.labelled_cases] == ["person_0", "person_1", "person_2"]
    assert dataset.channel_names == ("MR",) and dataset.scheme == SCHEME


def test_a_folder_without_label_maps_is_refused(tmp_path):
    with pytest.raises(InvresError, match="There are no label maps") as found:
        read_label_maps(tmp_path, LABELS)
    assert "one label map" in found.value.hint


RECIPE = Recipe(
    name="tiny-any-contrast",
    network=NetworkConfig(name="fully_invres", channels=(4, 16)),
    training=TrainingConfig(patch=(16, 16, 16), batch_size=1, iterations_per_epoch=2, epochs=2, schedule="constant"),
    spacing_mm=(2.0, 2.0, 2.0),
    window=(16, 24, 16),
    label_maps=SETTINGS,
    labels=LABELS,
)


def test_training_on_label_maps_gives_a_package_for_any_contrast_and_resumes_to_the_same_weights(tmp_path):
    write_maps(tmp_path / "maps")
    dataset = read_label_maps(tmp_path / "maps", RECIPE.labels)
    options = TrainOptions(device="cpu", validation_count=1)
    whole = train(dataset, RECIPE, tmp_path / "whole", options)
    manifest = open_package(whole.path).manifest
    assert [channel.name for channel in manifest.plan.channels] == ["MR"]
    assert manifest.plan.spacing_mm == (2.0, 2.0, 2.0) and manifest.patch == (16, 24, 16)
    assert not manifest.plan.normalise_first, "images are synthesised, and scaled, at the spacing of the plan"
    assert manifest.scheme == SCHEME and set(manifest.metrics) == {"middle", "left", "right"}
    assert manifest.metrics["left"]["Dice"]["n"] == 2
    # With a constant learning rate half of a training is the first half of the whole one.
    half = dataclasses.replace(RECIPE, training=dataclasses.replace(RECIPE.training, epochs=1))
    train(dataset, half, tmp_path / "parts", options)
    # The run says that its data are label maps.
    again = ("train", "-d", tmp_path / "maps", "-o", tmp_path / "parts", "--resume", "--device", "cpu")
    outcome = invres(*again, "--epochs", 2, "--json")
    assert outcome.code == 0, outcome
    assert all("too short to learn" in event["message"] for event in outcome.of("warning")), outcome
    resumed = open_package(tmp_path / "parts" / "model").load_weights()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.load_weights().items())


def test_a_label_of_both_sides_is_divided_by_the_package(tmp_path):
    write_maps(tmp_path / "maps", 2)
    labels = (LABELS[0], Label("both", (LEFT, RIGHT), RIGHT))
    maps = dataclasses.replace(SETTINGS, mirrored=((LEFT, RIGHT),))
    short = dataclasses.replace(RECIPE.training, iterations_per_epoch=1, epochs=1)
    recipe = dataclasses.replace(RECIPE, labels=labels, label_maps=maps, training=short)
    dataset = read_label_maps(tmp_path / "maps", labels)
    package = train(dataset, recipe, tmp_path / "run", TrainOptions(device="cpu", fold=None))
    assert package.manifest.sides == (Side("both", LEFT, RIGHT),)
    assert package.manifest.output_scheme.names == ("middle", "left both", "right both")


def test_a_recipe_with_label_maps_goes_to_json_and_back():
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(RECIPE)))) == RECIPE


@pytest.mark.parametrize("change", [{"labels": ()}, {"label_maps": None}])
def test_labels_and_label_maps_belong_together(change):
    with pytest.raises(InvresError, match="labels and label_maps together"):
        dataclasses.replace(RECIPE, **change)


def test_settings_that_follow_from_the_labels_are_refused():
    with pytest.raises(InvresError, match="must leave groups"):
        LabelMapConfig(synthesis=SynthesisConfig(targets=(1,)))
    with pytest.raises(InvresError, match=r"label_maps\.beginning must leave groups"):
        LabelMapConfig(beginning=SynthesisConfig(targets=(1,)), beginning_iterations=5)


def test_the_beginning_is_easier_and_ends():
    easy = LabelMapConfig(
        mirrored=((LEFT, RIGHT),), synthesis=SynthesisConfig(), beginning=STILL, beginning_iterations=2
    )
    both, hard = batches(easy), batches(dataclasses.replace(easy, beginning=None, beginning_iterations=0))
    assert not torch.equal(both.batch(1)[0], hard.batch(1)[0])
    assert torch.equal(both.batch(2)[0], hard.batch(2)[0])


@pytest.mark.parametrize("half", [{"beginning": STILL}, {"beginning_iterations": 3}])
def test_a_beginning_needs_its_length(half):
    with pytest.raises(InvresError, match="must be given together"):
        LabelMapConfig(**half)


def test_a_family_gives_each_group_of_tissues_its_range():
    fluid, bright = (20.0, 30.0), (190.0, 200.0)
    drawn = dataclasses.replace(STILL, tissue_probability=1.0, tissue_spread=0.0, families=((fluid, bright),))
    settings = LabelMapConfig(similar=((MIDDLE,), (LEFT,)), gain=0.0, offset=0.0, synthesis=drawn)
    config = dataclasses.replace(CONFIG, patch=(36, 36, 36), batch_size=1)
    source = batches(settings, config=config)
    for iteration in range(4):
        image, target = source.batch(iteration)
        assert image[0, 0][target[0] == 1].mean() < image[0, 0][target[0] == 2].mean() - 1


def test_families_must_fit_the_groups():
    with pytest.raises(InvresError, match="one pair for each of the 1 groups"):
        LabelMapConfig(similar=((LEFT, MIDDLE),), synthesis=SynthesisConfig(families=(((1.0, 2.0), (3.0, 4.0)),)))
