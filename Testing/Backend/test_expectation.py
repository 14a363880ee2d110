"""Warnings where an image or its segmentation is unlike what a model has seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invres import InvresError
from invres.config import ChannelPlan
from invres.expectation import (
    Expectation,
    confidence_in_words,
    merged,
    of_volumes,
    unlike_modality,
    unlike_result,
    unlike_spacing,
)
from invres.livebytes import LiveBytes
from invres.prediction import confidence_of

SEEN = of_volumes(["left", "right"], [[3.0, 2.5], [2.0, 4.0]], [0.95, 0.0, 0.9])


def test_the_extremes_of_the_training_cases_are_kept():
    assert Expectation({"left": [2.0, 3.0], "right": [2.5, 4.0]}, 0.9) == SEEN


def test_usual_volumes_and_confidence_say_nothing():
    assert unlike_result(SEEN, {"left": 1.1, "right": 7.9}, 0.81) == []


@pytest.mark.parametrize("volume", [0.9, 6.5, 0.0])
def test_an_unusual_volume_is_named_with_what_was_seen(volume):
    (sentence,) = unlike_result(SEEN, {"left": volume, "right": 3.0}, 0.9)
    assert f"left {volume:.3g} mL (training: 2 to 3)" in sentence and "right" not in sentence


def test_an_unsure_model_says_so():
    (sentence,) = unlike_result(SEEN, {"left": 2.5, "right": 3.0}, 0.7)
    assert "less sure" in sentence and "0.70 against 0.90" in sentence


def test_nothing_measured_nothing_said():
    assert unlike_result(Expectation(), {"left": 1000.0}, 0.1) == []
    assert unlike_result(Expectation(confidence=0.9), {"left": 0.0}, 0.0) == []


def test_ct_for_mr_is_told_and_mr_for_ct():
    ct = np.array([-1000.0, 40.0])
    mr = np.array([0.0, 800.0])
    (sentence,) = unlike_modality([ChannelPlan("T1", "MR")], [ct])
    assert "looks like CT" in sentence
    (sentence,) = unlike_modality([ChannelPlan("CT", "CT")], [mr])
    assert "does not look like CT" in sentence
    assert unlike_modality([ChannelPlan("T1", "MR"), ChannelPlan("CT", "CT")], [mr, ct]) == []
    assert unlike_modality([ChannelPlan("T1", "MR")], [None]) == []


def test_what_a_tuned_model_has_seen_includes_what_its_base_has():
    tuned = merged(SEEN, of_volumes(["left", "new"], [[1.5, 9.0]], [0.8]), ["left", "new"])
    assert tuned == Expectation({"left": [1.5, 3.0], "new": [9.0, 9.0]}, 0.8)


@pytest.mark.parametrize("ranges", [{"left": [2.0]}, {"left": [3.0, 2.0]}, {"left": "2"}, {"left": [-1.0, 2.0]}])
def test_ranges_that_are_none_are_refused(ranges):
    with pytest.raises(InvresError, match=r"expected\.volumes_ml\['left'\]"):
        Expectation(ranges)


def test_confidence_is_the_mean_over_the_voxels_of_labels():
    probabilities = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.8, 0.6]]).reshape(2, 1, 1, 3)
    assert confidence_of(probabilities, regions=False) == pytest.approx(0.7)
    assert confidence_of(probabilities.numpy(), regions=True) == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert confidence_of(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1), regions=False) == 0


@pytest.mark.parametrize("regions", [True, False])
def test_confidence_needs_no_memory_beside_the_probabilities(regions):
    probabilities = torch.rand(4, 40, 16, 16).softmax(dim=0) if not regions else torch.rand(4, 40, 16, 16)
    best, label = probabilities.max(dim=0)
    wanted = probabilities[probabilities > 0.5].mean() if regions else best[label > 0].mean()
    probe = LiveBytes()
    probe.watch([probabilities])
    with probe:
        found = confidence_of(probabilities, regions)
    assert found == pytest.approx(float(wanted), abs=1e-6)
    assert 0 < probe.peak - 4 * probabilities.numel() < 0.1 * 4 * probabilities.numel()


@pytest.mark.parametrize(
    ("given_mm", "told"),
    [
        ((2.0, 2.0, 2.0), False),
        ((2.4, 1.7, 2.0), False),
        ((2.5, 2.0, 2.0), True),
        ((2.0, 2.0, 1.6), True),
        ((1.0, 1.0, 1.0), True),
    ],
)
def test_voxels_of_another_size_than_a_model_learned_to_refine_are_told(given_mm, told):
    sentences = unlike_spacing((2.0, 2.0, 2.0), given_mm)
    assert len(sentences) == told
    if told:
        assert "2 x 2 x 2 mm" in sentences[0] and " x ".join(f"{side:g}" for side in given_mm) in sentences[0]


@pytest.mark.parametrize(
    ("confidence", "least", "told"),
    [
        (0.912, 0.77, "Confidence: 0.91 of 1 (0.77 or more on the images the model was tested with)"),
        (0.7, 0.77, "Confidence: 0.70 of 1, less than on all images the model was tested with (0.77 or more)"),
        (0.7, 0.0, "Confidence: 0.70 of 1"),
        (0.0, 0.77, "Confidence: none, for nothing was found"),
    ],
)
def test_confidence_is_told_beside_what_is_usual(confidence, least, told):
    assert confidence_in_words(confidence, Expectation(confidence=least)) == told
