"""The models that can be chosen, as plain data from the backend, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _

from .Paths import defaultModelsFolder
from .Protocol import Outcome

__all__ = ["ChannelInfo", "LabelInfo", "ModelCatalogue", "ModelInfo", "locatorFor", "modelFromDescription"]


@dataclass(frozen=True)
class ChannelInfo:
    """One input of a model. modality: "MR", "CT"... optional: the model was trained to do without."""

    name: str
    modality: str
    optional: bool = False


@dataclass(frozen=True)
class LabelInfo:
    """One segment that a model finds. colour: RGB 0..255, or None; terminology: Slicer's entry as text, or "".

    sides: the values of its left and its right side in results where these can be told apart, () for one segment.
    parts: all values of a label map that lie in it, where labels are regions that overlap; () where they are not.
    """

    name: str
    value: int
    colour: tuple[int, int, int] | None
    terminology: str
    sides: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def sided(self) -> bool:
        """Whether results have it as two segments, left and right, where these can be told apart."""
        return bool(self.sides)


@dataclass(frozen=True)
class ModelInfo:
    """One model package. path: what the backend takes as --model. spacingMm: superior, anterior, right.

    id, version: of the package. active: the version that its name stands for.
    cropAround: what the images that it learned from were cut out around, () where they showed all; largestMm: so large.
    mirrored: how many images it takes the average over, the volume itself and mirrored ones. onePiece: whether it
    leaves out what hangs loose. leastConfidence: of the cases that it was tested with, 0 where it is not known.
    metrics: one line of text for each label. parent: id of the model that it was tuned from, or "". manifest: all of
    it. predictedBytes: None, until somebody has planned a run.
    """

    name: str
    path: str
    description: str
    channels: tuple[ChannelInfo, ...]
    labels: tuple[LabelInfo, ...]
    spacingMm: tuple[float, float, float]
    licence: str
    trainingData: str
    metrics: list[str]
    parent: str
    sha256: str
    manifest: dict = field(repr=False)
    bundled: bool = False
    id: str = ""
    version: str = ""
    active: bool = False
    predictedBytes: int | None = None
    cropAround: tuple[str, ...] = ()
    largestMm: tuple[float, float, float] | None = None
    mirrored: int = 1
    onePiece: bool = False
    leastConfidence: float = 0.0

    def finds(self, names: Sequence[str]) -> bool:
        """Whether one of these structures is among the labels, on one side or both."""
        own = (label.name.casefold() for label in self.labels)
        plain = {name.removeprefix("left ").removeprefix("right ") for name in own}
        return any(name.casefold() in plain for name in names)


def locatorFor(model: ModelInfo, models: Sequence[ModelInfo]) -> ModelInfo | None:
    """The model that finds, in a whole image, what `model` was trained on crops around; None without."""
    if not model.cropAround:
        return None
    able = (one for one in models if not one.cropAround and len(one.channels) == 1 and one.finds(model.cropAround))
    return next(able, None)


def modelFromDescription(description: dict[str, Any]) -> ModelInfo:
    """A model from {"path", "bundled", "manifest"}, as the backend's `models list` and `describe` give it.

    Raises KeyError, TypeError or ValueError for what is no description of a model.
    """
    manifest = description["manifest"]
    plan, scheme = manifest["plan"], manifest["scheme"]
    sides = {one["label"]: (one["left_value"], one["right_value"]) for one in manifest.get("sides") or ()}
    crop = plan.get("crop") or {}
    largest = [float(value) for value in crop.get("largest_mm") or ()]
    depth, height, width = (float(value) for value in plan["spacing_mm"])
    return ModelInfo(
        name=manifest["name"],
        path=description["path"],
        description=manifest.get("description") or "",
        channels=tuple(_channel(each) for each in plan["channels"]),
        labels=tuple(_label(each, sides, bool(scheme.get("regions"))) for each in scheme["labels"]),
        spacingMm=(depth, height, width),
        licence=manifest.get("licence") or "",
        trainingData=_trainingData(manifest.get("training") or {}),
        metrics=_metrics(manifest.get("metrics") or {}),
        parent=manifest.get("parent") or "",
        sha256=manifest["sha256"],
        manifest=manifest,
        bundled=bool(description.get("bundled")),
        id=manifest.get("id") or "",
        version=str(manifest.get("version") or ""),
        active=bool(description.get("active")),
        cropAround=tuple(crop.get("around") or ()),
        largestMm=(largest[0], largest[1], largest[2]) if len(largest) == 3 else None,
        onePiece=bool(manifest.get("one_piece")),
        mirrored=2 ** len(manifest.get("mirror_axes") or ()),
        leastConfidence=float((manifest.get("expected") or {}).get("confidence") or 0.0),
    )


class ModelCatalogue:
    """Lists, imports, exports, verifies, deletes and rolls back model packages on the backend, without blocking.

    modelsFolder: the folder of own models, or a function that gives it; "" is the default one.
    Every action returns the backend's request id; its callback gets an `Outcome`.
    changed: called by `tell` with the path of the model that a person will want to use now.
    """

    def __init__(self, backend: Any, modelsFolder: Callable[[], str | Path] | str | Path) -> None:
        self._backend = backend
        self._modelsFolder = modelsFolder
        self.changed: list[Callable[[str], None]] = []
        self.models: list[ModelInfo] = []
        self.warnings: list[str] = []  # packages that were left out, and why

    @property
    def modelsFolder(self) -> str:
        """The folder of own models; made when something is imported."""
        folder = self._modelsFolder() if callable(self._modelsFolder) else self._modelsFolder
        return str(folder or defaultModelsFolder())

    def refresh(self, onDone: Callable[[list[ModelInfo], str], None]) -> int:
        """Reads the models again, bundled ones first. onDone gets them and "", or [] and why there are none.

        Models that enhance images are passed over: they have no labels, and nothing here could use them.
        """
        warnings: list[str] = []

        def onEvent(event: dict) -> None:
            if event["event"] == "warning":
                warnings.append(str(event.get("message") or ""))

        def onFinished(outcome: Outcome) -> None:
            if outcome.state != "done":
                text = f"{outcome.message} {outcome.hint}".strip()
                onDone([], text or _("The list of models was cancelled."))
                return
            found = []
            for description in outcome.result.get("models") or []:
                try:
                    if not _segments(description):
                        continue
                    found.append(modelFromDescription(description))
                except (KeyError, TypeError, ValueError):
                    path = description.get("path") if isinstance(description, dict) else description
                    warnings.append(_("The model {path} is left out: its manifest is damaged.").format(path=path))
            self.models, self.warnings = found, warnings
            onDone(list(found), "")

        return self._backend.request(self._arguments("list"), onEvent, onFinished)

    def importModel(self, path: str | Path, onDone: Callable[[Outcome], None]) -> int:
        """Copies a package (folder or .invres) into the folder of own models; the result has its new path."""
        return self._run("import", path, onDone)

    def exportModel(self, model: ModelInfo, path: str | Path, onDone: Callable[[Outcome], None]) -> int:
        """Writes a model as one .invres file."""
        return self._run("export", model.path, onDone, "--output", str(path))

    def verifyModel(self, model: ModelInfo, onDone: Callable[[Outcome], None]) -> int:
        """Checks that a model is whole and is what its manifest says."""
        return self._run("verify", model.path, onDone)

    def deleteModel(self, model: ModelInfo, onDone: Callable[[Outcome], None]) -> int:
        """Deletes a model from the disk; bundled ones are refused."""
        return self._run("delete", model.path, onDone)

    def rollBackModel(self, path: str | Path, onDone: Callable[[Outcome], None]) -> int:
        """Makes the name of a tuned model stand for its parent again; the result has the `path` of that one."""
        return self._run("rollback", path, onDone)

    def tell(self, path: str) -> None:
        """Says that another model than before is the one to use, after importing or rolling back."""
        for listener in list(self.changed):
            listener(path)

    def _run(self, action: str, model: str | Path, onDone: Callable[[Outcome], None], *more: str) -> int:
        return self._backend.request([*self._arguments(action, str(model)), *more], None, onDone)

    def _arguments(self, action: str, *model: str) -> list[str]:
        return ["models", action, *model, "--models-dir", self.modelsFolder]


def _segments(description: dict[str, Any]) -> bool:
    return not description["manifest"].get("enhancement")


def _channel(described: dict) -> ChannelInfo:
    return ChannelInfo(described["name"], described.get("modality") or "", bool(described.get("optional")))


def _label(label: dict[str, Any], sides: dict[str, tuple[int, ...]], regions: bool) -> LabelInfo:
    colour = None
    if label.get("colour"):
        red, green, blue = (int(part) for part in label["colour"])
        colour = (red, green, blue)
    value, terminology = int(label["output_value"]), label.get("terminology") or ""
    parts = tuple(int(part) for part in label["values"]) if regions else ()
    return LabelInfo(label["name"], value, colour, terminology, sides.get(label["name"], ()), parts)


def _trainingData(training: dict[str, Any]) -> str:
    """What the model has learned from, in words; manifests hold counts and nothing about patients."""
    cases, data = int(training.get("training_cases") or 0), str(training.get("data") or "")
    if not cases:
        return data
    validation = int(training.get("validation_cases") or 0)
    if validation:
        text = _("{cases} cases, validated on {validation} others").format(cases=cases, validation=validation)
    else:
        text = _("one case") if cases == 1 else _("{cases} cases").format(cases=cases)
    recipe = training.get("recipe")
    text = _("{text} (recipe {recipe})").format(text=text, recipe=recipe) if recipe else text
    return f"{data} {text}." if data else text


def _metrics(metrics: dict[str, Any]) -> list[str]:
    """One line for each label that was scored: mean, spread and number of cases."""
    rows = []
    for label, scores in metrics.items():
        parts = []
        for name in ("Dice", "HD95"):
            score = scores.get(name) if isinstance(scores, dict) else None
            mean = score.get("mean") if isinstance(score, dict) else None
            if isinstance(mean, (int, float)):
                unit = " mm" if name == "HD95" else ""
                digits = 1 if name == "HD95" else 3
                sd = score.get("sd")
                spread = f" \u00b1 {sd:.{digits}f}" if isinstance(sd, (int, float)) else ""
                count = f" (n = {score['n']})" if score.get("n") else ""
                parts.append(f"{name} {mean:.{digits}f}{spread}{unit}{count}")
        if parts:
            rows.append(f"{label}: {', '.join(parts)}")
    return rows
