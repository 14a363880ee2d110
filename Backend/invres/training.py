"""`invres train`: from a data set and a recipe to a model package in a run folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import InvresError
from .cardplan import fit_recipe
from .cases import Dataset, aligned_as_begun, report_missing_channels, report_resampled, split_by_count, split_cases
from .checkpoint import CHECKPOINT
from .config import LabelScheme, PreparationPlan, Recipe, check_one_piece
from .configjson import to_dict
from .cropping import CROPS, cropped
from .devices import choose_device
from .events import SILENT, Reporter
from .expectation import of_volumes
from .labelmapbatches import LabelMapBatches
from .labelmaps import SyntheticScenes, label_map_batches, label_map_plan
from .manifest import check_name
from .memory import predict_for
from .mirroring import check_mirror, with_kept_flips
from .modelpackage import ModelPackage, save_package
from .networks import build, with_patch
from .objectives import Segmentation
from .patchsize import within_cases
from .prepared import prepare_cases
from .preprocessing import (
    PreparedCase,
    case_volumes_ml,
    make_plan,
    with_dropout,
    without_channel,
)
from .sampling import CaseBatches
from .sides import sides_of_recipe
from .trainer import METRICS, StopRequest, Trainer, Validation
from .trainingrun import (
    MODEL,
    Split,
    TrainOptions,
    WithCurves,
    announce_memory,
    described,
    finished_package,
    lengthened,
    note_budget,
    remembered,
    resumable,
    run_folder,
    started_recipe,
    started_run,
    training_summary,
    write_run,
)
from .validation import card_scores, labels_in_files, validator
from .volume import Geometry

__all__ = ["train"]


def train(
    dataset: Dataset,
    recipe: Recipe,
    output: Path,
    options: TrainOptions = TrainOptions(),
    report: Reporter = SILENT,
    stop: StopRequest | None = None,
) -> ModelPackage:
    """Trains `recipe` on `dataset` in the folder `output`: run.json, checkpoint.pt, metrics.jsonl, curves.png, model/.

    Where the recipe is of crops (`Recipe.crop`), larger images are cropped around their labels first.

    Raises InvresError for a folder with another run or another process at work, unlabelled data, or configuration that
    does not fit; Cancelled after a stop was requested (everything is saved).
    """
    with run_folder(output, options.resume):
        return _train(dataset, recipe, output, resumable(output, options, report), report, stop)


def _train(
    dataset: Dataset, recipe: Recipe, output: Path, options: TrainOptions, report: Reporter, stop: StopRequest | None
) -> ModelPackage:
    device = choose_device(options.device)
    stopped = (lambda: stop.requested) if stop is not None else (lambda: False)
    check_one_piece(dataset.scheme, recipe.one_piece)
    recipe = with_kept_flips(recipe, dataset.scheme, report)
    check_mirror(dataset.scheme, recipe.mirror_axes)
    crop = started_recipe(output).crop if options.resume else recipe.crop
    dataset = aligned_as_begun(dataset, output, report) if options.resume else dataset
    report_resampled(dataset, dataset.labelled_cases, report)
    if crop is not None:
        dataset = cropped(dataset, crop, output / CROPS, report, stopped)
    labelled = [case.name for case in dataset.cases if case.label is not None]
    if not labelled:
        raise InvresError(f"The data set {dataset.name} has no labelled case.", hint="Training needs label files.")
    if options.resume:
        recipe, plan, names = _read_run(output, recipe, dataset, options, report)
        options = remembered(output, options)
    else:
        names = _split(dataset, labelled, recipe.training.seed, options)
        if recipe.label_maps is not None:
            plan = label_map_plan(recipe)
        else:
            report_missing_channels(dataset, names[0], report)
            plan = make_plan(dataset, names[0], recipe.spacing_mm, report, recipe.clip_hu)
        plan = with_dropout(plan, recipe.augmentation.channel_dropout)
        plan = dataclasses.replace(plan, crop=recipe.crop)
        recipe = within_cases(_fitted(recipe, dataset, plan), _grids(dataset, names[0]), plan.spacing_mm, report)
        if options.vram_bytes:
            recipe = fit_recipe(recipe, options.vram_bytes, dataset.scheme.regions, report)
            recipe = dataclasses.replace(recipe, network=with_patch(recipe.network, recipe.training.patch))
    check_name(options.name or recipe.name)  # before hours of training, after which no package could be saved
    if set(names[0]) & set(names[1]):
        report.warning("There is only one patient, so the Dice is measured on the training case itself; expect less.")
    scheme, config = dataset.scheme, recipe.training
    torch.manual_seed(config.seed)
    network = build(recipe.network, config.engine, config.memory).to(device)
    predicted = predict_for(recipe.network, config, network.engine, scheme.regions)
    announce_memory(recipe.network.name, network.engine, predicted.peak_bytes, report)
    prepared = output / "prepared"
    batches: LabelMapBatches | CaseBatches
    training_cases: list[PreparedCase] = []
    validation_cases: list[PreparedCase] = []
    scenes: SyntheticScenes | None = None
    validate: Validation | None = None
    if recipe.label_maps is not None:
        batches = label_map_batches(dataset, names[0], recipe, prepared, device, report)
        scenes = SyntheticScenes(dataset, names[1], recipe, prepared, device, report) if names[1] else None
        validate = scenes.validate if scenes is not None else None
    else:
        training_cases, validation_cases = (
            prepare_cases(dataset, part, plan, prepared, report, stopped) for part in names
        )
        batches = CaseBatches(training_cases, scheme, config, recipe.augmentation, device, plan)
        _check_labelled(batches.unlabelled, len(names[0]), dataset, report)
        validate = validator(validation_cases, scheme, config, device)
    # Not before every case was read: after a mistake in the data the same command is given again.
    write_run(output, recipe, plan, names, dataset.scheme, options)
    objective = Segmentation(scheme.regions, config.loss)
    reporter = WithCurves(report, output)
    trainer = Trainer(network, batches, config, output, objective, validate, reporter, stop)
    if options.resume and (output / CHECKPOINT).exists():
        trainer.resume()
        note_budget(config.time_s, trainer.elapsed_s, report)
    begun = trainer.iteration
    with reporter:
        result = trainer.run()
    name = options.name or recipe.name
    if result.iterations == begun and (finished := finished_package(output, name, options, begun)) is not None:
        return finished
    network.load_state_dict(result.weights)
    network.eval()
    if isinstance(batches, LabelMapBatches):
        scores, confidences = scenes.scores(network) if scenes is not None else (np.empty((0, 0)), [])
        volumes = batches.volumes_ml(plan.spacing_mm)
    else:
        scores, confidences = card_scores(network, validation_cases, dataset, recipe, device)
        volumes = [case_volumes_ml(case, scheme) for case in training_cases]
    # A label that no case held out has would be on the card with a Dice of 1 for not being found.
    label_maps = recipe.label_maps is not None or not names[1]
    shown = np.ones(len(scheme.labels), dtype=bool) if label_maps else labels_in_files(names[1], dataset)
    metrics = _metrics("Dice", scores, scheme, shown)
    for number, channel in enumerate(plan.channels):
        if channel.optional:
            # One at a time: they are copies in memory, unlike the prepared cases.
            lacking = (one for case in validation_cases if (one := without_channel(case, number)) is not None)
            scores, _ = card_scores(network, lacking, dataset, recipe, device)
            for label, spread in _metrics(f"Dice without {channel.name}", scores, scheme, shown).items():
                metrics[label] |= spread
    return save_package(
        output / MODEL,
        name=name,
        network=network.config,
        state_dict=result.weights,
        plan=plan,
        scheme=scheme,
        patch=recipe.window_or_patch,
        description=described(recipe, dataset.name, len(names[0])),
        training=training_summary(recipe, result, network.engine, len(names[0]), len(names[1]), options.source),
        metrics=metrics,
        expected=of_volumes(scheme.names, volumes, confidences),
        sides=sides_of_recipe(recipe),
        one_piece=recipe.one_piece,
        mirror_axes=recipe.mirror_axes,
        trained_on=itertools.chain.from_iterable(case.fingerprints for case in training_cases),
        licence=options.licence,
        log=output / METRICS,
    )


def _metrics(metric: str, table: np.ndarray, scheme: LabelScheme, shown: np.ndarray) -> dict[str, Any]:
    """A metric (cases, labels) as mean, sd and n by label, for the package; nothing where there are no cases.

    shown: bool (labels), those to have.
    """
    spreads: dict[str, Any] = {}
    columns = zip(scheme.names, table.T, shown, strict=True) if len(table) else ()
    for name, column in ((name, column) for name, column, wanted in columns if wanted):
        sd = float(column.std(ddof=1)) if len(column) > 1 else None
        spreads[name] = {metric: {"mean": float(column.mean()), "sd": sd, "n": len(column)}}
    return spreads


def _fitted(recipe: Recipe, dataset: Dataset, plan: PreparationPlan) -> Recipe:
    """The recipe with the network's channel counts taken from the data set."""
    network = dataclasses.replace(
        recipe.network, in_channels=len(plan.channels), out_channels=dataset.scheme.out_channels
    )
    return dataclasses.replace(recipe, network=with_patch(network, recipe.training.patch))


def _grids(dataset: Dataset, names: Iterable[str]) -> list[Geometry]:
    """Of the files of these cases, in canonical orientation; none of label maps, which have no images."""
    return [dataset.geometry(case).canonical() for case in map(dataset.case, names) if any(dataset.present(case))]


def _check_labelled(unlabelled: list[str], cases: int, dataset: Dataset, report: Reporter) -> None:
    if len(unlabelled) == cases:
        raise InvresError(
            f"No training case of {dataset.name} has a labelled voxel ({', '.join(dataset.scheme.names)}).",
            hint="Check the label files and the label values in dataset.json with `invres check`.",
        )
    if unlabelled:
        report.warning(
            f"{len(unlabelled)} of {cases} training cases have an empty label and teach background only: "
            f"{', '.join(unlabelled[:5])}{' and more' if len(unlabelled) > 5 else ''}."
        )


def _split(dataset: Dataset, labelled: list[str], seed: int, options: TrainOptions) -> Split:
    if len(labelled) < len(dataset.cases):
        dataset = dataclasses.replace(dataset, cases=tuple(c for c in dataset.cases if c.label is not None))
    if options.validation_count:
        return split_by_count(dataset, options.validation_count, seed)
    if options.fold is None:
        return tuple(sorted(labelled)), ()
    return split_cases(dataset, seed=seed, folds=options.folds, fold=options.fold)


def _read_run(
    output: Path, asked: Recipe, dataset: Dataset, options: TrainOptions, report: Reporter
) -> tuple[Recipe, PreparationPlan, Split]:
    """The run as it was started, but for its length (see `lengthened`)."""
    recipe, plan, scheme, names = started_run(output)
    asked = _fitted(asked, dataset, plan)
    if asked.training.patch != recipe.training.patch:
        smaller = within_cases(asked, _grids(dataset, names[0]), plan.spacing_mm)
        # What the same recipe came to at the start is no other wish.
        asked = smaller if smaller.training.patch == recipe.training.patch else asked
    recipe = lengthened(recipe, asked, output, report)
    if scheme != to_dict(dataset.scheme):
        raise InvresError(
            f"The labels of {dataset.name} differ from those that the training in {output} was started with.",
            hint="Resume with the data set it was started with.",
        )
    usual = TrainOptions()
    if (options.fold, options.validation_count) != (usual.fold, usual.validation_count):
        labelled = [case.name for case in dataset.cases if case.label is not None]
        if _split(dataset, labelled, recipe.training.seed, options) != names:
            report.warning(
                "The training goes on with the split that it was started with; --fold and the like are left out."
            )
    return recipe, plan, names
