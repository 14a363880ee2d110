"""Tiny data sets in the layouts of the published ones, file by file and name by name as they are downloaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tiny_datasets import phantom

from invres.volume import Geometry, Volume, write_volume

# All cases of these data sets lie on one grid; the axes of BraTS point left and to the back.
GRID = Geometry((18, 20, 16), (1.0, 1.0, 1.0), (0.0, -239.0, 0.0), np.eye(3)[:, ::-1] * [1, -1, -1])


def write_analyze(path: Path, volume: Volume) -> None:
    """An Analyze 7.5 pair (.hdr, .img), which knows spacing but neither origin nor direction; whole numbers only."""
    array = volume.array
    kinds = {"uint8": (2, 8), "int16": (4, 16)}
    code, bits = kinds[array.dtype.name]
    header = bytearray(348)
    struct.pack_into("<i", header, 0, 348)
    header[38:39] = b"r"
    struct.pack_into("<8h", header, 40, 4, *array.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, 0, *volume.geometry.spacing_mm[::-1], 1, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    path.with_suffix(".img").write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


def case(channels: int, values: tuple[int, ...], seed: int) -> tuple[list[Volume], Volume]:
    """Images, and a label map whose three structures have `values`."""
    images, label = phantom(GRID, channels, seed)
    found = np.array([0, *values], dtype=np.uint8)[label.array]
    return [Volume(image.array.astype(np.int16), GRID) for image in images], Volume(found, GRID)


def iseg(folder: Path, cases: int = 3, analyze: bool = True) -> Path:
    """iSeg-2019-Training: subject-1-T1.hdr and .img, subject-1-T2, subject-1-label."""
    root = folder / "iSeg-2019-Training"
    for number in range(1, cases + 1):
        images, label = case(2, (10, 150, 250), number)
        for name, volume in zip(("T1", "T2", "label"), (*images, label), strict=True):
            if analyze:
                write_analyze(root / f"subject-{number}-{name}.hdr", volume)
            else:
                write_volume(root / f"subject-{number}-{name}.nii.gz", volume)
    return root


def iseg_nifti(folder: Path) -> Path:
    return iseg(folder, analyze=False)


def brats(folder: Path, cases: int = 3) -> Path:
    """MICCAI_BraTS2020_TrainingData, with the one label that was published under a name of its own."""
    root = folder / "MICCAI_BraTS2020_TrainingData"
    for number in [*range(1, cases), 355]:
        name = f"BraTS20_Training_{number:03d}"
        images, label = case(4, (1, 2, 4), number)
        for channel, image in zip(("flair", "t1", "t1ce", "t2"), images, strict=True):
            write_volume(root / name / f"{name}_{channel}.nii", image)
        write_volume(root / name / ("W39_1998.09.19_Segm.nii" if number == 355 else f"{name}_seg.nii"), label)
    for table in ("name_mapping.csv", "survival_info.csv"):
        (root / table).write_text("BraTS_2020_subject_ID\n")
    return root


def kits19(folder: Path) -> Path:
    """kits19/data, as its own script puts the images into the repository; the cases from 210 on have no label."""
    root = folder / "data"
    for number in (0, 1, 2, 210):
        (image,), label = case(1, (1, 2, 0), number)
        write_volume(root / f"case_{number:05d}" / "imaging.nii.gz", image)
        if number < 210:
            write_volume(root / f"case_{number:05d}" / "segmentation.nii.gz", label)
    (root / "kits.json").write_text("[]\n")
    return root


def hcp(folder: Path) -> Path:
    """HCP Young Adult, Structural Preprocessed, as unpacked: a folder a subject, of which we read T1w."""
    root = folder / "HCP"
    for number, subject in enumerate(("100307", "100408", "101006")):
        images, label = case(2, (2, 3, 41), number)
        inside = root / subject / "T1w"
        for name, image in zip(("T1w_acpc_dc_restore", "T2w_acpc_dc_restore"), images, strict=True):
            write_volume(inside / f"{name}.nii.gz", image)
            write_volume(inside / f"{name}_brain.nii.gz", image)
        label.array[0, 0, 0] = 42
        write_volume(inside / "ribbon.nii.gz", label)
        write_volume(inside / "aparc+aseg.nii.gz", label)
        write_volume(root / subject / "MNINonLinear" / "T1w_restore.nii.gz", images[0])
    return root


def _decathlon(root: Path, prefix: str, modality: list[str], labels: list[str], cases: int = 3) -> Path:
    entries = []
    for number in range(1, cases + 1):
        name = f"{prefix}_{number:03d}.nii.gz"
        images, label = case(len(modality), (1, 2, 3)[: len(labels) - 1] + (0,) * (4 - len(labels)), number)
        write_volume(root / "labelsTr" / name, label)
        (root / "imagesTr").mkdir(exist_ok=True)
        if len(modality) == 1:
            write_volume(root / "imagesTr" / name, images[0])
        else:
            write_volume(root / "one.nii.gz", images[0])
            like = sitk.ReadImage(str(root / "one.nii.gz"))
            (root / "one.nii.gz").unlink()
            volumes = [sitk.GetImageFromArray(image.array) for image in images]
            for volume in volumes:
                volume.CopyInformation(like)
            sitk.WriteImage(sitk.JoinSeries(volumes), str(root / "imagesTr" / name))
        (root / "imagesTr" / f"._{name}").write_bytes(b"left by macOS")
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {
        "name": prefix,
        "tensorImageSize": "4D" if len(modality) > 1 else "3D",
        "modality": {str(index): name for index, name in enumerate(modality)},
        "labels": {str(value): name for value, name in enumerate(labels)},
        "numTraining": cases,
        "numTest": 1,
        "training": entries,
        "test": [f"./imagesTs/{prefix}_999.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


def task01(folder: Path) -> Path:
    """Task01_BrainTumour: four channels in one file, labels in the Decathlon's own numbers."""
    labels = ["background", "edema", "non-enhancing tumor", "enhancing tumour"]
    return _decathlon(folder / "Task01_BrainTumour", "BRATS", ["FLAIR", "T1w", "t1gd", "T2w"], labels)


def task04(folder: Path) -> Path:
    """Task04_Hippocampus: crops of one channel."""
    return _decathlon(folder / "Task04_Hippocampus", "hippocampus", ["MRI"], ["background", "Anterior", "Posterior"])
