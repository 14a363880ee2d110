"""Tells whether a model was trained on an image, without saying anything else of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from .volume import Volume

__all__ = ["fingerprints"]

DIGITS = 12  # hexadecimal: among ten thousand images two agree by chance once in five million data sets


def fingerprints(volumes: Iterable[Volume | None]) -> tuple[str, ...]:
    """Of each volume that is there, sorted: the start of the SHA-256 of its size and its voxels, as float32 in
    canonical orientation. The same for all formats and number types that hold the same values, and for flipped axes;
    another one as soon as a voxel differs. Of a case that is cut out of an image, that of the whole image is meant: a
    crop changes with the label that it was cut around (`cropping`).
    """
    return tuple(sorted({_fingerprint(volume) for volume in volumes if volume is not None}))


def _fingerprint(volume: Volume) -> str:
    array = volume.canonical().array
    digest = hashlib.sha256(f"{array.shape}".encode())
    for plane in array:  # one after the other, so that there is no second copy of the volume
        values = np.array(plane, dtype="<f4", order="C")
        values += 0.0  # of -0.0, which has other bits, it makes 0.0
        digest.update(values.data)
    return digest.hexdigest()[:DIGITS]
