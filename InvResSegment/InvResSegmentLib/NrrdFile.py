"""Writes voxels with their place as an NRRD file, which the backend reads."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["nrrdType", "writeNrrd"]

_TYPES = {"i1": "int8", "u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "u4": "uint32"}
_TYPES |= {"i8": "int64", "u8": "uint64", "f4": "float", "f8": "double"}


def nrrdType(dtype: np.dtype) -> str | None:
    """What NRRD calls a number type; None for one that it does not know."""
    return _TYPES.get(dtype.str[1:])


def writeNrrd(
    path: str | Path,
    array: np.ndarray,
    matrix: np.ndarray,
    fields: Mapping[str, str] | None = None,
    packed: bool = False,
) -> None:
    """Writes voxels (K, J, I). matrix: 4x4, (i, j, k, 1) -> RAS mm. Raises OSError where the disk does not take it.

    fields: what else the header says, ASCII without line breaks. packed: with gzip, which takes its time.
    """
    with open(path, "wb") as stream:
        stream.write(_header(array, matrix, fields or {}, "gzip" if packed else "raw"))
        if packed:
            with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as packing:
                for plane in array:
                    packing.write(memoryview(np.ascontiguousarray(plane)).cast("B"))
        else:
            stream.write(memoryview(np.ascontiguousarray(array)).cast("B"))


def _header(array: np.ndarray, matrix: np.ndarray, fields: Mapping[str, str], encoding: str) -> bytes:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix + 0.0  # + 0.0: no "-0"

    def vector(numbers: np.ndarray) -> str:
        return "({})".format(",".join(f"{number:.17g}" for number in numbers))

    lines = [
        "NRRD0004",
        f"type: {nrrdType(array.dtype)}",
        "dimension: 3",
        "space: left-posterior-superior",
        "sizes: {} {} {}".format(*array.shape[::-1]),
        f"space directions: {' '.join(vector(lps[:3, axis]) for axis in range(3))}",
        "kinds: domain domain domain",
        f"endian: {'big' if array.dtype.str[0] == '>' else 'little'}",
        f"encoding: {encoding}",
        f"space origin: {vector(lps[:3, 3])}",
        *(f"{key}:={value}" for key, value in fields.items()),
    ]
    return ("\n".join(lines) + "\n\n").encode("ascii")
