"""`invres train` for image quality transfer: from scans and a recipe to a model package in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import InvresError
from .checkpoint import CHECKPOINT
from .config import ChannelPlan, LabelScheme, PreparationPlan, Recipe
from .devices import choose_device
from .diffusion import COMPONENTS
from .enhancementconfig import EnhancementConfig
from .events import SILENT, Reporter
from .imagepairs import PatchPairs, PatchScores, choose_centres, plan_of, prepare_pairs
from .manifest import PATCHES, check_name
from .memory import predict_enhancement
from .modelpackage import ModelPackage, save_package
from .networks import BORDER, build_enhancer
from .objectives import Enhancement
from .scans import ScanFiles
from .trainer import METRICS, StopRequest, Trainer
from .trainingrun import (
    MODEL,
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
    started_run,
    training_summary,
    write_run,
)
from .volume import read_geometry

__all__ = ["train_enhancer"]


def train_enhancer(
    scans: Sequence[ScanFiles],
    recipe: Recipe,
    output: Path,
    options: TrainOptions,
    report: Reporter = SILENT,
    stop: StopRequest | None = None,
) -> ModelPackage:
    """Trains `recipe`, which has `enhancement`, on the scans: in a run folder and by the loop of `training.train`.

    The published way (Blumberg et al. 2018, section 3): patches around random voxels of the brain, a share of all
    patches held out to choose the best epoch. Patches overlap, and those held out come from the same scans: their error
    says which epoch was best, not how the model does on other subjects (`invres evaluate --model` does).
    Raises InvresError as `training.train`; Cancelled after a stop was requested (everything is saved).
    """
    settings = recipe.enhancement
    if settings is None:
        raise InvresError(f"The recipe {recipe.name} segments images.", hint="Give one with the key enhancement.")
    with run_folder(output, options.resume):
        return _train(scans, recipe, settings, output, resumable(output, options, report), report, stop)


def _train(
    scans: Sequence[ScanFiles],
    recipe: Recipe,
    settings: EnhancementConfig,
    output: Path,
    options: TrainOptions,
    report: Reporter,
    stop: StopRequest | None,
) -> ModelPackage:
    device = choose_device(options.device)
    names = tuple(scan.name for scan in scans)
    channels = 6 if settings.kind == "tensor" else 1
    network = dataclasses.replace(recipe.network, in_channels=channels, out_channels=channels)
    recipe = dataclasses.replace(recipe, network=network)
    if options.resume:
        recipe = _resumed(output, recipe, names, report)
        options = remembered(output, options)
        assert recipe.enhancement is not None  # `_resumed` has looked
        settings = recipe.enhancement
    check_name(options.name or recipe.name)  # before hours of training, after which no package could be saved
    config = recipe.training
    if min(config.patch) <= 2 * BORDER:
        raise InvresError(
            f"training.patch must be {2 * BORDER + 1} voxels or more, got {list(config.patch)}.",
            hint="The published patch is 11x11x11.",
        )
    torch.manual_seed(config.seed)
    net = build_enhancer(recipe.network, config.engine, config.memory).to(device)
    if settings.residual:
        # The biases are 0 already, so the training starts at the interpolation itself.
        torch.nn.init.zeros_(net.layers[-1].weight)  # type: ignore[arg-type]
    predicted = predict_enhancement(
        recipe.network,
        config.patch,
        config.batch_size,
        net.engine,
        config.precision,
        config.memory,
        config.optimizer,
    )
    announce_memory(recipe.network.name, net.engine, predicted.peak_bytes, report)
    factor = net.config.strides[0]
    stopped = (lambda: stop.requested) if stop is not None else (lambda: False)
    pairs = prepare_pairs(scans, settings, factor, output / "prepared", report, stopped)
    plan = plan_of(pairs, settings)
    chosen = choose_centres(pairs, config.patch, settings, config.seed)
    batches, held_out = (PatchPairs(pairs, part, plan, factor, config, device) for part in chosen)
    scores = PatchScores(held_out)
    preparation = _preparation(scans, channels, factor)
    write_run(output, recipe, preparation, (names, ()), LabelScheme(), options, enhancement=plan)
    reporter = WithCurves(report, output)
    trainer = Trainer(net, batches, config, output, Enhancement(), scores.validate, reporter, stop)
    if options.resume and (output / CHECKPOINT).exists():
        trainer.resume()
        note_budget(config.time_s, trainer.elapsed_s, report)
    begun = trainer.iteration
    with reporter:
        result = trainer.run()
    name = options.name or recipe.name
    if result.iterations == begun and (finished := finished_package(output, name, options, begun)) is not None:
        return finished
    net.load_state_dict(result.weights)
    count = len(held_out.centres)
    compared = scores.compared(net.eval())
    return save_package(
        output / MODEL,
        name=name,
        network=net.config,
        state_dict=result.weights,
        plan=preparation,
        scheme=LabelScheme(),
        patch=config.patch,
        description=described(recipe, "scans", len(scans)),
        training=training_summary(recipe, result, net.engine, len(scans), 0, options.source),
        metrics={PATCHES: {name: {"mean": value, "sd": None, "n": count} for name, value in compared.items()}},
        enhancement=plan,
        licence=options.licence,
        log=output / METRICS,
    )


def _preparation(scans: Sequence[ScanFiles], channels: int, factor: tuple[int, int, int]) -> PreparationPlan:
    """Channels, and the median voxel size of the training input; a model takes any other as well, with a warning."""
    grids = [read_geometry(scan.image).canonical() for scan in scans]
    spacing = np.median([grid.spacing_mm for grid in grids], axis=0) * factor
    plans = tuple(ChannelPlan(name, "DTI") for name in COMPONENTS) if channels == 6 else (ChannelPlan(),)
    return PreparationPlan(plans, tuple(float(size) for size in spacing), crop_to_nonzero=False)  # type: ignore[arg-type]


def _resumed(output: Path, asked: Recipe, names: tuple[str, ...], report: Reporter) -> Recipe:
    """The recipe as the run was started, but for its length (see `lengthened`)."""
    started, _, _, (known, _) = started_run(output)
    recipe = lengthened(started, asked, output, report)
    if known != names:
        raise InvresError(
            f"The scans differ from those that the training in {output} was started with.",
            hint="Resume with the data it was started with.",
        )
    return recipe
