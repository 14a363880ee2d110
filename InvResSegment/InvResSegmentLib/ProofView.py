"""What a fine-tuning brought: the verdict in words, before and after in a table, the cases and the way into them."""

from collections.abc import Callable
from typing import Any

import qt
from slicer.i18n import tr as _

from .CaseOverlay import COLOURS, CaseOverlay, titles
from .Notice import GOOD, INFORMATION, WARNING, Notice
from .RunDecision import RunDecision
from .RunRecord import RunRecord
from .Table import fitRows, setUpTable
from .Text import escape, paragraphs

__all__ = ["ProofView"]

METRICS = {"Dice": ("Dice", 3), "HD95_mm": ("HD95 [mm]", 1), "VolumeError_ml": ("Volume error [mL]", 2)}
"""Of comparison.json: what a person reads, and the digits behind the point."""
OF_MODEL = "model"
"""Whose scores a comparison holds: the model's alone; beginning with it, those of other trainings as well."""
ROWS_SHOWN = 9
NOTHING = "\u2013"


class ProofView:
    """`proofBox` of the view of a run; hidden until a run has ended. onDecided: called after each decision."""

    def __init__(self, ui, catalogue, onDecided: Callable[[], None]) -> None:
        self._ui = ui
        self._cases: list[dict] = []
        self._shown: dict = {}
        self._verdict = Notice(ui, "verdictNotice")
        self._overlayProblems = Notice(ui, "overlayNotice")
        self._overlay = CaseOverlay()
        self._decision = RunDecision(ui, catalogue, onDecided)
        setUpTable(ui.proofTable, [_("Segment"), "", _("Base"), _("Tuned"), _("Difference")], stretched=(0, 4))
        setUpTable(
            ui.casesTable, [_("Case"), _("Base"), _("Tuned"), _("Difference"), _("Worst segment")], stretched=(0, 4)
        )
        for table in (ui.proofTable, ui.casesTable):  # what is wrapped needs other heights at other widths
            table.horizontalHeader().connect("sectionResized(int,int,int)", self._fit)
        ui.legendText.text = _legend()
        ui.casesTable.connect("itemSelectionChanged()", self._onCase)
        ui.hideCaseButton.connect("clicked()", self._onHide)
        self.clear()

    def show(self, record: RunRecord) -> None:
        """Show the proof of a finished run."""
        comparison = record.comparison
        self._showVerdict(record, comparison)
        self._decision.show(record)
        if comparison != self._shown:  # a choice of case stays while nothing changes
            self._shown = comparison
            self._leaveCase()
            self._fillProof(comparison)
            self._fillCases(comparison)
        self._ui.proofBox.visible = True

    def clear(self) -> None:
        """Show nothing; the scene is left as it was before a case was chosen."""
        self._shown, self._cases = {}, []
        self._leaveCase()
        self._decision.clear()
        self._verdict.clear()
        self._ui.proofBox.visible = False

    def leave(self) -> None:
        """Nobody looks any more: a case that is shown goes out of the scene."""
        if self._overlay.shown:
            self._leaveCase()

    # ---------------------------------------------------------------- verdict

    def _showVerdict(self, record: RunRecord, comparison: dict[str, Any]) -> None:
        verdict = str(comparison.get("verdict") or "")
        level, title = {
            "better": (GOOD, _("The tuned model is better.")),
            "as good": (GOOD, _("The tuned model is as good as before.")),
            "worse": (WARNING, _("The tuned model got worse.")),
            "nothing to compare": (INFORMATION, _("There is nothing to compare the tuned model with.")),
        }.get(verdict, (INFORMATION, _("There is not enough data to tell whether the tuned model is better.")))
        notes = [str(comparison.get("sentence") or "")]
        of = str(comparison.get("of") or OF_MODEL)
        if of.startswith(OF_MODEL) and of != OF_MODEL:
            notes.append(
                _(
                    "Each case was held out from a training that did not learn from it. The model is one of these "
                    "trainings, and has learned from some of the cases itself."
                )
            )
        elif of != OF_MODEL:
            notes.append(
                _("Each case was held out once; the model itself has then been trained on all of them in the same way.")
            )
        if check := comparison.get("base_check"):
            notes.append(_("Cases of the base model's own kind: {sentence}").format(sentence=check.get("sentence", "")))
            level = WARNING if check.get("verdict") == "worse" else level
        for skipped in record.result.get("skipped_cases") or []:
            notes.append(_("{case} was left out: {reason}").format(**skipped))
        for given in record.result.get("reductions") or []:
            notes.append(_("For want of memory it was trained with {given}.").format(given=given))
        self._verdict.show(level, title)
        self._ui.verdictText.text = paragraphs([note for note in notes if note])

    # ---------------------------------------------------------------- tables

    def _fit(self) -> None:
        for table in (self._ui.proofTable, self._ui.casesTable):
            fitRows(table, ROWS_SHOWN)

    def _fillProof(self, comparison: dict[str, Any]) -> None:
        table, labels = self._ui.proofTable, comparison.get("labels") or {}
        table.setRowCount(len(labels) * len(METRICS))
        for place, (label, metrics) in enumerate(labels.items()):
            for offset, (key, (title, digits)) in enumerate(METRICS.items()):
                row, values = place * len(METRICS) + offset, metrics.get(key) or {}
                _setCell(table, row, 0, label if not offset else "", label)
                _setCell(table, row, 1, title)
                for column, which in ((2, "base"), (3, "tuned")):
                    spread = values.get(which) or {}
                    _setCell(table, row, column, _number(spread.get("mean"), digits), _spreadText(spread, digits))
                self._setDifference(row, values, digits)
        table.visible = bool(labels)
        fitRows(table, ROWS_SHOWN)

    def _setDifference(self, row: int, values: dict[str, Any], digits: int) -> None:
        found = values.get("difference") or {}
        text, bounds = _number(found.get("mean"), digits, "+"), found.get("ci95")
        if bounds:
            text += " ({low} to {high})".format(
                low=_number(bounds[0], digits, "+"), high=_number(bounds[1], digits, "+")
            )
        better, worse = _judged(bounds, bool(values.get("larger_is_better")))
        told = _("no difference beyond chance can be told")
        if better or worse:
            told = _("better beyond chance") if better else _("worse beyond chance")
        tip = _("Tuned minus base, mean over {count} patients; in brackets the 95 % interval: {told}.")
        item = _setCell(self._ui.proofTable, row, 4, text, tip.format(count=found.get("n", 0), told=told))
        if better or worse:
            kind = qt.QStyle.SP_DialogApplyButton if better else qt.QStyle.SP_MessageBoxWarning
            item.setIcon(self._ui.proofTable.style().standardIcon(kind))

    def _fillCases(self, comparison: dict[str, Any]) -> None:
        table = self._ui.casesTable
        self._cases = list(comparison.get("cases") or [])
        table.setRowCount(len(self._cases))
        for row, case in enumerate(self._cases):
            name = str(case.get("case") or "")
            _setCell(table, row, 0, name)
            for column, which in ((1, "base"), (2, "tuned")):
                _setCell(table, row, column, _number(_meanDice(case.get(which) or {}), 3), _diceText(case.get(which)))
            _setCell(table, row, 3, _number(case.get("difference"), 3, "+"))
            _setCell(table, row, 4, str(case.get("worst_label") or ""))
        table.clearSelection()
        for widget in (table, self._ui.casesText):
            widget.visible = bool(self._cases)
        fitRows(table, ROWS_SHOWN)

    # ---------------------------------------------------------------- the case in the views

    def _onCase(self) -> None:
        rows = {index.row() for index in self._ui.casesTable.selectionModel().selectedRows()}
        if not rows or min(rows) >= len(self._cases):
            return
        problems = self._overlay.show(self._cases[min(rows)])
        self._overlayProblems.show(WARNING, *problems)
        self._ui.legendRow.visible = self._overlay.shown

    def _onHide(self) -> None:
        self._leaveCase()

    def _leaveCase(self) -> None:
        self._overlay.clear()
        self._ui.casesTable.clearSelection()
        self._overlayProblems.clear()
        self._ui.legendRow.visible = False


# ---------------------------------------------------------------- small things


def _setCell(table, row: int, column: int, text: str, toolTip: str = ""):
    item = qt.QTableWidgetItem(text)
    item.setToolTip(toolTip or text)
    table.setItem(row, column, item)
    return item


def _number(value: Any, digits: int, sign: str = "") -> str:
    if not isinstance(value, (int, float)):
        return NOTHING
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no negative zero


def _spreadText(spread: dict[str, Any], digits: int) -> str:
    if not spread.get("n"):
        return _("The base model does not have this segment.")
    sd = _number(spread.get("sd"), digits)
    median = _number(spread.get("median"), digits)
    return _("Standard deviation {sd}, median {median}, {n} cases.").format(sd=sd, median=median, n=spread["n"])


def _judged(bounds: Any, largerIsBetter: bool) -> tuple[bool, bool]:
    """Whether the interval says better, and whether it says worse."""
    if not bounds:
        return False, False
    up, down = bounds[0] > 0, bounds[1] < 0
    return (up, down) if largerIsBetter else (down, up)


def _meanDice(scores: dict[str, Any]) -> float | None:
    values = [one["Dice"] for one in scores.values() if isinstance(one.get("Dice"), (int, float))]
    return sum(values) / len(values) if values else None


def _diceText(scores: Any) -> str:
    return ", ".join(f"{name} {_number(one.get('Dice'), 3)}" for name, one in (scores or {}).items())


def _legend() -> str:
    parts = []
    for source, title in titles().items():
        colour = "#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in COLOURS[source]))
        parts.append(f'<font color="{colour}">\u25a0</font>&nbsp;{escape(title)}')
    return " &nbsp; ".join(parts)
