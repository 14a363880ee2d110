"""The data doctor: each kind of trouble is found, named with its case, and never stops the check."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from invres.cases import Case, Dataset, read_dataset
from invres.config import Label, LabelScheme
from invres.doctor import check_dataset, findings_table
from invres.events import Recorder
from invres.volume import Geometry, Volume, write_volume

GRID = Geometry((9, 11, 7), (2.0, 1.0, 1.0), (5.0, -3.0, 40.0), np.eye(3)[:, ::-1] * [1, -1, 1])
SCHEME = LabelScheme((Label("x", (1,), 1), Label("y", (2,), 2)))


def moved(grid, shift_mm):
    return Geometry(grid.shape, grid.spacing_mm, tuple(np.add(grid.origin_mm, shift_mm)), grid.direction)


class Builder:
    """A data set of two channels that is healthy until a test changes one of its cases."""

    def __init__(self, folder):
        self.folder, self.cases = folder, []

    def add(self, name, *, image=None, label=None, grid=GRID, second_grid=None, label_grid=None, labelled=True):
        rng = np.random.default_rng(len(self.cases))
        if image is None:
            image = np.zeros(grid.shape, np.float32)
            image[2:-2, 2:-2, 1:-1] = rng.uniform(10, 99, image[2:-2, 2:-2, 1:-1].shape)
        if label is None:
            label = np.zeros(grid.shape, np.uint8)
            label[3, 3:6, 3], label[4, 3:6, 3] = 1, 2
        files = [self.folder / f"{name}_{kind}.nii.gz" for kind in ("0000", "0001", "label")]
        write_volume(files[0], Volume(image, grid))
        write_volume(files[1], Volume(np.where(image == 0, 0, image + 1), second_grid or grid))
        write_volume(files[2], Volume(label, label_grid or grid))
        self.cases.append(Case(name, (files[0], files[1]), files[2] if labelled else None))
        return files

    def dataset(self, scheme=SCHEME, modalities=("MR", "MR")):
        return Dataset("tiny", ("T1", "T2"), modalities, scheme, tuple(self.cases), self.folder, "test")


@pytest.fixture
def build(tmp_path):
    builder = Builder(tmp_path)
    builder.add("good1")
    builder.add("good2")
    return builder


def codes(dataset, case):
    return {(finding.severity, finding.code) for finding in check_dataset(dataset) if finding.case == case}


def test_a_healthy_data_set_has_no_findings(build):
    assert check_dataset(build.dataset()) == []
    assert findings_table([]) == "No problem was found."


def array(value, dtype=np.float32):
    return np.full(GRID.shape, value, dtype)


def with_nan():
    image = np.random.default_rng(5).uniform(1, 9, GRID.shape).astype(np.float32)
    image[0, 0, 0], image[1, 1, 1] = np.nan, np.inf
    return image


def label_of(*values, where=slice(3, 6)):
    label = np.zeros(GRID.shape, np.uint8)
    for index, value in enumerate(values):
        label[3 + index, where, 3] = value
    return label


def outside_label():
    label = np.zeros(GRID.shape, np.uint8)
    label[0] = 1
    return label


TURNED = Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, GRID.direction * [1, -1, 1])
BIG = Geometry((9, 11, 7), (6.0, 1.0, 1.0), GRID.origin_mm, GRID.direction)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"second_grid": TURNED}, ("error", "grid_mismatch")),
        ({"second_grid": moved(GRID, (0.01, 0, 0))}, ("error", "grid_mismatch")),
        ({"label_grid": TURNED}, ("error", "label_grid_mismatch")),
        ({"label_grid": moved(GRID, (1.0, 0, 0))}, ("error", "label_shift")),
        ({"label_grid": moved(GRID, (0, 2.0, -4.0))}, ("error", "label_shift")),
        ({"label_grid": moved(GRID, (0.4, 0, 0))}, ("error", "label_grid_mismatch")),
        ({"label_grid": moved(GRID, (1.4, 0, 0))}, ("error", "label_grid_mismatch")),
        ({"label": label_of(1, 7)}, ("warning", "unknown_label_value")),
        ({"label": label_of()}, ("warning", "empty_label")),
        ({"label": outside_label()}, ("warning", "label_outside_image")),
        ({"labelled": False}, ("note", "missing_label")),
        ({"image": with_nan()}, ("warning", "not_finite")),
        ({"image": array(0)}, ("error", "constant_image")),
        ({"grid": BIG}, ("note", "spacing_outlier")),
    ],
)
def test_each_trouble_is_found_in_its_case_alone(build, changes, expected):
    build.add("bad", **changes)
    findings = check_dataset(build.dataset())
    assert expected in codes(build.dataset(), "bad")
    assert {finding.case for finding in findings} == {"bad"}
    for finding in findings:
        assert "bad" in finding.message and finding.message.endswith(".") and finding.action.endswith(".")


def test_a_label_origin_within_a_hundredth_of_a_millimetre_is_accepted(build):
    build.add("near", label_grid=moved(GRID, (0.008, 0, 0)))
    assert check_dataset(build.dataset()) == []


def test_a_shift_is_told_in_voxels(build):
    build.add("bad", label_grid=moved(GRID, (0, 2.0, -4.0)))
    (finding,) = check_dataset(build.dataset())
    # The file's second axis runs posterior: 2 mm anterior are -2 voxels; 4 mm inferior are -2 voxels of 2 mm.
    assert "by -2, -2, 0 voxels" in finding.message


def test_an_oblique_header_that_is_not_orthonormal_is_reported_as_repaired(build):
    import nibabel

    files = build.add("sheared")
    for file in files:
        loaded = nibabel.load(file)
        affine = loaded.affine.copy()
        affine[0, 1] += 0.02
        voxels = np.asanyarray(loaded.dataobj).copy()
        nibabel.save(nibabel.Nifti1Image(voxels, affine), file)
    assert ("warning", "header_repaired") in codes(build.dataset(), "sheared")


def test_a_broken_case_does_not_stop_the_check(build):
    files = build.add("cut")
    files[0].write_bytes(files[0].read_bytes()[:100])
    build.add("gone")[1].unlink()
    build.add("last", label=label_of())
    recorder = Recorder()
    findings = {(finding.case, finding.code) for finding in check_dataset(build.dataset(), recorder)}
    assert findings == {("cut", "unreadable"), ("gone", "missing_channel"), ("last", "empty_label")}
    assert [event["done"] for event in recorder.events] == [0, 1, 2, 3, 4, 5]


def test_the_doctor_lists_what_the_strict_reader_refuses(tmp_path):
    build = Builder(tmp_path / "imagesTr")
    for name in ("a", "b"):
        files = build.add(name)
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        files[2].rename(tmp_path / "labelsTr" / f"{name}.nii.gz")
    (tmp_path / "imagesTr" / "b_0001.nii.gz").unlink()
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"x": 1, "y": 2}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    found = [(f.case, f.code) for f in check_dataset(read_dataset(tmp_path, checked=False))]
    assert found == [("b", "missing_channel"), ("", "case_count")]


@pytest.mark.parametrize("other_type", [np.float32, np.float64])
def test_the_same_voxels_in_two_cases_are_found_and_a_leak_is_an_error(build, other_type):
    image = np.random.default_rng(9).integers(1, 50, GRID.shape)
    build.add("twin1", image=image.astype(np.float32))
    build.add("twin2", image=image.astype(other_type))
    (build.folder / "splits_final.json").write_text('[{"train": ["good1", "twin1"], "val": ["twin2"]}]')
    (leak,) = check_dataset(build.dataset())
    assert (leak.severity, leak.code) == ("error", "duplicate_leak") and "twin1 and twin2" in leak.message
    (build.folder / "splits_final.json").write_text('[{"train": ["twin2", "twin1"], "val": ["good1"]}]')
    (double,) = check_dataset(build.dataset())
    assert (double.severity, double.code) == ("warning", "duplicate_case")


def test_label_values_with_gaps_are_noted_as_renumbered(build):
    scheme = LabelScheme((Label("x", (1,), 1), Label("y", (2,), 2), Label("z", (205,), 205)))
    for name in ("good3", "good4"):
        build.add(name, label=label_of(1, 2, 205))
    (finding,) = [one for one in check_dataset(build.dataset(scheme)) if one.code != "missing_label_value"]
    assert (finding.code, finding.case, finding.severity) == ("labels_renumbered", "", "note")
    assert "1, 2, 205" in finding.message


def test_a_splits_file_with_unknown_names_is_found(build):
    (build.folder / "splits_final.json").write_text('[{"train": ["good1"], "val": ["nobody"]}]')
    (finding,) = check_dataset(build.dataset())
    assert finding.code == "bad_split" and "nobody" in finding.message


def test_hounsfield_units_in_a_channel_not_called_ct_are_noted(build):
    image = np.full(GRID.shape, -1000.0, np.float32)
    image[2:-2, 2:-2, 1:-1] = np.random.default_rng(3).uniform(0, 100, image[2:-2, 2:-2, 1:-1].shape)
    build.add("scan", image=image)
    assert ("note", "looks_like_ct") in codes(build.dataset(), "scan")
    assert ("note", "looks_like_ct") not in codes(build.dataset(modalities=("CT", "CT")), "scan")


def test_the_table_groups_cases_and_fits_a_terminal(build):
    for index in range(7):
        build.add(f"empty{index}", label=label_of())
    build.add("bad", image=array(3))
    table = findings_table(check_dataset(build.dataset()))
    assert max(len(line) for line in table.splitlines()) <= 100
    assert "empty0, empty1, empty2, empty3, empty4 and 2 more" in table and "4 more like these" in table
    assert table.index("ERROR") < table.index("WARNING")
    assert table.splitlines()[-1] == "2 errors, 7 warnings."


def test_a_label_that_a_case_lacks_and_others_have_is_named(build):
    only_x = np.zeros(GRID.shape, np.uint8)
    only_x[3, 3:6, 3] = 1
    build.add("half", label=only_x)
    build.add("empty", label=np.zeros(GRID.shape, np.uint8))
    found = [one for one in check_dataset(build.dataset()) if one.code == "missing_label_value"]
    assert [(one.case, one.severity) for one in found] == [("half", "warning")]
    assert found[0].message == "half has no y, which other cases have; its voxels are learned as background."
    nobody = LabelScheme((Label("x", (1,), 1), Label("z", (3,), 2)))
    assert not [one for one in check_dataset(build.dataset(nobody)) if one.code == "missing_label_value"]
    partly = only_x.copy()
    partly[:3] = 9  # reaches over the empty border of the image
    build.add("partly", label=partly)
    build.add("open", label=np.where(partly == 9, partly, 0).astype(np.uint8))
    scheme = LabelScheme((Label("x", (1,), 1), Label("y", (2,), 2)), ignore_value=9)
    found = [one for one in check_dataset(build.dataset(scheme)) if one.case in ("partly", "open")]
    assert [(one.case, one.severity, one.code) for one in found] == [
        ("open", "warning", "empty_label"),
        ("partly", "note", "missing_label_value"),
    ]
    assert "voxels to ignore" in found[0].message and "outside of its voxels to ignore" in found[1].message


@pytest.mark.parametrize(
    ("layout", "named", "wanted"),
    [
        ("nnU-Net v2", False, "add them to `labels` in dataset.json"),
        ("a folder per case", False, "name all label values in labels.json"),
        ("images and labels folders", True, "add them to labels.json"),
        ("BIDS derivatives", False, "name all label values in labels.json"),
        ("KiTS19", False, "KiTS19 has no such labels"),
    ],
)
def test_the_file_is_named_in_which_a_label_value_is_to_be_written(build, layout, named, wanted):
    build.add("bad", label=label_of(1, 2, 7))
    if named:
        (build.folder / "labels.json").write_text('{"1": "x", "2": "y"}')
    (finding,) = check_dataset(dataclasses.replace(build.dataset(), layout=layout))
    assert finding.code == "unknown_label_value" and wanted in finding.action


def test_a_label_that_no_case_has_is_named_once(build):
    scheme = LabelScheme((*SCHEME.labels, Label("ghost", (3,), 3)))
    (finding,) = check_dataset(build.dataset(scheme))
    assert (finding.severity, finding.code, finding.case) == ("warning", "unused_label", "")
    assert finding.message == "No case has the label ghost (3), so it cannot be learned."
    assert finding.action.startswith("Take it out of dataset.json or correct the value")
    (published,) = check_dataset(dataclasses.replace(build.dataset(scheme), layout="KiTS19"))
    assert "dataset.json" not in published.action


@pytest.mark.parametrize("values", [(), (7,)], ids=["empty", "other values"])
def test_no_labelled_voxel_in_any_case_is_an_error_as_training_refuses_it(tmp_path, values):
    build = Builder(tmp_path)
    for name in ("a", "b"):
        build.add(name, label=label_of(*values))
    (error,) = [one for one in check_dataset(build.dataset()) if one.severity == "error"]
    assert (error.code, error.case) == ("nothing_labelled", "")
    assert error.message == "No case of tiny has a labelled voxel (x, y)."


def test_a_ct_without_a_negative_value_is_told_of(build):
    air = np.full(GRID.shape, -1000.0, np.float32)
    air[2:-2] = 40
    dataset = Builder(build.folder)
    dataset.add("scan", image=air)
    dataset.add("shifted", image=air + 1024)
    dataset.cases = [dataclasses.replace(case, images=case.images[:1]) for case in dataset.cases]
    one = Dataset("tiny", ("CT",), ("CT",), SCHEME, tuple(dataset.cases), build.folder, "test")
    (finding,) = check_dataset(one)
    assert (finding.severity, finding.code, finding.case) == ("warning", "not_hounsfield", "shifted")


SIDED = LabelScheme((Label("left kidney", (1,), 1), Label("Kidney_R", (2, 3), 2), Label("spleen", (4,), 4)))
FLIPPED = Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, GRID.direction * [1, 1, -1])
TURNED = Geometry((7, 11, 9), (1.0, 1.0, 2.0), GRID.origin_mm, GRID.direction[:, [2, 1, 0]])


@pytest.mark.parametrize(("grid", "right_axis", "sense"), [(GRID, 2, 1), (FLIPPED, 2, -1), (TURNED, 0, 1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_sides_that_lie_the_wrong_way_round_by_the_header_are_named(tmp_path, grid, right_axis, sense, swapped):
    build = Builder(tmp_path)
    label = np.zeros(grid.shape, np.uint8)
    along = np.moveaxis(label, right_axis, 0)  # slices from left to right, or back
    order = [1, 2, 3] if (sense > 0) != swapped else [3, 2, 1]
    for place, value in zip((2, 3, 4), order, strict=True):
        along[place, 4:6, 4] = value
    build.add("case", label=label, grid=grid)
    build.add("one side alone", label=np.where(label == 1, 1, 0).astype(np.uint8), grid=grid)
    found = [one for one in check_dataset(build.dataset(SIDED)) if one.code == "sides_swapped"]
    assert [(one.case, one.severity) for one in found] == ([("case", "warning")] if swapped else [])
    assert not swapped or "left kidney lies to the right of Kidney_R." in found[0].message


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_one_odd_pair_among_several_is_no_swapped_case(tmp_path, odd):
    build = Builder(tmp_path)
    names = [f"{side} {name}" for name in ("lung", "kidney", "ventricle") for side in ("left", "right")]
    scheme = LabelScheme(tuple(Label(name, (n,), n) for n, name in enumerate(names, start=1)))
    label = np.zeros(GRID.shape, np.uint8)
    for pair in range(3):
        left, right = (4, 2) if pair < odd else (2, 4)
        label[3, 3 + pair, left], label[3, 3 + pair, right] = 2 * pair + 1, 2 * pair + 2
    build.add("case", label=label)
    found = [one.message for one in check_dataset(build.dataset(scheme)) if one.code == "sides_swapped"]
    told = f"left lung lies to the right of right lung, and so it is with {odd} of its 3 pairs of sides."
    assert found == ([] if odd == 1 else [f"By the header of case, {told}"])
