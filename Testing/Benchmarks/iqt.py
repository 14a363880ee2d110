"""Image quality transfer on real data: figure 6, memory against depth, and errors beside cubic interpolation.

    PYTHONPATH=Backend python Testing/Benchmarks/iqt.py --output FOLDER [--data SHARED_DATA] [--steps 600]
        [--only memory|diffusion|t1]

Trains with one thread on parts of real scans and scores on other parts of them: the diffusion scan `dwi_philips` (one
person) and the T1 `t1_mni152` (the average of 152 brains), each cut in two at a coronal plane: what lies behind it is
trained on, what lies in front of it scored. (Left and right would be near copies of each other: mirror images, in the
symmetric template.) One subject proves nothing about others: the figures say that the method works, not how well.
Each network is trained as published and, "residual", to add to an interpolation of its input. Trainings resume: the
same command goes on after a kill. Steps, not seconds, end a training. Prints Markdown and at last the seconds that
each part took in this run; draws `iqt-diffusion.png` and `iqt-t1.png`: low resolution, cubic interpolation, the
networks, the truth.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invres.config import Recipe
from invres.diffusion import mean_diffusivity
from invres.enhancement import compared, enhanced, loaded_enhancer
from invres.enhancementscores import cubic
from invres.enhancementtraining import train_enhancer
from invres.events import TerminalReporter, format_bytes
from invres.iqt_figures import BATCH, PATCH, figure_6, map_bytes
from invres.memory import predict_enhancement
from invres.modelpackage import ModelPackage, open_package
from invres.networkconfig import NetworkConfig
from invres.scans import ScanFiles, find_scans, read_scan
from invres.trainingrun import TrainOptions
from invres.volume import Geometry, Volume, read_channels, write_channels, write_volume

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "Resources" / "Recipes"
# Label -> network, residual, and how many times the steps.
NETWORKS = {
    "espcn": (NetworkConfig(name="espcn"), False, 1),
    "espcn, residual": (NetworkConfig(name="espcn"), True, 1),
    "espcn_rn, N = 2": (NetworkConfig(name="espcn_rn", blocks=(2,)), False, 1),
    "espcn_rn, N = 2, residual": (NetworkConfig(name="espcn_rn", blocks=(2,)), True, 1),
}
DEPTHS = (1, 2, 4, 8, 16, 100)
NAIVE = 16  # deepest that is also predicted under `stored`; beyond it only takes long
TRAINED_SHARE = 0.6  # of the scan from behind
STEPS_PER_EPOCH = 100
TRAINED_BATCH = 6


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = options.only or ("memory", "diffusion", "t1")
    seconds = {}
    if "memory" in wanted:
        started = time.monotonic()
        _memory(options.depths)
        seconds["memory"] = time.monotonic() - started
    for name, kind, recipe, file in (
        ("diffusion", "tensor", "iqt", options.data / "dwi_philips" / "dwi.nii.gz"),
        ("t1", "image", "iqt-t1", options.data / "t1_mni152" / "mni_icbm152_t1_tal_nlin_sym_09a.nii.gz"),
    ):
        if name not in wanted:
            continue
        started = time.monotonic()
        train, test = _parts(name, kind, file, options.output / f"data-{name}")
        packages = {}
        for label, (network, residual, times) in NETWORKS.items():
            run = options.output / _folder(name, label)
            packages[label] = _trained(label, network, residual, recipe, train, run, times * options.steps)
        _draw(_scored(name, kind, packages, test), options.output / f"iqt-{name}.png")
        seconds[name] = time.monotonic() - started
    print(f"\nSeconds in this run: {', '.join(f'{part} {value:.0f}' for part, value in seconds.items())}.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--steps", type=int, default=600, help="of each training (default %(default)s)")
    parser.add_argument("--only", nargs="*", choices=("memory", "diffusion", "t1"))
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="blocks per stack; 100 takes minutes")
    return parser.parse_args()


def _folder(name: str, label: str) -> str:
    return f"{name}-{''.join(c for c in label if c.isalnum())}"


def _memory(depths: tuple[int, ...]) -> None:
    print("| model | paper, MB | paper, s an epoch | ours, live bytes | to ESPCN | ours, s a step |")
    print("|---|---|---|---|---|---|")
    rows = figure_6(measure_time=True)
    for row in rows:
        print(
            f"| {row.model} | {row.published_memory_mb:g} | {row.published_seconds:g} | {format_bytes(row.bytes)} | "
            f"{row.bytes / rows[0].bytes:.2f} | {row.seconds:.2f} |"
        )
    print("\n| blocks in each stack | parameters | peak, reversible | of it maps | peak, stored |")
    print("|---|---|---|---|---|")
    for depth in depths:
        config = NetworkConfig(name="espcn_rn", in_channels=6, out_channels=6, blocks=(depth,))
        found = predict_enhancement(config, PATCH, BATCH, "reversible")
        naive = format_bytes(predict_enhancement(config, PATCH, BATCH, "stored").peak_bytes) if depth <= NAIVE else ""
        print(
            f"| {depth} | {format_bytes(found.parameter_bytes)} | {format_bytes(found.peak_bytes)} | "
            f"{format_bytes(map_bytes(found))} | {naive} |",
            flush=True,
        )


def _parts(name: str, kind: str, file: Path, folder: Path) -> tuple[ScanFiles, ScanFiles]:
    """The scan in two files, behind and in front of a coronal plane, with the mask of the whole."""
    whole = dataclasses.replace(find_scans(file, kind)[0], name=name)  # type: ignore[arg-type]
    scan = read_scan(whole, kind, np.inf)  # type: ignore[arg-type]
    volumes = [volume.canonical() for volume in read_channels(file)]
    grid = volumes[0].geometry
    border = 2 * round(grid.shape[1] * TRAINED_SHARE / 2)
    found = []
    for part, (low, high) in {"behind": (0, border), "front": (border, grid.shape[1])}.items():
        box = (slice(None), slice(low, high), slice(None))
        image = folder / part / f"{name}.nii.gz"
        if not image.is_file():
            image.parent.mkdir(parents=True, exist_ok=True)
            if whole.gradients:
                _write_directions(scan, grid.crop(box), image)
            write_volume(folder / part / f"{name}_mask.nii.gz", Volume(scan.mask[box].astype(np.uint8), grid.crop(box)))
            cut = [Volume(volume.array[box].astype(np.float32), grid.crop(box)) for volume in volumes]
            (write_channels(image, cut) if len(cut) > 1 else write_volume(image, cut[0]))
        found += find_scans(folder / part, kind)  # type: ignore[arg-type]
    return found[0], found[1]


def _write_directions(scan: Any, grid: Geometry, image: Path) -> None:
    """The .bval and .bvec of a canonical volume, whose voxel axes are others than those of the scan's file."""
    from invres.diffusion import file_frame

    stem = image.name.removesuffix(".nii.gz")
    np.savetxt(image.with_name(f"{stem}.bval"), scan.b_values[None], fmt="%g")
    np.savetxt(image.with_name(f"{stem}.bvec"), (scan.directions @ file_frame(grid)).T, fmt="%.6f")


def _trained(
    label: str, network: NetworkConfig, residual: bool, recipe: str, scan: ScanFiles, run: Path, steps: int
) -> ModelPackage:
    if (run / "model" / "manifest.json").is_file():
        return open_package(run / "model")
    known = Recipe.read(RECIPES / f"{recipe}.json")
    assert known.enhancement is not None  # both recipes have it
    enhancement = dataclasses.replace(known.enhancement, residual=residual)
    training = dataclasses.replace(
        known.training,
        batch_size=TRAINED_BATCH,
        iterations_per_epoch=STEPS_PER_EPOCH,
        epochs=steps // STEPS_PER_EPOCH,
        learning_rate=1e-3,  # ten times the published one, for a training of minutes instead of a day
        early_stop_epochs=0,
        checkpoint_every_s=60,
    )
    resume = (run / "checkpoint.pt").is_file()
    print(f"Training {label} on {scan.name} ...", flush=True)
    return train_enhancer(
        [scan],
        dataclasses.replace(known, network=network, training=training, enhancement=enhancement),
        run,
        TrainOptions("cpu", resume),
        TerminalReporter(),
    )


def _scored(name: str, kind: str, packages: dict[str, ModelPackage], files: ScanFiles) -> dict[str, Any]:
    """Prints the errors of every model and of cubic interpolation; returns what is drawn."""
    scale, unit = (1e3, "10^-3 mm2/s") if kind == "tensor" else (1.0, "grey values")
    truth = read_scan(files, kind, 1500.0).cut((2, 2, 2))  # type: ignore[arg-type]
    low = truth.reduced((2, 2, 2))
    print(f"\n| {name}: RMSE, {unit} | interior | exterior | total | parameters | seconds of training |")
    print("|---|---|---|---|---|---|")
    pictures = {"low resolution": np.repeat(np.repeat(np.repeat(low.channels(), 2, 1), 2, 2), 2, 3)}
    pictures["cubic interpolation"] = cubic(low.channels(), (2, 2, 2))
    for number, (label, package) in enumerate(packages.items()):
        network, plan = loaded_enhancer(package, torch.device("cpu"))
        found = enhanced(network, plan, package.manifest.patch, low)
        pictures[label] = found
        errors = compared(name, found, low, truth, package.manifest.patch, (2, 2, 2))
        count = f"{sum(p.numel() for p in network.parameters()):,}"
        methods = {"cubic interpolation": ("cubic", "", "")} if number == 0 else {}
        methods[label] = ("network", count, f"{package.manifest.training.seconds:.0f}")
        for shown, (method, parameters, seconds) in methods.items():
            found_errors = (errors[method][part] for part in ("interior", "exterior", "total"))
            cells = " | ".join("no voxels" if value is None else f"{value * scale:.4g}" for value in found_errors)
            print(f"| {shown} | {cells} | {parameters} | {seconds} |")
    pictures["truth"] = truth.channels()
    maps = {key: mean_diffusivity(value) if kind == "tensor" else value[0] for key, value in pictures.items()}
    title = "Mean diffusivity (as figure 5)" if kind == "tensor" else "T1 (ICBM152)"
    return {"title": title, "maps": maps, "mask": truth.mask}


def _draw(row: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    mask = row["mask"]
    place = int(mask.sum(axis=(1, 2)).argmax())
    high = float(np.percentile(row["maps"]["truth"][mask], 97))
    # Nothing but the head, in the orientation of a coronal or axial slice as it is read.
    low_h, low_w = (int(where.min()) for where in np.nonzero(mask[place]))
    high_h, high_w = (int(where.max()) + 1 for where in np.nonzero(mask[place]))
    cuts = {label: values[place, low_h:high_h, low_w:high_w][::-1, ::-1] for label, values in row["maps"].items()}
    wide = (high_w - low_w) / (high_h - low_h)
    columns = (len(cuts) + 1) // 2
    figure = Figure(figsize=(2.8 * wide * columns, 3.2 * 2), dpi=110, facecolor="black", layout="constrained")
    axes = figure.subplots(2, columns).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, values) in zip(axes, cuts.items(), strict=False):
        axis.imshow(values, cmap="gray", vmin=0, vmax=high, interpolation="nearest")
        axis.set_title(label, color="white", fontsize=13)
    figure.suptitle(row["title"], color="white", fontsize=14)
    figure.savefig(path)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
