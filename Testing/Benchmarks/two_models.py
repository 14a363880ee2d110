"""Draws what two models in sequence find: brain-any-contrast the places, hippocampus-t1 the two parts of each side.

    PYTHONPATH=Backend python Testing/Benchmarks/two_models.py --picture Resources/Screenshots/hippocampus.png

The ICBM152 T1, around its right hippocampus.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from invres.cli import main as invres
from invres.demo import template
from invres.modelpackage import bundled_models_dir, open_package
from invres.overlay import draw_overlay
from invres.volume import Volume, read_volume, write_volume

MARGIN_MM = 18.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    picture = parser.parse_args().picture
    package, head = open_package(bundled_models_dir() / "hippocampus-t1"), template()[0]
    with tempfile.TemporaryDirectory() as folder:
        scan, output = Path(folder) / "head.nii.gz", Path(folder) / "hippocampus.nii.gz"
        write_volume(scan, head)
        command = ["segment", "--model", package.name, "--locate", "brain-any-contrast", "--input", str(scan)]
        if code := invres([*command, "--output", str(output)]):
            raise SystemExit(code)
        found = read_volume(output, kind="labels").array
    right = np.isin(found, [side.right_value for side in package.manifest.sides])
    box = _box(right, head.geometry.spacing_mm)
    rows = [(f"{package.name}, found by brain-any-contrast first", found[box])]
    part = Volume(head.array[box], head.geometry.crop(box))
    print(draw_overlay(picture, part, rows, package.manifest.output_scheme, "ICBM152 T1, two models in sequence"))


def _box(found: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """Around all that was found, with a margin."""
    places = np.argwhere(found)
    margin = [round(MARGIN_MM / mm) for mm in spacing_mm]
    ends = zip(places.min(axis=0), places.max(axis=0), margin, found.shape, strict=True)
    d, h, w = (slice(max(0, low - more), min(size, high + 1 + more)) for low, high, more, size in ends)
    return d, h, w


if __name__ == "__main__":
    main()
