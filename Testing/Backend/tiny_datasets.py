"""Small synthetic data sets, recipes and packages on disk, and the command line, for tests that train and segment."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from grids import RAS, rotation

from invres.cases import read_dataset
from invres.cli import main
from invres.config import Recipe
from invres.configjson import from_dict, to_dict
from invres.volume import Geometry, Volume, write_volume

BACKEND = Path(__file__).resolve().parents[2] / "Backend"
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "hot": 3}
# Odd sizes, thick slices, axes that are turned, flipped and in another order.
GRIDS = (
    Geometry((20, 17, 23), (2.5, 1.1, 0.8), (3.0, -7.5, 11.0), rotation(9) @ RAS),
    Geometry((17, 19, 22), (1.1, 2.4, 0.9), (-20.0, 4.0, 2.0), RAS[:, [1, 0, 2]] * [1, -1, 1]),
    Geometry((21, 16, 24), (2.5, 1.0, 0.8), (0.0, 60.0, -5.0), rotation(-14) @ RAS * [-1, 1, -1]),
)


def places(grid: Geometry) -> np.ndarray:
    """Where each voxel lies along the canonical axes D, H, W, as -1..1 from end to end: (3, D, H, W)."""
    canonical = grid.canonical()
    index = np.stack(np.meshgrid(*(np.arange(size) for size in grid.shape), indexing="ij"))
    middle = ((np.array(grid.shape) - 1) / 2).reshape(3, 1, 1, 1)
    along = np.tensordot(canonical.direction.T @ grid.affine[:3, :3], index - middle, 1)
    half = np.array(canonical.shape) * canonical.spacing_mm / 2
    return along / half.reshape(3, 1, 1, 1)


def phantom(grid: Geometry, channels: int = 1, seed: int = 0) -> tuple[list[Volume], Volume]:
    """Images and a label map: tissue with zeros around it, in it the balls 1 (above) and 2 (below, with a core 3)."""
    d, h, w = places(grid)
    rng = np.random.default_rng(seed)
    body = np.maximum(np.abs(d), np.maximum(np.abs(h), np.abs(w))) < 0.93
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[(2 * (d - 0.45)) ** 2 + (1.6 * h) ** 2 + (1.6 * (w - 0.2)) ** 2 < 1] = 1
    label[(2 * (d + 0.45)) ** 2 + (1.4 * h) ** 2 + (1.4 * w) ** 2 < 1] = 2
    label[(4 * (d + 0.45)) ** 2 + (3 * h) ** 2 + (3 * w) ** 2 < 1] = 3
    images = []
    for channel in range(channels):
        tissue = np.array([100, 180, 40, 260])[(np.arange(4) * (channel % 2 * 2 + 1)) % 4]
        image = (tissue[label] + rng.normal(0, 8, grid.shape)).astype(np.float32)
        images.append(Volume(np.where(body, np.maximum(image, 1), 0).astype(np.float32), grid))
    return images, Volume(label, grid)


def write_dataset(
    folder: Path,
    cases: int = 3,
    channels: tuple[str, ...] = ("T1", "T2"),
    labels: dict[str, Any] | None = None,
    ending: str = ".nii.gz",
    unlabelled: int = 0,
    empty: tuple[int, ...] = (),
) -> Path:
    """An nnU-Net data set; the values of its label files are 1, 2, 3, or those of `labels` in their order.

    unlabelled: how many of the cases, from the first, have no label file. empty: cases whose label is background.
    """
    labels = labels or {"background": 0, "upper": 1, "lower": 2, "core": 3}
    regions = any(isinstance(value, list) for value in labels.values())
    values = [0, 1, 2, 3] if regions else list(labels.values())
    entries = {}
    for case in range(cases):
        images, label = phantom(GRIDS[case % len(GRIDS)], len(channels), seed=case)
        name = f"patient{case:02d}"
        files = [f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(len(channels))]
        for file, image in zip(files, images, strict=True):
            write_volume(folder / file, image)
        entries[name] = {"images": files}
        if case >= unlabelled:
            entries[name]["label"] = f"labelsTr/{name}{ending}"
            array = np.array(values, dtype=np.uint8)[label.array]
            write_volume(folder / entries[name]["label"], Volume(array * (case not in empty), label.geometry))
    description = {
        "name": "Phantoms",
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ending,
        "dataset": entries,
    }
    if regions:
        description["regions_class_order"] = list(range(1, len(labels)))
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def write_decathlon(folder: Path, channels: tuple[str, ...] = ("FLAIR", "T1w"), cases: int = 2) -> Path:
    """A data set of the Decathlon: all channels of a case in one 4D file."""
    plain = write_dataset(folder / "plain", cases, channels)
    dataset = read_dataset(plain)
    (folder / "imagesTr").mkdir()
    for case in dataset.cases:
        volumes = [sitk.ReadImage(str(path)) for path in case.images]
        sitk.WriteImage(sitk.JoinSeries(volumes), str(folder / "imagesTr" / f"{case.name}.nii.gz"))
    description = {
        "name": "Phantoms 4D",
        "modality": {str(index): name for index, name in enumerate(channels)},
        "labels": {"0": "background", "1": "upper", "2": "lower", "3": "core"},
        "numTraining": cases,
        "training": [
            {"image": f"./imagesTr/{case.name}.nii.gz", "label": f"./plain/labelsTr/{case.name}.nii.gz"}
            for case in dataset.cases
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def tiny_recipe(network: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A recipe that trains in a second: two levels, patches of 16 voxels, every kind of augmentation."""
    return from_dict(
        Recipe,
        {
            "name": "tiny",
            "description": "For tests.",
            "network": {"name": "fully_invres", "channels": [4, 16], **(network or {})},
            "training": {
                **{"patch": [16, 12, 16], "batch_size": 2, "iterations_per_epoch": 2, "epochs": 2},
                **{"learning_rate": 0.01, **training},
            },
        },
    )


def write_recipe(path: Path, network: dict[str, Any] | None = None, **training: Any) -> Path:
    """`tiny_recipe` as a JSON file."""
    path.write_text(json.dumps(to_dict(tiny_recipe(network, **training))), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output and error."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a command with --json; fails on any other line."""
        return [json.loads(line) for line in self.out.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def invres(*arguments: Any) -> Outcome:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def start_process(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """`python -m invres` as a process of its own, with as many threads as this one: sums depend on their number."""
    import torch

    command = [sys.executable, "-m", "invres", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(BACKEND), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes, **options)


def invres_process(*arguments: Any, **options: Any) -> Outcome:
    """The command line in a process of its own, to its end."""
    process = start_process(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


@contextlib.contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """Every write beyond `size_bytes` of a file fails, as on a full disk. Skips the test where that cannot be had."""
    import pytest

    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers(folder: Path) -> list[str]:
    """Names of half-written files anywhere in `folder`."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith(".tmp") or ".tmp." in path.name or path.name.startswith(".")
    )
