"""Stand-in for Slicer's plot view: draws the chart of a plot view node of a real scene, with axes and a legend."""

import math

from PySide6 import QtCore, QtGui, QtWidgets

__all__ = ["curves", "qMRMLPlotView"]

_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 38, 8, 20, 34, 16  # pixels


def curves(view) -> dict:
    """Test only: name -> points of every curve that a view draws."""
    return {name: points for name, points, _colour in view._curves()}


class qMRMLPlotView(QtWidgets.QWidget):
    """Shows the chart that its view node names; nothing without a scene or a view node."""

    _standsFor = "qMRMLPlotView"

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene, self._viewNode = None, None

    def setMRMLScene(self, scene):
        self._scene = scene

    def setMRMLPlotViewNode(self, node):
        self._viewNode = node
        self.update()

    def _chart(self):
        node = self._viewNode
        if self._scene is None or node is None or node.GetScene() is not self._scene:
            return None
        return node.GetPlotChartNode()

    def _curves(self):
        chart, found = self._chart(), []
        for index in range(chart.GetNumberOfPlotSeriesNodes() if chart else 0):
            series = chart.GetNthPlotSeriesNode(index)
            table = series.GetTableNode().GetTable()
            columns = [table.GetColumnByName(name) for name in (series.GetXColumnName(), series.GetYColumnName())]
            rows = range(table.GetNumberOfRows()) if all(columns) else ()
            points = [tuple(column.GetValue(row) for column in columns) for row in rows]
            colour = QtGui.QColor.fromRgbF(*series.GetColor())
            found.append((series.GetName(), [p for p in points if not math.isnan(p[1])], colour))
        return found

    def paintEvent(self, _event):
        painter = QtGui.QPainter(self)
        painter.fillRect(self.rect, QtCore.Qt.white)
        curves, chart = self._curves(), self._chart()
        points = [point for _name, curve, _colour in curves for point in curve]
        if not points:
            painter.end()
            return
        area = QtCore.QRectF(self.rect).adjusted(_LEFT, _TOP, -_RIGHT, -_BOTTOM - _LEGEND)
        lowX, highX = min(p[0] for p in points), max(p[0] for p in points)
        lowY, highY = min(0.0, *(p[1] for p in points)), max(p[1] for p in points) or 1.0

        def place(point):
            x = (point[0] - lowX) / ((highX - lowX) or 1.0)
            y = (point[1] - lowY) / ((highY - lowY) or 1.0)
            return QtCore.QPointF(area.left() + x * area.width(), area.bottom() - y * area.height())

        painter.setRenderHint(QtGui.QPainter.Antialiasing)
        painter.setPen(QtCore.Qt.gray)
        painter.drawRect(area)
        painter.setPen(QtCore.Qt.black)
        font = painter.font()
        font.setPointSize(8)
        painter.setFont(font)
        painter.drawText(QtCore.QRectF(0, 0, self.width, _TOP), QtCore.Qt.AlignCenter, chart.GetTitle() or "")
        for value, y in ((highY, area.top()), (lowY, area.bottom())):
            painter.drawText(QtCore.QRectF(0, y - 8, _LEFT - 4, 16), QtCore.Qt.AlignRight, f"{value:.2g}")
        painter.drawText(area.bottomLeft() + QtCore.QPointF(0, 14), f"{lowX:g}")
        painter.drawText(area.bottomRight() + QtCore.QPointF(-14, 14), f"{highX:g}")
        painter.drawText(area.bottomLeft() + QtCore.QPointF(area.width() / 2 - 20, 14), chart.GetXAxisTitle())
        left = _LEFT
        for name, curve, colour in curves:
            painter.setPen(QtGui.QPen(colour, 2))
            places = [place(point) for point in curve]
            painter.drawPolyline(places)
            for each in places:
                painter.drawEllipse(each, 2, 2)
            painter.drawText(QtCore.QPointF(left, self.height - 6), name)
            left += painter.fontMetrics().horizontalAdvance(name) + 12
        painter.end()
