"""The picture that a segmentation is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from invres.config import Label, LabelScheme
from invres.overlay import draw_overlay
from invres.volume import Geometry, Volume

SCHEME = LabelScheme((Label("left", (1,), 1, (255, 0, 0)), Label("right", (5,), 5, (0, 0, 255))))


def picture_of(tmp_path, direction):
    """A volume with label 1 on the patient's left and 5 on the right, as pixels of the picture."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    canonical = Geometry((11, 13, 15), (3.0, 1.0, 1.0), (0, 0, 0), np.eye(3)[::-1].copy())
    array = np.random.default_rng(0).normal(100, 5, canonical.shape).astype(np.float32)
    labels = np.zeros(canonical.shape, np.uint8)
    labels[3:8, 4:9, 1:5], labels[3:8, 4:9, 10:14] = 1, 5  # the last axis runs to the patient's right
    geometry = canonical
    if direction == "flipped":
        array, labels = array[:, :, ::-1], labels[:, :, ::-1]
        turned = np.asarray(canonical.direction).copy()
        turned[:, 2] *= -1
        origin = (canonical.affine @ [0, 0, 14, 1])[:3]
        geometry = Geometry(canonical.shape, canonical.spacing_mm, tuple(origin), turned)
    path = draw_overlay(
        tmp_path / "new folder" / "a.png",
        Volume(np.ascontiguousarray(array), geometry),
        [("Ours", labels)],
        SCHEME,
        "T",
    )
    return pyplot.imread(path)[..., :3]


@pytest.mark.parametrize("direction", ["canonical", "flipped"])
def test_the_patients_right_is_on_the_pictures_left(tmp_path, direction):
    pixels = picture_of(tmp_path, direction)
    red = np.argwhere((pixels[..., 0] > 0.5) & (pixels[..., 0] > pixels[..., 2] + 0.3))
    blue = np.argwhere((pixels[..., 2] > 0.5) & (pixels[..., 2] > pixels[..., 0] + 0.3))
    third = pixels.shape[1] / 3
    for column in (1, 2):  # coronal and axial views show both sides
        inside = [
            found[
                (found[:, 1] > column * third)
                & (found[:, 1] < (column + 1) * third)
                & (found[:, 0] < 0.9 * len(pixels))
            ]
            for found in (red, blue)
        ]
        assert len(inside[0]) and len(inside[1])
        assert inside[1][:, 1].mean() < inside[0][:, 1].mean()  # right (blue) is drawn left of left (red)


def test_nothing_half_written_is_left(tmp_path):
    picture_of(tmp_path, "canonical")
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["a.png"]
