"""Left and right of labels that a model does not tell apart: schemes, the midline, and the way through a package."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from test_inference import Known, package_of
from tiny_datasets import invres

from invres import InvresError
from invres.config import Label, LabelScheme, Recipe
from invres.events import Recorder
from invres.inference import segment
from invres.manifest import manifest_from_json, manifest_to_json
from invres.midline import divided
from invres.modelpackage import bundled_models_dir
from invres.prediction import SegmentOptions
from invres.sides import Side, possible_sides, sided_scheme, sides_of_recipe
from invres.tunedmodel import _kept_sides
from invres.volume import Geometry, Volume, read_volume, write_volume

RECIPE = Recipe.read(Path(__file__).resolve().parents[2] / "Resources" / "Recipes" / "brain-any-contrast.json")
BRAIN, BRAIN_SIDES = LabelScheme(RECIPE.labels), sides_of_recipe(RECIPE)
TERM = "Segmentation category and type~SCT^1^Structure~SCT^2^Kidney~^^~Anatomic codes - DICOM master list~^^~^^"
SCHEME = LabelScheme((Label("a", (1,), 1, (100, 50, 200), TERM), Label("stem", (2,), 2), Label("b", (3,), 3)))
SIDES = (Side("a", 1, 11), Side("b", 3, 300))


def rotation(*degrees):
    """Of a head: about the axes to the right, to the front and to the top."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        one, two = (axis + 1) % 3, (axis + 2) % 3
        turn[[one, two], [one, two]] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def warnings(recorder):
    return [event["message"] for event in recorder.events if event["event"] == "warning"]


def moved(grid: Geometry, matrix, shift_mm=(0, 0, 0)) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, shift_mm
    return Geometry.from_affine(affine @ grid.affine, grid.shape)


def stored(volume: Volume, order, flipped) -> Volume:
    """The same voxels in the same places, with axes in another order."""
    affine = volume.geometry.affine
    for axis in flipped:
        affine[:3, 3] += affine[:3, axis] * (volume.array.shape[axis] - 1)
        affine[:3, axis] *= -1
    array = np.flip(volume.array, flipped).transpose(order)
    return Volume(np.ascontiguousarray(array), Geometry.from_affine(affine[:, [*order, 3]], array.shape))


# --- schemes -------------------------------------------------------------------------------------------------------


def test_each_side_is_a_label_with_its_own_colour_and_code():
    found = sided_scheme(SCHEME, SIDES).labels
    assert [(one.name, one.values, one.output_value) for one in found] == [
        ("left a", (1,), 1),
        ("right a", (11,), 11),
        ("stem", (2,), 2),
        ("left b", (3,), 3),
        ("right b", (300,), 300),
    ]
    assert found[0].colour == (100, 50, 200) and found[1].colour == (80, 40, 160) and found[3].colour is None
    assert found[0].terminology == TERM.replace("Kidney~^^", "Kidney~SCT^7771000^Left")
    assert found[1].terminology == TERM.replace("Kidney~^^", "Kidney~SCT^24028007^Right")
    assert found[3].terminology == "" and sided_scheme(SCHEME, ()) == SCHEME


def test_the_side_goes_behind_the_region_where_there_is_one():
    region = TERM.replace("list~^^~^^", "list~SCT^3^Hand~^^")
    scheme = LabelScheme((dataclasses.replace(SCHEME.labels[0], terminology=region),))
    assert sided_scheme(scheme, SIDES[:1]).labels[0].terminology == region[:-2] + "SCT^7771000^Left"
    said = TERM.replace("Kidney~^^", "Kidney~SCT^9^Upper")
    scheme = LabelScheme((dataclasses.replace(SCHEME.labels[0], terminology=said),))
    assert sided_scheme(scheme, SIDES[:1]).labels[0].terminology == said, "the place is taken"


def test_a_recipes_mirrored_pairs_say_what_has_sides():
    sides = {side.label: (side.left_value, side.right_value) for side in BRAIN_SIDES}
    assert sides["hippocampus"] == (17, 53) and sides["lateral ventricle"] == (4, 43)
    assert sides["cerebral white matter"] == (2, 41), "of several pairs that with its own value"
    assert not {"CSF", "third ventricle", "fourth ventricle", "brain stem"} & sides.keys() and len(sides) == 13
    one_side = tuple(dataclasses.replace(one, values=one.values[:1]) for one in RECIPE.labels)
    assert sides_of_recipe(dataclasses.replace(RECIPE, labels=one_side)) == ()
    assert sides_of_recipe(Recipe()) == ()


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        ([Side("nose", 1, 11)], "which is no label"),
        ([Side("a", 1, 11), Side("a", 5, 6)], "two entries for 'a'"),
        ([Side("a", 1, 2)], "the value 2 for a"),
        ([Side("a", 1, 3), Side("b", 3, 9)], "the value 3 for a"),
        ([Side("a", 1, 11), Side("b", 3, 11)], "the value 11 for b"),
        ([Side("a", 0, 11)], "the value 0 for a"),
        ([Side("a", 4, 4)], "the value 4 for a"),
    ],
)
def test_sides_that_contradict_the_labels_are_refused(tmp_path, sides, sentence):
    manifest = package_of(tmp_path / "model", SCHEME).manifest
    with pytest.raises(InvresError, match=sentence):
        dataclasses.replace(manifest, sides=tuple(sides))
    assert len(possible_sides(SCHEME, sides)) < len(sides)


def test_regions_have_no_sides(tmp_path):
    scheme = dataclasses.replace(SCHEME, regions=True)
    manifest = package_of(tmp_path / "model", scheme).manifest
    with pytest.raises(InvresError, match="exclude one another"):
        dataclasses.replace(manifest, sides=SIDES)


def test_a_manifest_keeps_its_sides_and_an_older_one_has_none(tmp_path):
    manifest = dataclasses.replace(package_of(tmp_path / "model", SCHEME).manifest, sides=SIDES)
    written = manifest_to_json(manifest)
    assert manifest_from_json(written) == manifest
    assert manifest.output_scheme.names == ("left a", "right a", "stem", "left b", "right b")
    older = json.loads(written)
    del older["sides"]
    assert manifest_from_json(json.dumps(older).encode()).sides == ()


def test_a_tuned_model_keeps_the_sides_of_the_labels_that_it_keeps(tmp_path):
    base = dataclasses.replace(package_of(tmp_path / "model", SCHEME).manifest, sides=SIDES)
    tuned = LabelScheme((Label("A", (5,), 5), Label("stem", (6,), 6), Label("lesion", (7,), 300), Label("b", (8,), 8)))
    assert _kept_sides(base, tuned) == (Side("A", 1, 11),), "another label has the value 300 now"


def test_the_bundled_brain_model_has_the_sides_of_its_recipe():
    manifest = manifest_from_json((bundled_models_dir() / RECIPE.name / "manifest.json").read_bytes())
    assert manifest.sides == BRAIN_SIDES


# --- the midline of a phantom --------------------------------------------------------------------------------------

GRID = Geometry((48, 64, 64), (3.0, 3.0, 3.0), (-94.5, -94.5, -70.5), np.eye(3)[:, ::-1])


def ball(middle_mm, radii_mm):
    """In the frame of the head."""
    places = np.moveaxis(np.indices(GRID.shape), 0, -1) @ GRID.affine[:3, :3].T + GRID.affine[:3, 3]
    return (((places - middle_mm) / radii_mm) ** 2).sum(axis=-1) < 1


@functools.lru_cache
def phantom():
    """A head of two halves and a stem, and its sides: -1 left, 1 right."""
    array, sides = np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, int)
    for side in (-1, 1):
        for value, middle, radii in ((1, (32, 5, 10), (28, 60, 40)), (3, (22, -20, -12), (8, 22, 9))):
            inside = ball(np.multiply(middle, (side, 1, 1)), radii)
            array[inside], sides[inside] = value, side
    stem = ball((0, -15, -35), (10, 20, 30)) & (array == 0)
    array[stem] = 2
    return array, sides


def right_side(found: Volume) -> np.ndarray:
    return np.isin(found.array, [side.right_value for side in SIDES])


@pytest.mark.parametrize("degrees", [(0, 0, 0), (10, 20, -25), (-15, -22, 20), (30, 0, 35)])
@pytest.mark.parametrize(("order", "flipped"), [((0, 1, 2), ()), ((2, 0, 1), (0, 2)), ((1, 2, 0), (1,))])
def test_both_halves_of_a_turned_phantom_are_told_apart(degrees, order, flipped):
    array, sides = phantom()
    grid = moved(GRID, rotation(*degrees), (35, -50, 12))
    labels = stored(Volume(array, grid), order, flipped)
    recorder = Recorder()
    found = divided(labels, SCHEME, SIDES, recorder)
    truth = stored(Volume(sides, grid), order, flipped).array
    assert found is not None and found.geometry.same_as(labels.geometry) and not warnings(recorder)
    assert set(np.unique(found.array)) == {0, 1, 11, 2, 3, 300}
    assert (right_side(found) == (truth > 0))[truth != 0].mean() > 0.995
    assert ((found.array == 2) == (labels.array == 2)).all(), "what has no sides stays"


def test_a_piece_that_reaches_over_a_plane_is_on_one_side_as_a_whole():
    array, _ = phantom()
    array = array.copy()
    reach = ball((-7, 25, -12), (9, 9, 9))
    array[array == 3] = 0
    array[reach | ball((32, 25, -12), (14, 9, 9))] = 3
    found = divided(Volume(array, GRID), SCHEME, SIDES)
    right = found.array == 300
    assert (found.array[reach] == 3).all() and right.any()


def test_one_side_alone_is_told_by_what_lies_in_the_middle():
    array, sides = phantom()
    for side in (-1, 1):
        half = np.where(sides == -side, 0, array)
        recorder = Recorder()
        found = divided(Volume(half, moved(GRID, rotation(0, 8, 10))), SCHEME, SIDES, recorder)
        assert not warnings(recorder)
        assert (right_side(found)[sides == side] == (side > 0)).mean() > 0.97


def test_one_side_without_anything_in_the_middle_is_told_by_the_scanner_and_says_so():
    array, sides = phantom()
    for side in (-1, 1):
        recorder = Recorder()
        found = divided(Volume(np.where((sides == side) & (array == 3), 3, 0), GRID), SCHEME, SIDES, recorder)
        assert set(np.unique(found.array)) == {0, 300 if side > 0 else 3}
        (warning,) = warnings(recorder)
        assert "scanner's axis" in warning


def test_a_file_that_begins_at_the_origin_says_nothing_of_the_side():
    array, sides = phantom()
    for side in (-1, 1):
        recorder = Recorder()
        part = np.where((sides == side) & (array == 3), 3, 0)
        for start in (0.0, 1.0, -float(np.abs(GRID.affine[0, :3] @ np.array(GRID.shape)))):
            origin = tuple(start if world == 0 else GRID.origin_mm[world] for world in range(3))
            corner = dataclasses.replace(GRID, origin_mm=origin)
            assert divided(Volume(part, corner), SCHEME, SIDES, recorder) is None
        assert all("could not be told apart" in warning for warning in warnings(recorder))


def test_where_nobody_can_tell_left_from_right_nothing_is_divided():
    scattered = np.random.default_rng(0).integers(0, 12, GRID.shape)
    recorder = Recorder()
    assert divided(Volume(np.where(scattered > 3, 0, scattered), GRID), SCHEME, SIDES, recorder) is None
    assert "could not be told apart" in warnings(recorder)[0]


def test_an_empty_map_and_a_map_without_sides_stay_as_they_are():
    recorder = Recorder()
    for value in (0, 2):
        array = np.full(GRID.shape, value, np.uint8)
        found = divided(Volume(array, GRID), SCHEME, SIDES, recorder)
        assert (found.array == value).all()
    assert not warnings(recorder)


# --- real heads ----------------------------------------------------------------------------------------------------

PAIRS = {value: pair for pair in RECIPE.label_maps.mirrored for value in pair} | {5: (5, 44), 44: (5, 44)}
DEEP = ("hippocampus", "thalamus", "caudate", "putamen", "amygdala")


@functools.lru_cache(maxsize=2)
def real_head(path):
    """A label map as the model would give it, and the sides that its file tells; cropped to the brain."""
    labels = read_volume(path, kind="labels").canonical()
    joined, sides = np.zeros(1000, np.uint8), np.zeros(1000, np.int8)
    for label in BRAIN.labels:
        for value in label.values:
            joined[value] = label.output_value
            if value in PAIRS:
                sides[value] = -1 if value == PAIRS[value][0] else 1
    array = joined[labels.array]
    box = tuple(slice(int(hit[0]), int(hit[-1]) + 1) for hit in (np.flatnonzero(array.any(axis=a)) for a in OTHERS))
    return Volume(array[box], labels.geometry.crop(box)), sides[labels.array[box]]


OTHERS = ((1, 2), (0, 2), (0, 1))


def agreement(found: Volume, labels: Volume, sides: np.ndarray) -> dict[str, float]:
    """By label, the part of its voxels that got the side that they are on."""
    result = {}
    for side in BRAIN_SIDES:
        value = next(label.output_value for label in BRAIN.labels if label.name == side.label)
        inside = (labels.array == value) & (sides != 0)
        if inside.any():
            result[side.label] = float(((found.array == side.right_value) == (sides > 0))[inside].mean())
    return result


def check(labels, sides, cortex=0.98):
    recorder = Recorder()
    found = divided(labels, BRAIN, BRAIN_SIDES, recorder)
    assert found is not None and not warnings(recorder)
    right = agreement(found, labels, sides)
    assert all(right[name] > 0.99 for name in DEEP if name in right), right
    assert right["cerebral cortex"] > cortex, right
    assert min(right.values()) > 0.93, right


VIEWS = {
    "as it is": lambda volume: volume,
    "turned and tilted": lambda volume: Volume(volume.array, moved(volume.geometry, rotation(10, -20, 25), (40, 9, 3))),
    "stored sagittally, flipped": lambda volume: stored(volume, (2, 0, 1), (0, 2)),
    "turned, in slices of 6 mm": lambda volume: Volume(
        np.ascontiguousarray(volume.array[3::6]),
        Geometry.from_affine(
            moved(volume.geometry, rotation(-5, 15, -20)).affine
            @ np.array([[6, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            volume.array[3::6].shape,
        ),
    ),
    "sagittal slices of 6 mm": lambda volume: Volume(
        np.ascontiguousarray(volume.array[..., ::6]),
        Geometry.from_affine(volume.geometry.affine @ np.diag([1, 1, 6, 1]), volume.array[..., ::6].shape),
    ),
    "upper half": lambda volume: Volume(
        volume.array[volume.array.shape[0] // 2 :],
        volume.geometry.crop((slice(volume.array.shape[0] // 2, None), slice(None), slice(None))),
    ),
    "left half and a little more": lambda volume: Volume(
        np.ascontiguousarray(volume.array[..., : volume.array.shape[2] // 2 + 14]),
        volume.geometry.crop((slice(None), slice(None), slice(0, volume.array.shape[2] // 2 + 14))),
    ),
}


@pytest.mark.parametrize(
    ("number", "view"), [*((1, view) for view in VIEWS), *((n, "turned and tilted") for n in (8, 14))]
)
def test_voxels_of_a_real_head_get_their_side_back(data_dir, number, view):
    labels, sides = real_head(data_dir / "labelmaps_synthseg" / f"training_seg_{number:02d}.nii.gz")
    part = view.startswith("left half")
    check(VIEWS[view](labels), VIEWS[view](Volume(sides, labels.geometry)).array, 0.97 if part else 0.98)


@pytest.mark.parametrize("number", [2, 17])
def test_a_large_lesion_on_one_side_does_not_move_the_midline(data_dir, number):
    labels, sides = real_head(data_dir / "labelmaps_synthseg" / f"training_seg_{number:02d}.nii.gz")
    middle = np.array(labels.array.shape) * (0.6, 0.4, 0.25)
    near = np.indices(labels.array.shape, dtype=np.float32) - middle[:, None, None, None].astype(np.float32)
    check(Volume(np.where((near**2).sum(axis=0) < 30**2, 0, labels.array), labels.geometry), sides)


# --- from a package to files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    array, _ = phantom()
    write_volume(folder / "image.nii.gz", Volume(array.astype(np.float32) * 100, GRID))
    package = package_of(folder / "model", SCHEME, spacing_mm=GRID.spacing_mm, patch=(48, 64, 64))
    manifest = dataclasses.replace(package.manifest, sides=SIDES)
    (package.path / "manifest.json").write_bytes(manifest_to_json(manifest))
    return dataclasses.replace(package, manifest=manifest), folder / "image.nii.gz"


def test_segmenting_writes_left_and_right(model, tmp_path):
    package, image = model
    _, sides = phantom()
    found = segment(
        package, {"": image}, tmp_path / "out.nii.gz", network=Known(4), probabilities_path=tmp_path / "p.nii.gz"
    )
    labels = read_volume(tmp_path / "out.nii.gz", kind="labels").array
    assert (right_side(Volume(labels, GRID)) == (sides > 0)).mean() > 0.999
    assert list(found["volumes_ml"]) == ["left a", "right a", "stem", "left b", "right b"]
    assert found["volumes_ml"]["right b"] == pytest.approx((labels == 300).sum() * 0.027, abs=1e-3)
    assert [Path(one).name for one in found["probabilities"]] == [
        f"p_{name}.nii.gz" for name in ("background", "a", "stem", "b")
    ], "probabilities are the network's"
    assert found["settings"]["sides"]


def test_sides_can_be_left_together(model, tmp_path):
    package, image = model
    options = SegmentOptions(sides=False)
    found = segment(package, {"": image}, tmp_path / "out.nii.gz", options, network=Known(4))
    assert list(found["volumes_ml"]) == ["a", "stem", "b"] and not found["settings"]["sides"]
    assert np.array_equal(read_volume(tmp_path / "out.nii.gz", kind="labels").array, phantom()[0])


def test_a_region_of_interest_is_divided_by_what_lies_around_it(model, tmp_path):
    package, image = model
    recorder = Recorder()
    options = SegmentOptions(roi_mm=(10.0, 50.0, -50.0, 10.0, -30.0, 10.0))
    found = segment(package, {"": image}, tmp_path / "out.nii.gz", options, network=Known(4), report=recorder)
    assert not any("left and right" in said.casefold() for said in warnings(recorder))
    assert found["volumes_ml"]["left b"] == 0 < found["volumes_ml"]["right b"]


def test_what_cannot_be_divided_is_written_with_the_networks_labels(model, tmp_path):
    package, _ = model
    scattered = np.random.default_rng(0).integers(0, 4, GRID.shape)
    write_volume(tmp_path / "image.nii.gz", Volume((scattered * 100).astype(np.float32), GRID))
    found = segment(package, {"": tmp_path / "image.nii.gz"}, tmp_path / "out.seg.nrrd", network=Known(4))
    assert list(found["volumes_ml"]) == ["a", "stem", "b"]


def test_the_command_line_leaves_sides_together_when_asked(model, tmp_path):
    package, image = model
    arguments = (
        "-m",
        package.path,
        "-i",
        image,
        "-o",
        tmp_path / "o.nii.gz",
        "--device",
        "cpu",
        "--no-sides",
        "--json",
    )
    (result,) = invres("segment", *arguments).of("result")
    assert list(result["volumes_ml"]) == ["a", "stem", "b"] and not result["settings"]["sides"]
    assert "right b = 300" in invres("describe", package.path).out
