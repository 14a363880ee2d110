"""Stand-ins for Slicer's MRML widgets, bound to a real scene, with the behaviour read from Slicer's sources."""

import vtk
from PySide6 import QtCore, QtGui, QtWidgets

from .plotview import qMRMLPlotView

__all__ = [
    "qMRMLNodeComboBox",
    "qMRMLPlotView",
    "qMRMLSegmentationShow3DButton",
    "qMRMLTableView",
    "qMRMLWidget",
    "qSlicerScriptedLoadableModuleWidget",
]


class qMRMLWidget(QtWidgets.QWidget):
    """A widget that hands the scene on to the widgets connected to it."""

    _standsFor = "qMRMLWidget"
    mrmlSceneChanged = QtCore.Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene = None

    def mrmlScene(self):
        return self._scene

    def setMRMLScene(self, scene):
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChanged(scene)


class qSlicerScriptedLoadableModuleWidget(qMRMLWidget):
    """The parent that Slicer gives to a scripted module's widget."""

    _standsFor = "qSlicerScriptedLoadableModuleWidget"

    def __init__(self, parent=None):
        super().__init__(parent)
        self._entered = False
        self._self = None
        self.setLayout(QtWidgets.QVBoxLayout())

    isEntered = QtCore.Property(bool, lambda self: self._entered, lambda self, value: setattr(self, "_entered", value))

    def self(self):
        return self._self


def _plainProperty(kind, name, default):
    """A property without behaviour of its own."""
    attribute = "_" + name
    return QtCore.Property(
        kind,
        lambda self: self.__dict__.get(attribute, default),
        lambda self, value: self.__dict__.__setitem__(attribute, value),
    )


class qMRMLNodeComboBox(QtWidgets.QWidget):
    """Chooses a node of given classes; with `noneEnabled` the choice may be empty."""

    _standsFor = "qMRMLNodeComboBox"
    currentNodeChanged = QtCore.Signal(object)
    currentNodeIDChanged = QtCore.Signal(str)
    nodeAddedByUser = QtCore.Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._combo = QtWidgets.QComboBox(self)
        self._combo.setSizePolicy(QtWidgets.QSizePolicy.Expanding, QtWidgets.QSizePolicy.Fixed)
        self._combo.setSizeAdjustPolicy(QtWidgets.QComboBox.AdjustToMinimumContentsLengthWithIcon)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self.setSizePolicy(QtWidgets.QSizePolicy.Preferred, QtWidgets.QSizePolicy.Fixed)
        self._scene, self._tags, self._nodeTypes, self._labels = None, [], [], {}
        self._noneEnabled, self._noneDisplay, self._filling = False, "None", False
        self._observed: dict = {}
        self._combo.connect("currentIndexChanged(int)", self._onIndexChanged)
        self.setEnabled(False)

    def _setNodeTypes(self, types):
        self._nodeTypes = list(types)
        self._refill()

    def _setNoneEnabled(self, enabled):
        self._noneEnabled = enabled
        self._refill()

    def _setNoneDisplay(self, text):
        self._noneDisplay = text
        self._refill()

    nodeTypes = QtCore.Property("QStringList", lambda self: list(self._nodeTypes), _setNodeTypes)
    noneEnabled = QtCore.Property(bool, lambda self: self._noneEnabled, _setNoneEnabled)
    noneDisplay = QtCore.Property(str, lambda self: self._noneDisplay, _setNoneDisplay)
    currentNodeID = QtCore.Property(str, lambda self: self._currentID() or "", lambda self, value: self._select(value))
    addEnabled = _plainProperty(bool, "addEnabled", True)
    removeEnabled = _plainProperty(bool, "removeEnabled", True)
    renameEnabled = _plainProperty(bool, "renameEnabled", False)
    editEnabled = _plainProperty(bool, "editEnabled", False)
    showHidden = _plainProperty(bool, "showHidden", False)
    showChildNodeTypes = _plainProperty(bool, "showChildNodeTypes", True)
    hideChildNodeTypes = _plainProperty("QStringList", "hideChildNodeTypes", [])
    selectNodeUponCreation = _plainProperty(bool, "selectNodeUponCreation", True)
    baseName = _plainProperty(str, "baseName", "")

    def mrmlScene(self):
        return self._scene

    def setMRMLScene(self, scene):
        if scene is self._scene:
            return
        for tag in self._tags:
            self._scene.RemoveObserver(tag)
        self._scene, self._tags = scene, []
        if scene is not None:
            events = (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndCloseEvent, scene.EndImportEvent)
            self._tags = [scene.AddObserver(event, self._onScene) for event in events]
        self.setEnabled(scene is not None)
        self._refill()

    def currentNode(self):
        return self._scene.GetNodeByID(self._currentID()) if self._scene and self._currentID() else None

    def setCurrentNode(self, node):
        self._select(node.GetID() if node else "")

    def setCurrentNodeID(self, nodeID):
        self._select(nodeID)

    def nodeCount(self):
        return self._combo.count - (1 if self._noneEnabled else 0)

    def nodeFromIndex(self, index):
        return self._scene.GetNodeByID(self._combo.itemData(index + (1 if self._noneEnabled else 0)))

    def setNodeTypeLabel(self, label, nodeType):
        self._labels[nodeType] = label

    def addNode(self, nodeType=None):
        node = self._scene.AddNewNodeByClass(nodeType or self._nodeTypes[0], self.baseName)
        self.setCurrentNode(node)
        self.nodeAddedByUser(node)
        return node

    def _currentID(self):
        return self._combo.itemData(self._combo.currentIndex) if self._combo.currentIndex >= 0 else None

    def _select(self, nodeID):
        index = self._combo.findData(nodeID) if nodeID else -1
        self._combo.setCurrentIndex(index if index >= 0 else (0 if self._noneEnabled else -1))

    def _accepts(self, node):
        if node.GetHideFromEditors() and not self.showHidden:
            return False
        for kind in self._nodeTypes:
            if node.GetClassName() == kind or (self.showChildNodeTypes and node.IsA(kind)):
                return not any(node.IsA(hidden) for hidden in self.hideChildNodeTypes)
        return False

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onScene(self, _caller, event, node=None):
        if event == "NodeRemovedEvent" or node is None or self._accepts(node):
            self._refill()

    def _onRenamed(self, _caller, _event):
        for index in range(self._combo.count):
            node = self._scene.GetNodeByID(self._combo.itemData(index) or "")
            if node is not None and node.GetName() != self._combo.itemText(index):
                self._combo.setItemText(index, node.GetName())

    def _refill(self):
        before, row = self._currentID(), self._combo.currentIndex
        self._filling = True
        self._combo.clear()
        if self._noneEnabled:
            self._combo.addItem(self._noneDisplay, "")
        for node, tag in self._observed.items():
            node.RemoveObserver(tag)
        self._observed = {}
        for index in range(self._scene.GetNumberOfNodes() if self._scene else 0):
            node = self._scene.GetNthNode(index)
            if self._accepts(node):
                self._combo.addItem(node.GetName(), node.GetID())
                self._observed[node] = node.AddObserver(vtk.vtkCommand.ModifiedEvent, self._onRenamed)
        self._select(before)
        first = 1 if self._noneEnabled else 0
        if before and self._combo.findData(before) < 0 and self._combo.count > first:
            # Slicer's, too, goes to the neighbour of a node that is removed, as any combo box does, and not to "none".
            self._combo.setCurrentIndex(min(max(row, first), self._combo.count - 1))
        self._filling = False
        if (self._currentID() or None) != (before or None):
            self._emit()

    def _onIndexChanged(self, _index):
        if not self._filling:
            self._emit()

    def _emit(self):
        node = self.currentNode()
        self.currentNodeChanged(node)
        self.currentNodeIDChanged(node.GetID() if node else "")


class qMRMLTableView(QtWidgets.QTableView):
    """Shows a table node. With a scene and without a table view node it is emptied by the end of every batch."""

    _standsFor = "qMRMLTableView"

    def __init__(self, parent=None):
        super().__init__(parent)
        self._node, self._scene, self._tag = None, None, None
        self._standardModel = QtGui.QStandardItemModel(self)
        self.setModel(self._standardModel)

    def setMRMLScene(self, scene):
        if self._scene is not None:
            self._scene.RemoveObserver(self._tag)
        self._scene = scene
        if scene is not None:
            self._tag = scene.AddObserver(scene.EndBatchProcessEvent, lambda *_: self.setMRMLTableNode(None))

    def mrmlTableNode(self):
        return self._node

    def setMRMLTableNode(self, node):
        self._node = node
        model = self._standardModel
        model.clear()
        if node is None:
            return
        table = node.GetTable()
        model.setHorizontalHeaderLabels([table.GetColumnName(c) for c in range(table.GetNumberOfColumns())])
        for row in range(table.GetNumberOfRows()):
            values = [table.GetValue(row, column).ToString() for column in range(table.GetNumberOfColumns())]
            model.appendRow([QtGui.QStandardItem(value) for value in values])


class qMRMLSegmentationShow3DButton(QtWidgets.QPushButton):
    """Creates or removes the closed surface of a segmentation."""

    _standsFor = "qMRMLSegmentationShow3DButton"

    def __init__(self, parent=None):
        super().__init__(parent)
        self.setText("Show 3D")
        self.setCheckable(True)
        self.setEnabled(False)
        self._node = None
        self.connect("toggled(bool)", self._onToggled)

    def segmentationNode(self):
        return self._node

    def setSegmentationNode(self, node):
        self._node = node
        self.setEnabled(node is not None and node.GetSegmentation().GetNumberOfSegments() > 0)
        wasBlocked = self.blockSignals(True)
        self.setChecked(node is not None and node.GetSegmentation().ContainsRepresentation("Closed surface"))
        self.blockSignals(wasBlocked)

    def _onToggled(self, on):
        if self._node is None:
            return
        if on:
            self._node.GetSegmentation().CreateRepresentation("Closed surface")
        else:
            self._node.GetSegmentation().RemoveRepresentation("Closed surface")
