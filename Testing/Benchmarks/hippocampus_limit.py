"""What else might raise the Dice of hippocampus-t1, without training anew, on the crops that it has never seen.

    PYTHONPATH=Backend python Testing/Benchmarks/hippocampus_limit.py [PACKAGE ...] [--data HIPPOCAMPUS]

Averages its probabilities with those of further packages (such as its earlier versions, which learned from the same
crops: `git show REVISION:Resources/Models/hippocampus-t1/...`), and favours structures over background or the reverse.
Prints a Markdown table with paired differences to the bundled model as it is.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

import numpy as np
import torch

from invres.cases import read_dataset
from invres.fingerprints import fingerprints
from invres.inference import load_network
from invres.intervals import interval
from invres.metrics import score_case
from invres.modelpackage import ModelPackage, bundled_models_dir, open_package
from invres.prediction import predict_probabilities, window_within
from invres.preprocessing import PreparedCase, prepare
from invres.restoration import restore_probabilities
from invres.segmentoptions import SegmentOptions

REPOSITORY = Path(__file__).resolve().parents[2]
FAVOUR = (-0.4, -0.2, 0.2, 0.4)  # added to the logarithm of what the structures' probabilities are multiplied by


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    packages = [open_package(bundled_models_dir() / "hippocampus-t1"), *map(open_package, options.packages)]
    networks = [load_network(package, torch.device("cpu")) for package in packages]
    names = [f"{package.manifest.version}" for package in packages]
    manifest, data = packages[0].manifest, read_dataset(options.data)
    dice: dict[str, list[list[float]]] = {}
    for case in data.labelled_cases:
        volumes, label = data.load(case)
        if label is None or set(fingerprints(volumes)) & set(manifest.trained_on):
            continue
        prepared = prepare(volumes, None, manifest.plan, manifest.scheme)
        found = [_probabilities(package, net, prepared) for package, net in zip(packages, networks, strict=True)]
        ways = dict(zip(names, found, strict=True))
        for count in range(2, len(found) + 1):
            for some in itertools.combinations(range(len(found)), count):
                ways[f"mean of {', '.join(names[i] for i in some)}"] = np.mean([found[i] for i in some], axis=0)
        for favour in FAVOUR:
            weighted = found[0] * np.exp([0.0] + [favour] * len(manifest.scheme.labels))[:, None, None, None]
            ways[f"{names[0]}, structures times {np.exp(favour):.2f}"] = weighted / weighted.sum(axis=0)
        for way, probabilities in ways.items():
            voxels = restore_probabilities(probabilities, prepared.geometry, prepared.original, manifest.scheme)
            scores = score_case(voxels, label.array, data.scheme, label.geometry.spacing_mm)
            dice.setdefault(way, []).append([score.dice for score in scores.values()])
    print("| prediction | n | " + " | ".join(manifest.scheme.names) + " | mean | difference [95 % interval] |")
    print("|---" * (4 + len(manifest.scheme.names)) + "|")
    first = np.mean(dice[names[0]], axis=1)
    for way, values in dice.items():
        change = np.mean(values, axis=1) - first
        low, high = interval(change.tolist()) or (0.0, 0.0)
        shown = "" if way == names[0] else f"{change.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        means = " | ".join(f"{value:.4f}" for value in (*np.mean(values, axis=0), np.mean(values)))
        print(f"| {way} | {len(values)} | {means} | {shown} |")


def _options() -> argparse.Namespace:
    shared = Path(os.environ.get("INVRES_DATA") or REPOSITORY.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", type=Path, help="further packages, prepared for as the bundled one is")
    parser.add_argument("--data", type=Path, default=shared / "hippocampus_msd")
    return parser.parse_args()


def _probabilities(package: ModelPackage, network: torch.nn.Module, prepared: PreparedCase) -> np.ndarray:
    window = window_within((0, 0, 0), package.manifest.patch, prepared.image.shape[1:])
    mirrored = SegmentOptions(mirror_axes=(2,))
    return predict_probabilities(network, torch.from_numpy(prepared.image), window, False, mirrored).numpy()


if __name__ == "__main__":
    main()
