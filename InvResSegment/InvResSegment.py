"""The Slicer module InvResSegment: segments MR and CT with invertible networks; the work is in InvResSegmentLib."""

import os
import sys

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

HOMEPAGE = "https://github.com/InvResSegment/SlicerInvResSegment"


class InvResSegment(ScriptedLoadableModule):
    """What Slicer shows of the module."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("InvResSegment")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["Segmentations", "SubjectHierarchy", "Volumes", "Markups", "Tables", "Terminologies"]
        parent.contributors = ["InvResSegment contributors"]
        parent.helpText = _(
            "<p>Segments loaded MR and CT volumes with invertible residual networks, which need little memory. "
            "Choose a model, assign the volumes to its channels, and press Apply. Everything is computed on this "
            "computer; no data leaves it. For research; not a medical device.</p>"
            '<p>Tutorial, models and troubleshooting: <a href="{homepage}">{homepage}</a>.</p>'
        ).format(homepage=HOMEPAGE)
        parent.acknowledgementText = _(
            "<p>If you use the networks, please cite: K. Yamazaki, V. S. Rathour, T. H. N. Le, <i>Invertible Residual "
            "Network with Regularization for Effective Volumetric Segmentation</i>, "
            '<a href="https://arxiv.org/abs/2103.09042">arXiv:2103.09042</a>; and for the software: '
            '<a href="{homepage}">{homepage}</a>.</p>'
            "<p>The sample data were donated to 3D Slicer by the persons visible in the images, to be used without any "
            "restrictions.</p>"
        ).format(homepage=HOMEPAGE)
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Offer a sample volume in the module Sample Data, under the name of this module."""
    import SampleData
    from slicer.util import TESTING_DATA_URL

    digest = "cc211f0dfd9a05ca3841ce1141b292898b2dd2d3f08286affadf823a7e58df93"
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="InvResSegment",
        sampleName="MRHead",
        thumbnailFileName=os.path.join(os.path.dirname(__file__), "Resources", "Icons", "MRHead.png"),
        uris=[f"{TESTING_DATA_URL}SHA256/{digest}"],
        fileNames=["MR-head.nrrd"],
        nodeNames=["MRHead"],
        checksums=[f"SHA256:{digest}"],
    )


class InvResSegmentWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Hands the events of Slicer on to the panel."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self.panel = None

    def setup(self) -> None:
        """Called when the module is opened for the first time, and by Reload."""
        ScriptedLoadableModuleWidget.setup(self)
        from InvResSegmentLib.Widget import Panel

        self.logic = InvResSegmentLogic()
        self.panel = Panel(self.resourcePath)
        self.layout.addWidget(self.panel.widget)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneChanged)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneChanged)
        slicer.app.connect("aboutToQuit()", self.onAboutToQuit)
        if self.parent.isEntered:  # by Reload: the module is shown already, and nothing else would fill the panel
            self.enter()

    def cleanup(self) -> None:
        """Called when the module is unloaded, reloaded, or the application ends."""
        self.removeObservers()
        slicer.app.disconnect("aboutToQuit()", self.onAboutToQuit)
        if self.panel is not None:
            self.panel.cleanup()
            self.panel = None

    def enter(self) -> None:
        """Called each time the module is shown."""
        self.panel.setParameterNode(self.logic.getParameterNode())
        self.panel.enter()

    def exit(self) -> None:
        """Called each time another module is shown; a run goes on."""
        if self.panel is not None:
            self.panel.exit()

    def onSceneStartClose(self, _caller, _event) -> None:
        self.panel.sceneAboutToClose()

    def onSceneChanged(self, _caller, _event) -> None:
        if self.parent.isEntered:
            self.panel.setParameterNode(self.logic.getParameterNode())

    def onAboutToQuit(self) -> None:
        if self.panel is not None:
            self.panel.stop()

    def onReload(self) -> None:
        """Reload the files of the library, too."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "InvResSegmentLib"]:
            del sys.modules[name]

        ScriptedLoadableModuleWidget.onReload(self)


class InvResSegmentLogic(ScriptedLoadableModuleLogic):
    """The module's parameter node; what segments is `InvResSegmentLib.SegmentationLogic`, usable without the panel."""

    def __init__(self) -> None:
        ScriptedLoadableModuleLogic.__init__(self)
        self._parameters = None

    def getParameterNode(self):
        """The choices of the scene, as an `InvResSegmentParameterNode`; the same object as long as the node is."""
        from InvResSegmentLib.ParameterNode import InvResSegmentParameterNode

        node = super().getParameterNode()
        if self._parameters is None or self._parameters.parameterNode is not node:
            self._parameters = InvResSegmentParameterNode(node)
        return self._parameters


class InvResSegmentTest(ScriptedLoadableModuleTest):
    """The journey of a user inside a real Slicer: `InvResSegmentLib.SelfTest`."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        from InvResSegmentLib.SelfTest import SelfTest

        self.setUp()
        SelfTest(self).run()
