"""How long the bundled models take for a whole head, cold and warm, and how much memory.

Cold is a fresh process, from its start to its end: imports, loading the model, reading, segmenting, writing. Warm is a
second request to a process that has the model loaded, as the panel's worker has. The head is the ICBM152 T1 of the
package nilearn (extra `demo`), and MRHead-like whole heads given with --image.

    PYTHONPATH=Backend python Testing/Benchmarks/segmentation_time.py [--image HEAD.nii.gz] [--device cpu]

Run by hand; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from invres.cli import main as invres
from invres.console import package_named
from invres.demo import template
from invres.events import format_bytes
from invres.volume import read_geometry, write_volume

BRAIN, HIPPOCAMPUS = "brain-any-contrast", "hippocampus-t1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, action="append", default=[], help="also these heads")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = {"ICBM152 T1": Path(folder) / "icbm152.nii.gz"} | {path.name: path for path in options.image}
        write_volume(images["ICBM152 T1"], template()[0])
        print(
            f"`python Testing/Benchmarks/segmentation_time.py`, {options.device}, {os.cpu_count()}-core machine "
            f"({platform.machine()}), {os.environ.get('OMP_NUM_THREADS', 'all')} threads, {date.today()}.\n\n"
            "| model | image | cold, s | warm, s | of which the network, s | tensors and images | process grew by |\n"
            "|---|---|---|---|---|---|---|"
        )
        for model in (BRAIN, HIPPOCAMPUS):
            for name, path in images.items():
                print(f"| {model} | {name}, {_size(path)} | {_row(model, path, Path(folder), options.device)} |")


def _size(path: Path) -> str:
    geometry = read_geometry(path)
    shape, spacing = (" x ".join(f"{n:g}" for n in part) for part in (geometry.shape, geometry.spacing_mm))
    return f"{shape} of {spacing} mm"


def _row(model: str, image: Path, folder: Path, device: str) -> str:
    channel = package_named(model).manifest.plan.channels[0].name
    arguments = ["segment", "--model", model, "--input", f"{channel}={image}", "--device", device, "--json"]
    arguments += ["--output", str(folder / "out.seg.nrrd")]
    if model == HIPPOCAMPUS:
        arguments += ["--locate", BRAIN]
    began = time.perf_counter()
    answer = subprocess.run([sys.executable, "-m", "invres", *arguments], check=True, capture_output=True, text=True)
    cold, seconds = _result(answer.stdout), time.perf_counter() - began
    warm: dict[str, Any] = {}
    for _ in range(2):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            invres(arguments)
        warm = _result(out.getvalue())
    cells = [f"{seconds:.1f}", f"{warm['seconds']['total']:.1f}", f"{warm['seconds']['predict']:.1f}"]
    return " | ".join([*cells, *(format_bytes(cold[key]) for key in ("measured_bytes", "measured_rss_bytes"))])


def _result(text: str) -> dict[str, Any]:
    events = [json.loads(line) for line in text.splitlines()]
    return next(event for event in events if event["event"] == "result")


if __name__ == "__main__":
    main()
