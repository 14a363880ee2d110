"""A data set of bright balls on disk, and a run of `invres finetune` on it, made by the backend in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from small_models import example

from invres.config import Recipe
from invres.configjson import from_dict

__all__ = ["SHAPE", "at_work", "tuned", "write_balls"]

BACKEND = Path(__file__).resolve().parents[2] / "Backend"
SHAPE = (18, 20, 22)
ORIGIN_LPS = (-4.0, 6.0, 11.0)
RECIPE = {
    "name": "tiny",
    "training": {
        "patch": [16, 16, 16],
        "batch_size": 1,
        "iterations_per_epoch": 3,
        "epochs": 3,
        "learning_rate": 0.001,
    },
}


def write_balls(folder: Path, cases: int = 3, labelled: bool = True, seed: int = 5) -> Path:
    """An nnU-Net data set of one channel T1 and the label "ball" (value 3), on a grid that is not centred."""
    generator = np.random.default_rng(seed)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    entries = {}
    for index in range(cases):
        images, classes = example(generator, SHAPE, 1)
        name = f"case{index}"
        entries[name] = {"images": [f"imagesTr/{name}_0000.nii.gz"]}
        _write(folder / entries[name]["images"][0], images[0].astype(np.float32))
        if labelled:
            entries[name]["label"] = f"labelsTr/{name}.nii.gz"
            _write(folder / entries[name]["label"], (classes * 3).astype(np.uint8))
    description = {
        "name": "Balls",
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "ball": 3},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "dataset": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def tuned(base, folder: Path) -> Path:
    """The folder of a whole run on three cases; its data lie beside it. base: a package. Seconds."""
    from invres.cases import read_dataset
    from invres.finetuning import finetune
    from invres.tuningplan import TuningOptions

    data = write_balls(folder / "data")
    options = TuningOptions(device="cpu", recipe=from_dict(Recipe, RECIPE))
    finetune(base, read_dataset(data, checked=False), folder / "run", options)
    return folder / "run"


def at_work(folder: Path, *events: dict) -> subprocess.Popen:
    """A process that holds the folder as a fine-tuning does and has told these events; kill it when done."""
    program = (
        "import json, pathlib, sys, time\n"
        "from invres.runfolder import RecordingReporter, held\n"
        "from invres.events import Reporter\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with held(folder):\n"
        "    recorder = RecordingReporter(Reporter(), folder)\n"
        "    for event in json.loads(sys.argv[2]):\n"
        "        recorder.emit(event)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    command = [sys.executable, "-c", program, str(folder), json.dumps(events)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    return process


def _write(path: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(ORIGIN_LPS)
    sitk.WriteImage(image, str(path))
