"""Reads a segmentation (.seg.nrrd) of the backend or of Slicer: labels on a grid, with names, colours, terminology.
And an image (.nrrd) of the backend.

Slicer's own reader ends the whole application on a file that was cut off; this one raises an error.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["DamagedFile", "ResultFile", "SegmentLabel", "readImage", "readMasks", "readResultFile", "readSegments"]

_TYPES = {"unsigned char": "u1", "signed char": "i1", "short": "i2", "unsigned short": "u2"}
_TYPES |= {"int": "i4", "unsigned int": "u4", "uint8": "u1", "int8": "i1", "int16": "i2", "uint16": "u2"}
_TYPES |= {"int32": "i4", "uint32": "u4"}
_NUMBERS = {"float": "f4"}
_LONGEST_HEADER = 4 * 1024**2


class DamagedFile(Exception):
    """The file is not a whole segmentation; the text says why, for the log."""


@dataclass(frozen=True)
class SegmentLabel:
    """A label of a model or a result. colour: (r, g, b) from 0 to 255, or None; terminology: Slicer's entry or "".

    layer: of a file in which segments overlap, the label map that it is in.
    """

    name: str
    value: int
    colour: tuple[float, float, float] | None = None
    terminology: str = ""
    layer: int = 0


@dataclass(frozen=True, eq=False)
class ResultFile:
    """The segments of a file. layers: whole numbers (K, J, I, layers), one layer unless segments overlap; matrix: 4x4
    (i, j, k, 1) -> RAS mm; segments: in the order of the file."""

    layers: np.ndarray
    matrix: np.ndarray
    segments: tuple[SegmentLabel, ...]

    @property
    def labels(self) -> np.ndarray:
        """The label map (K, J, I) of the first layer."""
        return self.layers[..., 0]

    def mask(self, number: int) -> np.ndarray:
        """The voxels (K, J, I) of a segment, counted from 0."""
        segment = self.segments[number]
        return self.layers[..., segment.layer] == segment.value


def readResultFile(path: str | Path) -> ResultFile:
    """The labels of a .seg.nrrd. Raises DamagedFile for anything else, OSError if it cannot be read."""
    found = readMasks(path)
    if not found.segments:
        raise DamagedFile("it names no segment")
    return found


def readMasks(path: str | Path) -> ResultFile:
    """The segments of any .seg.nrrd; there may be none. Raises DamagedFile, OSError if it cannot be read."""
    return _read(path, _TYPES)


def readImage(path: str | Path) -> ResultFile:
    """The float32 voxels of a .nrrd in place of labels. Raises DamagedFile, OSError if it cannot be read."""
    return _read(path, _NUMBERS)


def _read(path: str | Path, types: dict[str, str]) -> ResultFile:
    with open(path, "rb") as stream:
        fields, values = _header(stream)
        size, dtype = _layout(fields, types)
        data = stream.read()
    length = int(np.prod(size)) * dtype.itemsize
    if fields.get("encoding") in ("gzip", "gz"):
        # Never more than the header promises: a few bytes may unpack to gigabytes.
        unpack = zlib.decompressobj(wbits=31)
        try:
            data = unpack.decompress(data, length + 1)
        except zlib.error as error:
            raise DamagedFile(f"its voxels cannot be unpacked: {error}") from None
        if not unpack.eof:
            raise DamagedFile("its voxels are cut off")
    elif fields.get("encoding") != "raw":
        raise DamagedFile(f"unknown encoding {fields.get('encoding')!r}")
    if len(data) != length:
        raise DamagedFile(f"it has {len(data)} bytes of voxels instead of {length}")
    array = np.frombuffer(data, dtype).reshape(size[::-1])
    segments = _segments(values)
    if any(not 0 <= segment.layer < size[0] for segment in segments):
        raise DamagedFile("it names a layer that it does not hold")
    return ResultFile(array.astype(dtype.newbyteorder("="), copy=False), _matrix(fields), segments)


def readSegments(path: str | Path) -> tuple[SegmentLabel, ...]:
    """The segments that the header of a .seg.nrrd names; () for a segmentation in which there is nothing.

    Raises DamagedFile and OSError as `readResultFile` does.
    """
    with open(path, "rb") as stream:
        _fields, values = _header(stream)
    segments = _segments(values)
    if not segments and not any(key.startswith("Segmentation_") for key in values):
        raise DamagedFile("it names no segment")
    return segments


def _header(stream) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of the format ("sizes: 3 4 5") and the file's own ("Segment0_Name:=liver")."""
    if not stream.readline(16).startswith(b"NRRD000"):
        raise DamagedFile("it is no NRRD file")
    fields: dict[str, str] = {}
    values: dict[str, str] = {}
    while line := stream.readline(_LONGEST_HEADER):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            return fields, values
        if text.startswith("#"):
            continue
        name, separator, value = text.partition(":=")
        if separator:
            values[name] = re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), value)
        else:
            name, _separator, value = text.partition(":")
            fields[name.strip().lower()] = value.strip()
    raise DamagedFile("its header has no end")


def _layout(fields: dict[str, str], types: dict[str, str]) -> tuple[tuple[int, int, int, int], np.dtype]:
    """Layers and voxels (layers, I, J, K), and the type of number."""
    try:
        sizes = [int(text) for text in fields["sizes"].split()]
        # Several layers lie in front, as a list of values for each voxel.
        layers, first, second, third = sizes if fields.get("kinds", "").startswith("list") else [1, *sizes]
        dtype = np.dtype(types[fields["type"]])
    except (KeyError, ValueError):
        what = "label map" if types is _TYPES else "image"
        raise DamagedFile(f"it is no {what} of three dimensions") from None
    if min(layers, first, second, third) < 1:
        raise DamagedFile("it has no voxels")
    return (layers, first, second, third), dtype.newbyteorder(">" if fields.get("endian") == "big" else "<")


def _matrix(fields: dict[str, str]) -> np.ndarray:
    try:
        columns = re.findall(r"\(([^)]*)\)", fields["space directions"] + fields["space origin"])
        numbers = np.array([[float(text) for text in column.split(",")] for column in columns])
        if numbers.shape != (4, 3) or not np.isfinite(numbers).all():
            raise ValueError
    except (KeyError, ValueError):
        raise DamagedFile("its place in the world is missing") from None
    space = fields.get("space", "").lower()
    flips = {"left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1), "right-anterior-superior": (1, 1, 1)}
    if space not in flips:
        raise DamagedFile(f"unknown space {space!r}")
    matrix = np.eye(4)
    matrix[:3] = np.diag(flips[space]) @ numbers.T
    return matrix


def _segments(values: dict[str, str]) -> tuple[SegmentLabel, ...]:
    numbers = sorted(int(found[1]) for key in values if (found := re.fullmatch(r"Segment(\d+)_ID", key)))
    segments = []
    for number in numbers:
        try:
            value = int(values[f"Segment{number}_LabelValue"])
            layer = int(values.get(f"Segment{number}_Layer", 0))
            colour = [255 * float(text) for text in values.get(f"Segment{number}_Color", "").split()]
        except (KeyError, ValueError):
            raise DamagedFile(f"segment {number} has no label value or colour") from None
        entry = re.search(r"TerminologyEntry:([^|]*)\|", values.get(f"Segment{number}_Tags", ""))
        segments.append(
            SegmentLabel(
                values.get(f"Segment{number}_Name") or f"Segment {value}",
                value,
                (colour[0], colour[1], colour[2]) if len(colour) == 3 else None,
                entry[1] if entry else "",
                layer,
            )
        )
    return tuple(segments)
