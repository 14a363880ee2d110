"""Scans without labels, as image quality transfer uses them: what lies in a folder, and each at two resolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import InvresError
from .dataset_json import list_folders, list_volumes, stem_of
from .diffusion import COMPONENTS, LOW_B, file_frame, fit_tensor, gradient_files, head_mask, read_gradients, turned
from .enhancementconfig import Kind
from .events import SILENT, Reporter
from .volume import Geometry, Volume, read_channels, read_volume

__all__ = ["Scan", "ScanFiles", "find_scans", "read_scan", "scan_of"]

Triple = tuple[int, int, int]
MASK = "_mask"
HCP_MASK = "nodif_brain_mask"
# Label maps of a data set, by their folder (labels, labelsTr) and by the end of their name.
LABEL_FOLDER = "label"
LABEL_ENDINGS = ("_seg", "_dseg", "_label", "_labels")
DEEPEST = 4  # folders below the one that is given; HCP has subject/T1w/Diffusion


@dataclass(frozen=True)
class ScanFiles:
    """One scan. gradients: its .bval and .bvec; None for a plain image or a volume of tensors. mask: or find it."""

    name: str
    image: Path
    gradients: tuple[Path, Path] | None = None
    mask: Path | None = None

    def all(self) -> list[Path]:
        return [self.image, *(self.gradients or ()), *([self.mask] if self.mask else [])]


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan in memory, in canonical orientation.

    signal: (n, D, H, W) float32, as stored; six tensor components in the frame of the world where `fitted`.
    b_values, directions: (n,) and (n, 3) in the frame of the world; None for anything but raw diffusion images.
    mask: bool (D, H, W). direction: of the grid as it lies in the file. file_frame: that of its directions.
    """

    signal: np.ndarray
    mask: np.ndarray
    geometry: Geometry
    direction: np.ndarray
    file_frame: np.ndarray
    b_values: np.ndarray | None = None
    directions: np.ndarray | None = None
    fitted: bool = False

    def channels(self) -> np.ndarray:
        """What is enhanced, (C, D, H, W) float32: the image, or six components in mm2/s, 0 outside the mask."""
        if self.b_values is None or self.directions is None:
            return self.signal
        return fit_tensor(self.signal, self.b_values, self.directions) * self.mask

    def reduced(self, factor: Triple) -> Scan:
        """The scan at low resolution: means of blocks of `factor` voxels, of diffusion scans in the raw images.

        What does not fill a block at the far ends is cut off. A block belongs to the mask with at least half its voxels
        (chosen).
        """
        if self.fitted:
            raise InvresError(
                "A volume of tensors cannot be reduced: means are taken of the raw images, before the fit.",
                hint="Give the diffusion scan with its .bval and .bvec.",
            )
        whole = self.cut(factor)
        grid = whole.geometry
        spacing = tuple(s * f for s, f in zip(grid.spacing_mm, factor, strict=True))
        return dataclasses.replace(
            whole,
            signal=_block_means(whole.signal, factor),
            mask=_block_means(whole.mask.astype(np.float32), factor) >= 0.5,
            geometry=grid.with_spacing((spacing[0], spacing[1], spacing[2])),
        )

    def cut(self, factor: Triple) -> Scan:
        """Without what does not fill a block of `factor` voxels at the far ends."""
        sizes = [size - size % step for size, step in zip(self.geometry.shape, factor, strict=True)]
        box = (slice(0, sizes[0]), slice(0, sizes[1]), slice(0, sizes[2]))
        if min(sizes) < 1:
            raise InvresError("The scan is too small to be reduced.")
        signal = self.signal[:, box[0], box[1], box[2]]
        return dataclasses.replace(self, signal=signal, mask=self.mask[box], geometry=self.geometry.crop(box))


def find_scans(root: Path, kind: Kind, report: Reporter = SILENT) -> tuple[ScanFiles, ...]:
    """The scans in a folder and the folders in it, of one file, or of a text file with a path a line.

    kind "tensor": every volume with a .bval and a .bvec beside it (or `bvals` and `bvecs`, as in HCP). kind "image":
    every other volume. A file of the same name ending in `_mask`, or HCP's `nodif_brain_mask`, is the scan's mask.
    In a folder, label maps are left out, as a note says: files ending in `_seg`, `_dseg`, `_label` or `_labels`, and
    folders whose name starts with `label`. Files that are given by name are always taken.
    Raises InvresError where there is none, or two have one name.
    """
    if root.is_file() and root.suffix.lower() == ".txt":
        lines = [line.strip() for line in root.read_text(encoding="utf-8-sig").splitlines()]
        files = [root.parent / line for line in lines if line and not line.startswith("#")]
    elif root.is_file():
        files = [root]
    else:
        files = _volumes_below(root, DEEPEST)
    base = root if root.is_dir() else root.parent
    found = []
    left_out = 0
    for file in files:
        stem = stem_of(file)
        if root.is_dir() and _is_label_map(file, root):
            left_out += 1
            continue
        if stem.endswith(MASK) or stem == HCP_MASK or (gradient_files(file) is None) == (kind == "tensor"):
            continue
        named = file.parent.relative_to(base) / stem if file.is_relative_to(base) else Path(stem)
        found.append(dataclasses.replace(scan_of(file, kind), name=named.as_posix()))
    if left_out:
        what, they = ("file is", "it looks") if left_out == 1 else ("files are", "they look")
        report.note(
            f"{left_out} {what} left out, for {they} like label maps by folder ({LABEL_FOLDER}...) or name "
            f"({', '.join(LABEL_ENDINGS)})."
        )
    if not found:
        what = "diffusion scan (a 4D volume with .bval and .bvec beside it)" if kind == "tensor" else "volume"
        raise InvresError(
            f"There is no {what} in {root}.",
            hint="Give a folder of scans, one scan, or a text file with a path a line.",
        )
    names = [scan.name for scan in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvresError(f"Two scans have the name {twice}.", hint="Rename or remove one of them.")
    return tuple(found)


def _is_label_map(file: Path, root: Path) -> bool:
    """By the names of the file and of the folders below `root`."""
    folders = (part.lower() for part in file.parent.relative_to(root).parts)
    return stem_of(file).lower().endswith(LABEL_ENDINGS) or any(part.startswith(LABEL_FOLDER) for part in folders)


def scan_of(image: Path, kind: Kind) -> ScanFiles:
    """A scan with what lies beside its file, as `find_scans` finds it. A diffusion scan is a plain image to "image"."""
    gradients = gradient_files(image) if kind == "tensor" else None
    beside = {stem_of(path): path for path in reversed(list_volumes(image.parent))}
    mask = beside.get(stem_of(image) + MASK) or (beside.get(HCP_MASK) if gradients else None)
    return ScanFiles(stem_of(image), image, gradients, mask)


def read_scan(files: ScanFiles, kind: Kind, largest_b: float, report: Reporter = SILENT) -> Scan:
    """Reads a scan. kind "tensor" without gradients: a volume of six tensor components, 0 outside of the mask.

    Raises InvresError for files that are not what `kind` needs.
    """
    stored = read_channels(files.image, report=report)
    grid = stored[0].geometry
    frame = file_frame(grid)
    b_values: np.ndarray | None = None
    directions: np.ndarray | None = None
    if kind == "image":
        if len(stored) != 1:
            raise InvresError(
                f"{files.image} holds {len(stored)} volumes, but the model enhances plain images of one.",
                hint="Give one 3D volume.",
            )
    elif files.gradients is not None:
        b_values, directions = read_gradients(*files.gradients)
        if len(b_values) != len(stored):
            raise InvresError(
                f"{files.image} holds {len(stored)} volumes, but {files.gradients[0].name} {len(b_values)} b-values.",
                hint="Give the .bval and .bvec that were exported with the scan.",
            )
        kept = np.flatnonzero(b_values <= largest_b)
        if len(kept) < len(stored):
            report.note(f"{files.image.name}: {len(stored) - len(kept)} volumes above b = {largest_b:g} are left out.")
        stored = [stored[place] for place in kept]
        b_values, directions = b_values[kept], directions[kept] @ frame.T
    elif len(stored) != len(COMPONENTS):
        raise InvresError(
            f"{files.image} holds {len(stored)} volumes without b-values, but a volume of tensors has six.",
            hint="Give --bval and --bvec of a diffusion scan, or six components (Dxx, Dxy, Dxz, Dyy, Dyz, Dzz).",
        )
    volumes = [volume.canonical() for volume in stored]
    signal = np.stack([volume.array for volume in volumes]).astype(np.float32)
    fitted = kind == "tensor" and b_values is None
    if fitted:
        signal = turned(signal, frame)
    if files.mask is not None:
        mask = _mask_on(files.mask, grid, report)
    elif fitted:
        mask = (signal != 0).any(axis=0)
    else:
        plain = np.ones(len(signal), bool) if b_values is None else b_values <= LOW_B
        mask = head_mask((signal[plain] if plain.any() else signal).mean(axis=0))
    return Scan(signal, mask, volumes[0].geometry, grid.direction, frame, b_values, directions, fitted)


def _mask_on(path: Path, grid: Geometry, report: Reporter) -> np.ndarray:
    mask = read_volume(path, kind="labels", report=report)
    if not mask.geometry.same_as(grid, tolerance_mm=1e-2):
        raise InvresError(
            f"The mask {path.name} lies on another grid than its scan ({mask.geometry.difference(grid)}).",
            hint="Resample it to the scan's grid with nearest neighbours.",
            code="grid_mismatch",
        )
    found = Volume(mask.array, grid).canonical().array > 0
    if not found.any():
        raise InvresError(f"The mask {path} is empty.", hint="Remove it, and one will be made.")
    return found


def _volumes_below(folder: Path, depth: int) -> list[Path]:
    below: Sequence[Path] = list_folders(folder) if depth else ()
    return [*list_volumes(folder), *(path for one in below for path in _volumes_below(one, depth - 1))]


def _block_means(array: np.ndarray, factor: Triple) -> np.ndarray:
    """Means over blocks of the last three axes, whose sizes are multiples of `factor`; float32."""
    *first, depth, height, width = array.shape
    d, h, w = factor
    blocks = array.reshape(*first, depth // d, d, height // h, h, width // w, w)
    return blocks.mean(axis=(-5, -3, -1), dtype=np.float64).astype(np.float32)
