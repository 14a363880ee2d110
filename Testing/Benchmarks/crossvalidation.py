"""Five-fold cross-validation of the three networks on real MR crops of the hippocampus, and the model that is bundled.

    PYTHONPATH=Backend python Testing/Benchmarks/crossvalidation.py --output FOLDER [--data HIPPOCAMPUS]

Every network trains on the same folds, patches and augmentation, for as many steps as fit into --seconds at its own
step time, under the faster of its engines (which makes no difference to the result). The step times are measured at the
start, one network after the other in turn, and kept; steps and not seconds end a training, so that the figures do not
depend on what else runs. The weights after the last step are
scored on the cases of the fold that was left out, in the file's own voxels; nothing is chosen by those cases. Every
finished fold is kept in FOLDER: after a kill the same command goes on. Prints Markdown, after each fold all that there
is so far. One thread.

--folds takes only the first ones, --optimizer another optimizer than the recipe's, --steps trains every network for as
many steps, whatever they take. Once the step times are measured, several processes may work in one FOLDER, each on its
own fold (--only). With --bundle PATH the recipe's network as trained for the first fold is written as a package: the
figures on its card are of these very weights.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import ctypes
import dataclasses
import json
import platform
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invres.benchmark import ENGINE_TABLE
from invres.cases import Dataset, read_dataset
from invres.config import Label, LabelScheme, Recipe
from invres.console import spread
from invres.events import TerminalReporter, format_bytes
from invres.expectation import Expectation
from invres.files import written_whole
from invres.inference import load_network, segment_volumes
from invres.intervals import interval
from invres.memory import predict_training
from invres.metrics import score_case
from invres.modelpackage import ModelPackage, open_package, save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.prediction import confidence_of
from invres.sides import Side
from invres.step import make_optimizer, training_step
from invres.training import train
from invres.trainingrun import TrainOptions

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "Resources" / "Recipes" / "hippocampus-t1.json"
FOLDS = 5
# Only where --networks names them:
ABLATION = "fully_invres with shuffle"
BUNDLED = "fully_invres of the recipe"
EPOCHS = 10  # of a training; what an epoch is makes no difference, but for the curves
SOURCE = "Medical Segmentation Decathlon, Task04 (hippocampus in T1-weighted MR), CC BY-SA 4.0."
_HIPPOCAMPUS = (
    "Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure~SCT^5366008^Hippocampus~^^"
    "~Anatomic codes - DICOM master list~^^~^^"
)
LABELS = (
    Label("anterior hippocampus", (1,), 1, (235, 160, 40), _HIPPOCAMPUS),
    Label("posterior hippocampus", (2,), 2, (60, 140, 225), _HIPPOCAMPUS),
)
SIDES = (Side("anterior hippocampus", 1, 11), Side("posterior hippocampus", 2, 12))
METRICS = (("dice", "Dice", 3), ("hd95_mm", "HD95 mm", 2), ("nsd", "NSD at 1 mm", 3))


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    _keep_freed_memory()
    options.output.mkdir(parents=True, exist_ok=True)
    data = read_dataset(options.data)
    recipe = Recipe.read(RECIPE)
    training = dataclasses.replace(recipe.training, precision=options.precision)
    training = training.with_optimizer(options.optimizer or training.optimizer)
    recipe = dataclasses.replace(recipe, training=training)
    networks = _networks()
    length = {"steps": options.steps} if options.steps else {"seconds": options.seconds}
    settings = {**length, "precision": options.precision, "optimizer": training.optimizer}
    begun = options.output / "settings.json"
    if begun.is_file() and _read(begun) != settings:
        raise SystemExit(
            f"{options.output} was begun with {_read(begun)}, and now it is {settings}: take another folder."
        )
    _write(begun, settings)
    known = options.output / "steps.json"
    steps = _read(known) if known.is_file() else {}
    if missing := {name: networks[name] for name in options.networks if name not in steps}:
        steps |= _step_seconds(missing, recipe, data)
        _write(known, steps)
    for fold in range(options.folds) if options.only is None else [options.only]:
        for name in options.networks:
            engine, seconds = min(steps[name].items(), key=lambda found: found[1])
            count = EPOCHS * max(1, round((options.steps or options.seconds / seconds) / EPOCHS))
            run, kept = options.output / f"{name}_{fold}", _kept(options.output, name, fold)
            if not kept.is_file():
                _write(kept, _fold(networks[name], recipe, engine, data, run, count, fold))
            print(_markdown(options, data, steps, networks), flush=True)
    if options.bundle:
        package = _bundle(
            data, options.output / f"{BUNDLED}_0", _read(_kept(options.output, BUNDLED, 0)), options.bundle
        )
        print(package.path)
        for name, values in package.manifest.metrics.items():
            print(f"  {name}: " + ", ".join(f"{key} {spread(value)}" for key, value in values.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    names = [*_networks()]
    parser.add_argument("--data", type=Path, default=shared / "hippocampus_msd", help="folder with images/ and labels/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="of training steps, for each fold of each network")
    parser.add_argument("--steps", type=int, default=0, help="of each training, instead of --seconds; tens are counted")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer", choices=("adam", "muon"), help="default: the recipe's")
    parser.add_argument("--bundle", type=Path, help="where the package is written; adds its network to --networks")
    usual = [name for name in names if name not in (ABLATION, BUNDLED)]
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five, from the first one on")
    parser.add_argument("--only", type=int, choices=range(FOLDS), help="only this fold, beside others in FOLDER")
    parser.add_argument("--networks", nargs="*", choices=names, default=usual)
    options = parser.parse_args()
    if options.bundle and BUNDLED not in options.networks:
        options.networks.append(BUNDLED)
    return options


def _keep_freed_memory() -> None:
    """Without this glibc gives every large map back to the system, and getting it anew costs the networks with large
    maps, the baseline most of all, up to a fifth of their time on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _networks() -> dict[str, NetworkConfig]:
    """Fully-InvRes with its default widths and, of about its size, the baseline and Partially-InvRes; then variants."""
    default = NetworkConfig(name="fully_invres", levels=4)
    return {
        "fully_invres": default,
        "unet3d": NetworkConfig(name="unet3d", levels=4),
        "partially_invres": NetworkConfig(name="partially_invres", levels=4),
        ABLATION: dataclasses.replace(default, resampling="shuffle"),
        BUNDLED: Recipe.read(RECIPE).network,
    }


def _sized(network: NetworkConfig, data: Dataset) -> NetworkConfig:
    return dataclasses.replace(network, in_channels=len(data.channel_names), out_channels=data.scheme.out_channels)


def _step_seconds(networks: dict[str, NetworkConfig], recipe: Recipe, data: Dataset) -> dict[str, dict[str, float]]:
    """Network -> engine -> median seconds of a step; all take turns, so that they meet the same machine."""
    config = recipe.training
    image = torch.randn(config.batch_size, len(data.channel_names), *config.patch)
    target = torch.randint(0, data.scheme.out_channels, (config.batch_size, *config.patch), dtype=torch.int16)
    built = {
        (name, engine): build(_sized(network, data), engine).train()
        for name, network in networks.items()
        for engine in ("stored", "reversible")
        if engine in ENGINE_TABLE[network.name]
    }
    optimizers = {key: make_optimizer(network, kind=config.optimizer) for key, network in built.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in built}
    for _ in range(8):
        for key, network in built.items():
            began = time.process_time()
            training_step(network, optimizers[key], image, target, False, config.loss, config.precision)
            seconds[key].append(time.process_time() - began)
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for (name, engine), times in seconds.items():
        found[name][engine] = statistics.median(times[1:])
    return found


def _bundle(data: Dataset, run: Path, fold: dict[str, Any], target: Path) -> ModelPackage:
    """Writes the model of a fold as a package with the names of its labels, its figures and its source."""
    package = open_package(run / "model")
    manifest, scheme = package.manifest, LabelScheme(LABELS)
    assert [label.values for label in scheme.labels] == [label.values for label in manifest.scheme.labels]
    names = dict(zip(scheme.names, manifest.scheme.names, strict=True))
    cases = list(fold["scores"].values())
    shown = {"Dice": "dice", "HD95": "hd95_mm", "NSD": "nsd"}
    metrics = {
        name: {metric: _spread([case[own][key] for case in cases]) for metric, key in shown.items()}
        for name, own in names.items()
    }
    ranges = {name: manifest.expected.volumes_ml[own] for name, own in names.items()}
    return save_package(
        target,
        name=manifest.name,
        network=manifest.network,
        state_dict=package.load_weights(),
        # A folder of images says nothing of their contrast; the Decathlon's description does.
        plan=dataclasses.replace(manifest.plan, channels=(dataclasses.replace(manifest.plan.channels[0], name="T1"),)),
        scheme=scheme,
        patch=manifest.patch,
        description=f"{manifest.description} Metrics: on {len(cases)} cases that it was not trained on.",
        training=dataclasses.asdict(manifest.training),
        metrics=metrics,
        expected=Expectation(ranges, min(fold["confidences"])),
        one_piece=manifest.one_piece,
        mirror_axes=manifest.mirror_axes,
        sides=SIDES,
        licence="CC-BY-SA-4.0",
        log=run / "metrics.jsonl",
    )


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "n": len(values)}


def _fold(
    network: NetworkConfig, recipe: Recipe, engine: str, data: Dataset, run: Path, steps: int, fold: int
) -> dict[str, Any]:
    training = dataclasses.replace(
        recipe.training,
        epochs=EPOCHS,
        iterations_per_epoch=steps // EPOCHS,
        time_s=0.0,
        engine=engine,
        validate_every=EPOCHS,
        validation_cases=1,
    )
    recipe = dataclasses.replace(recipe, network=network, training=training)
    resume = (run / "checkpoint.pt").is_file()
    options = TrainOptions(device="cpu", fold=fold, folds=FOLDS, resume=resume, source=SOURCE)
    package = train(data, recipe, run, options, TerminalReporter())
    held_out = json.loads((run / "run.json").read_text(encoding="utf-8"))["split"]["validation"]
    scores, confidences = _scores(package, data, held_out)
    shutil.rmtree(run / "prepared")
    training = dataclasses.asdict(package.manifest.training)
    return {"steps": steps, "training": training, "scores": scores, "confidences": confidences}


def _scores(package: ModelPackage, data: Dataset, names: list[str]) -> tuple[dict[str, Any], list[float]]:
    """Case -> label -> metric -> value, on the grid of the case's file; and the confidence in each case."""
    network = load_network(package, torch.device("cpu"))
    scores, confidences = {}, []
    for name in names:
        volumes, label = data.load(data.case(name))
        assert label is not None  # only labelled cases are in a fold
        found, probabilities, _ = segment_volumes(package, network, volumes)
        confidences.append(confidence_of(probabilities, data.scheme.regions))
        scored = score_case(found.array, label.array, data.scheme, label.geometry.spacing_mm)
        scores[name] = {one: {key: getattr(score, key) for key, _, _ in METRICS} for one, score in scored.items()}
    return scores, confidences


def _kept(output: Path, name: str, fold: int) -> Path:
    """Where the scores of a finished fold are."""
    return output / "folds" / f"{name}_{fold}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _markdown(
    options: argparse.Namespace, data: Dataset, steps: dict[str, dict[str, float]], networks: dict[str, NetworkConfig]
) -> str:
    lines = [
        "`python Testing/Benchmarks/crossvalidation.py "
        + (f"--steps {options.steps} " if options.steps else f"--seconds {options.seconds:g} ")
        + f"--precision {options.precision} --folds {options.folds} --networks "
        + " ".join(f'"{name}"' for name in options.networks)
        + (f" --optimizer {options.optimizer}" if options.optimizer else "")
        + f" --output FOLDER`, {os.cpu_count()}-core CPU "
        f"({platform.machine()}), one thread, {date.today()}, torch {torch.__version__.split('+')[0]}.",
        "",
        "| network | parameters | memory of a step | step, s | steps | folds | n | label "
        + "".join(f"| {heading} " for _, heading, _ in METRICS)
        + "| Dice, difference to unet3d [95 % interval] |",
        "|" + "---|" * (9 + len(METRICS)),
    ]
    training = Recipe.read(RECIPE).training
    optimizer = options.optimizer or training.optimizer
    folds = {
        name: [_read(path) for path in sorted((options.output / "folds").glob(f"{name}_?.json"))] for name in networks
    }
    scores = {
        name: {key: case for fold in found for key, case in fold["scores"].items()} for name, found in folds.items()
    }
    for name, of_cases in scores.items():
        if not of_cases:
            continue
        network = _sized(networks[name], data)
        parameters = sum(p.numel() for p in build(network).parameters())
        memory = predict_training(
            network, training.patch, training.batch_size, precision=options.precision, optimizer=optimizer
        ).peak_bytes
        head = [name, f"{parameters:,}", format_bytes(memory), f"{min(steps[name].values()):.2f}"]
        head += [str(folds[name][0]["steps"]), str(len(folds[name])), str(len(of_cases))]
        labels = list(next(iter(of_cases.values())))
        for label in [*labels, "mean"]:
            chosen = labels if label == "mean" else [label]

            def value(case: dict[str, Any], metric: str, chosen: list[str] = chosen) -> float:
                return float(np.mean([case[one][metric] for one in chosen]))

            cells = []
            for metric, _, decimals in METRICS:
                values = np.array([value(case, metric) for case in of_cases.values()])
                cells.append(f"{values.mean():.{decimals}f} ± {values.std(ddof=1):.{decimals}f}")
            both = [key for key in of_cases if key in scores["unet3d"] and name != "unet3d"]
            pairs = [value(of_cases[key], "dice") - value(scores["unet3d"][key], "dice") for key in both]
            between = interval(pairs) if pairs else None
            cells.append(f"{np.mean(pairs):+.3f} [{between[0]:+.3f}, {between[1]:+.3f}]" if between else "")
            first = label == labels[0]
            lines.append(f"| {' | '.join(head if first else [''] * len(head))} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
