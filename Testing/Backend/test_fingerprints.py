"""Fingerprints of images: the same however an image is stored, and another one for another image."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_datasets import GRIDS, phantom

from invres.fingerprints import fingerprints
from invres.volume import Volume, read_volume, write_volume


@pytest.fixture
def volume():
    found = phantom(GRIDS[0], 1, 4)[0][0]
    return Volume(found.array.astype(np.int16), found.geometry)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_format_and_type_make_no_difference(volume, tmp_path, name, dtype):
    write_volume(tmp_path / name, Volume(volume.array.astype(dtype), volume.geometry))
    assert fingerprints([read_volume(tmp_path / name)]) == fingerprints([volume])


def test_flipped_and_permuted_axes_make_no_difference(volume):
    assert fingerprints([volume.canonical()]) == fingerprints([volume])


def test_a_single_voxel_makes_a_difference(volume):
    other = volume.array.copy()
    other[3, 4, 5] += 1
    assert fingerprints([Volume(other, volume.geometry)]) != fingerprints([volume])


def test_the_sign_of_zero_makes_no_difference(volume):
    plain = Volume(np.where(volume.array > 2, volume.array, 0).astype(np.float32), volume.geometry)
    signed = Volume(np.where(plain.array == 0, np.float32(-0.0), plain.array), volume.geometry)
    assert np.signbit(signed.array).any() and np.array_equal(signed.array, plain.array)
    before = signed.array.tobytes()
    assert fingerprints([signed]) == fingerprints([plain])
    assert signed.array.tobytes() == before, "the volume itself stays as it is"


def test_each_channel_has_its_own_in_any_order_and_missing_ones_none(volume):
    second = phantom(GRIDS[0], 1, 5)[0][0]
    both = fingerprints([volume, second])
    assert both == fingerprints([second, None, volume]) and len(both) == 2
    assert fingerprints([None]) == ()
