"""The tab of models: what is there, import, export, verify, delete, the manifest, the folder of own models."""

import json
from pathlib import Path

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from . import Settings
from .Notice import ERROR, GOOD, INFORMATION, Notice
from .Table import setUpTable
from .Text import firstOf

__all__ = ["ModelsTab"]

LABELS = 2  # the column
LABELS_SHOWN = 4  # in a row; its tool tip has them all


class ModelsTab:
    """What the panel (`Panel`) expects of every tab: title, widget, setParameterNode, setModels, enter, cleanup."""

    def __init__(self, services) -> None:
        self.title = _("Models")
        self._services = services
        self._models: list = []
        self._busy = False
        self._said = False  # a message of an action stays until the next one
        self.widget = slicer.util.loadUI(services.resourcePath("UI/ModelsTab.ui"))
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self._notice = Notice(self.ui, "modelsNotice")
        self._setUpTable()
        self.ui.modelsProgress.visible = False
        self.ui.modelsFolderEdit.filters = ctk.ctkPathLineEdit.Dirs
        self._showFolder()
        for button, action in (
            (self.ui.importButton, self._onImport),
            (self.ui.importFolderButton, self._onImportFolder),
            (self.ui.exportButton, self._onExport),
            (self.ui.verifyButton, self._onVerify),
            (self.ui.deleteButton, self._onDelete),
            (self.ui.rollbackButton, self._onRollBack),
            (self.ui.refreshButton, self._onRefresh),
            (self.ui.openFolderButton, self._onOpenFolder),
            (self.ui.defaultFolderButton, self._onDefaultFolder),
        ):
            button.connect("clicked()", action)
        self.ui.modelsFolderEdit.connect("currentPathChanged(QString)", self._onFolder)
        self._updateButtons()

    def setParameterNode(self, parameters) -> None:
        """Models do not depend on the scene."""

    def setModels(self, models: list, emptyText: str, problem: str = "") -> None:
        """Show these models; emptyText says why there are none, problem why they may not be those of now."""
        chosen = self.selected
        self._models = list(models)
        table = self.ui.modelsTable
        table.setRowCount(len(self._models))
        for row, model in enumerate(self._models):
            for column, text in enumerate(self._cells(model)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text if column != LABELS else ", ".join(label.name for label in model.labels))
                table.setItem(row, column, item)
        table.resizeRowsToContents()
        paths = [model.path for model in self._models]
        if chosen is not None and chosen.path in paths:
            table.selectRow(paths.index(chosen.path))
        else:
            table.clearSelection()
        if problem:
            self._notice.show(ERROR, problem)
        elif not self._models:
            self._notice.show(INFORMATION, emptyText)
        elif not self._said:
            self._notice.clear()
        self._showManifest()
        self._updateButtons()

    def setupChanged(self) -> None:
        """What is installed has changed."""
        self._updateButtons()

    def enter(self) -> None:
        """The tab is shown: only now have the columns their widths, and what wraps its height."""
        qt.QTimer.singleShot(0, self.ui.modelsTable.resizeRowsToContents)

    def cancel(self) -> None:
        """Nothing here runs long."""

    def cleanup(self) -> None:
        """Nothing is held."""

    @property
    def selected(self):
        """The selected `ModelInfo`, or None."""
        rows = {index.row() for index in self.ui.modelsTable.selectionModel().selectedRows()}
        return self._models[min(rows)] if rows and min(rows) < len(self._models) else None

    # ---------------------------------------------------------------- the table

    def _setUpTable(self) -> None:
        table = self.ui.modelsTable
        setUpTable(table, [_("Name"), _("Version"), _("Labels"), _("Licence"), _("From")], stretched=(0, LABELS))
        table.horizontalHeader().connect("sectionResized(int,int,int)", self._onColumnResized)
        table.connect("itemSelectionChanged()", self._onSelected)

    def _onColumnResized(self) -> None:
        self.ui.modelsTable.resizeRowsToContents()

    def _cells(self, model) -> list[str]:
        version = model.version
        if model.parent:
            version = _("{version}, tuned").format(version=version)
        if model.active and (model.parent or any(other.parent == model.id for other in self._models)):
            version = _("{version}, in use").format(version=version)
        return [
            model.name,
            version,
            ", ".join(firstOf([label.name for label in model.labels], LABELS_SHOWN)),
            model.licence or _("not stated"),
            _("bundled") if model.bundled else _("own"),
        ]

    def _onSelected(self) -> None:
        self._showManifest()
        self._updateButtons()

    def _showManifest(self) -> None:
        model = self.selected
        text = "" if model is None else json.dumps(model.manifest, indent=2, ensure_ascii=False)
        if self.ui.manifestText.toPlainText() != text:
            self.ui.manifestText.setPlainText(text)

    def _updateButtons(self) -> None:
        model = self.selected
        for button in (self.ui.importButton, self.ui.importFolderButton, self.ui.refreshButton):
            button.enabled = not self._busy
        for button in (self.ui.exportButton, self.ui.verifyButton):
            button.enabled = model is not None and not self._busy
            self._explain(button, model)
        self.ui.deleteButton.enabled = model is not None and not model.bundled and not self._busy
        self._explain(self.ui.deleteButton, model)
        rollback = self.ui.rollbackButton
        rollback.enabled = model is not None and bool(model.parent) and model.active and not self._busy
        self._explain(rollback, model)

    def _explain(self, button, model) -> None:
        """Add to the tool tip why a button cannot be pressed."""
        said = button.property("InvResSegmentToolTip") or button.toolTip
        button.setProperty("InvResSegmentToolTip", said)
        reason = ""
        if model is None:
            reason = _("Select a model first.")
        elif model.bundled and button is self.ui.deleteButton:
            reason = _("Bundled models cannot be deleted.")
        elif button is self.ui.rollbackButton and not model.parent:
            reason = _("This model was not tuned from another one.")
        elif button is self.ui.rollbackButton and not model.active:
            reason = _("Its name stands for another version already.")
        button.toolTip = f"{said}\n{reason}" if reason else said

    # ---------------------------------------------------------------- actions

    def _onImport(self) -> None:
        path = qt.QFileDialog.getOpenFileName(
            self.widget, _("Import a model"), "", _("InvResSegment models (*.invres);;All files (*)")
        )
        self._import(path)

    def _onImportFolder(self) -> None:
        self._import(qt.QFileDialog.getExistingDirectory(self.widget, _("Import the folder of a model"), ""))

    def _import(self, path: str) -> None:
        if path:
            name = Path(path).name
            self._run(
                _("Importing {name}...").format(name=name),
                _("{name} was imported.").format(name=name),
                lambda done: self._services.catalogue.importModel(path, done),
            )

    def _onExport(self) -> None:
        model = self.selected
        path = qt.QFileDialog.getSaveFileName(
            self.widget, _("Export the model"), f"{model.name}.invres", _("InvResSegment models (*.invres)")
        )
        if not path:
            return
        if not path.lower().endswith(".invres"):
            path += ".invres"
        self._run(
            _("Exporting {name}...").format(name=model.name),
            _("{name} was written to {path}.").format(name=model.name, path=path),
            lambda done: self._services.catalogue.exportModel(model, path, done),
        )

    def _onVerify(self) -> None:
        model = self.selected
        self._run(
            _("Verifying {name}...").format(name=model.name),
            _("{name} is intact.").format(name=model.name),
            lambda done: self._services.catalogue.verifyModel(model, done),
        )

    def _onDelete(self) -> None:
        model = self.selected
        question = _("Delete the model {name} from disk? This cannot be undone.\n\n{path}")
        if slicer.util.confirmYesNoDisplay(question.format(name=model.name, path=model.path), _("Delete model")):
            self._run(
                _("Deleting {name}...").format(name=model.name),
                _("{name} was deleted.").format(name=model.name),
                lambda done: self._services.catalogue.deleteModel(model, done),
            )

    def _onRollBack(self) -> None:
        model = self.selected

        def start(done) -> None:
            def onDone(outcome) -> None:
                done(outcome)
                if outcome.state == "done":
                    self._services.catalogue.tell(str(outcome.result.get("path") or ""))

            self._services.catalogue.rollBackModel(model.path, onDone)

        self._run(
            _("Going back to the version that {version} was tuned from...").format(version=model.version),
            _("{name} stands for the version that {version} was tuned from again; nothing was deleted.").format(
                name=model.name, version=model.version
            ),
            start,
        )

    def _onRefresh(self) -> None:
        self._said = False
        self._notice.clear()
        self._services.refreshModels()

    def _run(self, doing: str, done: str, start) -> None:
        """Start an action of the catalogue, say what it does, and read the models again after it."""
        self._setBusy(True)
        self._said = True
        self._notice.show(INFORMATION, doing)

        def onDone(outcome) -> None:
            self._setBusy(False)
            if outcome.state == "done":
                self._notice.show(GOOD, done)
            elif outcome.state == "cancelled":
                self._notice.show(INFORMATION, _("Cancelled."))
            else:
                self._notice.show(ERROR, outcome.message, outcome.hint)
            self._services.refreshModels()

        start(onDone)

    def _setBusy(self, busy: bool) -> None:
        self._busy = busy
        self.ui.modelsProgress.visible = busy
        self._updateButtons()

    # ---------------------------------------------------------------- the folder

    def _showFolder(self) -> None:
        wasBlocked = self.ui.modelsFolderEdit.blockSignals(True)
        self.ui.modelsFolderEdit.currentPath = Settings.modelsFolder()
        self.ui.modelsFolderEdit.blockSignals(wasBlocked)

    def _onFolder(self, path: str) -> None:
        # While a path is being typed it names no folder yet.
        if path and Path(path).is_dir() and path != Settings.modelsFolder():
            Settings.setModelsFolder(path)
            self._services.refreshModels()

    def _onDefaultFolder(self) -> None:
        Settings.setModelsFolder("")
        self._showFolder()
        self._services.refreshModels()

    def _onOpenFolder(self) -> None:
        folder = Path(self.ui.modelsFolderEdit.currentPath)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._said = True
            self._notice.show(
                ERROR,
                _("The folder {path} could not be created: {reason}.").format(
                    path=folder, reason=(error.strerror or str(error)).lower()
                ),
                _("Choose another folder for your models."),
            )
            return
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(folder)))
