"""The list of models with its search box and the card of the chosen one."""

from collections.abc import Callable
from pathlib import Path

import qt
from slicer.i18n import tr as _

from .ModelCard import cardText, matchesSearch
from .Text import escape

__all__ = ["ModelChooser"]

ROWS_SHOWN = 5
USUAL_MODEL = "brain-any-contrast"


class ModelChooser:
    """`searchBox`, `modelList` and `modelCard` of the Segment tab.

    onChosen is called with the `ModelInfo` that a person chose.
    """

    def __init__(self, ui, onChosen: Callable[[object], None]) -> None:
        self._ui = ui
        self._onChosen = onChosen
        self._models: list = []
        self._shown: list = []
        self._wanted = ""  # SHA-256 of the choice, which outlives a search that hides it
        self._memory: dict[str, str] = {}  # SHA-256 -> what the model needs, in words
        self._filling = False
        self._emptyText = _("The list of models has not been read yet.")
        ui.searchBox.connect("textChanged(QString)", self._fill)
        ui.modelList.connect("currentRowChanged(int)", self._onRow)
        self._fill()

    @property
    def chosen(self):
        """The chosen `ModelInfo`, or None."""
        return next((model for model in self._models if model.sha256 == self._wanted), None)

    @property
    def models(self) -> list:
        """All models, whether the search shows them or not."""
        return list(self._models)

    @property
    def usual(self):
        """The model to begin with: the only one there is, else the bundled one for brains; None without."""
        if len(self._models) == 1:
            return self._models[0]
        return next((model for model in self._models if model.bundled and model.name == USUAL_MODEL), None)

    def setModels(self, models: list, emptyText: str) -> None:
        """Show these models; emptyText is the card's text where there is none."""
        self._models, self._emptyText = list(models), emptyText
        self._fill()

    def choose(self, sha256: str) -> None:
        """Choose a model by its hash without calling back; one that is not there (yet) is remembered."""
        self._wanted = sha256
        self._fill()

    def setMemory(self, sha256: str, text: str) -> None:
        """Say on the card how much memory a model needs."""
        self._memory[sha256] = text
        self._showCard()

    def knowsMemoryOf(self, model) -> bool:
        """Whether the card says how much memory the model needs."""
        return bool(self._memory.get(model.sha256)) or model.predictedBytes is not None

    def _fill(self, *_text) -> None:
        self._filling = True
        self._shown = [model for model in self._models if matchesSearch(model, self._ui.searchBox.text)]
        self._ui.modelList.clear()
        for model in self._shown:
            item = qt.QListWidgetItem(self._title(model))
            item.setToolTip(model.description or model.name)
            self._ui.modelList.addItem(item)
        self._fitList()
        rows = [index for index, model in enumerate(self._shown) if model.sha256 == self._wanted]
        self._ui.modelList.setCurrentRow(rows[0] if rows else -1)
        self._filling = False
        self._showCard()

    def _title(self, model) -> str:
        """The name; with its version where two models have the same, or that of its folder where that is the same."""
        same = [other for other in self._models if other.name == model.name]
        if len(same) < 2:
            return model.name
        if not model.version or sum(other.version == model.version for other in same) > 1:
            return f"{model.name} ({Path(model.path).stem})"
        title = f"{model.name} {model.version}"
        return _("{title} (in use)").format(title=title) if model.active else title

    def _fitList(self) -> None:
        """As high as its rows: the card below it is what is read."""
        models = self._ui.modelList
        models.visible = bool(self._models)
        rows = min(max(models.count, 1), ROWS_SHOWN)
        rowHeight = models.sizeHintForRow(0) if models.count else models.fontMetrics().height()
        models.setFixedHeight(rows * max(rowHeight, 1) + 2 * models.frameWidth + 2)

    def _onRow(self, row: int) -> None:
        if self._filling or not 0 <= row < len(self._shown):
            return
        self._wanted = self._shown[row].sha256
        self._showCard()
        self._onChosen(self._shown[row])

    def _showCard(self) -> None:
        model = self.chosen
        if model is not None:
            self._ui.modelCard.text = cardText(model, self._memory.get(model.sha256, ""))
        elif not self._models:
            self._ui.modelCard.text = escape(self._emptyText)
        elif not self._shown:
            self._ui.modelCard.text = _("No model fits these words; delete some of them.")
        elif self._wanted:
            self._ui.modelCard.text = _(
                "The model that this scene was made with is not installed here; import it in the tab Models, "
                "or choose another one."
            )
        else:
            self._ui.modelCard.text = _("Choose a model.")
