"""What every `invres train` has, whatever it trains: options, a folder with a record of how it began, and its words."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import InvresError, __version__
from .checkpoint import CHECKPOINT
from .config import LabelScheme, PreparationPlan, Recipe
from .configjson import differing_keys, from_dict, to_dict
from .curves import Curves
from .events import Reporter, format_bytes, format_seconds
from .files import write_changed
from .modelpackage import ModelPackage, open_package
from .networkconfig import network_as_written
from .runfolder import RUN, held, kind_of_run
from .trainer import TrainingResult

__all__ = [
    "MODEL",
    "RUN",
    "Split",
    "TrainOptions",
    "WithCurves",
    "announce_memory",
    "choosing_names",
    "data_of_run",
    "described",
    "finished_package",
    "held_out_names",
    "lengthened",
    "note_budget",
    "remembered",
    "resumable",
    "run_folder",
    "software_versions",
    "started_recipe",
    "started_run",
    "training_summary",
    "write_run",
]

_WORDS = ("name", "licence", "source", "data")
Split = tuple[tuple[str, ...], tuple[str, ...]]
MODEL = "model"


@dataclass(frozen=True)
class TrainOptions:
    """What belongs to one run and not to a recipe.

    fold: which of `folds` is validated on, None to train on every case; validation_count > 0 takes that many cases
    instead of a fold. source: where the training data come from, in words, for the package.
    vram_bytes: > 0 changes the recipe's memory setting and patch to what a card with so much memory holds.
    name: of the model, "" takes the recipe's. data: full path of the data set, by which run.json says where it is; ""
    where nobody has to find it again. Name, licence, source and data are remembered when the run is resumed.
    """

    device: str = "auto"
    resume: bool = False
    fold: int | None = 0
    folds: int = 5
    validation_count: int = 0
    licence: str = ""
    source: str = ""
    vram_bytes: int = 0
    name: str = ""
    data: str = ""


class WithCurves(Reporter):
    """Passes events on and redraws the curves after epochs; as a context also at the end, whatever ended it."""

    def __init__(self, report: Reporter, folder: Path):
        super().__init__()
        self._report, self._folder, self._curves = report, folder, Curves()
        self._behind = False

    def emit(self, event: dict[str, Any]) -> None:
        self._report.emit(event)
        if event["event"] == "epoch":
            self._behind = not self._curves.due
            if not self._behind:
                self._curves.draw(self._folder, self._report)

    def __enter__(self) -> WithCurves:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._behind:
            self._curves.draw(self._folder, self._report)


@contextmanager
def run_folder(output: Path, resume: bool) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes out of it.

    Raises InvresError for a file, for the folder of a fine-tuning, where another process is at work (code `in_use`),
    and for another training unless it is resumed.
    """
    if output.exists() and not output.is_dir():
        raise InvresError(f"{output} is a file, but training needs a folder.", hint="Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    with held(output):
        _check_kind(output)
        # Without a checkpoint nothing was trained: a first step that memory did not suffice for may be tried again.
        if not resume and (output / RUN).exists() and (output / CHECKPOINT).exists():
            raise InvresError(
                f"There is already a training in {output}.", hint="Add --resume to go on, or give another folder."
            )
        yield


def resumable(output: Path, options: TrainOptions, report: Reporter) -> TrainOptions:
    """The options, to start a training where one is to be resumed that ended before it had begun."""
    if not options.resume or (output / RUN).is_file():
        return options
    report.note(f"There is nothing in {output} to resume, so the training starts.")
    return dataclasses.replace(options, resume=False)


def remembered(output: Path, options: TrainOptions) -> TrainOptions:
    """The options with what the package says of itself as it was asked for when the run in `output` was started."""
    content = json.loads((output / RUN).read_text(encoding="utf-8"))
    kept: dict[str, Any] = {key: getattr(options, key) or str(content.get(key) or "") for key in _WORDS}
    return dataclasses.replace(options, **kept)


def finished_package(output: Path, name: str, options: TrainOptions, iterations: int) -> ModelPackage | None:
    """The package that the run in `output` has written already after so many steps, with this name and the licence and
    source of the options; else None.

    A run that is complete and resumed again keeps it, because a new one would be another model to all that came of it.
    """
    try:
        package = open_package(output / MODEL)
    except InvresError:
        return None
    manifest = package.manifest
    written = (manifest.name, manifest.licence, manifest.training.data, manifest.training.iterations)
    return package if written == (name, options.licence, options.source, iterations) else None


def described(recipe: Recipe, data: str, cases: int) -> str:
    """The model's description: a recipe that comes with its label maps says what is found, any other one cannot know.

    data: name of the data set. cases: that were trained on.
    """
    if recipe.label_maps is not None:
        return recipe.description
    return f"Trained with the recipe {recipe.name} on {data} ({cases} case{'' if cases == 1 else 's'})."


def note_budget(time_s: float, elapsed_s: float, report: Reporter) -> None:
    """Says of a run that goes on what is left of the time that it was given."""
    if time_s > 0:
        left = format_seconds(max(0.0, time_s - elapsed_s))
        report.note(f"Of the time budget of {format_seconds(time_s)} there are {left} left; --time gives another one.")


def announce_memory(network: str, engine: str, predicted_bytes: int, report: Reporter) -> None:
    """Says what a training step is predicted to need. network: its name."""
    report.emit({"event": "memory", "predicted_bytes": predicted_bytes})
    report.note(
        f"{network} under the {engine} engine: a training step is predicted to need {format_bytes(predicted_bytes)}."
    )


def training_summary(
    recipe: Recipe, result: TrainingResult, engine: str, training_cases: int, validation_cases: int, data: str = ""
) -> dict[str, Any]:
    """The manifest's training fields."""
    return {
        "recipe": recipe.name,
        "data": data,
        "epochs": result.epochs,
        "iterations": result.iterations,
        "seconds": round(result.seconds, 1),
        "training_cases": training_cases,
        "validation_cases": validation_cases,
        "engine": engine,
        "memory": recipe.training.memory,
        "precision": recipe.training.precision,
        "optimizer": recipe.training.optimizer,
        "seed": recipe.training.seed,
        "channel_dropout": recipe.augmentation.channel_dropout,
        "software": software_versions(),
    }


def software_versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"invres": __version__, "torch": torch.__version__, "python": platform.python_version()}


def write_run(
    output: Path,
    recipe: Recipe,
    plan: PreparationPlan,
    names: Split,
    scheme: LabelScheme,
    options: TrainOptions,
    **more: Any,
) -> None:
    """run.json: what a training was started with, and its length by now. more: further entries, as configurations.

    Raises InvresError where the disk refuses.
    """
    content = {
        **{key: getattr(options, key) for key in _WORDS},
        "recipe": to_dict(recipe),
        "plan": to_dict(plan),
        "scheme": to_dict(scheme),
        "split": {"train": list(names[0]), "validation": list(names[1])},
        **{key: to_dict(value) for key, value in more.items()},
    }
    try:
        write_changed(output / RUN, json.dumps(content, indent=1))
    except OSError as error:
        raise InvresError(
            f"{output / RUN} cannot be written: {error.strerror or error}.",
            hint="Free some space, and give the same command again.",
            code="write_failed",
        ) from None


def started_recipe(output: Path) -> Recipe:
    """What the training in `output` was started with. Raises InvresError where there is none, and for a damaged one."""
    return started_run(output)[0]


def held_out_names(output: Path) -> tuple[str, ...]:
    """The cases that the training in `output` was validated on. Raises InvresError as `started_recipe` does."""
    if not (output / RUN).is_file():
        raise InvresError(f"There is no training in {output}.", hint="Give the folder that `invres train` wrote.")
    return started_run(output)[3][1]


def data_of_run(output: Path) -> Path | None:
    """The data set that the training in `output` was given last; None where its run.json does not say, as those of
    earlier versions. Raises InvresError as `started_recipe` does."""
    started_run(output)
    data = json.loads((output / RUN).read_text(encoding="utf-8")).get("data")
    return Path(data) if data and isinstance(data, str) else None


def choosing_names(output: Path) -> tuple[str, ...]:
    """Those of `held_out_names` whose Dice chose the epoch that the training in `output` kept. Raises as it does.

    None where only the last epoch is validated, which then is the one that is kept.
    """
    names, config = held_out_names(output), started_recipe(output).training
    if config.validate_every >= config.epochs > 1:
        return ()
    return names[: config.validation_cases] if config.validation_cases else names


def started_run(output: Path) -> tuple[Recipe, PreparationPlan, dict[str, Any], Split]:
    """run.json: recipe, plan, scheme as JSON, and split. Raises InvresError as `started_recipe`."""
    if not (output / RUN).is_file():
        raise InvresError(f"There is no training in {output} to resume.", hint="Leave --resume out to start one.")
    _check_kind(output)
    try:
        content = json.loads((output / RUN).read_text(encoding="utf-8"))
        network = network_as_written(content["recipe"]["network"])
        recipe = from_dict(Recipe, content["recipe"] | {"network": network}, "run.json: recipe")
        plan = from_dict(PreparationPlan, content["plan"], "run.json: plan")
        scheme, names = content["scheme"], (tuple(content["split"]["train"]), tuple(content["split"]["validation"]))
    except (ValueError, KeyError, TypeError):
        raise InvresError(f"{output / RUN} is damaged.", hint="Train again in a new folder.") from None
    return recipe, plan, scheme, names


def _check_kind(output: Path) -> None:
    if kind_of_run(output) == "fine-tuning":
        raise InvresError(
            f"{output} is the folder of a fine-tuning, not of a training.",
            hint="`invres finetune --resume` goes on with it, and its comparison.txt has the scores.",
        )


def lengthened(started: Recipe, asked: Recipe, output: Path, report: Reporter) -> Recipe:
    """The recipe that the training in `output` was started with. `asked` may only lengthen it (epochs, time); other
    wishes give a warning. Raises InvresError where it is of another network."""
    if asked.network.name != started.network.name:
        raise InvresError(
            f"The training in {output} is of {started.network.name}, the recipe asks for {asked.network.name}.",
            hint="Resume with the recipe it was started with, or train in a new folder.",
        )
    training = dataclasses.replace(started.training, epochs=asked.training.epochs, time_s=asked.training.time_s)
    recipe = dataclasses.replace(started, training=training)
    if other := differing_keys(recipe, asked):
        report.warning(
            f"The training goes on as it was started; what is asked otherwise now is left out: {', '.join(other)}."
        )
    return recipe
