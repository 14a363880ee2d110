"""`invres demo`: the bundled brain model segments a real MR volume that it has never seen, and is scored.

The volume is the ICBM152 2009a T1 template, as shipped inside the `nilearn` package (extra `demo`): an average of 152
real brains, 1 mm, already brain-extracted. It comes with grey and white matter maps, which are the reference; the model
knows neither them nor the T1.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from . import InvresError
from .config import Label, LabelScheme
from .devices import choose_device
from .events import SILENT, Reporter, format_bytes, format_seconds
from .inference import segment
from .metrics import score_case
from .modelpackage import ModelPackage
from .overlay import draw_overlay
from .planning import plan_segmentation
from .prediction import SegmentOptions
from .synthesis import tissue_maps_from_gm_wm
from .volume import Volume, read_volume, write_volume

__all__ = ["TISSUES", "run", "template", "tissues_of"]

TISSUES = LabelScheme(
    (
        Label("CSF", (1,), 1, (86, 152, 222)),
        Label("grey matter", (2,), 2, (214, 105, 92)),
        Label("white matter", (3,), 3, (240, 214, 140)),
    )
)
# What of a brain model's labels is not grey matter, by words in their names, as the template's maps have it: most of
# the brain stem is grey there, and most of pallidum and ventral diencephalon white.
_FLUID = ("csf", "ventricle")
_WHITE = ("white matter", "ventral diencephalon", "pallidum")


def template() -> tuple[Volume, np.ndarray]:
    """The T1 and the tissues of `TISSUES` on its grid. Raises InvresError where nilearn is missing."""
    files = _template_files()
    t1, gm, wm = (read_volume(files[key]) for key in ("t1", "gm", "wm"))
    maps = tissue_maps_from_gm_wm(gm.array, wm.array)
    inside = (maps.sum(axis=0) > 0.5) & (t1.array > 0)
    return t1, np.where(inside, maps.argmax(axis=0) + 1, 0).astype(np.uint8)


def tissues_of(labels: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """A brain model's label map with its structures joined to those of `TISSUES`."""
    table = np.zeros(max(label.output_value for label in scheme.labels) + 1, np.uint8)
    for label in scheme.labels:
        name = label.name.casefold()
        fluid, white = (any(word in name for word in words) for words in (_FLUID, _WHITE))
        table[label.output_value] = 1 if fluid else 3 if white else 2
    return table[labels]


def run(package: ModelPackage, output: Path, device: str = "auto", report: Reporter = SILENT) -> dict[str, Any]:
    """Segments the T1 and scores it. Returns paths, figures and a readable `text`.

    package: a model of one MR channel with labels of the brain. Raises InvresError for a model of something else.
    """
    _check_brain(package)
    output.mkdir(parents=True, exist_ok=True)
    manifest, chosen = package.manifest, choose_device(device)
    t1, reference = template()
    volume, segmentation = output / "icbm152_t1.nii.gz", output / "icbm152_t1.seg.nrrd"
    write_volume(volume, t1)
    grid = t1.geometry.canonical()
    plan = plan_segmentation(manifest, grid.shape, grid.spacing_mm, chosen)
    options = SegmentOptions(device=str(chosen))
    summary = segment(package, {manifest.plan.channels[0].name: volume}, segmentation, options, report=report)
    labels = read_volume(segmentation, kind="labels")
    write_volume(output / "icbm152_t1_labels.nii.gz", labels)
    found = tissues_of(labels.array, manifest.output_scheme)
    scores = score_case(found, reference, TISSUES, t1.geometry.spacing_mm)
    dice = {name: score.dice for name, score in scores.items()}
    scored = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    tissues = draw_overlay(
        output / "tissues.png",
        t1,
        [(f"Segmentation by {package.name}", found), ("Reference: the template's own tissue maps", reference)],
        TISSUES,
        f"ICBM152 T1: Dice {scored}",
    )
    structures = draw_overlay(
        output / "structures.png",
        t1,
        [(f"Segmentation by {package.name}", labels.array)],
        manifest.output_scheme,
        "ICBM152 T1, all structures of the model",
    )
    size = "x".join(map(str, t1.array.shape))
    text = "\n".join(
        [
            "Dice of the real T1 against its own tissue maps (CSF: inside the brain, neither grey nor white):",
            *(f"  {name:13} {value:.3f}" for name, value in dice.items()),
            f"{size} voxels in {format_seconds(summary['seconds']['total'])} on {summary['device']}, of which the "
            f"network took {format_seconds(summary['seconds']['predict'])}.",
            f"Peak memory: predicted {format_bytes(plan.predicted_bytes)} at most, measured "
            f"{format_bytes(summary['measured_bytes'])} in tensors and images; the process grew by "
            f"{format_bytes(summary['measured_rss_bytes'])}.",
            f"Volumes in mL: {', '.join(f'{name} {ml:.1f}' for name, ml in summary['volumes_ml'].items())}.",
            "Files:",
            *(f"  {path}" for path in (volume, f"{segmentation}  (open both in 3D Slicer)")),
            *(f"  {path}" for path in (output / "icbm152_t1_labels.nii.gz", tissues, structures)),
        ]
    )
    return {
        "dice": dice,
        "volumes_ml": summary["volumes_ml"],
        "seconds": summary["seconds"],
        "predicted_bytes": plan.predicted_bytes,
        "measured_bytes": summary["measured_bytes"],
        "measured_rss_bytes": summary["measured_rss_bytes"],
        "segmentation": str(segmentation),
        "overlays": [str(tissues), str(structures)],
        "model": str(package.path),
        "text": text,
    }


def _check_brain(package: ModelPackage) -> None:
    manifest = package.manifest
    names = [name.casefold() for name in manifest.scheme.names]
    if manifest.plan.crop is not None or not any(word in name for name in names for word in (*_FLUID, *_WHITE)):
        raise InvresError(
            f"{package.name} is not a model of the whole brain, whose tissues the demo scores.",
            hint="Choose a model with labels of fluid or white matter, or leave --model out.",
        )


def _template_files() -> dict[str, Path]:
    """t1, gm and wm of the template inside the nilearn package."""
    found = importlib.util.find_spec("nilearn")
    if found is None or not found.submodule_search_locations:
        raise InvresError(
            "The demo's MR volume comes with the package nilearn, which is not installed.",
            hint="Run `pip install nilearn matplotlib`.",
        )
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    files = {key: folder / f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz" for key in ("t1", "gm", "wm")}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise InvresError(f"nilearn has no {missing[0]}.", hint="Install nilearn 0.10 or newer.")
    return files
