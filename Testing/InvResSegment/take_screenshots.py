"""Writes a picture of every tab and state of the panel to a folder; with --keep the best to Resources/Screenshots.

python Testing/InvResSegment/take_screenshots.py FOLDER [--keep]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "Backend")]

from panel_driver import addVolume, loadedPanel, picture, tunedManifest, waitUntil  # noqa: E402
from small_models import ONE, TWO, example, trained_package  # noqa: E402

KEPT = {"ready": "panel_segment.png", "done": "panel_result.png", "models": "panel_models.png"}
SCREENSHOTS = HERE.parents[1] / "Resources" / "Screenshots"


def makeModels(folder: Path) -> None:
    """Two models that are trained in seconds to find balls, with cards as real ones have."""
    trained_package(folder / "one", ("T1",), ONE)
    trained_package(folder / "two", ("T1", "FLAIR"), TWO)
    # Nothing was measured, so the cards say so: a picture must not show figures that nobody can reproduce.
    said = "a demonstration, not anatomy."
    tunedManifest(folder / "one", name="Ball, one contrast", description=f"Finds a bright ball in noise; {said}")
    tunedManifest(
        folder / "two",
        name="Ball with core, two contrasts",
        description=f"Finds a ball and its core in two contrasts; {said}",
    )


def take(folder: Path) -> None:
    """All pictures."""

    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    models = Path(tempfile.mkdtemp())
    makeModels(models)
    with loadedPanel(models) as module:
        panel = module.enter().panel
        tab = panel.segmentTab
        shoot("checking")
        waitUntil(lambda: not panel.setup.checking and tab.models, 120)
        shoot("empty")
        images, _classes = example(np.random.default_rng(3), (40, 42, 44), 2)
        addVolume("MPRAGE T1", voxels=images[0])
        addVolume("scan 7", voxels=images[1], origin=(3, 0, 0))
        tab.ui.modelList.setCurrentRow(1)
        shoot("unmatched")
        other = addVolume("FLAIR axial", voxels=images[1], origin=(3, 0, 0))
        tab.ui.matchButton.click()
        waitUntil(lambda: tab.idle, 60)
        shoot("geometry")
        other.SetOrigin(0, 0, 0)
        waitUntil(lambda: tab.ui.applyButton.enabled and tab.idle, 60)
        shoot("ready")
        tab.ui.applyButton.click()
        waitUntil(lambda: tab.ui.progressBar.value > 400, 120)
        shoot("running")
        waitUntil(lambda: not tab.running, 120)
        waitUntil(lambda: tab.idle, 60)
        shoot("done")
        (models / "two" / "model.safetensors").write_bytes(b"damaged")
        panel.backend.stop()
        tab.ui.applyButton.click()
        waitUntil(lambda: not tab.running, 120)
        shoot("error")
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        panel.modelsTab.ui.modelsTable.selectRow(1)
        panel.modelsTab.ui.manifestButton.collapsed = False
        shoot("models")
    with loadedPanel(models / "nothing") as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 120)
        waitUntil(lambda: "Reading" not in panel.segmentTab.ui.modelCard.text, 60)
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        shoot("models_empty")
    with loadedPanel(models / "nothing", python=bareEnvironment(models)) as module:
        panel = module.enter().panel
        waitUntil(lambda: not panel.setup.checking, 120)
        shoot("setup_missing")


def bareEnvironment(folder: Path) -> str:
    """A Python without any package."""
    import venv

    venv.create(folder / "bare", with_pip=False)
    return str(next(path for path in (folder / "bare").glob("*/python*") if path.is_file()))


def keep(folder: Path) -> None:
    """The best pictures as small files, without what they were made on in their metadata."""
    for name, kept in KEPT.items():
        image = Image.open(folder / f"{name}.png").convert("RGB")
        image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            SCREENSHOTS / kept, optimize=True
        )
        print(SCREENSHOTS / kept, (SCREENSHOTS / kept).stat().st_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="write the best to Resources/Screenshots as well")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    take(options.folder)
    if options.keep:
        keep(options.folder)
