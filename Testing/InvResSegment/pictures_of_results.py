"""Pictures of what comes after: the proof of a fine-tuning, and the review of a batch; for take_screenshots.py."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import slicer
from panel_driver import loadedPanel, picture, waitUntil
from small_models import ONE, trained_package
from standins import qtclasses
from tiny_run import tuned, write_balls

__all__ = ["takeBatch", "takeProof"]


def takeProof(folder: Path) -> None:
    """The Fine-tune tab with a run that has ended: the verdict, a case that is shown, and after the promotion."""

    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    place = Path(tempfile.mkdtemp())
    base = trained_package(place / "models" / "ball", ("T1",), ONE, iterations=12)
    run = tuned(base, place / "runs")
    (run / "panel.json").write_text(
        json.dumps({"created": "2026-01-01T10:00", "model": "ball", "arguments": ["finetune"]})
    )
    settings = {"InvResSegment/RunsFolder": str(place / "runs")}
    with loadedPanel(place / "models", settings=settings) as module:
        panel = module.enter().panel
        tab = panel.fineTuneTab
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 120)
        panel.ui.tabs.setCurrentWidget(tab.widget)
        for section in (tab.ui.casesButton, tab.ui.trainingButton):
            section.collapsed = True
        view = tab.run.view
        waitUntil(lambda: view.state == "finished", 30)
        shoot("proof")
        view.ui.casesTable.selectRow(0)
        assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        while view.ui.promoteButton.enabled:
            view.ui.promoteButton.click()
        waitUntil(lambda: view.ui.rollbackButton.enabled, 60)
        shoot("promoted")
        panel.ui.tabs.setCurrentWidget(panel.modelsTab.widget)
        waitUntil(lambda: panel.modelsTab.ui.modelsTable.rowCount == 2, 60)
        shoot("models_versions")


def takeBatch(folder: Path) -> None:
    """The Batch tab: empty, while it runs, and in review, with a case that failed."""

    def shoot(name: str) -> None:
        print(picture(panel.widget, folder / f"{name}.png"))

    place = Path(tempfile.gettempdir()) / "study"  # a name that may be seen
    shutil.rmtree(place, ignore_errors=True)
    trained_package(place / "models" / "ball", ("T1",), ONE)
    data = write_balls(place / "data", cases=4, labelled=False)
    (place / "results").mkdir()
    with loadedPanel(place / "models", settings={"InvResSegment/Device": "cpu"}) as module:
        panel = module.enter().panel
        tab = panel.batchTab
        waitUntil(lambda: not panel.setup.checking and panel.segmentTab.models, 120)
        panel.ui.tabs.setCurrentWidget(tab.widget)
        shoot("batch_empty")
        qtclasses.answers.append(str(data))
        tab.ui.datasetButton.click()
        waitUntil(lambda: tab.ui.casesTable.rowCount == 4, 60)
        tab.ui.folderEdit.currentPath = str(place / "results")
        (data / "imagesTr" / "case2_0000.nii.gz").unlink()
        tab.ui.startButton.click()
        waitUntil(lambda: tab.queue.cases[0].state == "done", 120)
        shoot("batch_running")
        waitUntil(lambda: not tab.queue.running, 120)
        tab.ui.nextButton.click()
        tab.ui.acceptButton.click()
        tab.ui.nextButton.click()
        shoot("batch")
    shutil.rmtree(place, ignore_errors=True)
