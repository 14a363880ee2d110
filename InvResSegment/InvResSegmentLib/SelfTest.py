"""The journey of a user in a real Slicer, run by ctest and by Reload and Test: model, volume, Apply, result, close."""

import subprocess
import time

import numpy as np
import slicer

from .BackendPython import backendEnvironment, backendPython
from .Models import modelFromDescription

__all__ = ["SelfTest"]

TIMEOUT = 300  # seconds, for a machine that imports torch for the first time
PROGRAM = """
import sys, torch
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
torch.manual_seed(0)
scheme = LabelScheme((Label("ball", (1,), 1, (250, 20, 40)),))
network = build(NetworkConfig(name="unet3d", channels=(4, 8), in_channels=1, out_channels=scheme.out_channels))
save_package(sys.argv[1], name="self test", network=network.config, state_dict=network.state_dict(),
             plan=PreparationPlan((ChannelPlan("T1", "MR"),), (1.0, 1.0, 1.0), crop_to_nonzero=False),
             scheme=scheme, patch=(16, 16, 16), licence="CC0-1.0")
"""
"""Makes a model package with random weights: whether it finds anything does not matter here."""


class SelfTest:
    """test: the `unittest.TestCase` that asks."""

    def __init__(self, test) -> None:
        self._test = test

    def run(self) -> None:
        """The whole journey. Raises unittest.SkipTest where the backend's dependencies are not installed."""
        slicer.util.selectModule("InvResSegment") if slicer.util.mainWindow() else None
        widget = slicer.modules.invressegment.widgetRepresentation().self()
        widget.enter()
        panel = widget.panel
        self._wait(lambda: not panel.setup.checking, "the check of the setup ends")
        if panel.setup.problem:
            self._test.skipTest(f"There is no backend here: {panel.setup.problem}")
        self._segment(panel)
        self._test.delayDisplay("Test passed.")

    def _segment(self, panel) -> None:
        tab = panel.segmentTab
        folder = slicer.util.tempDirectory()
        subprocess.run(
            [backendPython(), "-c", PROGRAM, folder + "/model"],
            env=backendEnvironment(),
            check=True,
            timeout=TIMEOUT,
        )
        described = []
        panel.backend.request(["describe", folder + "/model"], None, described.append)
        self._wait(lambda: described, "the model is described")
        self._test.assertEqual(described[0].state, "done", described[0].message)
        tab.setModels([modelFromDescription(described[0].result)], "")
        voxels = np.random.default_rng(0).normal(100, 10, (20, 22, 24)).astype(np.float32)
        volume = slicer.util.addVolumeFromArray(voxels, name="T1")
        tab.enter()
        self._wait(lambda: tab.ui.applyButton.enabled, "Apply can be pressed")
        before = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode")
        tab.ui.applyButton.click()
        self._test.assertEqual(tab.ui.progressBar.visible, True)
        self._wait(lambda: not tab.running, "the run ends")
        self._test.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode"), before + 1)
        tab.ui.trainingButton.click()
        self._test.assertEqual(len(panel.fineTuneTab.cases.rows), 1)
        self._wait(lambda: not panel.fineTuneTab.ui.casesTable.isHidden(), "the case is in the table")
        panel.ui.tabs.setCurrentWidget(tab.widget)
        self._wait(lambda: tab.ui.applyButton.enabled, "Apply can be pressed again")
        tab.ui.applyButton.click()
        slicer.mrmlScene.RemoveNode(volume)
        self._wait(lambda: not tab.running, "the run without its volume ends")
        slicer.mrmlScene.Clear()
        self._test.assertFalse(tab.running)

    def _wait(self, condition, what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            self._test.assertLess(time.monotonic(), end, f"It was waited in vain that {what}.")
            slicer.app.processEvents()
            time.sleep(0.01)
