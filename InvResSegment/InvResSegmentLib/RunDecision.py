"""What becomes of a tuned model: promoted, discarded or rolled back, each with a word of what that means."""

from collections.abc import Callable
from pathlib import Path

from slicer.i18n import tr as _

from .Notice import ERROR, GOOD, INFORMATION, WARNING, Notice
from .RunRecord import DISCARDED, PROMOTED, ROLLED_BACK, RunRecord, decide, tidy

__all__ = ["RunDecision"]

PACKAGES = ("model", "candidate")
"""Folders of a run, of which one has the tuned model; it may be promoted again until it is discarded."""


class RunDecision:
    """The row `decisionRow` and `decisionNotice` of the view of a run. onDecided: called after each decision."""

    def __init__(self, ui, catalogue, onDecided: Callable[[], None]) -> None:
        self._ui, self._catalogue, self._onDecided = ui, catalogue, onDecided
        self._record: RunRecord | None = None
        self._busy = False
        self._done: Callable = lambda outcome: None  # of the request that is under way
        self._asked = ""  # the button whose second press does it
        self._notice = Notice(ui, "decisionNotice")
        ui.promoteButton.connect("clicked()", self._onPromote)
        ui.discardButton.connect("clicked()", self._onDiscard)
        ui.rollbackButton.connect("clicked()", self._onRollBack)

    def show(self, record: RunRecord) -> None:
        """Offer what can be done with the model of this finished run."""
        if self._record is None or self._record.folder != record.folder:
            self._asked = ""
        self._record = record
        self._update()

    def clear(self) -> None:
        """Offer nothing."""
        self._record, self._asked = None, ""
        self._notice.clear()

    @property
    def _package(self) -> Path | None:
        """The folder of the tuned model, promoted by the run or only a candidate."""
        if self._record is None:
            return None
        return next((self._record.folder / name for name in PACKAGES if (self._record.folder / name).is_dir()), None)

    def _update(self) -> None:
        if self._record is None:  # another run, or none, is shown by now
            return
        decision = str(self._record.decision.get("decision") or "")
        package = self._package
        ui = self._ui
        ui.promoteButton.enabled = not self._busy and package is not None and decision in ("", ROLLED_BACK)
        ui.discardButton.enabled = not self._busy and decision == ""
        ui.rollbackButton.enabled = not self._busy and decision == PROMOTED
        ui.promoteButton.text = _("Promote all the same") if self._asked == "promote" else _("Promote")
        ui.discardButton.text = _("Discard it") if self._asked == "discard" else _("Discard")
        if self._busy or self._asked:
            return
        name, version = self._record.result.get("name", ""), self._record.result.get("version", "")
        if decision == PROMOTED:
            text = _("{name} now stands for the tuned version {version}.").format(name=name, version=version)
            self._notice.show(GOOD, text)
        elif decision == ROLLED_BACK:
            text = _("Rolled back: {name} stands for the version that this one was tuned from; both are kept.")
            self._notice.show(INFORMATION, text.format(name=name))
        elif decision == DISCARDED:
            self._notice.show(INFORMATION, _("The tuned model was discarded; nothing has changed."))
        elif package is None:
            self._notice.show(ERROR, _("The tuned model is no longer in the folder of this run."))
        else:
            self._notice.clear()

    # ---------------------------------------------------------------- decisions

    def _onPromote(self) -> None:
        package = self._package
        if package is None:
            return
        doubts = self._doubts
        if doubts and self._asked != "promote":
            last = _("Press the button again to use it all the same; you can roll back at any time.")
            self._ask("promote", *doubts, last)
            return
        record = self._record

        def promoted(outcome) -> None:
            path = str(outcome.result.get("path") or "")
            self._decided(record, PROMOTED, model=path)
            self._catalogue.tell(path)

        self._run(_("Adding the tuned model to your models..."), promoted)
        self._catalogue.importModel(package, self._finish)

    def _onRollBack(self) -> None:
        record = self._record
        if record is None:
            return

        def rolledBack(outcome) -> None:
            self._decided(record, ROLLED_BACK, model=str(record.decision.get("model") or ""))
            self._catalogue.tell(str(outcome.result.get("path") or ""))

        self._run(_("Going back to the version that it was tuned from..."), rolledBack)
        self._catalogue.rollBackModel(str(record.decision.get("model") or ""), self._finish)

    def _onDiscard(self) -> None:
        if self._record is None:
            return
        if self._asked != "discard":
            question = _("The tuned model and its prepared data will be deleted; what was proved is kept.")
            self._ask("discard", question, _("Press the button again to delete them."))
            return
        self._asked = ""
        self._decided(self._record, DISCARDED)

    @property
    def _doubts(self) -> list[str]:
        """What speaks against the tuned model, one sentence each."""
        result = self._record.result
        check = result.get("base_check") or {}
        worse = self._record.comparison.get("worse_labels") or []
        dropped = ((result.get("transfer") or {}).get("labels") or {}).get("dropped") or []
        found = [_("Labels that got worse: {names}.").format(names=", ".join(worse))] if worse else []
        if dropped:
            found.append(_("Labels that it does not find any more: {names}.").format(names=", ".join(dropped)))
        forgotten = check.get("verdict") == "worse" or bool(check.get("worse_labels"))
        # What the backend found against it may be just those labels.
        told = bool(found) and not forgotten and self._looksGood
        if not result.get("promoted") and not told:
            found.insert(0, _("The proof does not speak for this model: {verdict}.").format(verdict=self._verdict))
        return found

    @property
    def _looksGood(self) -> bool:
        """Whether the proof speaks for the model as a whole, whatever became of single labels."""
        comparison = self._record.comparison
        verdict = comparison.get("verdict")
        if verdict == "nothing to compare":
            tuned = [(of.get("Dice") or {}).get("tuned") or {} for of in (comparison.get("labels") or {}).values()]
            return any((spread.get("mean") or 0) > 0 for spread in tuned)
        if verdict == "not enough data to tell":
            mean = (comparison.get("difference") or {}).get("mean")
            return bool(comparison.get("held_out")) and mean is not None and mean >= 0
        return verdict in ("better", "as good")

    @property
    def _verdict(self) -> str:
        forgotten = _("it has forgotten some of what the base model could")
        if self._looksGood:
            return forgotten
        return {
            "worse": _("it got worse"),
            "not enough data to tell": _(
                "there is not enough data to tell, and the cases there are do not look better"
            ),
            "nothing to compare": _("it finds nothing"),
        }.get(str(self._record.result.get("verdict")), forgotten)

    def _ask(self, what: str, *sentences: str) -> None:
        self._asked = what
        self._notice.show(WARNING, *sentences)
        self._update()

    def _run(self, doing: str, done: Callable) -> None:
        self._busy, self._asked, self._done = True, "", done
        self._notice.show(INFORMATION, doing)
        self._update()

    def _finish(self, outcome) -> None:
        self._busy = False
        if outcome.state == "done":
            self._done(outcome)
            return
        self._update()
        if outcome.state == "failed" and self._record is not None:
            self._notice.show(ERROR, outcome.message, outcome.hint)

    def _decided(self, record: RunRecord, decision: str, **fields) -> None:
        try:
            decide(record.folder, decision, **fields)
        except OSError as error:
            problem = _("The decision could not be written down: {reason}.").format(reason=error.strerror or error)
        else:
            problem = ""
            tidy(record.folder, *(PACKAGES if decision == DISCARDED else ()))
        self._update()
        if problem and self._record is not None:
            self._notice.show(ERROR, problem)
        self._onDecided()
