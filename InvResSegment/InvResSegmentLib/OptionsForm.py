"""The options of a fine-tuning in the panel, with what they will need of memory and time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ctk
from slicer.i18n import tr as _

from . import Settings
from .FineTuneRun import secondsPerStep
from .Notice import GOOD, INFORMATION, WARNING, Notice
from .RunOptions import DROPOUT, FROZEN, MEMORY, RunOptions
from .Text import formatSeconds

__all__ = ["OptionsForm"]


class OptionsForm:
    """The widgets of the section Training. onChanged: called when an option is another one."""

    def __init__(self, ui, backend: Any, onChanged: Callable[[], None]) -> None:
        self._ui, self._backend, self._onChanged = ui, backend, onChanged
        self._notice = Notice(ui, "memoryNotice")
        self._plans: dict[tuple, tuple[str, str, bool, str]] = {}  # asked -> level, sentence, is it reversible, speed
        self._asked: tuple | None = None
        ui.baseCasesEdit.filters = ctk.ctkPathLineEdit.Dirs | ctk.ctkPathLineEdit.Files
        for box in (ui.minutesBox, ui.epochsBox, ui.patienceBox, ui.syntheticBox, ui.memorySlider):
            box.connect("valueChanged(int)", self._changed)
        for box in (ui.freezeBox, ui.vaeBox):
            box.connect("currentIndexChanged(int)", self._changed)
        for edit in (ui.nameEdit, ui.rateEdit):
            edit.connect("textChanged(QString)", self._changed)
        ui.dropoutBox.connect("toggled(bool)", self._changed)
        ui.baseCasesEdit.connect("currentPathChanged(QString)", self._changed)

    @property
    def options(self) -> RunOptions:
        """What is asked for; a learning rate that is no number counts as none (`problems` says so)."""
        ui = self._ui
        return RunOptions(
            minutes=ui.minutesBox.value,
            epochs=ui.epochsBox.value,
            memory=MEMORY[ui.memorySlider.value],
            freeze=FROZEN[ui.freezeBox.currentIndex],
            synthetic=ui.syntheticBox.value / 100,
            vae=(None, True, False)[ui.vaeBox.currentIndex],
            learningRate=_rate(ui.rateEdit.text) or 0.0,
            name=ui.nameEdit.text.strip(),
            baseCases=ui.baseCasesEdit.currentPath.strip(),
            device=Settings.device(),
            patience=ui.patienceBox.value,
            channelDropout=DROPOUT if ui.dropoutBox.checked else 0.0,
        )

    def problems(self, model: Any, channels: Sequence[str]) -> list[str]:
        """Why these options cannot be run, one plain sentence each. channels: those that are trained on."""
        ui, options = self._ui, self.options
        sentences = []
        if ui.rateEdit.text.strip() and _rate(ui.rateEdit.text) is None:
            sentences.append(_("The learning rate must be a number above 0 and below 1, or empty."))
        if options.synthetic and any(channel.modality == "CT" for channel in model.channels):
            sentences.append(_("Synthetic images suit MR and not CT: choose none."))
        if options.channelDropout and len(channels) < 2:
            sentences.append(_("With a single channel there is none that the model can do without."))
        if options.freeze == "all-but-head" and options.vae:
            sentences.append(_("With all but the last layer kept, the VAE branch has nothing to do: choose without."))
        if options.baseCases and not Path(options.baseCases).exists():
            sentences.append(_("There is no data set at {path}.").format(path=options.baseCases))
        return sentences

    def setEnabled(self, enabled: bool) -> None:
        """Whether they can be changed."""
        for widget in (self._ui.mainOptions, self._ui.advancedOptions):
            widget.enabled = enabled

    def showPlan(self, model: Any) -> None:
        """Say what a training step of this model will need; asks the backend where that is not known yet."""
        if model is None:
            self._notice.clear()
            return
        options = self.options
        key = (model.sha256, options.memory, options.vae, options.device)
        if key in self._plans:
            self._tell(key, options)
        elif self._asked != key:
            self._asked = key
            self._notice.show(INFORMATION, _("Planning the memory..."))
            arguments = options.planArguments(model.path)
            self._backend.request(arguments, None, lambda outcome: self._onPlan(key, model, outcome))

    def forgetPlans(self) -> None:
        """Free memory is another one now, or another device computes."""
        self._plans.clear()
        self._asked = None

    def _onPlan(self, key: tuple, model: Any, outcome: Any) -> None:
        if self._asked == key:
            self._asked = None
        speed = self._speed(model.sha256, key[1], key[3])
        if outcome.state == "done":
            level = GOOD if outcome.result.get("fits") else WARNING
            reversible = outcome.result.get("engine") == "reversible"
            self._plans[key] = level, str(outcome.result.get("sentence") or ""), reversible, speed
        elif outcome.state == "failed":
            self._plans[key] = WARNING, f"{outcome.message} {outcome.hint}".strip(), True, speed
        else:
            return
        options = self.options
        if key == (model.sha256, options.memory, options.vae, options.device):
            self._tell(key, options)

    def _tell(self, key: tuple, options: RunOptions) -> None:
        level, sentence, reversible, speed = self._plans[key]
        words = _memoryWords()[options.memory]
        if not reversible:
            words = _("The slider changes nothing for the network of this model.") if options.memory != "low" else ""
        self._notice.show(level, sentence, words, speed)

    @staticmethod
    def _speed(sha256: str, memory: str, device: str) -> str:
        wanted = {"modelSha256": sha256, "memory": memory, "device": device}
        seconds = secondsPerStep(Path(Settings.runsFolder()), wanted)
        if seconds is None:
            return ""
        time = formatSeconds(seconds) if seconds >= 1 else _("{count} s").format(count=f"{seconds:.2g}")
        return _("A step took {time} the last time.").format(time=time)

    def _changed(self, *_value) -> None:
        self._onChanged()


def _memoryWords() -> dict[str, str]:
    """What a setting does, in words."""
    return {
        "low": _("Little memory at hardly any cost in time."),
        "lower": _("Fewer channels are worked on at a time: less memory, more time."),
        "lowest": _("Numbers are kept in 16 bits as well: least memory, most time."),
    }


def _rate(text: str) -> float | None:
    try:
        rate = float(text.replace(",", "."))
    except ValueError:
        return None
    return rate if 0 < rate < 1 else None
