"""Stand-ins for the few CTK widgets of the panel, with the behaviour read from CTK's sources."""

from PySide6 import QtCore, QtGui, QtWidgets

from . import qtclasses

__all__ = ["ctkCollapsibleButton", "ctkMessageBox", "ctkPathLineEdit", "ctkSearchBox"]

_HEADER = 24  # pixels


class ctkCollapsibleButton(QtWidgets.QAbstractButton):
    """A header that shows or hides the widgets in it."""

    _standsFor = "ctkCollapsibleButton"
    contentsCollapsed = QtCore.Signal(bool)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._collapsed = False
        self._hidden: list = []
        self.setCheckable(True)
        self.setChecked(True)
        self.setContentsMargins(0, _HEADER, 0, 0)
        self.setSizePolicy(QtWidgets.QSizePolicy.Preferred, QtWidgets.QSizePolicy.Preferred)
        self.connect("toggled(bool)", self._onToggled)

    def _onToggled(self, checked):
        if self._collapsed == (not checked):
            return
        self._collapsed = not checked
        if self._collapsed:
            children = [child for child in self.children() if isinstance(child, QtWidgets.QWidget)]
            self._hidden = [child for child in children if not child.isHidden()]
            for child in self._hidden:
                child.hide()
        else:
            for child in self._hidden:
                child.show()
        self.setMaximumHeight(_HEADER if self._collapsed else 16777215)
        self.updateGeometry()
        self.contentsCollapsed(self._collapsed)

    def _getCollapsed(self):
        return self._collapsed

    def _setCollapsed(self, collapsed):
        self.setChecked(not collapsed)

    collapsed = QtCore.Property(bool, _getCollapsed, _setCollapsed)

    def sizeHint(self):
        layout = self.layout()
        if self._collapsed or layout is None:
            return QtCore.QSize(60, _HEADER)
        return layout.totalSizeHint()

    def minimumSizeHint(self):
        layout = self.layout()
        if self._collapsed or layout is None:
            return QtCore.QSize(60, _HEADER)
        return layout.totalMinimumSize()

    def hasHeightForWidth(self):
        layout = self.layout()
        return not self._collapsed and layout is not None and layout.hasHeightForWidth()

    def heightForWidth(self, width):
        return self.layout().totalHeightForWidth(width)

    def hitButton(self, position):
        return position.y() < _HEADER

    def paintEvent(self, _event):
        painter = QtGui.QPainter(self)
        palette = self.palette
        if not self._collapsed:
            painter.setPen(palette.color(QtGui.QPalette.Mid))
            painter.drawRect(0, _HEADER // 2, self.width - 1, self.height - _HEADER // 2 - 1)
        header = QtCore.QRect(0, 0, self.width, _HEADER - 2)
        painter.fillRect(header, palette.color(QtGui.QPalette.Button))
        painter.setPen(palette.color(QtGui.QPalette.Mid))
        painter.drawRect(header.adjusted(0, 0, -1, -1))
        option = QtWidgets.QStyleOption()
        option.initFrom(self)
        option.rect = QtCore.QRect(6, 5, 12, 12)
        element = QtWidgets.QStyle.PE_IndicatorArrowRight if self._collapsed else QtWidgets.QStyle.PE_IndicatorArrowDown
        self.style().drawPrimitive(element, option, painter, self)
        painter.setPen(palette.color(QtGui.QPalette.ButtonText))
        painter.drawText(header.adjusted(24, 0, -6, 0), QtCore.Qt.AlignVCenter, self.text.replace("&&", "&"))
        painter.end()


class ctkSearchBox(QtWidgets.QLineEdit):
    """A line edit with a magnifying glass."""

    _standsFor = "ctkSearchBox"

    def __init__(self, parent=None):
        super().__init__(parent)
        self.setPlaceholderText("Search...")
        self.setClearButtonEnabled(True)
        self._showSearchIcon = False

    showSearchIcon = QtCore.Property(
        bool, lambda self: self._showSearchIcon, lambda self, value: setattr(self, "_showSearchIcon", value)
    )


class ctkPathLineEdit(QtWidgets.QWidget):
    """An editable path with a browse button."""

    _standsFor = "ctkPathLineEdit"
    currentPathChanged = QtCore.Signal(str)
    validInputChanged = QtCore.Signal(bool)
    Dirs, Files, Executable = 0x001, 0x002, 0x040

    def __init__(self, parent=None):
        super().__init__(parent)
        self._edit = QtWidgets.QComboBox(self)
        self._edit.setEditable(True)
        self._browse = QtWidgets.QToolButton(self)
        self._browse.setText("...")
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._edit, 1)
        layout.addWidget(self._browse)
        self._filters, self._settingKey, self._options, self._nameFilters = 0, "", 0, []
        self._minimumContentsLength = 0
        self._edit.connect("editTextChanged(QString)", self._onEdited)

    def _onEdited(self, text):
        self.currentPathChanged(text)

    def minimumSizeHint(self):
        # As wide as its text where no length is set.
        letters = "X" * self._minimumContentsLength or self._edit.currentText
        hint = super().minimumSizeHint()
        return QtCore.QSize(self.fontMetrics().horizontalAdvance(letters) + 60, hint.height())

    def _get(name):
        return lambda self: getattr(self, name)

    def _set(name):
        return lambda self, value: setattr(self, name, value)

    def _setPath(self, path):
        self._edit.setEditText(str(path))

    def setCurrentPath(self, path):
        self._setPath(path)

    def addCurrentPathToHistory(self):
        pass

    def comboBox(self):
        return self._edit

    currentPath = QtCore.Property(str, lambda self: self._edit.currentText, _setPath)
    filters = QtCore.Property(int, _get("_filters"), _set("_filters"))
    minimumContentsLength = QtCore.Property(int, _get("_minimumContentsLength"), _set("_minimumContentsLength"))
    options = QtCore.Property(int, _get("_options"), _set("_options"))
    settingKey = QtCore.Property(str, _get("_settingKey"), _set("_settingKey"))
    nameFilters = QtCore.Property("QStringList", _get("_nameFilters"), _set("_nameFilters"))


class ctkMessageBox(qtclasses.MessageBox):
    """What slicer.util.messageBox opens."""

    _standsFor = "ctkMessageBox"
