"""Synthetic batches from the training cases' own label maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grids import RAS
from test_transfer import scheme

from invres import InvresError
from invres.config import AugmentationConfig, Label, LabelScheme, PreparationPlan, TrainingConfig
from invres.preprocessing import PreparedCase
from invres.sampling import CaseBatches
from invres.synthesis import synthesise
from invres.synthesisconfig import SynthesisConfig
from invres.syntheticbatches import MixedBatches, SyntheticBatches
from invres.volume import Geometry

CPU = torch.device("cpu")
CONFIG = TrainingConfig(patch=(16, 12, 16), batch_size=2, seed=4, foreground_fraction=1.0)
PLAN = PreparationPlan()
GRID = Geometry((24, 20, 22), (1, 1, 1), (0, 0, 0), RAS)


def cases(count=2, channels=2):
    found = []
    for seed in range(count):
        random = np.random.RandomState(seed)
        label = np.zeros(GRID.shape, np.int16)
        label[8:16, 6:14, 6:16] = 1
        label[10:14, 8:12, 8:14] = 2
        label[8, 6, 6:8] = -1
        image = random.normal(-2, 0.1, (channels, *GRID.shape)).astype(np.float32)
        image[:, 3:21, 3:17, 3:19] += 2 + random.normal(0, 0.5, (18, 14, 16))
        image += label * 0.7
        found.append(PreparedCase(f"c{seed}", image, label, GRID, GRID))
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_batches_have_all_channels_and_only_the_users_labels(channels):
    batches = SyntheticBatches(cases(channels=channels), scheme("a", "b"), CONFIG, CPU, PLAN)
    seen = set()
    for iteration in range(6):
        image, target = batches.batch(iteration)
        assert image.shape == (2, channels, 16, 12, 16) and target.shape == (2, 16, 12, 16)
        assert bool(torch.isfinite(image).all())
        seen |= set(target.unique().tolist())
    assert {0, 1, 2} <= seen <= {-1, 0, 1, 2}


def test_each_batch_is_a_function_of_seed_and_iteration():
    first, again = (SyntheticBatches(cases(), scheme("a", "b"), CONFIG, CPU, PLAN) for _ in range(2))
    later = again.batch(3)
    for one, other in zip(first.batch(3), later, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.batch(4)[0], later[0])


def test_channels_show_one_anatomy_in_contrasts_of_their_own():
    labels = torch.zeros(1, 1, 20, 20, 20, dtype=torch.int16)
    labels[:, :, 5:15, 5:15, 5:15] = 1
    plain = SynthesisConfig(noise_std=0, low_resolution_probability=0, bias_field=0, std=(0, 0), blur_voxels=0)
    generator = torch.Generator().manual_seed(3)
    image, moved = synthesise(labels, plain, generator, (16, 16, 16), channels=2)
    assert image.shape == (1, 2, 16, 16, 16) and moved.shape == (1, 1, 16, 16, 16)
    inside = moved[0, 0] == 1
    for channel in image[0]:
        assert channel[inside].std() < 0.05 * channel.std(), "flat where the label is"
    assert not torch.allclose(image[0, 0], image[0, 1])


def test_what_is_around_the_labels_is_divided_into_structures():
    batches = SyntheticBatches(cases(1), scheme("a", "b"), CONFIG, CPU, PLAN)
    numbers = batches.cases[0].image[0]
    label = np.asarray(cases(1)[0].label)
    assert np.array_equal(numbers[label != 0], label[label != 0])
    assert len(np.unique(numbers[label == 0])) > 3 and numbers[0, 0, 0] == 0


def test_an_image_without_surroundings_still_gives_batches():
    (one,) = cases(1)
    empty = PreparedCase("flat", np.zeros_like(one.image), one.label, GRID, GRID)
    image, _ = SyntheticBatches([empty], scheme("a", "b"), CONFIG, CPU, PLAN).batch(0)
    assert bool(torch.isfinite(image).all())


def test_regions_become_masks():
    regions = LabelScheme((Label("all", (1, 2), 1), Label("core", (2,), 2)), regions=True)
    _, target = SyntheticBatches(cases(), regions, CONFIG, CPU, PLAN).batch(0)
    assert target.shape == (2, 2, 16, 12, 16)
    assert bool((target[:, 1] <= target[:, 0]).all())


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_fraction_is_kept_and_decided_by_the_iteration_alone(fraction):
    class Source:
        def __init__(self, name):
            self.name = name

        def batch(self, iteration):
            return self.name, iteration

    drawn = [MixedBatches(Source("real"), Source("synthetic"), fraction, 0).batch(i)[0] for i in range(300)]
    assert drawn.count("synthetic") / 300 == pytest.approx(fraction, abs=0.08)
    assert drawn == [MixedBatches(Source("real"), Source("synthetic"), fraction, 0).batch(i)[0] for i in range(300)]


def test_a_fraction_beyond_1_is_refused():
    real = CaseBatches(cases(), scheme("a", "b"), CONFIG, AugmentationConfig(), CPU, PLAN)
    with pytest.raises(InvresError, match="from 0 to 1"):
        MixedBatches(real, real, 1.5, 0)
    with pytest.raises(InvresError, match="no case"):
        SyntheticBatches([], scheme("a"), CONFIG, CPU, PLAN)
