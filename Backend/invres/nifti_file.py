"""NIfTI-1 and Analyze files, whose headers and voxels ITK reads without noticing damage."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import InvresError
from .image_header import COPY_AGAIN, TimeAxis, check_claim, check_spacing, missing_data_file, unsupported_values

__all__ = ["NiftiHeader", "nifti_chunks", "nifti_frames", "read_nifti_header", "read_nifti_voxels"]

_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}
_COLOURS = {128: 3, 2304: 4}


@dataclass(frozen=True)
class NiftiHeader:
    """What an Analyze or NIfTI-1 header says.

    size: (x, y, z[, t]). dtype: of one component, in the byte order of the file.
    scale: (slope, intercept) or None. affines: what sform and qform say, as far as the header declares them:
    4x4, (x, y, z, 1) -> RAS mm. is_nifti: an Analyze file has no place for them. time: the fourth axis.
    """

    data_file: Path
    offset_bytes: int
    voxel_bytes: int
    size: tuple[int, ...]
    components: int
    dtype: np.dtype
    scale: tuple[float, float] | None
    affines: tuple[np.ndarray, ...]
    is_nifti: bool
    time: TimeAxis


def read_nifti_header(path: Path) -> NiftiHeader | None:
    """The header of an Analyze or NIfTI-1 file after its own checks; None for other files.

    Raises InvresError where it is damaged, claims more than its data, or has values that are no plain numbers.
    """
    name = path.name.lower()
    bare = name.removesuffix(".gz")
    if not bare.endswith((".nii", ".hdr", ".img")):
        return None
    header_file = _partner(path, ".hdr") if bare.endswith(".img") else path
    try:
        with _open_unpacked(header_file) as stream:
            raw = stream.read(348)
    except (OSError, EOFError, zlib.error):
        return None
    if raw[4:8] in (b"n+2\0", b"ni2\0"):
        raise InvresError(
            f"{path} is NIfTI-2, and only NIfTI-1 is read here.",
            hint="Write it as NIfTI-1 (nibabel, FSL and 3D Slicer do), which holds up to 32767 voxels along an axis.",
        )
    order = next((o for o in "<>" if len(raw) == 348 and struct.unpack_from(o + "i", raw)[0] == 348), None)
    if order is None:
        return None
    is_nifti = raw[344:347] in (b"n+1", b"ni1")
    data_file = path if raw[344:347] == b"n+1" or bare.endswith(".img") else _partner(path, ".img")
    if not data_file.exists():
        raise missing_data_file(path, data_file.name)
    dimension, *size = struct.unpack_from(order + "8h", raw, 40)
    if not 1 <= dimension <= 7 or min(size[:dimension]) < 1:
        raise InvresError(
            f"The header of {path} is damaged: it gives the sizes {size[: max(0, min(dimension, 7))]}, "
            "but every size must be 1 or more.",
            hint=COPY_AGAIN,
        )
    size = size[:dimension]
    pixdim = np.array(struct.unpack_from(order + "8f", raw, 76), dtype=float)
    check_spacing(path, pixdim[1 : min(dimension, 3) + 1])
    kind, bits = struct.unpack_from(order + "2h", raw, 70)
    offset, slope, intercept = struct.unpack_from(order + "3f", raw, 108)
    components = _COLOURS.get(kind, 1)
    value_bits = 8 * components * np.dtype(_TYPES.get(kind, "u1")).itemsize
    voxel_bytes = math.prod(size) * (bits or value_bits) // 8  # some writers leave the bits out
    offset_bytes = max(int(offset), 352 if raw[344:347] == b"n+1" else 0)
    packed = _is_gzip(data_file)
    stored_bytes = data_file.stat().st_size - (0 if packed else offset_bytes)
    check_claim(path, tuple(size), voxel_bytes, stored_bytes, packed=packed)
    if kind not in _TYPES and kind not in _COLOURS:
        raise unsupported_values(path, f"NIfTI type {kind}")
    if bits not in (0, value_bits):
        raise InvresError(
            f"The header of {path} is damaged: it gives {bits} bits for a value of NIfTI type {kind}, which has "
            f"{value_bits}.",
            hint=COPY_AGAIN,
        )
    if dimension == 5 and size[3] == 1 and size[4] > 1:  # where NIfTI puts the components of a vector
        components = size.pop()
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    # ITK applies the unit of lengths, too; others take all for millimetres.
    unit_mm = {1: 1e3, 3: 1e-3}.get(raw[123] & 7, 1.0) if is_nifti else 1.0
    affines = []
    qform_code, sform_code = struct.unpack_from(order + "2h", raw, 252)
    if is_nifti and sform_code > 0:
        affines.append(np.vstack([np.reshape(struct.unpack_from(order + "12f", raw, 280), (3, 4)), [0, 0, 0, 1]]))
    if is_nifti and qform_code > 0:
        affines.append(_qform(struct.unpack_from(order + "6f", raw, 256), pixdim))
    scaled = is_nifti and slope != 0 and math.isfinite(slope) and math.isfinite(intercept)
    return NiftiHeader(
        data_file=data_file,
        offset_bytes=offset_bytes,
        voxel_bytes=voxel_bytes,
        size=tuple(size),
        components=components,
        dtype=np.dtype(order + _TYPES.get(kind, "u1")),
        scale=(slope, intercept) if scaled and (slope, intercept) != (1, 0) else None,
        affines=tuple(np.diag([unit_mm] * 3 + [1.0]) @ affine for affine in affines),
        is_nifti=is_nifti,
        time=_time(raw, order, pixdim) if is_nifti else TimeAxis(0.0, float(pixdim[4])),
    )


def read_nifti_voxels(path: Path, nifti: NiftiHeader) -> np.ndarray:
    """The scaled voxels (D, H, W) or (T, D, H, W).

    ITK is not used: it reads NaN, and whatever is missing or damaged in the data, as 0 and says nothing.
    """
    stored = np.empty(nifti.voxel_bytes, dtype=np.uint8)
    done = -nifti.offset_bytes
    for chunk in nifti_chunks(path, nifti):
        first, last = max(0, done), min(stored.size, done + len(chunk))
        if last > first:
            stored[first:last] = np.frombuffer(chunk, np.uint8)[first - done : last - done]
        done += len(chunk)
    return _scaled(stored, nifti).reshape(nifti.size[::-1])


def nifti_frames(path: Path, nifti: NiftiHeader) -> Iterator[np.ndarray]:
    """The scaled voxels (D, H, W) of each volume of a 4D file, one after the other, as they are unpacked: no more than
    one is held. That the file is whole shows at its end only (`nifti_chunks`)."""
    frame_bytes = nifti.voxel_bytes // nifti.size[3]
    held, before, left = bytearray(), nifti.offset_bytes, nifti.size[3]
    for chunk in nifti_chunks(path, nifti):
        held += chunk[before:]
        before = max(0, before - len(chunk))
        while left and len(held) >= frame_bytes:
            frame = np.frombuffer(bytes(held[:frame_bytes]), np.uint8)
            del held[:frame_bytes]
            left -= 1
            yield _scaled(frame, nifti).reshape(nifti.size[2::-1])
        if not left:
            held.clear()


def _scaled(stored: np.ndarray, nifti: NiftiHeader) -> np.ndarray:
    """The values of stored bytes (N,)."""
    array = stored.view(nifti.dtype)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if nifti.scale is not None:
        slope, intercept = nifti.scale
        array = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
        array = array * array.dtype.type(slope) + array.dtype.type(intercept)
    return array


def nifti_chunks(path: Path, nifti: NiftiHeader) -> Iterator[bytes]:
    """The unpacked data file to its end. Raises InvresError where it is cut short or fails its checksum."""
    unpacked_bytes = 0
    try:
        with _open_unpacked(nifti.data_file) as stream:
            while chunk := stream.read(1 << 20):
                unpacked_bytes += len(chunk)
                yield chunk
        complete = unpacked_bytes >= nifti.offset_bytes + nifti.voxel_bytes
    except (EOFError, zlib.error, gzip.BadGzipFile):
        complete = False
    if not complete:
        raise InvresError(f"{path} is damaged or cut short: it cannot be unpacked to the end.", hint=COPY_AGAIN)


def _time(raw: bytes, order: str, pixdim: np.ndarray) -> TimeAxis:
    unit = _SECONDS.get(raw[123] & 56)
    (start,) = struct.unpack_from(order + "f", raw, 136)
    return TimeAxis((unit or 1.0) * start, (unit or 1.0) * float(pixdim[4]), unit is not None)


def _qform(quaternion: tuple[float, ...], pixdim: np.ndarray) -> np.ndarray:
    """The affine of a NIfTI-1 quaternion (b, c, d) with offset (x, y, z): nifti1.h, method 2."""
    b, c, d, *offset = quaternion
    a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
    affine[:3, 3] = offset
    return affine


def _partner(path: Path, suffix: str) -> Path:
    """The other file of an .hdr and .img pair, compressed or not."""
    stem = path.name[: -7 if path.name.lower().endswith(".gz") else -4]
    compressed = path.with_name(stem + suffix + ".gz")
    return compressed if compressed.exists() else path.with_name(stem + suffix)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _open_unpacked(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb")
