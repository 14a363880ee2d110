"""The memory-efficient FCN: table 1 of its paper beside ours, and a first training on one real CT.

    PYTHONPATH=Backend python Testing/Benchmarks/compact_fcn.py table
    PYTHONPATH=Backend python Testing/Benchmarks/compact_fcn.py same --output FOLDER [--data CT_ABDOMEN]
    PYTHONPATH=Backend python Testing/Benchmarks/compact_fcn.py train --output FOLDER [--data CT_ABDOMEN]

Prints Markdown. `table` predicts and allocates nothing. `same` trains a network with and without in-place norms from
one seed on the same patches and says how far the two come apart, in double precision and in single; there also how far
a network comes apart from itself whose weights differ in the last digit. `train` is the recipe `kits19` on a single CT
of the abdomen at 3 mm, whose labels another network made: it is cut in two between left and right, one kidney in each
half, and networks are trained on one half and score both. That is one person, so it says nothing of other people or
scanners; it shows whether the recipe works and the networks learn. Changed, because it is one CPU core: smaller
patches, few steps, and so a higher learning rate.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import dataclasses
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invres import InvresError
from invres.cases import Dataset, read_dataset
from invres.config import LossWeights, Recipe
from invres.events import TerminalReporter, format_bytes
from invres.fcn_table import compare_table
from invres.files import written_whole
from invres.inference import load_network, segment_volumes
from invres.metrics import score_case
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.step import make_optimizer, training_step
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.volume import Volume, read_volume, write_volume

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE, LABELS = "example_ct.nii.gz", "example_ct_seg_v1_104classes.nii.gz"
KIDNEYS = (2, 3)
EPOCHS = 5
SAME_STEPS = 60
LEARNING_RATE = 2e-3  # five times the recipe's, because steps are few
NARROW = NetworkConfig(name="compact_fcn", channels=(8, 16, 32))
NARROW_PATCH = (24, 24, 24)
RECIPE = Recipe.read(REPOSITORY / "Resources" / "Recipes" / "kits19.json")
PATCH = (32, 64, 64)  # about 10 cm a side at the recipe's spacing
NETWORKS = {
    "the recipe's": RECIPE.network,
    "the recipe's, instance norm": dataclasses.replace(RECIPE.network, norm="instance"),
    "fully_invres": NetworkConfig(name="fully_invres", levels=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("part", choices=("table", "same", "train"))
    parser.add_argument("--data", type=Path, default=shared / "ct_abdomen")
    parser.add_argument("--output", type=Path, help="where data and runs are kept; with `same` and `train`")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--norm", choices=("batch", "instance", "group"), default="batch", help="with `same`")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "table":
        print(_table())
        return
    if options.output is None:
        parser.error(f"{options.part} needs --output")
    if options.part == "same":
        print(_sameness(_halves(options.data, options.output / "data"), options.norm))
        return
    print(_trainings(options))


# --- table 1 ----------------------------------------------------------------------------------------------------------


def _table() -> str:
    rows = compare_table(report=TerminalReporter())
    lines = [
        f"`python Testing/Benchmarks/compact_fcn.py table`, {_machine()}.",
        "",
        "| network | parameters: paper | ours | input | paper, GB | ratio | ours | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = row["published_parameters"]
        cells = [
            row["network"],
            "" if published is None else f"{published / 1e6:.1f} M",
            f"{row['parameters'] / 1e6:.2f} M",
            row["size"],
            _gigabytes(row),
            "" if row["published_ratio"] is None else f"{row['published_ratio']:.2f}",
            format_bytes(row["peak_bytes"]),
            f"{row['ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gigabytes(row: dict[str, Any]) -> str:
    if row["published_parameters"] is None:
        return ""
    return "> 32" if row["published_gb"] is None else f"{row['published_gb']:.1f}"


# --- one real CT ------------------------------------------------------------------------------------------------------


def _trainings(options: argparse.Namespace) -> str:
    dataset = _halves(options.data, options.output / "data")
    networks = {name: NETWORKS[name] for name in options.networks}
    seconds = _step_seconds(networks, dataset)
    lines = [
        f"`python Testing/Benchmarks/compact_fcn.py train --output FOLDER --steps {options.steps}`, {_machine()}, "
        "one thread.",
        "",
        "| network | parameters | CPU s a step | loss, first fifth | last fifth | Dice, trained half | other half |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (name, network) in enumerate(networks.items()):
        parameters = sum(p.numel() for p in build(_sized(network, dataset)).parameters())
        figures = _run(network, dataset, options.output / str(number), options.steps)
        cells = [name, f"{parameters:,}", f"{seconds[name]:.2f}", *(f"{figure:.4f}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _halves(source: Path, folder: Path) -> Dataset:
    """The CT cut between left and right, as a data set of two cases with one label."""
    image, labels = (read_volume(source / name).canonical() for name in (IMAGE, LABELS))
    if image.geometry.shape != labels.geometry.shape:
        raise InvresError(f"{IMAGE} and {LABELS} in {source} do not have one shape.")
    kidney = np.isin(labels.array, KIDNEYS).astype(np.uint8)
    middle = image.geometry.shape[2] // 2
    for name, part in (("left", slice(0, middle)), ("right", slice(middle, None))):
        box = (slice(None), slice(None), part)
        grid = image.geometry.crop(box)
        for kind, array in (("imagesTr", image.array.astype(np.float32)), ("labelsTr", kidney)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            file = f"{name}_0000.nii.gz" if kind == "imagesTr" else f"{name}.nii.gz"
            write_volume(folder / kind / file, Volume(np.ascontiguousarray(array[box]), grid))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    with written_whole(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    return read_dataset(folder)


def _run(network: NetworkConfig, dataset: Dataset, run: Path, steps: int) -> list[float]:
    """Trains on one half; loss at the beginning and at the end, Dice on that half and on the other."""
    training = dataclasses.replace(
        RECIPE.training,
        patch=PATCH,
        iterations_per_epoch=max(1, steps // EPOCHS),
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        validate_every=EPOCHS,  # so that nothing is chosen by the other half
    )
    # A left kidney is to teach what a right one looks like.
    augmentation = dataclasses.replace(RECIPE.augmentation, flip_axes=(2,))
    recipe = dataclasses.replace(RECIPE, network=network, training=training, augmentation=augmentation)
    package = train(dataset, recipe, run, TrainOptions(device="cpu", fold=0, folds=2), TerminalReporter())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    split = json.loads((run / "run.json").read_text(encoding="utf-8"))["split"]
    loaded = load_network(package, torch.device("cpu"))
    dice = []
    for part in ("train", "validation"):
        (case,) = split[part]
        volumes, label = dataset.load(dataset.case(case))
        assert label is not None  # both halves are labelled
        segmented, _, _ = segment_volumes(package, loaded, volumes)
        dice.append(score_case(segmented.array, label.array, dataset.scheme, label.geometry.spacing_mm)["kidney"].dice)
    return [losses[0], losses[-1], *dice]


def _sized(network: NetworkConfig, data: Dataset) -> NetworkConfig:
    return dataclasses.replace(network, in_channels=1, out_channels=data.scheme.out_channels)


def _step_seconds(networks: dict[str, NetworkConfig], data: Dataset) -> dict[str, float]:
    """Median CPU seconds of a step; the networks take turns, so that all meet the same machine."""
    image, target = torch.randn(1, 1, *PATCH), torch.randint(0, 2, (1, *PATCH), dtype=torch.int16)
    built = {name: build(_sized(network, data)).train() for name, network in networks.items()}
    optimizers = {name: make_optimizer(network) for name, network in built.items()}
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(12):
        for name, network in built.items():
            began = time.process_time()
            training_step(network, optimizers[name], image, target, False, LossWeights(), RECIPE.training.precision)
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def _sameness(data: Dataset, norm: str) -> str:
    """How far the losses of two trainings come apart that ought to be the same."""
    (image,), label = data.load(data.cases[0])
    assert label is not None  # both halves are labelled
    grid = image.array.shape
    voxels = torch.from_numpy(np.clip(image.array, -200, 300) / 200).double()
    plain, inplace = (
        dataclasses.replace(_sized(NARROW, data), norm=norm, inplace_norm=inplace) for inplace in (False, True)
    )

    def losses(network: NetworkConfig, dtype: torch.dtype, nudge: float = 0.0) -> np.ndarray:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        built = build(network).to(dtype).train()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.mul_(1 + nudge)
        optimizer = make_optimizer(built, learning_rate=LEARNING_RATE)
        found = []
        for _ in range(SAME_STEPS):
            corner = [int(rng.integers(size - side)) for size, side in zip(grid, NARROW_PATCH, strict=True)]
            box = tuple(slice(first, first + side) for first, side in zip(corner, NARROW_PATCH, strict=True))
            target = torch.from_numpy(label.array[box].astype(np.int16))[None]
            step = training_step(built, optimizer, voxels[box][None, None].to(dtype), target, False, LossWeights())
            found.append(float(step.total))
        return np.array(found)

    lines = [
        f"`python Testing/Benchmarks/compact_fcn.py same --output FOLDER --norm {norm}`, {_machine()}, one thread.",
        "",
        f"| largest relative difference of the loss | first 10 steps | {SAME_STEPS} steps |",
        "|---|---|---|",
    ]
    single = losses(plain, torch.float32)
    for title, one, other in (
        ("in place or not, float64", losses(plain, torch.float64), losses(inplace, torch.float64)),
        ("in place or not, float32", single, losses(inplace, torch.float32)),
        ("not in place, weights nudged by 1e-7, float32", single, losses(plain, torch.float32, 1e-7)),
    ):
        apart = np.abs(one - other) / np.abs(one)
        lines.append(f"| {title} | {apart[:10].max():.1e} | {apart.max():.1e} |")
    return "\n".join(lines)


def _machine() -> str:
    return f"{os.cpu_count()}-core CPU ({platform.machine()}), {date.today()}, torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    main()
