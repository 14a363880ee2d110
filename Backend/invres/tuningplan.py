"""What is settled before a fine-tuning begins, and recorded in its folder so that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import InvresError
from .cases import SPLITS, Dataset, case_problems, read_splits, report_missing_channels
from .casesplits import Part, parts_of_splits, plan_parts
from .config import (
    AugmentationConfig,
    ChannelPlan,
    LabelScheme,
    PreparationPlan,
    Recipe,
    TrainingConfig,
    check_spacing,
)
from .configjson import differing_keys, from_dict, to_dict
from .events import SILENT, FilteredReporter, Reporter, listed
from .files import write_changed
from .freezing import FROZEN_PARTS
from .manifest import Manifest
from .mirroring import kept_mirror, with_kept_flips
from .networkconfig import NetworkConfig, VAEConfig
from .networks import with_patch
from .prepared import prepare_cases
from .preprocessing import PreparedCase, make_plan, with_dropout
from .recipekeys import check_tunable, given_keys, tunable, with_values
from .runfolder import RUN
from .transfer import match_names

__all__ = [
    "SkippedCase",
    "TuningOptions",
    "TuningPlan",
    "check_single",
    "merged_scheme",
    "plan_tuning",
    "prepare_readable",
    "read_plan",
    "started_labels",
    "write_plan",
]

DEFAULTS = TrainingConfig(
    iterations_per_epoch=25,
    epochs=40,
    learning_rate=1e-4,
    warmup_iterations=10,
    validate_every=5,
    early_stop_epochs=20,
    checkpoint_every_s=60.0,
)
"""Half the learning rate of a training from the start (chosen), for weights that are good already."""
NEW_LABELS_LEARNING_RATE = 1e-3
"""Where the head begins anew for some label: at the rate above its random rows hardly move in a short training."""
_LENGTHS = ("epochs", "time_s")


def check_single(manifest: Manifest) -> None:
    """Raises InvresError for a model that is the average of several networks."""
    if manifest.members > 1:
        raise InvresError(
            f"{manifest.name} is the average of {manifest.members} networks, which are not fine-tuned together.",
            hint="Fine-tune one of the models that it was joined from.",
        )


@dataclass(frozen=True)
class TuningOptions:
    """What the person asks for.

    recipe: training and augmentation from it instead of the defaults; its network and spacing do not count.
    wishes: fields of `TrainingConfig` that go above both; time_s is for all trainings of the run together.
    given: KEY=VALUE of training and augmentation, above all of these (`recipekeys`).
    folds, validation_count: see `casesplits.plan_parts`; where both are 0, a splits_final.json beside the data decides,
    and where there is none the number of patients.
    vae: None keeps the base model's branch or its absence. synthetic: fraction of synthesised batches.
    channel_dropout: see `AugmentationConfig`; None takes the recipe's or, where that has none, the base model's.
    spacing_mm: None keeps the base model's. normalisation: "data" takes CT figures anew from these cases.
    name, licence: of the tuned model; "" takes the base model's. promote: whatever the proof says.
    check_base: a data set of cases for the base model, to see what was forgotten.
    new_labels: the data may have no label of the model's; without it such data are refused (see `labelmatching`).
    """

    device: str = "auto"
    resume: bool = False
    recipe: Recipe | None = None
    wishes: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[str] = ()
    folds: int = 0
    validation_count: int = 0
    freeze: str = "none"
    vae: bool | None = None
    synthetic: float = 0.0
    channel_dropout: float | None = None
    spacing_mm: tuple[float, float, float] | None = None
    normalisation: Literal["base", "data"] = "base"
    name: str = ""
    licence: str = ""
    promote: bool = False
    check_base: Path | None = None
    new_labels: bool = False

    def __post_init__(self) -> None:
        check_tunable(self.given, self.recipe)
        if self.freeze not in FROZEN_PARTS:
            raise InvresError(
                f"There is no part {self.freeze!r} to freeze; the parts are {', '.join(FROZEN_PARTS)}.",
                hint="Choose one of them.",
            )
        if not 0 <= self.synthetic <= 1:
            raise InvresError(
                f"The fraction of synthetic batches must be from 0 to 1, got {self.synthetic:g}.",
                hint="0.5 makes every second batch synthetic.",
            )
        if self.spacing_mm is not None:
            hint = "Give it superior, anterior, right; or leave it out to keep the base model's."
            check_spacing("The spacing", self.spacing_mm, hint)


@dataclass(frozen=True)
class SkippedCase:
    """A case that takes no part, and why, in one sentence."""

    case: str
    reason: str


@dataclass(frozen=True)
class TuningPlan:
    """A run. training.time_s is for one part. reductions: what was given up for want of memory, in words.

    folds to check_base: as asked for at the start (`TuningOptions`).
    """

    base_id: str
    base_name: str
    base_version: str
    network: NetworkConfig
    training: TrainingConfig
    augmentation: AugmentationConfig
    plan: PreparationPlan
    scheme: LabelScheme
    parts: tuple[Part, ...]
    freeze: str = "none"
    synthetic: float = 0.0
    skipped: tuple[SkippedCase, ...] = ()
    reductions: tuple[str, ...] = ()
    folds: int = 0
    validation_count: int = 0
    normalisation: str = "base"
    name: str = ""
    licence: str = ""
    check_base: str = ""

    def remembered(self, options: TuningOptions, report: Reporter = SILENT) -> TuningOptions:
        """The options with what was asked for at the start and is not asked again. Warns where the data set for
        `check_base` is gone, without which a run can still go on."""
        path = options.check_base or (Path(self.check_base) if self.check_base else None)
        if path is not None and str(path.absolute()) == self.check_base and not path.exists():
            report.warning(f"{path} is not there any more, so what the model forgets is not checked.")
            path = None
        return dataclasses.replace(
            options,
            name=options.name or self.name,
            licence=options.licence or self.licence,
            check_base=path,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All cases that take part."""
        return tuple(sorted({name for part in self.parts for name in (*part.train, *part.validation, *part.held_out)}))


def merged_scheme(scheme: LabelScheme, base: LabelScheme) -> LabelScheme:
    """The data's labels, with colour and terminology of the base model's labels of the same name."""
    labels = []
    for label, place in zip(scheme.labels, match_names(scheme.names, base.names), strict=True):
        if place is not None:
            known = base.labels[place]
            label = dataclasses.replace(
                label, colour=label.colour or known.colour, terminology=label.terminology or known.terminology
            )
        labels.append(label)
    return dataclasses.replace(scheme, labels=tuple(labels))


def plan_tuning(
    base: Manifest, dataset: Dataset, prepared: Path, options: TuningOptions, report: Reporter = SILENT
) -> TuningPlan:
    """Settles all of a run, and prepares every case in the folder `prepared` on the way; bad ones are left out.

    dataset: with `merged_scheme`; may come from `read_dataset(path, checked=False)`.
    Raises InvresError where no case is left, none has a labelled voxel, or the wishes contradict one another.
    """
    everything = dataset
    augmentation = _augmentation(base, dataset, options, report)
    dropout = augmentation.channel_dropout
    dataset, skipped = _with_files(dataset, partial=dropout > 0)
    for one in skipped:
        report.warning(f"The case {one.case} is left out: {one.reason}", case=one.case)
    plan, dataset, unreadable = _preparation(base, dataset, options, report)
    plan = with_dropout(plan, dropout)
    names, empty, broken = _prepared(dataset, plan, prepared, report)
    skipped += unreadable + broken
    if not names:
        raise InvresError(
            f"No case of {dataset.name} can be trained on: {skipped[0].case}: {skipped[0].reason}"
            if skipped
            else f"The data set {dataset.name} has no case with a label.",
            hint="See what `invres check` says about the data.",
        )
    report_missing_channels(dataset, names, report)
    if len(empty) == len(names):
        raise InvresError(
            f"No case of {dataset.name} has a labelled voxel ({', '.join(dataset.scheme.names)}).",
            hint="Check the label files and the label values in dataset.json with `invres check`.",
        )
    if empty:
        report.warning(f"{len(empty)} of {len(names)} cases have an empty label and teach background only.")
    if options.synthetic and any(channel.modality == "CT" for channel in plan.channels):
        raise InvresError(
            "Synthetic images have random contrasts, which suits MR but not the fixed scale of CT.",
            hint="Leave --synthetic out.",
        )
    if options.freeze == "all-but-head" and options.vae:
        raise InvresError(
            "With everything but the head frozen the VAE branch has nothing to regularise.",
            hint="Leave --vae out, or freeze less.",
        )
    training = options.recipe.training if options.recipe else _defaults(base, dataset.scheme)
    training = training.with_optimizer(options.wishes.get("optimizer", training.optimizer))
    training = dataclasses.replace(training, **options.wishes)
    training = with_values(Recipe(training=training), options.given).training
    cases = [case for case in dataset.cases if case.name in names]
    file = dataset.root / SPLITS
    if file.is_file() and not (options.folds or options.validation_count):
        parts = parts_of_splits(read_splits(file, everything), cases, training.seed)
    else:
        parts = plan_parts(cases, training.seed, options.folds, options.validation_count)
    training = dataclasses.replace(training, time_s=training.time_s / len(parts))
    return TuningPlan(
        base_id=base.id,
        base_name=base.name,
        base_version=base.version,
        network=_network(base, plan, dataset.scheme, training, options),
        training=training,
        augmentation=augmentation,
        plan=plan,
        scheme=dataset.scheme,
        parts=parts,
        freeze=options.freeze,
        synthetic=options.synthetic,
        skipped=tuple(skipped),
        folds=options.folds,
        validation_count=options.validation_count,
        normalisation=options.normalisation,
        name=options.name,
        licence=options.licence,
        check_base=str(options.check_base.absolute()) if options.check_base else "",
    )


def write_plan(folder: Path, plan: TuningPlan) -> None:
    """run.json, whole or not at all. Raises OSError where the disk refuses."""
    write_changed(folder / RUN, json.dumps(to_dict(plan), indent=1))


def started_labels(folder: Path) -> tuple[str, ...]:
    """The names of the labels that the run in `folder` was begun with; () where its run.json is damaged."""
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return tuple(label["name"] for label in content["scheme"]["labels"])
    except (ValueError, KeyError, TypeError):
        return ()


def read_plan(
    folder: Path, base: Manifest, dataset: Dataset, options: TuningOptions, report: Reporter = SILENT
) -> TuningPlan:
    """The run as it was started; what is asked now may only change its length, other wishes give a warning (but for the
    recipe, which only says where a run begins).

    Raises InvresError for a damaged run.json, another base model, or data with other labels.
    """
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        plan = from_dict(TuningPlan, content, RUN)
    except (ValueError, InvresError):
        raise InvresError(f"{folder / RUN} is damaged.", hint="Fine-tune again in a new folder.") from None
    if base.id != plan.base_id:
        raise InvresError(
            f"The run in {folder} was started from {plan.base_name} {plan.base_version}, another model than "
            f"{base.name} {base.version}.",
            hint=f"Give the model that it was started from (id {plan.base_id[:8]}), or another folder.",
        )
    if to_dict(dataset.scheme) != to_dict(plan.scheme):
        raise InvresError(
            f"The labels of {dataset.name} differ from those that the run in {folder} was started with.",
            hint="Resume with the data set it was started with.",
        )
    given = given_keys(options.given)
    started = Recipe(training=plan.training, augmentation=plan.augmentation)
    changed = with_values(started, options.given)
    flipped = _flipped_as(base, dataset.scheme, changed.augmentation)
    changed = dataclasses.replace(changed, augmentation=flipped)
    longer = {key: getattr(changed.training, key) for key in _LENGTHS if f"training.{key}" in given}
    wishes = {**options.wishes, **longer}
    if "time_s" in wishes:
        wishes["time_s"] /= len(plan.parts)
    lengths = {key: wishes.pop(key) for key in _LENGTHS if key in wishes}
    others = {*given} - {f"training.{key}" for key in _LENGTHS}
    ignored = [key for key in differing_keys(started, changed) if key in others]
    ignored += [key for key, value in wishes.items() if value != getattr(plan.training, key)]
    ignored += [
        key
        for key in ("freeze", "synthetic", "folds", "validation_count", "normalisation")
        if getattr(options, key) not in (getattr(plan, key), _unset(key))
    ]
    for key, wish, chosen in (
        ("channel_dropout", options.channel_dropout, plan.augmentation.channel_dropout),
        ("vae", options.vae, plan.network.vae is not None),
        ("spacing", options.spacing_mm, plan.plan.spacing_mm),
    ):
        if wish not in (None, chosen):
            ignored.append(key)
    if ignored:
        report.warning(f"The run goes on as it was started; what is asked otherwise is left out: {', '.join(ignored)}.")
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, **lengths))


def prepare_readable(
    dataset: Dataset, names: Sequence[str], plan: PreparationPlan, folder: Path, report: Reporter = SILENT
) -> tuple[list[PreparedCase], list[SkippedCase]]:
    """`prepare_cases` of those that can be read; the others with the reason, of which a warning tells."""
    cases: list[PreparedCase] = []
    skipped = []
    counted = FilteredReporter(report, lambda kind: kind != "progress")  # which is counted in cases here
    report.progress("prepare.cases", 0, len(names))
    for count, name in enumerate(names, start=1):
        try:
            cases += prepare_cases(dataset, [name], plan, folder, counted)
        # One broken file must not cost the other cases: InvresError, and what readers throw for damaged data.
        except (InvresError, RuntimeError, ValueError, MemoryError) as error:
            if isinstance(error, InvresError) and error.code == "write_failed":
                raise
            skipped.append(_skip(name, error, report))
        report.progress("prepare.cases", count, len(names))
    return cases, skipped


def _defaults(base: Manifest, scheme: LabelScheme) -> TrainingConfig:
    """The training that fits most, for a model that knows all of these labels and for one that does not."""
    known = None not in match_names(scheme.names, base.scheme.names) and scheme.regions == base.scheme.regions
    rate = DEFAULTS.learning_rate if known else NEW_LABELS_LEARNING_RATE
    return dataclasses.replace(DEFAULTS, patch=base.patch, learning_rate=rate)


def _augmentation(base: Manifest, dataset: Dataset, options: TuningOptions, report: Reporter) -> AugmentationConfig:
    """The recipe's or the default, with the dropout asked for; a model that can do without channels stays so, and one
    that segments mirrored images as well goes on to see them."""
    recipe = with_values(tunable(options.recipe), options.given)
    recipe = with_kept_flips(recipe, dataset.scheme, report)
    chosen, given = recipe.augmentation, given_keys(options.given)
    dropout = options.channel_dropout
    if "augmentation.channel_dropout" in given:
        dropout = chosen.channel_dropout
    elif dropout is None:
        dropout = chosen.channel_dropout or (base.training.channel_dropout if len(dataset.channel_names) > 1 else 0.0)
    flipped = _flipped_as(base, dataset.scheme, chosen)
    if "augmentation.flip_axes" in given and {*flipped.flip_axes} != {*chosen.flip_axes}:
        axes = listed([str(axis) for axis in kept_mirror(dataset.scheme, base.mirror_axes)])
        report.note(f"Images are flipped along {axes} as well, as the model segments flipped ones.")
    return dataclasses.replace(flipped, channel_dropout=dropout)


def _flipped_as(base: Manifest, scheme: LabelScheme, chosen: AugmentationConfig) -> AugmentationConfig:
    """With flips along the axes, too, along which the model segments mirrored images."""
    return dataclasses.replace(
        chosen, flip_axes=tuple(sorted({*chosen.flip_axes, *kept_mirror(scheme, base.mirror_axes)}))
    )


def _unset(key: str) -> Any:
    return getattr(TuningOptions(), key)


def _with_files(dataset: Dataset, partial: bool) -> tuple[Dataset, list[SkippedCase]]:
    """The data set without cases whose files or labels are missing; those without a label are not worth a word."""
    reasons = {name: sentence for name, _, sentence in reversed(case_problems(dataset, partial))}
    skipped = [SkippedCase(name, reason) for name, reason in reasons.items()]
    cases = tuple(case for case in dataset.labelled_cases if case.name not in reasons)
    return dataclasses.replace(dataset, cases=cases), skipped


def _preparation(
    base: Manifest, dataset: Dataset, options: TuningOptions, report: Reporter
) -> tuple[PreparationPlan, Dataset, list[SkippedCase]]:
    """The base model's preparation, with figures from the data for channels that it does not know."""
    known = base.plan.channels
    places = match_names(dataset.channel_names, [channel.name for channel in known], alone=True)
    channels: list[ChannelPlan | None] = []
    for name, modality, place in zip(dataset.channel_names, dataset.modalities, places, strict=True):
        same = place is not None and known[place].modality == modality
        if place is not None and not same:
            report.warning(
                f"The channel {name} is {modality} here and {known[place].modality} in the base model; "
                "its intensities are scaled as those of the data."
            )
        keep = same and options.normalisation == "base"
        channels.append(dataclasses.replace(known[place], name=name) if keep and place is not None else None)
    fresh: PreparationPlan | None = None
    skipped: list[SkippedCase] = []
    if None in channels and dataset.cases:
        dataset, skipped = _readable(dataset, report)
        if dataset.cases:
            fresh = make_plan(dataset, dataset.cases, base.plan.spacing_mm, report)
    spacing = options.spacing_mm or base.plan.spacing_mm
    settled = tuple(
        channel or (fresh.channels[index] if fresh else ChannelPlan(dataset.channel_names[index]))
        for index, channel in enumerate(channels)
    )
    crop = base.plan.crop_to_nonzero and all(channel.modality != "CT" for channel in settled)
    plan = PreparationPlan(settled, spacing, crop, base.plan.crop, base.plan.normalise_first, dataset.aligned)
    return plan, dataset, skipped


def _readable(dataset: Dataset, report: Reporter) -> tuple[Dataset, list[SkippedCase]]:
    good, skipped = [], []
    for case in dataset.cases:
        try:
            dataset.load(case)
        except (InvresError, OSError, RuntimeError, ValueError, MemoryError) as error:
            skipped.append(_skip(case.name, error, report))
        else:
            good.append(case)
    return dataclasses.replace(dataset, cases=tuple(good)), skipped


def _prepared(
    dataset: Dataset, plan: PreparationPlan, folder: Path, report: Reporter
) -> tuple[list[str], list[str], list[SkippedCase]]:
    """Names of the cases that could be prepared, those of them without a labelled voxel, and the others."""
    cases, skipped = prepare_readable(dataset, [case.name for case in dataset.cases], plan, folder, report)
    empty = [one.name for one in cases if one.label is None or not bool((np.asarray(one.label) > 0).any())]
    return [one.name for one in cases], empty, skipped


def _skip(case: str, error: Exception, report: Reporter) -> SkippedCase:
    if isinstance(error, InvresError):
        reason = error.message
    elif isinstance(error, MemoryError):
        reason = "To prepare it takes more main memory than there is."
    else:
        reason = f"It cannot be read: {error}."
    report.warning(f"The case {case} is left out: {reason}", case=case)
    return SkippedCase(case, reason)


def wanted_vae(base: NetworkConfig, wish: bool | None) -> VAEConfig | None:
    """The VAE branch of a fine-tuned network: as the base has it, or as is wished; of the base's sizes if any."""
    wanted = (base.vae is not None) if wish is None else wish
    return (base.vae or VAEConfig()) if wanted else None


def _network(
    base: Manifest, plan: PreparationPlan, scheme: LabelScheme, training: TrainingConfig, options: TuningOptions
) -> NetworkConfig:
    vae = None if options.freeze == "all-but-head" else wanted_vae(base.network, options.vae)
    network = dataclasses.replace(
        base.network, in_channels=len(plan.channels), out_channels=scheme.out_channels, vae=vae
    )
    return with_patch(network, training.patch)
