"""What fine-tuning on a few cases brings against training from scratch, on real MR volumes of the hippocampus.

    PYTHONPATH=Backend python Testing/Benchmarks/finetuning.py --output FOLDER [--data HIPPOCAMPUS]

The base model learns the hippocampus as a whole (labels 1 and 2 of the Decathlon's Task04 merged). It is then
fine-tuned to the two parts, anterior and posterior, with 1, 3, 5, 10 and 20 cases; "from scratch" is the same command
on a network of random weights: same cases, same order, same number of steps of the same size, so the same time on one
machine. All models are scored on the same 40 cases, which none of them has seen. Further cells try other learning
rates. Every finished cell is kept in FOLDER: after a kill the same command goes on and loses one cell at most.
Prints Markdown, after each cell all that there is so far. One thread; steps, not seconds, end a training, so the
figures do not depend on what else runs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import dataclasses
import json
import platform
import shutil
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invres.casecomparison import Contender, compare_case
from invres.cases import Dataset, read_dataset
from invres.config import LabelScheme, PreparationPlan, Recipe
from invres.events import Reporter, TerminalReporter
from invres.files import written_whole
from invres.finetuning import finetune
from invres.inference import load_network
from invres.intervals import interval
from invres.modelpackage import ModelPackage, open_package, save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.training import train
from invres.trainingrun import TrainOptions
from invres.tuningplan import TuningOptions
from invres.volume import Volume, read_volume, write_volume

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "Resources" / "Recipes" / "hippocampus-t1.json"
TEST_CASES, LOCAL_CASES, CHOOSING_CASES = 40, 20, 10  # what remains without the first two is the base model's
COUNTS = (1, 3, 5, 10, 20)
RATES_AT = 3  # cases
PARTS = {"background": 0, "anterior": 1, "posterior": 2}


@dataclass(frozen=True)
class Cell:
    """One training. start: "tuned" or "scratch". rate: None is the default of `invres finetune`."""

    cases: int
    start: str
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.start}_{self.cases}" + (f"_{self.rate:g}" if self.rate else "")


CELLS = (  # what tells most comes first
    *(Cell(count, start) for count in (3, 1, 20) for start in ("tuned", "scratch")),
    *(Cell(RATES_AT, "tuned", rate) for rate in (3e-3, 3e-4)),
    *(Cell(count, start) for count in (10, 5) for start in ("tuned", "scratch")),
    *(Cell(RATES_AT, start, rate) for start, rate in (("scratch", 3e-3), ("tuned", 1e-4), ("scratch", 3e-4))),
)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    names = _shuffled(options.data, options.seed)
    test, local, rest = names[:TEST_CASES], names[TEST_CASES:][:LOCAL_CASES], names[TEST_CASES + LOCAL_CASES :]
    report = TerminalReporter()
    merged = _merged(options.data, output / "merged", [*rest, *test])
    recipe = Recipe.read(RECIPE)
    training = dataclasses.replace(
        recipe.training, patch=tuple(options.patch), epochs=max(1, options.base_steps // 100), time_s=0.0
    )
    training = dataclasses.replace(training, seed=options.seed)
    recipe = dataclasses.replace(recipe, training=training, spacing_mm=(options.spacing,) * 3)
    base = _base(_listed(output, "base", merged, rest, {"background": 0, "hippocampus": 1}), recipe, output, report)
    untrained = _untrained(base, output / "untrained", options.seed)
    on_test = _listed(output, "test", options.data, test, PARTS)
    _kept(output, "base", lambda: _score(base, _listed(output, "whole", merged, test, {"hippocampus": 1})))
    for cell in CELLS:
        data = _listed(output, f"local_{cell.cases}", options.data, local[: cell.cases], PARTS, patient="all")
        start = base if cell.start == "tuned" else untrained
        _kept(
            output,
            cell.name,
            lambda cell=cell, data=data, start=start: _cell(cell, data, start, on_test, output, options, report),
        )
        print(_markdown(output, options, len(rest)), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=shared / "hippocampus_msd", help="folder with images/ and labels/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of each fine-tuning and of each training from scratch")
    parser.add_argument("--optimizer", choices=("adam", "muon"), help="of these (default: that of `invres finetune`)")
    parser.add_argument("--spacing", type=float, default=1.5, help="mm, of all models; labels are scored at their 1 mm")
    parser.add_argument("--patch", type=int, nargs=3, default=[24, 32, 24])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --- data ----------------------------------------------------------------------------------------------------------


def _shuffled(data: Path, seed: int) -> list[str]:
    names = sorted(path.name for path in (data / "images").glob("*.nii.gz"))
    np.random.RandomState(seed).shuffle(names)
    return names


def _merged(data: Path, folder: Path, names: list[str]) -> Path:
    """A folder with the same images, and labels of which 1 and 2 are 1."""
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / "labels" / name
        if not target.exists():
            label = read_volume(data / "labels" / name, kind="labels")
            write_volume(target, Volume((label.array > 0).astype(np.uint8), label.geometry))
    if not (folder / "images").exists():
        (folder / "images").symlink_to(data / "images")
    return folder


def _listed(
    output: Path, name: str, data: Path, files: list[str], labels: dict[str, int], patient: str = ""
) -> Dataset:
    """A data set of these files. patient: of all of them, so that none is held out; "" makes each its own."""
    cases = {
        file.removesuffix(".nii.gz"): {
            "images": [str((data / "images" / file).absolute())],
            "label": str((data / "labels" / file).absolute()),
            "patient": patient,
        }
        for file in files
    }
    home = output / "lists" / name
    home.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "channel_names": {"0": "T1"}, "labels": labels, "dataset": cases}
    (home / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return read_dataset(home)


# --- models --------------------------------------------------------------------------------------------------------


def _base(data: Dataset, recipe: Recipe, output: Path, report: Reporter) -> ModelPackage:
    run = output / "base"
    if (run / "model" / "manifest.json").is_file():
        return open_package(run / "model")
    options = TrainOptions(device="cpu", resume=(run / "run.json").is_file(), validation_count=CHOOSING_CASES)
    return train(data, recipe, run, options, report)


def _untrained(base: ModelPackage, folder: Path, seed: int) -> ModelPackage:
    """The base model's network before it has learnt anything."""
    if (folder / "manifest.json").is_file():
        return open_package(folder)
    torch.manual_seed(seed + 1)
    config: NetworkConfig = base.manifest.network
    plan: PreparationPlan = base.manifest.plan
    scheme: LabelScheme = base.manifest.scheme
    return save_package(
        folder,
        name="untrained",
        network=config,
        state_dict=build(config).state_dict(),
        plan=plan,
        scheme=scheme,
        patch=base.manifest.patch,
    )


def _cell(
    cell: Cell,
    data: Dataset,
    start: ModelPackage,
    on_test: Dataset,
    output: Path,
    options: argparse.Namespace,
    report: Reporter,
) -> dict[str, Any]:
    folder = output / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a cell that was killed
    wishes = {"epochs": max(1, options.steps // 25), "seed": options.seed}
    wishes |= {"learning_rate": cell.rate} if cell.rate else {}
    wishes |= {"optimizer": options.optimizer} if options.optimizer else {}
    began = time.monotonic()
    choices = TuningOptions(device="cpu", wishes=wishes, promote=True, new_labels=True)
    found = finetune(start, data, folder, choices, report)
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["training"]
    record = {
        "training": {key: found["training"][key] for key in ("iterations", "seconds", "training_cases")},
        "learning_rate": settings["learning_rate"],
        "seconds": round(time.monotonic() - began, 1),
        **_score(open_package(found["model"]), on_test),
    }
    shutil.rmtree(folder)
    return record


def _score(package: ModelPackage, data: Dataset) -> dict[str, Any]:
    """Metrics of each case of `data`, on its own grid."""
    contender = Contender(package, load_network(package, torch.device("cpu")))
    return {"scores": {case.name: compare_case(data, case, None, contender).tuned for case in data.cases}}


def _kept(output: Path, name: str, compute: Any) -> None:
    """cells/NAME.json, computed where it is not there."""
    path = _path(output, name)
    path.parent.mkdir(exist_ok=True)
    if not path.is_file():
        content = compute()
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


# --- the table -----------------------------------------------------------------------------------------------------


def _path(output: Path, name: str) -> Path:
    return output / "cells" / f"{name}.json"


def _read(output: Path, name: str) -> dict[str, Any]:
    return json.loads(_path(output, name).read_text(encoding="utf-8"))


def _values(record: dict[str, Any], metric: str = "Dice") -> np.ndarray:
    """One value for each case, mean over labels."""
    return np.array([np.mean([label[metric] for label in case.values()]) for case in record["scores"].values()])


def _mean_sd(values: np.ndarray, decimals: int = 3) -> str:
    return f"{values.mean():.{decimals}f} ± {values.std(ddof=1):.{decimals}f}"


def _markdown(output: Path, options: argparse.Namespace, base_cases: int) -> str:
    base = _values(_read(output, "base"))
    patch = " ".join(map(str, options.patch))
    lines = [
        f"`python Testing/Benchmarks/finetuning.py --base-steps {options.base_steps} --steps {options.steps} "
        f"--spacing {options.spacing:g} --patch {patch} --seed {options.seed}"
        f"{f' --optimizer {options.optimizer}' if options.optimizer else ''}`, {os.cpu_count()}-core CPU "
        f"({platform.machine()}), one thread, {date.today()}, torch {torch.__version__.split('+')[0]}.",
        "",
        f"Base model: {base_cases} cases ({CHOOSING_CASES} of them choose its epoch), {options.base_steps} steps; Dice "
        f"of the whole hippocampus on the {len(base)} test cases {_mean_sd(base)}.",
        "",
        "| cases | from scratch: Dice | HD95 mm | fine-tuned: Dice | HD95 mm | difference in Dice [95 % interval] |",
        "|---|---|---|---|---|---|",
    ]
    there = {cell: _read(output, cell.name) for cell in CELLS if _path(output, cell.name).is_file()}
    for count in COUNTS:
        scratch, tuned = (there.get(Cell(count, start)) for start in ("scratch", "tuned"))
        if scratch is None or tuned is None:
            continue
        paired = _values(tuned) - _values(scratch)
        ends = interval(paired.tolist())
        assert ends is not None  # there are 40 cases
        lines.append(
            f"| {count} | {_mean_sd(_values(scratch))} | {_mean_sd(_values(scratch, 'HD95_mm'), 2)} "
            f"| {_mean_sd(_values(tuned))} | {_mean_sd(_values(tuned, 'HD95_mm'), 2)} "
            f"| {paired.mean():+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}] |"
        )
    lines += ["", f"| learning rate, {RATES_AT} cases | from scratch: Dice | fine-tuned: Dice |", "|---|---|---|"]
    rates = {(cell.start, there[cell]["learning_rate"]): there[cell] for cell in there if cell.cases == RATES_AT}
    for rate in sorted({rate for _, rate in rates}):
        row = [rates.get((start, rate)) for start in ("scratch", "tuned")]
        shown = ["" if record is None else _mean_sd(_values(record)) for record in row]
        lines.append(f"| {rate:g} | {shown[0]} | {shown[1]} |")
    seconds = [record["training"]["seconds"] for record in there.values()]
    lines += ["", f"A training of {options.steps} steps took {min(seconds):.0f} to {max(seconds):.0f} s."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
