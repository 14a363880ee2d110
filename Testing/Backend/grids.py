"""Grids of every orientation, label schemes and small volumes on them, for the tests of preparation and return."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.volume import Geometry, Volume

RAS = np.eye(3)[:, ::-1]  # columns: superior, anterior, right
PLAIN = LabelScheme((Label("a", (10,), 10), Label("b", (150,), 150), Label("c", (250,), 250)))
REGIONS = LabelScheme((Label("whole", (1, 2, 4), 2), Label("core", (1, 4), 1), Label("hot", (4,), 4)), regions=True)


def rotation(degrees, axis=(1.0, 2.0, 3.0)):
    return Rotation.from_rotvec(np.radians(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()


GRIDS = {
    "canonical": Geometry((9, 12, 7), (1.0, 1.0, 1.0), (0, 0, 0), RAS),
    "flipped": Geometry((9, 12, 7), (3.0, 0.7, 0.7), (4.2, -91, 13), RAS * [-1, 1, -1]),
    "sagittal": Geometry((7, 9, 11), (1.2, 0.9, 0.9), (-3, 7, 1), RAS[:, [2, 0, 1]] * [1, -1, -1]),
    "oblique": Geometry((11, 8, 13), (2.5, 0.43, 0.43), (17.3, 2, -50), rotation(28) @ RAS * [1, -1, 1]),
    "diagonal": Geometry((7, 11, 9), (1.0, 1.0, 2.0), (1, 2, 3), rotation(44.99, (0, 0, 1)) @ RAS),
}


def pair(grid, values, margin=2):
    """An image that is zero in a margin, and a label inside it."""
    rng = np.random.default_rng(1)
    image = np.zeros(grid.shape, dtype=np.float32)
    label = np.zeros(grid.shape, dtype=np.int16)
    inner = (slice(margin, -1),) * 3
    image[inner] = rng.uniform(50, 100, image[inner].shape)
    label[inner] = rng.choice([0, *values], label[inner].shape)
    return Volume(image, grid), Volume(label, grid)


def plan_for(spacing, modality="MR", crop=True, channels=1, **ct):
    return PreparationPlan(tuple(ChannelPlan(f"c{i}", modality, **ct) for i in range(channels)), spacing, crop)
