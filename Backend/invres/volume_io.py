"""Image files to and from plain arrays with a RAS affine: formats, header checks, DICOM series, atomic writing.

`invres.volume` builds on this; import from there.
"""

from __future__ import annotations

import gzip
import math
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .events import format_bytes

__all__ = ["WRITABLE_ENDINGS", "Header", "corners", "read_header", "read_voxels", "to_sitk", "write_image"]

sitk.ProcessObject.GlobalWarningDisplayOff()

WRITABLE_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha")
_READABLE = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), Analyze (.hdr, .img) or a DICOM folder"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_DEFLATE_LIMIT = 1100  # zlib and gzip cannot shrink data more than 1032 times
_STRONG_SHEAR_DEGREES = 5.0


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels.

    files: one name, or the slices of a DICOM series in the order of their position.
    size: (x, y, z) or (x, y, z, t) voxels; components: values per voxel.
    affine: 4x4, (d, h, w, 1) -> RAS mm, its axes at right angles.
    metadata: text fields of NRRD files. warnings: a sentence for each thing that was repaired or looks wrong.
    """

    files: tuple[str, ...]
    size: tuple[int, ...]
    affine: np.ndarray
    components: int = 1
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    nifti: NiftiHeader | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)"""
        return self.size[2], self.size[1], self.size[0]

    @property
    def count(self) -> int:
        """Volumes in the file: 1 for 3D."""
        return self.size[3] if len(self.size) > 3 else 1


@dataclass(frozen=True)
class NiftiHeader:
    """What an Analyze or NIfTI-1 header says.

    size: (x, y, z[, t]). dtype: of one component, in the byte order of the file.
    scale: (slope, intercept) or None. affines: what sform and qform say, as far as the header declares them:
    4x4, (x, y, z, 1) -> RAS mm.
    """

    data_file: Path
    offset_bytes: int
    voxel_bytes: int
    size: tuple[int, ...]
    components: int
    dtype: np.dtype
    scale: tuple[float, float] | None
    affines: tuple[np.ndarray, ...]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a 3D or 4D file or of a DICOM folder.

    Raises InvresError if it is missing, no image, flat, complex, without a voxel size, or larger than its data.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_series(_series_files(path))
        if not path.exists():
            raise InvresError(f"There is no file {path}.", hint="Check the spelling and the folder.")
        if path.stat().st_size == 0:
            raise InvresError(f"The file {path} is empty.", hint="Copy or export it again.")
        return _read_file_header(path)
    except OSError as error:
        raise InvresError(f"The file {path} cannot be read: {_reason(error)}.") from None


def _read_file_header(path: Path) -> Header:
    nifti = _read_nifti_header(path)
    stored = _stored_by_text_header(path)
    try:
        if sitk.ImageFileReader.GetImageIOFromFileName(os.fspath(path)) == "GDCMImageIO":
            return _read_series(_series_of(path))
        reader = _itk_information(os.fspath(path))
    except RuntimeError as error:
        if nifti is None or not nifti.affines or "orthonormal" not in str(error):
            raise InvresError(
                f"{path} is not an image that can be read, or it is damaged.", hint=f"Allowed are {_READABLE}."
            ) from None
        reader = None  # ITK refuses sheared axes
    if nifti is not None:
        size, components = nifti.size, nifti.components
        _check_dimensions(path, size)
    elif reader is not None:
        size, components = _layout(path, reader)
        if stored is not None:
            pixel = sitk.Image([1, 1, 1], reader.GetPixelID(), components if components > 1 else 0)
            claimed_bytes = math.prod(size) * components * pixel.GetSizeOfPixelComponent()
            _check_claim(path, size, claimed_bytes, stored[0], packed=stored[1])
    shape, warnings = size[2::-1], []
    own = [_array_order(a) for a in nifti.affines] if nifti is not None else []
    affine = own[0] if reader is None else _itk_affine(path, reader)
    if own and (shift_mm := min(_shift_mm(affine, a, shape) for a in own)) > 0.05 * _spacing(own[0]).min():
        affine = own[0]
        warnings.append(
            f"{path.name}: the header gives the position of its voxels in two ways that disagree by up to "
            f"{shift_mm:.3g} mm; the sform (without one, the qform) was used."
        )
    affine, sentence = _repaired(path, affine, shape)
    texts = {} if reader is None else {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    return Header(
        files=(os.fspath(path),),
        size=size,
        affine=affine,
        components=components,
        metadata={key: text for key, text in texts.items() if key.startswith("Segment")},
        warnings=(*warnings, *([sentence] if sentence else [])),
        nifti=nifti,
    )


def read_voxels(header: Header) -> np.ndarray:
    """The voxels as they are stored: (D, H, W), (T, D, H, W) for 4D, with components last where there are several.

    Raises InvresError where the data is cut short or damaged.
    """
    path = Path(header.files[0])
    try:
        if header.nifti is not None:
            return _nifti_voxels(path, header.nifti)
        image = sitk.ReadImage(list(header.files) if len(header.files) > 1 else header.files[0])
        return sitk.GetArrayFromImage(image)
    except MemoryError:
        raise _too_large(path, header) from None
    except OSError as error:
        raise InvresError(f"The file {path} cannot be read: {_reason(error)}.") from None
    except RuntimeError as error:
        if "alloc" in str(error):
            raise _too_large(path, header) from None
        raise InvresError(f"{path} is damaged or cut short: its voxels cannot be read.", hint=_COPY_AGAIN) from None


def write_image(
    path: str | os.PathLike[str],
    array: np.ndarray,
    affine: np.ndarray,
    *,
    metadata: dict[str, str] | None = None,
    compress: bool = True,
) -> None:
    """Writes (D, H, W) voxels; complete or not at all. A missing folder is made.

    Raises InvresError for an ending that is not in WRITABLE_ENDINGS and where the disk does not take the file.
    """
    path = Path(path)
    ending = next((e for e in sorted(WRITABLE_ENDINGS, key=len, reverse=True) if path.name.lower().endswith(e)), None)
    if ending is None:
        raise InvresError(
            f"{path.name} cannot be written: the allowed endings are {', '.join(WRITABLE_ENDINGS)} and .seg.nrrd.",
            hint="Choose one of these endings.",
        )
    if path.is_dir():
        raise InvresError(f"{path} is a folder, not a file that can be written.", hint="Add a file name.")
    image = to_sitk(array, affine)
    for key, value in (metadata or {}).items():
        image.SetMetaData(key, value)
    # Short and of the same ending: ITK chooses the format by it, and the full name may be as long as names can be.
    temporary = path.parent / f".{secrets.token_hex(6)}{ending}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, os.fspath(temporary), useCompression=compress)
        # ITK writes NIfTI without noticing a full disk.
        header = read_header(temporary)
        if header.nifti is not None:
            for _ in _nifti_chunks(temporary, header.nifti):
                pass
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, InvresError) as error:
        reason = f" ({_reason(error)})" if isinstance(error, OSError) else ""
        raise InvresError(
            f"{path} could not be written{reason}; nothing was left behind.",
            hint="Check the free space and that you may write to the folder.",
            code="write_failed",
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def to_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK image (LPS, x fastest) from (D, H, W) voxels and a (d, h, w, 1) -> RAS affine."""
    if array.dtype == bool:
        array = array.view(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    columns = _LPS_TO_RAS @ affine[:3, 2::-1]
    spacing = np.linalg.norm(columns, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).ravel().tolist())
    image.SetOrigin((_LPS_TO_RAS @ affine[:3, 3]).tolist())
    return image


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """RAS positions in mm (8, 3) of the centres of the corner voxels of a (D, H, W) grid."""
    index = np.array([[d, h, w] for d in (0, 1) for h in (0, 1) for w in (0, 1)]) * (np.array(shape) - 1)
    return index @ affine[:3, :3].T + affine[:3, 3]


# ---------------------------------------------------------------- geometry of headers


def _itk_information(file: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def _itk_affine(path: Path, reader: sitk.ImageFileReader) -> np.ndarray:
    spacing = np.array(reader.GetSpacing()[:3])
    _check_spacing(path, spacing)
    dimension = reader.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3] * spacing
    affine[:3, 3] = reader.GetOrigin()[:3]
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    return _array_order(affine)


def _array_order(affine: np.ndarray) -> np.ndarray:
    """(x, y, z, 1) -> RAS as (d, h, w, 1) -> RAS."""
    return affine[:, [2, 1, 0, 3]]


def _spacing(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def _shift_mm(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    return float(np.abs(corners(affine, shape) - corners(other, shape)).max())


def _repaired(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The affine with its axes turned to right angles (nearest rotation, polar decomposition; the centre stays).

    Returns a sentence with the size of the change where it exceeds a hundredth of a voxel.
    """
    spacing = _spacing(affine)
    _check_spacing(path, spacing)
    axes = affine[:3, :3] / spacing
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine < 1e-6:
        return affine, ""
    left, singular, right = np.linalg.svd(axes)
    if singular[-1] < 1e-2:
        raise InvresError(f"The header of {path} gives axes that lie in one plane.", hint="Export the image again.")
    repaired = affine.copy()
    repaired[:3, :3] = (left @ right) * spacing
    middle = (np.array(shape) - 1) / 2
    repaired[:3, 3] += (affine[:3, :3] - repaired[:3, :3]) @ middle
    shift_mm, degrees = _shift_mm(affine, repaired, shape), math.degrees(math.asin(min(1.0, cosine)))
    if shift_mm <= 0.01 * spacing.min():
        return repaired, ""
    change = f"by up to {degrees:.2g} degrees and were turned to right angles, which moves voxels by up to"
    if degrees > _STRONG_SHEAR_DEGREES:
        return repaired, (
            f"{path.name} is strongly sheared (by a tilted gantry, or an affine registration in its header): its axes "
            f"miss right angles {change} {shift_mm:.3g} mm, so shapes and positions are wrong; resample it to a "
            "regular grid first."
        )
    return repaired, f"{path.name}: the axes in its header miss right angles {change} {shift_mm:.2g} mm."


# ---------------------------------------------------------------- checks that ITK does not make


_COPY_AGAIN = "Copy, download or export it again."


def _check_spacing(path: Path, spacing: np.ndarray) -> None:
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        sizes = " x ".join(f"{float(s):g}" for s in spacing)
        raise InvresError(
            f"The header of {path} gives a voxel size of {sizes} mm, but every size must be above 0.",
            hint="Export the image again or mend its header.",
        )


def _layout(path: Path, reader: sitk.ImageFileReader) -> tuple[tuple[int, ...], int]:
    """Size and components of a file that is 3D or 4D and has real values."""
    size, pixel = tuple(reader.GetSize()), sitk.GetPixelIDValueAsString(reader.GetPixelID())
    _check_dimensions(path, size)
    if "complex" in pixel or "unknown" in pixel.lower():
        raise _unplain(path, pixel)
    return size, reader.GetNumberOfComponents()


def _check_dimensions(path: Path, size: tuple[int, ...]) -> None:
    if len(size) not in (3, 4):
        what = "flat (2D)" if len(size) == 2 else f"{len(size)}D"
        raise InvresError(f"{path} is {what}, but a 3D volume is wanted.", hint="Give the whole volume, not a slice.")


def _unplain(path: Path, kind: str) -> InvresError:
    return InvresError(
        f"{path} has values of the kind '{kind}', but plain numbers are wanted.", hint="Export it as whole numbers."
    )


def _stored_by_text_header(path: Path) -> tuple[int, bool] | None:
    """Bytes that an NRRD or MetaImage file has for its voxels, and whether they are packed; None if not known."""
    fields = _text_fields(path)
    if not fields or fields.get("encoding") in ("bzip2", "bz2", "hex", "ascii", "text", "txt"):
        return None
    detached = fields.get("data file") or fields.get("datafile") or fields.get("elementdatafile", "LOCAL")
    if fields.get("binarydata") == "false" or "%" in detached or detached.split(" ")[0] == "LIST":
        return None
    data = path if detached.upper() == "LOCAL" else path.parent / detached
    if not data.exists():
        raise InvresError(
            f"{path} keeps its voxels in the file {detached}, which is not beside it.", hint="Copy both files together."
        )
    packed = fields.get("encoding", "raw") != "raw" or fields.get("compresseddata") == "true"
    return data.stat().st_size, packed


def _check_claim(path: Path, size: tuple[int, ...], claimed_bytes: int, stored_bytes: int, *, packed: bool) -> None:
    if claimed_bytes > stored_bytes * (_DEFLATE_LIMIT if packed else 1):
        raise InvresError(
            f"{path} is damaged or cut short: its header claims {' x '.join(map(str, size))} voxels "
            f"({format_bytes(claimed_bytes)}), but the file holds only {format_bytes(max(0, stored_bytes))}.",
            hint=_COPY_AGAIN,
        )


def _text_fields(path: Path) -> dict[str, str]:
    """The fields of an NRRD or MetaImage text header, keys in lower case; {} for other formats."""
    with open(path, "rb") as stream:
        start = stream.read(1 << 16)
    if not start.startswith(b"NRRD") and b"ElementDataFile" not in start:
        return {}
    fields = {}
    for line in start.decode("latin-1").splitlines():
        key, separator, value = line.partition(":" if start.startswith(b"NRRD") else "=")
        key, value = key.strip().lower(), value.strip()
        if not line.strip():
            break
        if separator and not value.startswith("="):
            names = ("elementdatafile", "data file", "datafile")
            fields[key] = value if key in names else value.lower()
        if key == "elementdatafile":
            break
    return fields


def _too_large(path: Path, header: Header) -> InvresError:
    return InvresError(
        f"{path} has {' x '.join(map(str, header.size))} voxels, which do not fit into this computer's memory.",
        hint="Crop or downsample it first.",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# ---------------------------------------------------------------- NIfTI-1 and Analyze


def _read_nifti_header(path: Path) -> NiftiHeader | None:
    """The header of an Analyze or NIfTI-1 file after its own checks; None for other files."""
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
    order = next((o for o in "<>" if len(raw) == 348 and struct.unpack_from(o + "i", raw)[0] == 348), None)
    if order is None:
        return None
    is_nifti = raw[344:347] in (b"n+1", b"ni1")
    data_file = path if raw[344:347] == b"n+1" or bare.endswith(".img") else _partner(path, ".img")
    if not data_file.exists():
        raise InvresError(
            f"{path} keeps its voxels in the file {data_file.name}, which is not beside it.",
            hint="Copy both files together.",
        )
    dimension, *size = struct.unpack_from(order + "8h", raw, 40)
    if not 1 <= dimension <= 7 or min(size[:dimension]) < 1:
        raise InvresError(
            f"The header of {path} is damaged: it gives the sizes {size[: max(0, min(dimension, 7))]}, "
            "but every size must be 1 or more.",
            hint=_COPY_AGAIN,
        )
    size = size[:dimension]
    pixdim = np.array(struct.unpack_from(order + "8f", raw, 76), dtype=float)
    _check_spacing(path, pixdim[1 : min(dimension, 3) + 1])
    kind, bits = struct.unpack_from(order + "2h", raw, 70)
    offset, slope, intercept = struct.unpack_from(order + "3f", raw, 108)
    voxel_bytes = math.prod(size) * bits // 8
    offset_bytes = max(int(offset), 352 if raw[344:347] == b"n+1" else 0)
    packed = _is_gzip(data_file)
    stored_bytes = data_file.stat().st_size - (0 if packed else offset_bytes)
    _check_claim(path, tuple(size), voxel_bytes, stored_bytes, packed=packed)
    if kind not in _NIFTI_TYPES and kind not in _NIFTI_COLOURS:
        raise _unplain(path, f"NIfTI type {kind}")
    components = _NIFTI_COLOURS.get(kind, 1)
    if dimension == 5 and size[3] == 1 and size[4] > 1:  # where NIfTI puts the components of a vector
        components = size.pop()
    while len(size) > 3 and size[-1] == 1:
        size.pop()
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
        dtype=np.dtype(order + _NIFTI_TYPES.get(kind, "u1")),
        scale=(slope, intercept) if scaled and (slope, intercept) != (1, 0) else None,
        affines=tuple(affines),
    )


_NIFTI_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_NIFTI_COLOURS = {128: 3, 2304: 4}


def _nifti_voxels(path: Path, nifti: NiftiHeader) -> np.ndarray:
    """The scaled voxels (D, H, W) or (T, D, H, W).

    ITK is not used: it reads NaN, and whatever is missing or damaged in the data, as 0 and says nothing.
    """
    stored = np.empty(nifti.voxel_bytes, dtype=np.uint8)
    done = -nifti.offset_bytes
    for chunk in _nifti_chunks(path, nifti):
        first, last = max(0, done), min(stored.size, done + len(chunk))
        if last > first:
            stored[first:last] = np.frombuffer(chunk, np.uint8)[first - done : last - done]
        done += len(chunk)
    array = stored.view(nifti.dtype).reshape(nifti.size[::-1])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if nifti.scale is not None:
        slope, intercept = nifti.scale
        array = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
        array = array * array.dtype.type(slope) + array.dtype.type(intercept)
    return array


def _nifti_chunks(path: Path, nifti: NiftiHeader) -> Iterator[bytes]:
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
        raise InvresError(f"{path} is damaged or cut short: it cannot be unpacked to the end.", hint=_COPY_AGAIN)


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


# ---------------------------------------------------------------- DICOM


def _series_files(folder: Path) -> tuple[str, ...]:
    """The sorted files of the one series in `folder`."""
    series = {uid: _files_of(folder, uid) for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(os.fspath(folder))}
    if not series:
        inside = sorted(child.name for child in folder.iterdir() if child.is_dir())
        hint = f"Name one of its sub-folders: {', '.join(inside[:8])}." if inside else f"Allowed are {_READABLE}."
        raise InvresError(f"The folder {folder} has no DICOM images.", hint=hint)
    if len(series) > 1:
        listing = "; ".join(f"{_description(files[0])} ({len(files)} files)" for files in series.values())
        raise InvresError(
            f"The folder {folder} has {len(series)} DICOM series, but one is wanted: {listing}.",
            hint="Move each series to a sub-folder and name that, or name one file of the series you want, "
            f"for example {Path(next(iter(series.values()))[0]).name}.",
        )
    return next(iter(series.values()))


def _series_of(path: Path) -> tuple[str, ...]:
    """All files of the series that the DICOM file `path` belongs to; itself where it is a volume of its own."""
    reader = _itk_information(os.fspath(path))
    if reader.GetSize()[-1] > 1:
        return (os.fspath(path),)
    uid = reader.GetMetaData("0020|000e").strip("\0 ") if reader.HasMetaDataKey("0020|000e") else ""
    files = _files_of(path.parent, uid) if uid else ()
    return files or (os.fspath(path),)


def _files_of(folder: Path, uid: str) -> tuple[str, ...]:
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(os.fspath(folder), uid))


def _description(file: str) -> str:
    reader = _itk_information(file)
    text = reader.GetMetaData("0008|103e").strip("\0 ") if reader.HasMetaDataKey("0008|103e") else ""
    # Texts of old scanners are not UTF-8.
    return "'" + text.encode("utf-8", "replace").decode() + "'" if text else "without a description"


def _read_series(files: tuple[str, ...]) -> Header:
    """The header of a series of slices (or of one multi-frame file) from the headers of all its files."""
    folder = Path(files[0]).parent if len(files) > 1 else Path(files[0])
    try:
        readers = [_itk_information(file) for file in files]
    except RuntimeError:
        raise InvresError(f"A DICOM file in {folder} has a damaged header.", hint=_COPY_AGAIN) from None
    size, components = _layout(folder, readers[0])
    affine = _itk_affine(folder, readers[0])
    if len(files) == 1:
        affine, sentence = _repaired(folder, affine, size[2::-1])
        return Header(files, size, affine, components, warnings=(sentence,) if sentence else ())
    if len({reader.GetSize() for reader in readers}) > 1:
        raise InvresError(
            f"The DICOM slices in {folder} are not all of one size, so they are not one volume.",
            hint="Remove the slices that do not belong to it (a localizer, for example).",
        )
    origins = np.array([reader.GetOrigin() for reader in readers]) @ _LPS_TO_RAS
    positions = origins @ affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    order = np.argsort(positions, kind="stable")  # GDCM falls back to file names where positions repeat
    gaps = np.diff(positions[order])
    if gaps.min() < 1e-3:
        raise InvresError(
            f"The DICOM series in {folder} has several slices at one position, so it is not one 3D volume.",
            hint="Export one volume of it (a time series or a diffusion series has many).",
        )
    affine[:3, 0] = (origins[order[-1]] - origins[order[0]]) / (len(files) - 1)
    affine[:3, 3] = origins[order[0]]
    warnings = []
    if np.ptp(gaps) > 0.02 * gaps.mean():
        warnings.append(
            f"The slices of the DICOM series in {folder} are not evenly spaced ({gaps.min():.3g} to "
            f"{gaps.max():.3g} mm); a slice may be missing, and positions inside are not right."
        )
    size = (size[0], size[1], len(files))
    affine, sentence = _repaired(folder, affine, size[::-1])
    warnings += [sentence] if sentence else []
    return Header(tuple(files[i] for i in order), size, affine, components, warnings=tuple(warnings))
