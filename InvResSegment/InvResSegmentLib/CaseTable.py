"""The table of training cases: images, labels, role and findings of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from .CaseChannels import channelsOf
from .CaseFindings import labelNames, lackingLabels
from .LabelMapping import BACKGROUND, UNKNOWN, TrainedLabel, isLearned, labelOf
from .Notice import ERROR, GOOD, INFORMATION, WARNING, levelIcon
from .Table import fitRows, setUpTable
from .Text import bullets
from .TrainingCases import LEFT_OUT, TRAINING, VALIDATION, CaseRow, Finding, TrainingCases

__all__ = ["LEVELS", "CaseTable"]

CASE, IMAGES, LABELS, ROLE, FINDINGS = range(5)
ROWS_SHOWN = 8
LEVELS = {"error": ERROR, "warning": WARNING, "note": INFORMATION, "": GOOD}
"""Severity of the worst finding -> level of what is shown."""


class CaseTable:
    """`casesTable`, one row for each case. onSelected: called when another case is selected."""

    def __init__(self, table, cases: TrainingCases, onSelected: Callable[[], None]) -> None:
        self._table, self._cases, self._onSelected = table, cases, onSelected
        self._rows: list[CaseRow] = []
        self._model: Any = None
        self._trained: Sequence[TrainedLabel] = ()
        self._filling = False
        setUpTable(table, [_("Case"), _("Images"), _("Labels"), _("Role"), _("Findings")], stretched=(CASE, LABELS))
        table.horizontalHeader().connect("sectionResized(int,int,int)", self._fit)
        table.connect("itemSelectionChanged()", self._onSelectionChanged)

    @property
    def selected(self) -> list[CaseRow]:
        """The selected cases, from the top."""
        rows = sorted({index.row() for index in self._table.selectionModel().selectedRows()})
        return [self._rows[row] for row in rows if row < len(self._rows)]

    def select(self, row: CaseRow) -> None:
        """Select one case."""
        if row in self._rows:
            self._table.selectRow(self._rows.index(row))

    def show(
        self, findings: Mapping[str, Sequence[Finding]], model: Any = None, labels: Sequence[TrainedLabel] = ()
    ) -> None:
        """Bring the table in line with the cases. findings: by the key of a case. labels: those that are trained on."""
        self._model, self._trained = model, labels
        table, rows = self._table, list(self._cases.rows)
        self._filling = True
        if rows != self._rows:
            chosen = self.selected
            self._rows = rows
            table.clearSelection()
            table.setRowCount(len(rows))
            for index, row in enumerate(rows):
                for column in range(FINDINGS + 1):
                    table.setItem(index, column, qt.QTableWidgetItem(""))
                table.setCellWidget(index, ROLE, self._makeRole(row))
            for row in chosen[:1]:
                self.select(row)
        for index, row in enumerate(rows):
            self._showRow(index, row, findings.get(row.key, ()))
        self._filling = False
        table.visible = bool(rows)
        # With one channel there is nothing to tell apart.
        table.setColumnHidden(IMAGES, all(len(channelsOf(self._cases, row)) < 2 for row in rows))
        self._fit()

    def _showRow(self, index: int, row: CaseRow, findings: Sequence[Finding]) -> None:
        worst = self._cases.worst(list(findings))
        sentences = [finding.sentence for finding in findings]
        said = _words()[worst] if sentences or row.examined is not None else _("not checked")
        if len(sentences) > 1:
            said = _("{count} findings").format(count=len(sentences))
        channels = channelsOf(self._cases, row)
        texts = {
            CASE: row.name if row.code == row.name else f"{row.name}\n{row.code}",
            IMAGES: str(len(channels)),
            LABELS: self._labelsText(row),
            FINDINGS: said,
        }
        where = self._cases.dataSets[row.dataSet].path if row.ofDataSet else _("in the scene")
        where = where if row.stored is None else row.stored.label
        tips = {
            CASE: _("{name}, {where}; its files are called {code}.").format(name=row.name, where=where, code=row.code),
            IMAGES: "\n".join(self._imagesTip(row, channels)),
            LABELS: bullets(_("Segment and what it stands for:"), self._labelsTip(row)),
            FINDINGS: bullets(_("Findings:"), sentences) if sentences else said,
        }
        for column, text in texts.items():
            item = self._table.item(index, column)
            item.setText(text)
            item.setToolTip(tips[column])
        level = INFORMATION if not sentences and row.examined is None else LEVELS[worst]
        self._table.item(index, CASE).setIcon(levelIcon(self._table, level))
        box = self._table.cellWidget(index, ROLE)
        place = _roles().index(row.role)
        if box.currentIndex != place:
            box.currentIndex = place

    def _labelsText(self, row: CaseRow) -> str:
        found = [label for _name, label in self._pairs(row)]
        said = ["?" if label is None else label for label in found if label is None or isLearned(label)]
        said += [_("no {label}").format(label=label) for label in self._lacking(row)]
        said += [_("some not known")] if UNKNOWN in found else []
        return ", ".join(dict.fromkeys(said))

    def _labelsTip(self, row: CaseRow) -> list[str]:
        words = {
            None: _("not decided"),
            BACKGROUND: _("left out: learned as background"),
            UNKNOWN: _("not known: takes no part"),
        }
        said = [f"{name} \u2192 {words.get(label, label)}" for name, label in self._pairs(row)]
        text = _("no {label} \u2192 it is learned that there is none")
        return said + [text.format(label=label) for label in self._lacking(row)]

    def _pairs(self, row: CaseRow) -> list[tuple[str, str | None]]:
        """Segments of a case, and what each of them stands for."""
        labels = [label.name for label in self._model.labels] if self._model is not None else []
        return [(name, labelOf(name, labels, self._cases.choices)) for name in labelNames(self._cases, row)]

    def _lacking(self, row: CaseRow) -> list[str]:
        if self._model is None or not row.used:
            return []
        return lackingLabels(self._cases, row, self._model, self._trained)

    @staticmethod
    def _imagesTip(row: CaseRow, channels: Sequence[str]) -> list[str]:
        if row.stored is not None:
            return [f"{name}: {path}" for name, path in row.stored.paths.items()]
        if row.ofDataSet:
            return [str(path) for path in row.files.get("images", ()) if path]
        return [f"{name}: {row.channels[name].GetName()}" for name in channels]

    def _makeRole(self, row: CaseRow):
        box = qt.QComboBox()
        for text in (_("training"), _("validation"), _("left out")):
            box.addItem(text)
        box.toolTip = _(
            "Training: learned from. Validation: held out, to prove what the training brought. Where no case is for "
            "validation, each patient is held out once by itself."
        )
        box.currentIndex = _roles().index(row.role)
        box.connect("currentIndexChanged(int)", lambda place, row=row: self._onRole(row, place))
        return box

    def _onRole(self, row: CaseRow, place: int) -> None:
        if not self._filling:
            self._cases.setRole(row, _roles()[place])

    def _onSelectionChanged(self) -> None:
        if not self._filling:
            self._onSelected()

    def _fit(self) -> None:
        """As high as its rows, so that a short list takes little room."""
        fitRows(self._table, ROWS_SHOWN)


def _roles() -> tuple[str, str, str]:
    return (TRAINING, VALIDATION, LEFT_OUT)


def _words() -> dict[str, str]:
    """Severity of the worst finding -> a word for it; the sentences stand in the tool tip and below the table."""
    return {"error": _("problem"), "warning": _("look at it"), "note": _("note"), "": _("good")}
