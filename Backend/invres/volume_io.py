"""Image files to and from plain arrays with a RAS affine: which reader a file needs, ITK's formats, whole writing.

`invres.volume` builds on this; import from there.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from . import InvresError
from .dicom_series import read_series, series_files, series_of
from .files import WRITABLE_ENDINGS, written_whole
from .image_header import (
    COPY_AGAIN,
    LPS_TO_RAS,
    READABLE,
    Header,
    TimeAxis,
    array_order,
    check_claim,
    check_dimensions,
    checked_layout,
    itk_affine,
    itk_information,
    missing_data_file,
    repaired_axes,
    shift_mm_between,
    spacing_of,
)
from .nifti_file import nifti_chunks, read_nifti_header, read_nifti_voxels

__all__ = ["WRITABLE_ENDINGS", "read_header", "read_voxels", "to_sitk", "write_image"]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a 3D or 4D file or of a DICOM folder.

    Raises InvresError if it is missing, no image, flat, complex, without a voxel size, or larger than its data.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_series(series_files(path))
        if not path.exists():
            raise InvresError(f"There is no file {path}.", hint="Check the spelling and the folder.")
        if path.stat().st_size == 0:
            raise InvresError(f"The file {path} is empty.", hint="Copy or export it again.")
        return _read_file_header(path)
    except OSError as error:
        raise InvresError(f"The file {path} cannot be read: {_reason(error)}.") from None


def _read_file_header(path: Path) -> Header:
    nifti = read_nifti_header(path)
    stored = _stored_by_text_header(path)
    try:
        if sitk.ImageFileReader.GetImageIOFromFileName(os.fspath(path)) == "GDCMImageIO":
            return read_series(series_of(path))
        reader = itk_information(os.fspath(path))
    except RuntimeError as error:
        if nifti is None or not nifti.affines or "orthonormal" not in str(error):
            raise InvresError(
                f"{path} is not an image that can be read, or it is damaged.", hint=f"Allowed are {READABLE}."
            ) from None
        reader = None  # ITK refuses sheared axes
    if nifti is not None:
        size, components = nifti.size, nifti.components
        check_dimensions(path, size)
    elif reader is not None:
        size, components = checked_layout(path, reader)
        if stored is not None:
            pixel = sitk.Image([1, 1, 1], reader.GetPixelID(), components if components > 1 else 0)
            claimed_bytes = math.prod(size) * components * pixel.GetSizeOfPixelComponent()
            check_claim(path, size, claimed_bytes, stored[0], packed=stored[1])
    shape, warnings = size[2::-1], []
    own = [array_order(a) for a in nifti.affines] if nifti is not None else []
    affine = own[0] if reader is None else itk_affine(path, reader)
    if own and (shift_mm := min(shift_mm_between(affine, a, shape) for a in own)) > 0.05 * spacing_of(own[0]).min():
        affine = own[0]
        warnings.append(
            f"{path.name}: the header gives the position of its voxels in two ways that disagree by up to "
            f"{shift_mm:.3g} mm; the sform (without one, the qform) was used."
        )
    elif len(own) > 1 and (apart_mm := shift_mm_between(own[0], own[1], shape)) > 0.05 * spacing_of(own[0]).min():
        warnings.append(
            f"{path.name}: sform and qform put its voxels up to {apart_mm:.3g} mm apart; the one that ITK and 3D "
            "Slicer take was used. Other programs may take the other one: write the file again with a single position."
        )
    elif nifti is not None and nifti.is_nifti and not own:
        warnings.append(
            f"{path.name}: the header does not say how the image lies in the body (neither sform nor qform is "
            "declared), so left and right may be exchanged."
        )
    affine, sentence = repaired_axes(path, affine, shape)
    time = TimeAxis() if nifti is None else nifti.time
    if nifti is None and reader is not None and reader.GetDimension() > 3:
        time = TimeAxis(reader.GetOrigin()[3], reader.GetSpacing()[3])
    texts = {} if reader is None else {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    return Header(
        files=(os.fspath(path),),
        size=size,
        affine=affine,
        components=components,
        metadata={key: text for key, text in texts.items() if key.startswith("Segment")},
        warnings=(*warnings, *([sentence] if sentence else [])),
        nifti=nifti,
        time=time,
    )


def read_voxels(header: Header) -> np.ndarray:
    """The voxels as they are stored: (D, H, W), (T, D, H, W) for 4D, with components last where there are several.

    Raises InvresError where the data is cut short or damaged.
    """
    path = Path(header.files[0])
    try:
        if header.nifti is not None:
            return read_nifti_voxels(path, header.nifti)
        kind = sitk.sitkFloat64 if header.mixed_types else sitk.sitkUnknown
        image = sitk.ReadImage(list(header.files) if len(header.files) > 1 else header.files[0], kind)
        array = sitk.GetArrayFromImage(image)
        return array[list(header.frames)] if header.frames else array
    except MemoryError:
        raise _too_large(path, header) from None
    except OSError as error:
        raise InvresError(f"The file {path} cannot be read: {_reason(error)}.") from None
    except RuntimeError as error:
        if "alloc" in str(error):
            raise _too_large(path, header) from None
        raise InvresError(f"{path} is damaged or cut short: its voxels cannot be read.", hint=COPY_AGAIN) from None


def write_image(
    path: str | os.PathLike[str],
    array: np.ndarray,
    affine: np.ndarray,
    *,
    metadata: dict[str, str] | None = None,
    compress: bool = True,
    layers: bool = False,
    time: TimeAxis | None = None,
) -> None:
    """Writes (D, H, W) or (T, D, H, W) voxels; complete or not at all. A missing folder is made.

    time: of the first axis of four; NIfTI says that it is in s.

    layers: of an NRRD file, the first axis are label maps of one grid, in the way that Slicer keeps segments that
    overlap: a list of values for each voxel.

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
    image = to_sitk(array[0] if layers else array, affine)
    if layers:
        listed = sitk.GetImageFromArray(np.moveaxis(array, 0, -1), isVector=True)
        listed.CopyInformation(image)
        image = listed
    if time is not None:
        image.SetSpacing([*image.GetSpacing()[:3], time.step])
        image.SetOrigin([*image.GetOrigin()[:3], time.start])
    for key, value in (metadata or {}).items():
        image.SetMetaData(key, value)
    try:
        with written_whole(path, ending) as temporary:
            sitk.WriteImage(image, os.fspath(temporary), useCompression=compress)
            if layers:
                # ITK calls them a vector, which Slicer would take for a direction in space.
                temporary.write_bytes(temporary.read_bytes().replace(b"kinds: vector ", b"kinds: list ", 1))
            # ITK writes NIfTI without noticing a full disk.
            header = read_header(temporary)
            if header.nifti is not None:
                for _ in nifti_chunks(temporary, header.nifti):
                    pass
    except (OSError, RuntimeError, InvresError) as error:
        reason = f" ({_reason(error)})" if isinstance(error, OSError) else ""
        raise InvresError(
            f"{path} could not be written{reason}; nothing was left behind.",
            hint="Check the free space and that you may write to the folder.",
            code="write_failed",
        ) from None


def to_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK image (LPS, x fastest) from (D, H, W) or (T, D, H, W) voxels and a (d, h, w, 1) -> RAS affine."""
    if array.dtype == bool:
        array = array.view(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=False)
    columns = LPS_TO_RAS @ affine[:3, 2::-1]
    spacing = np.linalg.norm(columns, axis=0)
    further = array.ndim - 3
    direction = np.eye(array.ndim)
    direction[:3, :3] = columns / spacing
    image.SetSpacing([*spacing.tolist(), *[1.0] * further])
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin([*(LPS_TO_RAS @ affine[:3, 3]).tolist(), *[0.0] * further])
    return image


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
        raise missing_data_file(path, detached)
    packed = fields.get("encoding", "raw") != "raw" or fields.get("compresseddata") == "true"
    return data.stat().st_size, packed


def _text_fields(path: Path) -> dict[str, str]:
    """The fields of an NRRD or MetaImage text header, keys in lower case; {} for other formats."""
    with open(path, "rb") as stream:
        start = stream.read(1 << 16)
    if not start.startswith(b"NRRD") and b"ElementDataFile" not in start:
        return {}
    fields = {}
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError:  # voxels behind the header, or the names of another system
        text = start.decode("latin-1")
    for line in text.split("\n"):
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
