"""Overlap, surface distance and volume: masks worked out by hand, empty masks, symmetry, MONAI, cropping."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.metrics import hausdorff_distance

from invres import InvresError
from invres.config import Label, LabelScheme
from invres.metrics import EMPTY_DISTANCE_MM, score_case, score_masks, surface, surface_distances

SPACING_MM = (3.0, 0.7, 1.1)


def box(shape, *corners):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(low, high) for low, high in corners)] = True
    return mask


def blobs(seed, shape=(17, 26, 21), fraction=0.8):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return noise > np.quantile(noise, fraction)


def scheme(*labels, **fields):
    return LabelScheme(tuple(Label(name, values, values[0]) for name, values in labels), **fields)


def test_two_single_voxels_are_as_far_apart_as_their_spacing_says():
    predicted, reference = box((5, 6, 7), (1, 2), (1, 2), (1, 2)), box((5, 6, 7), (3, 4), (1, 2), (5, 6))
    score = score_masks(predicted, reference, SPACING_MM)
    expected_mm = np.hypot(2 * 3.0, 4 * 1.1)
    assert score.hausdorff_mm == pytest.approx(expected_mm)
    assert score.hd95_mm == pytest.approx(expected_mm)
    assert (score.dice, score.nsd, score.iou) == (0, 0, 0)
    assert (score.tp, score.fp, score.fn, score.tn) == (0, 1, 1, 5 * 6 * 7 - 2)


@pytest.mark.parametrize(("axis", "expected_mm"), [(0, 3.0), (1, 0.7), (2, 1.1)])
def test_a_cube_shifted_by_one_voxel_is_one_spacing_away(axis, expected_mm):
    reference = box((9, 9, 9), (2, 6), (2, 6), (2, 6))
    predicted = np.roll(reference, 1, axis)
    score = score_masks(predicted, reference, SPACING_MM)
    assert score.dice == pytest.approx(2 * 48 / 128)
    assert score.iou == pytest.approx(48 / 80)
    assert score.hausdorff_mm == pytest.approx(expected_mm)
    assert (score.tp, score.fp, score.fn, score.tn) == (48, 16, 16, 729 - 80)


def test_a_single_stray_voxel_moves_hausdorff_but_not_hd95():
    reference = box((12, 12, 40), (2, 10), (2, 10), (2, 10))
    predicted = reference.copy()
    predicted[5, 5, 39] = True
    score = score_masks(predicted, reference, (1, 1, 1))
    assert score.hausdorff_mm == pytest.approx(30)
    assert score.hd95_mm == 0
    surface_voxels = 8**3 - 6**3
    assert score.nsd == pytest.approx(2 * surface_voxels / (2 * surface_voxels + 1))


def test_hd95_is_the_larger_of_the_directed_percentiles_and_not_that_of_the_pooled_distances():
    """The reference is a line of 1 voxel, the prediction the same voxel and 9 more."""
    reference, predicted = box((1, 1, 10), (0, 1), (0, 1), (0, 1)), box((1, 1, 10), (0, 1), (0, 1), (0, 10))
    score = score_masks(predicted, reference, (1, 1, 2))
    directed = np.percentile(2.0 * np.arange(10), 95)
    assert score.hd95_mm == pytest.approx(directed)
    assert score.hd95_mm != pytest.approx(np.percentile([*(2.0 * np.arange(10)), 0], 95))


def test_asd_is_the_mean_over_both_surfaces_and_mhd_the_larger_directed_mean():
    """A voxel and a line of 10 that begins with it: one distance of 0, and ten of 0 to 18 mm."""
    reference, predicted = box((1, 1, 10), (0, 1), (0, 1), (0, 1)), box((1, 1, 10), (0, 1), (0, 1), (0, 10))
    score = score_masks(predicted, reference, (1, 1, 2))
    assert score.asd_mm == pytest.approx((2 * 45 + 0) / (10 + 1))
    assert score.mhd_mm == pytest.approx(2 * 45 / 10)


@pytest.mark.parametrize(("axis", "spacing"), [(0, 3.0), (1, 0.7), (2, 1.1)])
def test_two_plates_a_voxel_apart_are_one_spacing_apart_in_every_mean(axis, spacing):
    plate = np.zeros((6, 6, 6), dtype=bool)
    plate[(slice(None),) * axis + (2,)] = True
    score = score_masks(np.roll(plate, 1, axis), plate, SPACING_MM)
    assert (score.asd_mm, score.mhd_mm) == pytest.approx((spacing, spacing))


@pytest.mark.parametrize(("axis", "spacing"), [(0, 3.0), (1, 0.7), (2, 1.1)])
def test_of_a_shifted_cube_the_mean_distances_are_those_counted_by_hand(axis, spacing):
    """A cube of 5 voxels has 98 on its surface. Shifted by one, it has a face of 25 outside of the other cube,
    a spacing away, and in the opposite face 9 inside of it; all else lies on the other's surface."""
    reference = box((12, 12, 12), (3, 8), (3, 8), (3, 8))
    score = score_masks(np.roll(reference, 1, axis), reference, SPACING_MM)
    # Of the face inside: the face behind it is a spacing away, the sides 1 voxel from its ring and 2 from its middle.
    others = [SPACING_MM[other] for other in range(3) if other != axis]
    inside = sum(
        min(spacing, (2 - abs(one)) * others[0], (2 - abs(other)) * others[1])
        for one in (-1, 0, 1)
        for other in (-1, 0, 1)
    )
    expected = (25 * spacing + inside) / 98
    assert (score.asd_mm, score.mhd_mm) == pytest.approx((expected, expected))


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), SPACING_MM])
@pytest.mark.parametrize("seed", range(4))
def test_mean_distances_equal_those_of_every_pair_of_surface_voxels(seed, spacing_mm):
    generator = np.random.default_rng(seed)
    predicted, reference = generator.random((7, 9, 8)) < 0.1, generator.random((7, 9, 8)) < 0.4

    def border(mask):
        """Voxels with one of six neighbours outside, told one by one."""
        padded, found = np.pad(mask, 1), []
        for place in np.argwhere(mask):
            around = [tuple(place + 1 + step) for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int))]
            if not all(padded[neighbour] for neighbour in around):
                found.append(place * np.array(spacing_mm))
        return np.array(found)

    pairs = cdist(border(predicted), border(reference))
    forth, back = pairs.min(axis=1), pairs.min(axis=0)
    score = score_masks(predicted, reference, spacing_mm)
    assert score.asd_mm == pytest.approx((forth.sum() + back.sum()) / (forth.size + back.size))
    assert score.mhd_mm == pytest.approx(max(forth.sum() / forth.size, back.sum() / back.size))
    assert score.asd_mm < score.mhd_mm, "the surfaces are not of one size"


def test_mhd_is_the_modified_hausdorff_distance_of_scikit_image():
    predicted, reference = blobs(7), blobs(8, fraction=0.6)
    expected = hausdorff_distance(surface(predicted), surface(reference), method="modified")
    assert score_masks(predicted, reference, (1, 1, 1)).mhd_mm == pytest.approx(expected)


def test_nsd_counts_the_share_of_both_surfaces_within_the_tolerance():
    reference, predicted = box((1, 1, 10), (0, 1), (0, 1), (0, 1)), box((1, 1, 10), (0, 1), (0, 1), (0, 10))
    assert score_masks(predicted, reference, (1, 1, 1), tolerance_mm=3.0).nsd == pytest.approx((4 + 1) / 11)
    assert score_masks(predicted, reference, (1, 1, 1), tolerance_mm=0.0).nsd == pytest.approx((1 + 1) / 11)


def test_rounding_of_the_spacing_in_a_file_does_not_flip_the_nsd():
    reference = box((9, 9, 9), (2, 6), (2, 6), (2, 6))
    score = score_masks(np.roll(reference, 1, 0), reference, (1.000001, 1.0, 1.0), tolerance_mm=1.0)
    assert score.nsd == 1


def test_volume_is_in_ml_and_its_error_signed_and_relative():
    reference, predicted = box((10, 10, 10), (0, 5), (0, 5), (0, 4)), box((10, 10, 10), (0, 5), (0, 5), (0, 3))
    score = score_masks(predicted, reference, (2.0, 3.0, 4.0))
    assert score.volume_reference_ml == pytest.approx(2.4)
    assert score.volume_predicted_ml == pytest.approx(1.8)
    assert score.volume_error_ml == pytest.approx(-0.6)
    assert score.volume_error_relative == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("predicted", "reference", "empty", "dice", "distance_mm", "nsd"),
    [
        (False, False, "both", 1, 0, 1),
        (True, False, "reference", 0, EMPTY_DISTANCE_MM, 0),
        (False, True, "predicted", 0, EMPTY_DISTANCE_MM, 0),
        (True, True, "none", 1, 0, 1),
    ],
)
def test_empty_masks_follow_the_rule_of_brats(predicted, reference, empty, dice, distance_mm, nsd):
    blob = box((5, 6, 7), (1, 3), (1, 3), (1, 3))
    score = score_masks(blob & predicted, blob & reference, SPACING_MM)
    assert score.empty == empty
    assert (score.dice, score.hausdorff_mm, score.hd95_mm, score.nsd) == (dice, distance_mm, distance_mm, nsd)
    assert (score.asd_mm, score.mhd_mm) == (distance_mm, distance_mm)
    assert score.iou == dice
    assert (score.volume_error_relative is None) == (not reference)
    assert score.tp + score.fp + score.fn + score.tn == 5 * 6 * 7


def test_the_distance_of_one_empty_mask_is_the_number_of_brats():
    assert EMPTY_DISTANCE_MM == 373.1287


def test_the_surface_is_what_a_six_neighbourhood_erosion_takes_away_also_at_the_edge_of_the_volume():
    whole = np.ones((4, 5, 6), dtype=bool)
    assert np.count_nonzero(surface(whole)) == 4 * 5 * 6 - 2 * 3 * 4
    notched = np.ones((5, 5, 5), dtype=bool)
    notched[0, 0, 2] = False
    assert not surface(notched)[1, 1, 2]
    assert surface(notched)[0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_symmetric_apart_from_the_sign_of_the_volume_error(seed):
    one, other = blobs(seed), blobs(seed + 100, fraction=0.7)
    forth, back = score_masks(one, other, SPACING_MM), score_masks(other, one, SPACING_MM)
    for key in ("dice", "hausdorff_mm", "hd95_mm", "asd_mm", "mhd_mm", "nsd", "iou", "tp", "tn"):
        assert getattr(forth, key) == pytest.approx(getattr(back, key))
    assert forth.volume_error_ml == pytest.approx(-back.volume_error_ml)
    assert (forth.fp, forth.fn) == (back.fn, back.fp)
    assert forth.hd95_mm <= forth.hausdorff_mm
    assert forth.asd_mm <= forth.mhd_mm <= forth.hausdorff_mm


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_do_not_depend_on_the_direction_of_an_axis(axis):
    one, other = blobs(1), blobs(2)
    flipped, scored = (
        asdict(score_masks(*pair, SPACING_MM)) for pair in ((np.flip(one, axis), np.flip(other, axis)), (one, other))
    )
    assert flipped.pop("empty") == scored.pop("empty") and flipped == pytest.approx(scored)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), SPACING_MM])
@pytest.mark.parametrize("seed", range(3))
def test_surface_metrics_equal_monai(seed, spacing_mm):
    predicted, reference = blobs(seed), blobs(seed + 50)
    score = score_masks(predicted, reference, spacing_mm, tolerance_mm=1.7)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, reference)]
    options = {"include_background": True, "spacing": list(spacing_mm)}
    assert score.hausdorff_mm == pytest.approx(compute_hausdorff_distance(*tensors, **options).item(), rel=1e-5)
    hd95_mm = compute_hausdorff_distance(*tensors, percentile=95, **options).item()
    assert score.hd95_mm == pytest.approx(hd95_mm, rel=1e-5)
    assert score.nsd == pytest.approx(compute_surface_dice(*tensors, [1.7], **options).item(), rel=1e-5)
    asd_mm = compute_average_surface_distance(*tensors, symmetric=True, **options).item()
    assert score.asd_mm == pytest.approx(asd_mm, rel=1e-5)


def test_a_small_structure_in_a_big_volume_scores_as_it_does_uncropped():
    predicted, reference = np.zeros((2, 60, 80, 70), dtype=bool)
    predicted[20:37, 30:56, 40:61], reference[22:39, 29:55, 40:61] = blobs(3), blobs(4)
    found = surface_distances(predicted, reference, SPACING_MM)
    surfaces = [surface(mask) for mask in (predicted, reference)]
    uncropped = [ndimage.distance_transform_edt(~other, sampling=SPACING_MM) for other in surfaces]
    np.testing.assert_array_equal(found.predicted_to_reference_mm, uncropped[1][surfaces[0]])
    np.testing.assert_array_equal(found.reference_to_predicted_mm, uncropped[0][surfaces[1]])


def test_a_region_is_the_union_of_its_values():
    reference = np.array([[[0, 1, 2, 3, 0]]], dtype=np.int16)
    predicted = np.array([[[0, 2, 1, 3, 3]]], dtype=np.uint8)
    scores = score_case(
        predicted, reference, scheme(("whole", (1, 2, 3)), ("core", (2, 3)), ("three", (3,))), (1, 1, 1)
    )
    assert list(scores) == ["whole", "core", "three"]
    assert (scores["whole"].tp, scores["whole"].fp, scores["whole"].fn) == (3, 1, 0)
    assert (scores["core"].tp, scores["core"].fp, scores["core"].fn) == (1, 2, 1)
    assert (scores["three"].tp, scores["three"].fp, scores["three"].fn) == (1, 1, 0)


def test_each_label_scores_as_its_mask_alone():
    predicted, reference = blobs(5).astype(np.int16) * 7, blobs(6).astype(np.int16) * 7
    predicted[:3], reference[-3:] = 150, 150
    scores = score_case(predicted, reference, scheme(("a", (7,)), ("b", (150,))), SPACING_MM, tolerance_mm=2.0)
    for name, value in (("a", 7), ("b", 150)):
        assert scores[name] == score_masks(predicted == value, reference == value, SPACING_MM, tolerance_mm=2.0)


def test_voxels_to_be_ignored_are_in_no_count():
    reference = np.array([[[0, 1, 1, 9, 9]]])
    predicted = np.array([[[0, 1, 0, 1, 0]]])
    score = score_case(predicted, reference, scheme(("a", (1,)), ignore_value=9), (1, 1, 1))["a"]
    assert (score.tp, score.fp, score.fn, score.tn) == (1, 0, 1, 1)
    assert score.hausdorff_mm == 1


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "tolerance_mm", "word"),
    [
        ((3, 4, 6), (1, 1, 1), 1.0, "one shape"),
        ((3, 4, 5), (1, 0, 1), 1.0, "spacing"),
        ((3, 4, 5), (1, 1), 1.0, "spacing"),
        ((3, 4, 5), (1, float("nan"), 1), 1.0, "spacing"),
        ((3, 4, 5), (1, 1, 1), -1.0, "tolerance"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_a_sentence(shape, spacing_mm, tolerance_mm, word):
    with pytest.raises(InvresError, match=word):
        score_case(np.zeros(shape, int), np.zeros((3, 4, 5), int), scheme(("a", (1,))), spacing_mm, tolerance_mm)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_the_border_of_what_is_ignored_is_no_surface(shift):
    """The upper half of an organ, of which the lower half was not drawn, scores as the whole would."""
    z, y, x = np.indices((40, 40, 40)) - 19.5
    organ = z**2 + y**2 + x**2 < 14**2
    found = np.roll(organ, shift, axis=2)
    whole = score_masks(found, organ, (1.0, 1.0, 1.0))
    drawn = np.where(z < 0, 255, organ.astype(np.uint8))
    scheme = LabelScheme((Label("organ", (1,), 1),), ignore_value=255)
    half = score_case(found.astype(np.uint8), drawn, scheme, (1.0, 1.0, 1.0))["organ"]
    assert half.nsd == pytest.approx(whole.nsd, abs=0.01) and half.hausdorff_mm == pytest.approx(whole.hausdorff_mm)


def test_a_mask_inside_of_what_is_ignored_still_has_a_distance():
    reference = np.full((9, 9, 9), 255, np.uint8)
    reference[4, 4, 4] = 1
    scheme = LabelScheme((Label("a", (1,), 1),), ignore_value=255)
    score = score_case((reference == 1).astype(np.uint8), reference, scheme, (1.0, 1.0, 1.0))["a"]
    assert (score.dice, score.hausdorff_mm, score.nsd) == (1, 0, 1)
