"""The curves of a training, loss and Dice of each segment over the epochs, in a Slicer plot."""

import math
from collections.abc import Sequence

import slicer
import vtk
from slicer.i18n import tr as _

from .RunRecord import Epoch

__all__ = ["RunChart"]

HEIGHT = 190  # pixels
EPOCH, LOSS = "Epoch", "Loss"
LOSS_COLOUR = (0.35, 0.35, 0.35)
# Okabe and Ito: told apart by people who do not see all colours.
DICE_COLOURS = (
    (0.00, 0.45, 0.70),
    (0.90, 0.62, 0.00),
    (0.00, 0.62, 0.45),
    (0.80, 0.47, 0.65),
    (0.34, 0.71, 0.91),
    (0.84, 0.37, 0.00),
)


class RunChart:
    """A plot view in a layout of the panel, and its nodes in the scene, which are neither saved nor listed.

    The nodes are made when there is something to show, and again after the scene was closed.
    """

    def __init__(self, layout) -> None:
        self._nodes: dict[str, vtk.vtkObject] = {}
        self._shown: tuple = ()
        self.view = slicer.qMRMLPlotView()
        self.view.setMinimumHeight(HEIGHT)
        layout.addWidget(self.view)
        self.view.visible = False

    def show(self, epochs: Sequence[Epoch], title: str) -> None:
        """Draw these epochs; nothing is shown before the first."""
        if not epochs:
            self.clear()
            return
        if self._shown == (tuple(epochs), title) and self._alive:
            return
        self._shown = tuple(epochs), title
        if not self._alive:
            self._removeNodes()
            self._makeNodes()
        names = list(dict.fromkeys(name for epoch in epochs for name in epoch.dice))
        watched = [epoch for epoch in epochs if epoch.dice]
        chart = self._nodes["chart"]
        wasModified = chart.StartModify()
        self._fill("lossTable", [one.number for one in epochs], {LOSS: [one.loss for one in epochs]})
        dice = {_diceOf(name): [one.dice.get(name) for one in watched] for name in names}
        self._fill("diceTable", [one.number for one in watched], dice)
        self._setSeries([(LOSS, "lossTable", LOSS_COLOUR), *self._diceSeries(names)])
        chart.SetTitle(title)
        chart.EndModify(wasModified)
        self.view.visible = True

    def clear(self) -> None:
        """Take the plot away, and its nodes out of the scene."""
        self.view.visible = False
        self._shown = ()
        self._removeNodes()

    @property
    def lost(self) -> bool:
        """Whether the scene was closed under the plot, so that it has to be shown again."""
        return bool(self._nodes) and not self._alive

    @property
    def _alive(self) -> bool:
        return bool(self._nodes) and all(node.GetScene() is not None for node in self._nodes.values())

    @staticmethod
    def _diceSeries(names: list[str]) -> list[tuple]:
        colours = [DICE_COLOURS[index % len(DICE_COLOURS)] for index in range(len(names))]
        return [(_diceOf(name), "diceTable", colour) for name, colour in zip(names, colours, strict=True)]

    def _makeNodes(self) -> None:
        for key, kind in (("lossTable", "Table"), ("diceTable", "Table"), ("chart", "PlotChart"), ("view", "PlotView")):
            self._nodes[key] = self._newNode(f"vtkMRML{kind}Node", f"InvResSegment {key}")
        chart = self._nodes["chart"]
        chart.SetXAxisTitle(_("epoch"))
        chart.SetYAxisTitle(_("loss, Dice"))
        chart.SetLegendVisibility(True)
        self._nodes["view"].SetPlotChartNodeID(chart.GetID())
        self.view.setMRMLScene(slicer.mrmlScene)
        self.view.setMRMLPlotViewNode(self._nodes["view"])

    @staticmethod
    def _newNode(kind: str, name: str):
        node = slicer.mrmlScene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(name)
        node.SetSaveWithScene(False)
        node.SetHideFromEditors(True)
        if kind == "vtkMRMLPlotViewNode":
            node.SetSingletonTag("InvResSegmentRun")
            node.SetLayoutName("InvResSegmentRun")
        return slicer.mrmlScene.AddNode(node)

    def _removeNodes(self) -> None:
        nodes, self._nodes = self._nodes, {}
        if nodes:
            self.view.setMRMLPlotViewNode(None)
        for node in nodes.values():
            if node.GetScene() is not None:
                node.GetScene().RemoveNode(node)

    def _fill(self, key: str, epochs: list[int], columns: dict[str, list[float | None]]) -> None:
        table = vtk.vtkTable()
        for name, values in {EPOCH: epochs, **columns}.items():
            column = vtk.vtkFloatArray()
            column.SetName(name)
            for value in values:
                column.InsertNextValue(math.nan if value is None else value)
            table.AddColumn(column)
        self._nodes[key].SetAndObserveTable(table)

    def _setSeries(self, wanted: list[tuple]) -> None:
        """One series for each column; those that are there already are kept."""
        chart = self._nodes["chart"]
        for name, table, colour in wanted:
            if name in self._nodes:
                continue
            series = self._nodes[name] = self._newNode("vtkMRMLPlotSeriesNode", name)
            series.SetAndObserveTableNodeID(self._nodes[table].GetID())
            series.SetXColumnName(EPOCH)
            series.SetYColumnName(name)
            series.SetPlotType(slicer.vtkMRMLPlotSeriesNode.PlotTypeScatter)
            series.SetMarkerStyle(slicer.vtkMRMLPlotSeriesNode.MarkerStyleCircle)
            series.SetMarkerSize(4)
            series.SetLineWidth(2)
            if name == LOSS:
                series.SetLineStyle(slicer.vtkMRMLPlotSeriesNode.LineStyleDash)
            series.SetColor(*colour)
            chart.AddAndObservePlotSeriesNodeID(series.GetID())
        for name in set(self._nodes) - {"lossTable", "diceTable", "chart", "view"} - {one[0] for one in wanted}:
            series = self._nodes.pop(name)
            chart.RemovePlotSeriesNodeID(series.GetID())
            slicer.mrmlScene.RemoveNode(series)


def _diceOf(name: str) -> str:
    return _("Dice {name}").format(name=name)
