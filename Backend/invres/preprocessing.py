"""The way from files to network input: orientation, crop, spacing, intensities, label numbers.

Labels inside: file values are renumbered to 0..n (0 = background, -1 = ignore). For labels that exclude one another
n is the label's place in the scheme plus one. For regions n is the place, plus one, of the file value among all file
values of all regions in ascending order; `scheme_targets` turns these numbers into one mask per region.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from . import InvresError
from .alignment import IMAGE_TOLERANCE_MM, LABEL_TOLERANCE_MM
from .config import DARKEST, ChannelPlan, LabelScheme, PreparationPlan
from .events import SILENT, Reporter
from .volume import Geometry, Volume, resample

if TYPE_CHECKING:
    from .cases import Case, Dataset

__all__ = [
    "NOTHING_TO_SEGMENT",
    "PreparedCase",
    "case_volumes_ml",
    "check_grids",
    "inside_values",
    "make_plan",
    "nonzero_box",
    "on_one_grid",
    "prepare",
    "scheme_targets",
    "target_table",
    "with_dropout",
    "without_channel",
]

NOTHING_TO_SEGMENT = "nothing_to_segment"
"""Code of the error where an image shows nothing, or not what a model looks for in it."""

# Spacings closer than this (relative) count as the same and are not resampled.
SAME_SPACING = 1e-3
# Downsampling by more than this is preceded by smoothing.
SMOOTH_ABOVE = 1.5
# Above this part of non-zero voxels an image has no empty background worth a mask.
MASK_BELOW = 0.75
# CT figures settle long before this many cases and voxels of each.
CT_CASES = 50
CT_VOXELS = 10_000


@dataclass(frozen=True)
class PreparedCase:
    """Network input of one case.

    image: float32 (C, D, H, W). label: int16 (D, H, W), 0..n inside and -1 = ignore, or None.
    geometry: of both arrays; original: of the files. absent: the channels that the case lacks; they are all zero.
    fingerprints: of the images in the files, or of those that they were cut out of, where known (see `fingerprints`).
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry
    original: Geometry
    absent: tuple[int, ...] = ()
    fingerprints: tuple[str, ...] = ()


# --- the plan ----------------------------------------------------------------------------------------------------


def make_plan(
    dataset: Dataset,
    cases: Iterable[Case | str],
    spacing_mm: tuple[float, float, float] | None = None,
    report: Reporter = SILENT,
    clip_hu: tuple[float, float] | None = None,
) -> PreparationPlan:
    """The preparation for `cases` (the training cases, or their names) of `dataset`.

    spacing_mm: target spacing (superior, anterior, right); None takes the median of the cases. CT channels get clip_hu
    as clip, or else the 0.5 and 99.5 percentile of the labelled voxels, and mean and standard deviation of the clipped
    voxels (nnU-Net's scheme, arXiv 1904.08128, with the figures taken after clipping).
    Raises InvresError for unreadable files and for no cases.
    """
    chosen = [dataset.case(case) if isinstance(case, str) else case for case in cases]
    if not chosen:
        raise InvresError("There is no training case to plan for.", hint="Give at least one case.")
    has_ct = "CT" in dataset.modalities
    spacings: list[tuple[float, float, float]] = []
    samples: list[list[np.ndarray]] = [[] for _ in dataset.channel_names]
    sampled = {round(index) for index in np.linspace(0, len(chosen) - 1, CT_CASES)} if has_ct else set()
    report.progress("prepare.plan", 0, len(chosen))
    for index, case in enumerate(chosen):
        if index in sampled:
            volumes, label = dataset.load(case, report)
            there = {place: volume.canonical() for place, volume in enumerate(volumes) if volume is not None}
            spacings.append(next(iter(there.values())).geometry.spacing_mm)
            voxels_of = _foreground(list(there.values()), label, dataset.scheme, index)
            for channel, voxels in zip(there, voxels_of, strict=True):
                samples[channel].append(voxels)
        else:
            spacings.append(dataset.geometry(case).canonical().spacing_mm)
        report.progress("prepare.plan", index + 1, len(chosen))
    if spacing_mm is None:
        depth, height, width = np.median(np.asarray(spacings), axis=0).tolist()
        spacing_mm = (depth, height, width)
    channels = tuple(
        _channel_plan(name, modality, voxels, clip_hu)
        for name, modality, voxels in zip(dataset.channel_names, dataset.modalities, samples, strict=True)
    )
    return PreparationPlan(
        channels, spacing_mm, crop_to_nonzero=not has_ct, normalise_first=True, aligned=dataset.aligned
    )


def with_dropout(plan: PreparationPlan, probability: float) -> PreparationPlan:
    """The plan of a network that is trained with each channel blanked with this probability, which may be 0.

    Raises InvresError for a single channel, which cannot be blanked.
    """
    if probability > 0 and len(plan.channels) == 1:
        raise InvresError(
            f"Channel dropout needs two channels or more; there is {plan.channels[0].name} alone.",
            hint="Leave it out, or set it to 0.",
        )
    channels = tuple(dataclasses.replace(channel, optional=probability > 0) for channel in plan.channels)
    return dataclasses.replace(plan, channels=channels)


def _foreground(volumes: list[Volume], label: Volume | None, scheme: LabelScheme, seed: int) -> Iterator[np.ndarray]:
    """Up to CT_VOXELS voxels of each channel inside the labels; of the whole volume where nothing is labelled."""
    where = np.empty(0, dtype=np.int64)
    if label is not None and (label := label.canonical()).array.shape == volumes[0].array.shape:
        values = [value for entry in scheme.labels for value in entry.values]
        where = np.flatnonzero(np.isin(label.array, values))
    if not where.size:
        where = np.arange(volumes[0].array.size)
    if where.size > CT_VOXELS:
        where = np.random.RandomState(seed).choice(where, CT_VOXELS, replace=False)
    for volume in volumes:
        yield volume.array.reshape(-1)[where].astype(np.float32)


def _channel_plan(
    name: str, modality: str, samples: list[np.ndarray], clip_hu: tuple[float, float] | None
) -> ChannelPlan:
    if modality != "CT":
        return ChannelPlan(name, modality)
    if not samples:
        raise InvresError(
            f"None of the cases that were looked at has the channel {name}, so its Hounsfield units are not known.",
            hint="Give more cases that have it, or leave it out of the data set's channels.",
        )
    voxels = np.concatenate(samples).astype(np.float64)
    low, high = clip_hu or (float(value) for value in np.percentile(voxels, (0.5, 99.5)))
    clipped = np.clip(voxels, low, high)
    return ChannelPlan(name, modality, (low, high), float(clipped.mean()), max(float(clipped.std()), 1e-3))


# --- forward -----------------------------------------------------------------------------------------------------


def prepare(
    volumes: Sequence[Volume | None],
    label: Volume | None,
    plan: PreparationPlan,
    scheme: LabelScheme,
    name: str = "",
    report: Reporter = SILENT,
) -> PreparedCase:
    """Volumes of one case, in channel order, as network input; None for an optional channel that it lacks.

    Canonical orientation, crop to the box where any channel differs from zero (if the plan says so), linear
    resampling to the plan's spacing (Gaussian smoothing first where it shrinks more than 1.5-fold), intensities: MR
    z-scored by the non-zero mask if that is below 75 % of the crop (outside stays dark: 0 there would be the tissue's
    mean) and by all voxels otherwise; CT clipped and scaled by the plan. With `plan.normalise_first` intensities come
    before resampling, in the voxels of the files, as in nnU-Net (arXiv 1904.08128). A channel that is lacking is zero
    throughout, as where it was blanked in training.

    Volumes are finite, as `read_volume` makes them. original is the grid of the first volume as given.
    Raises InvresError for a wrong number of channels, a lacking one that is not optional, volumes on different grids, a
    label on another grid (origins up to 0.01 mm apart are accepted), and a volume in which every voxel is the same.
    """
    given = [volume for volume in volumes if volume is not None]
    if not given or len(volumes) != len(plan.channels):
        raise InvresError(
            f"{_subject(name)} has {len(given)} volumes, but {len(plan.channels)} are wanted "
            f"({', '.join(channel.name for channel in plan.channels)}).",
            hint="Give one volume for each channel, in this order.",
        )
    absent = tuple(place for place, volume in enumerate(volumes) if volume is None)
    places = [place for place, volume in enumerate(volumes) if volume is not None]
    needed = [plan.channels[place].name for place in absent if not plan.channels[place].optional]
    if needed:
        raise InvresError(
            f"{_subject(name)} has no {' and no '.join(needed)} volume, which the model needs.",
            hint="Only a model that was trained with channel dropout can do without a channel.",
        )
    original = given[0].geometry
    names = [plan.channels[place].name for place in places]
    given, label = on_one_grid(given, label, names, name)
    for channel, volume in zip(names, given, strict=True):
        lowest, highest = volume.array.min(), volume.array.max()
        if lowest == highest:
            raise InvresError(
                f"There is nothing to segment in the {channel} volume of {_subject(name)}: every voxel is {lowest:g}.",
                hint="Check that the right file was chosen and that it was exported completely.",
                code=NOTHING_TO_SEGMENT,
            )
    grid = given[0].geometry
    box = nonzero_box([volume.array for volume in given]) if plan.crop_to_nonzero else nonzero_box([])
    cropped = grid.crop(box)
    same = np.allclose(cropped.spacing_mm, plan.spacing_mm, rtol=SAME_SPACING, atol=0)
    target = cropped if same else cropped.with_spacing(plan.spacing_mm)

    image = np.zeros((len(volumes), *target.shape), dtype=np.float32)
    by_mask = any(plan.channels[place].modality != "CT" for place in places)
    # From the files: smoothing and interpolation make voxels outside a brain differ from zero.
    mask = _body([volume.array[box] for volume in given]) if by_mask and plan.normalise_first else None
    for place, volume in zip(places, given, strict=True):
        scaled_as = plan.channels[place] if plan.normalise_first else None
        image[place] = _on_target(volume.array[box], cropped, target, scaled_as, mask)
    if not plan.normalise_first:
        mask = _body(image) if by_mask else None
        for place in places:
            _normalise(image[place], plan.channels[place], mask)
    prepared_label = None
    if label is not None:
        inside = _renumber(np.ascontiguousarray(label.array[box]), scheme, name, report)
        prepared_label = inside if same else _resample_label(inside, cropped, target)
    return PreparedCase(name, image, prepared_label, target, original, absent)


def without_channel(case: PreparedCase, channel: int) -> PreparedCase | None:
    """The case as if it lacked one more channel; None where it has no such channel, or no other one."""
    absent = tuple(sorted({*case.absent, channel}))
    if channel in case.absent or len(absent) == len(case.image):
        return None
    image = np.array(case.image)
    image[channel] = 0
    return dataclasses.replace(case, image=image, absent=absent)


def on_one_grid(
    volumes: Sequence[Volume], label: Volume | None, names: Sequence[str], case: str = ""
) -> tuple[list[Volume], Volume | None]:
    """The volumes and the label of a case in canonical orientation, so that an index is the same place in all of them.

    However each is stored: in another order of axes or backwards. Raises InvresError as `check_grids` does.
    """
    first = volumes[0].geometry
    images = [_snapped(volume, first, IMAGE_TOLERANCE_MM) for volume in volumes]
    label = None if label is None else _snapped(label, first, LABEL_TOLERANCE_MM)
    check_grids(images, label, names, case)
    return images, label


def check_grids(volumes: Sequence[Volume], label: Volume | None, names: Sequence[str], case: str = "") -> None:
    """Raises InvresError, with the difference, unless all volumes and the label lie on one voxel grid."""
    first = volumes[0].geometry
    for name, volume in zip(names[1:], volumes[1:], strict=True):
        if not first.same_as(volume.geometry, tolerance_mm=IMAGE_TOLERANCE_MM):
            raise InvresError(
                f"The volumes {names[0]} and {name} of {_subject(case)} lie on different grids "
                f"({first.difference(volume.geometry)}).",
                hint=f"Resample {name} to the grid of {names[0]}, which --align does by what the headers say"
                + ("; `invres check` lists all cases this concerns." if case else ", then try again."),
                code="grid_mismatch",
            )
    if label is not None and not first.same_as(label.geometry, tolerance_mm=LABEL_TOLERANCE_MM):
        raise InvresError(
            f"The label of {_subject(case)} lies on another grid than its image ({first.difference(label.geometry)}).",
            hint="Resample the label to the image's grid with nearest neighbours; `invres check` lists all such cases.",
            code="label_grid_mismatch",
        )


def nonzero_box(arrays: Sequence[np.ndarray]) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel in which any array differs from zero; everything if none does."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        profile = np.zeros(1, dtype=bool)
        for array in arrays:
            profile = profile | (array != 0).any(axis=others)
        hit = np.flatnonzero(profile)
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(None))
    return box[0], box[1], box[2]


def _subject(name: str) -> str:
    return f"the case {name}" if name else "this case"


def _snapped(volume: Volume, grid: Geometry, tolerance_mm: float) -> Volume:
    """The volume in canonical orientation, on exactly `grid` first where it lies there within the tolerance.

    Without it a rounded header of an oblique volume might choose another order of axes.
    """
    same = grid.same_as(volume.geometry, tolerance_mm=tolerance_mm)
    return (Volume(volume.array, grid) if same else volume).canonical()


def _on_target(
    part: np.ndarray, source: Geometry, target: Geometry, scaled_as: ChannelPlan | None, mask: np.ndarray | None
) -> np.ndarray:
    """One channel of the crop `source` on the prepared grid, float32; `scaled_as` a channel before that, if at all."""
    part = np.array(part, dtype=np.float32, order="C")
    if scaled_as is not None:
        _normalise(part, scaled_as, mask)
    return part if target is source else _resample_image(Volume(part, source), target).array


def _resample_image(volume: Volume, target: Geometry) -> Volume:
    factors = np.asarray(target.spacing_mm) / np.asarray(volume.geometry.spacing_mm)
    # The width at which a step of `factor` voxels no longer aliases, as scikit-image's rescale takes it.
    sigmas = [(factor - 1) / 2 if factor > SMOOTH_ABOVE else 0.0 for factor in factors]
    if any(sigmas):
        volume = Volume(ndimage.gaussian_filter(volume.array, sigmas, mode="nearest"), volume.geometry)
    return resample(volume, target, interpolation="linear")


def _resample_label(inside: np.ndarray, source: Geometry, target: Geometry) -> np.ndarray:
    # Shifted by one so that no value is negative and ignore (-1) is what lies outside.
    moved = resample(Volume((inside + 1).astype(np.uint16), source), target, interpolation="label", outside=1)
    return (moved.array.astype(np.int32) - 1).astype(np.int16)


def _normalise(plane: np.ndarray, channel: ChannelPlan, mask: np.ndarray | None) -> None:
    """Intensities of one channel (D, H, W), in place. mask: `_body` of all channels; CT needs none."""
    if channel.modality == "CT":
        if channel.clip is not None:
            np.clip(plane, *channel.clip, out=plane)
        plane -= channel.mean
        plane /= max(channel.std, 1e-8)
    elif mask is not None:
        inside = plane[mask].astype(np.float64)
        mean = inside.mean()
        inside -= mean
        inside *= inside  # in place, unlike inside.std(): a whole volume in double precision is large
        plane -= mean
        plane /= max(float(np.sqrt(inside.mean())), 1e-8)
        np.maximum(plane, DARKEST, out=plane, where=~mask)


def _body(channels: Iterable[np.ndarray]) -> np.ndarray:
    """Where any channel (D, H, W) differs from zero, with holes closed; everything where that is most of the volume."""
    empty = ~functools.reduce(np.logical_or, (channel != 0 for channel in channels))
    numbers, _ = ndimage.label(empty)
    border = [numbers.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    # Zeros that do not reach the border are dark tissue, not background.
    outside = np.isin(numbers, np.setdiff1d(np.concatenate(border), 0))
    return ~outside if outside.mean() > 1 - MASK_BELOW else np.ones(outside.shape, dtype=bool)


# --- labels ------------------------------------------------------------------------------------------------------


def inside_values(scheme: LabelScheme) -> list[tuple[int, ...]]:
    """The file values that stand for each inside number 1..n."""
    if scheme.regions:
        return [(value,) for value in sorted({value for label in scheme.labels for value in label.values} - {0})]
    return [label.values for label in scheme.labels]


def target_table(scheme: LabelScheme) -> np.ndarray:
    """bool (R, n + 1): whether inside number 0..n belongs to each of the R labels or regions."""
    numbers = [(0,), *inside_values(scheme)]
    return np.array([[bool(set(values) & set(label.values)) for values in numbers] for label in scheme.labels])


def scheme_targets(label: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """One mask per label or region, bool (R, D, H, W), of a prepared label (D, H, W); ignored voxels are in none."""
    return target_table(scheme)[:, np.maximum(label, 0)] & (label >= 0)


def case_volumes_ml(case: PreparedCase, scheme: LabelScheme) -> list[float]:
    """The volume of each label or region of a labelled case."""
    assert case.label is not None  # the caller has looked
    voxel_ml = float(np.prod(case.geometry.spacing_mm)) / 1000
    return [float(mask.sum()) * voxel_ml for mask in scheme_targets(np.asarray(case.label), scheme)]


def _renumber(label: np.ndarray, scheme: LabelScheme, name: str, report: Reporter) -> np.ndarray:
    """File values as int16 inside numbers; values that the scheme does not know become background, with a warning."""
    found = np.unique(label)
    numbers = {value: index + 1 for index, values in enumerate(inside_values(scheme)) for value in values}
    if scheme.ignore_value is not None:
        numbers[scheme.ignore_value] = -1
    unknown = [int(value) for value in found if value != 0 and int(value) not in numbers]
    if unknown:
        report.warning(
            f"The label of {_subject(name)} has the values {', '.join(map(str, unknown))}, which are no label of the "
            "data set; they count as background."
        )
    table = np.array([numbers.get(int(value), 0) for value in found], dtype=np.int16)
    inside = np.empty(label.shape, dtype=np.int16)
    for source, target in zip(label, inside, strict=True):
        target[:] = table[np.searchsorted(found, source)]
    return inside
