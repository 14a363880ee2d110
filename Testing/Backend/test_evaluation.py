"""Evaluation of folders: matching, grids, nnU-Net's keys, spread over cases, the table and the file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from invres import InvresError
from invres.config import Label, LabelScheme
from invres.evaluation import case_name, evaluate, summary_table
from invres.events import Recorder
from invres.volume import Geometry, Volume, read_volume, write_segmentation, write_volume

SHAPE = (7, 9, 11)
SPACING_MM = (3.0, 0.7, 1.1)
TWO = LabelScheme((Label("liver", (1,), 1), Label("tumour", (2,), 2)))
REGIONS = LabelScheme((Label("whole", (1, 2), 1), Label("core", (2,), 2)), regions=True)


def geometry(shape=SHAPE, spacing_mm=SPACING_MM, origin_mm=(-5.0, 8.0, 2.0)):
    """Array axes D, H, W point superior, anterior, right."""
    return Geometry(shape, spacing_mm, origin_mm, np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


def labels(shift=0):
    """Label 1 is a box of 3 x 5 x 6, label 2 a box of 2 x 2 x 2 beside it; both shifted along W."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[1:4, 1:6, 1:7] = 1
    array[5:7, 1:3, 1:3] = 2
    return np.roll(array, shift, axis=2)


@pytest.fixture
def folders(tmp_path):
    """`write(name, predicted, reference)` puts a case into the folders of predictions and references."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    predictions.mkdir()
    references.mkdir()

    def write(name, predicted=None, reference=None, ending=".nii.gz", grid=None):
        if predicted is not None:
            write_volume(predictions / f"{name}{ending}", Volume(predicted, grid or geometry()))
        if reference is not None:
            write_volume(references / f"{name}.nii.gz", Volume(reference, geometry()))

    return predictions, references, write


def test_figures_of_two_cases_are_the_ones_worked_out_by_hand(folders):
    predictions, references, write = folders
    write("a", labels(), labels())
    write("b", labels(1), labels())
    found = evaluate(predictions, references, TWO)
    # Shifted by one of six planes: 75 of 90 voxels overlap. One of two: 4 of 8.
    assert found["metric_per_case"][1]["metrics"]["1"]["Dice"] == pytest.approx(150 / 180)
    assert found["mean"]["1"]["Dice"] == pytest.approx((1 + 150 / 180) / 2)
    assert found["mean"]["2"]["Dice"] == pytest.approx((1 + 0.5) / 2)
    assert found["foreground_mean"]["Dice"] == pytest.approx((11 / 12 + 0.75) / 2)
    assert found["mean"]["2"]["HD"] == pytest.approx(1.1 / 2)
    # All 8 voxels of a box of 2 are its surface, and 4 of either are 1.1 mm away from the other.
    assert found["metric_per_case"][1]["metrics"]["2"]["ASD"] == pytest.approx(1.1 / 2)
    assert found["mean"]["2"]["ASD"] == found["mean"]["2"]["MHD"] == pytest.approx(1.1 / 4)
    assert found["summary"]["tumour"]["MHD"]["mean"] == pytest.approx(1.1 / 4)
    liver = found["summary"]["liver"]
    assert liver["Dice"]["mean"] == liver["Dice"]["median"] == pytest.approx(11 / 12)
    assert liver["Dice"]["sd"] == pytest.approx((1 / 6) / math.sqrt(2))
    assert liver["Dice"]["n"] == 2
    assert liver["VolumeReference_ml"]["mean"] == pytest.approx(90 * 3.0 * 0.7 * 1.1 / 1000)
    assert liver["empty"] == {"none": 2, "both": 0, "predicted": 0, "reference": 0}


def test_nnunets_keys_are_there_and_its_numbers_agree(folders):
    predictions, references, write = folders
    write("a", labels(1), labels())
    found = json.loads(json.dumps(evaluate(predictions, references, TWO)))
    case = found["metric_per_case"][0]
    assert case["reference_file"].endswith("a.nii.gz") and case["prediction_file"].endswith("a.nii.gz")
    for key, value in (("1", 1), ("2", 2)):
        predicted, reference = labels(1) == value, labels() == value
        tp, fp, fn = (predicted & reference).sum(), (predicted & ~reference).sum(), (~predicted & reference).sum()
        expected = {
            "Dice": 2 * tp / (2 * tp + fp + fn),
            "IoU": tp / (tp + fp + fn),
            "TP": tp,
            "FP": fp,
            "FN": fn,
            "TN": (~predicted & ~reference).sum(),
            "n_pred": predicted.sum(),
            "n_ref": reference.sum(),
        }
        assert {name: case["metrics"][key][name] for name in expected} == pytest.approx(expected)
        assert {"HD", "HD95", "ASD", "MHD", "NSD", "VolumeError_ml"} <= set(case["metrics"][key])
    assert set(found["foreground_mean"]) == set(found["mean"]["1"]) == set(case["metrics"]["1"])


def test_regions_are_keyed_as_nnunet_does_and_summed_up_by_name(folders):
    predictions, references, write = folders
    write("a", np.where(labels() == 1, 2, labels()).astype(np.uint8), labels())
    found = evaluate(predictions, references, REGIONS)
    assert set(found["mean"]) == {"(1, 2)", "2"}
    assert found["label_names"] == {"(1, 2)": "whole", "2": "core"}
    assert found["summary"]["whole"]["Dice"]["mean"] == 1
    assert found["summary"]["core"]["Dice"]["mean"] == pytest.approx(2 * 8 / (98 + 8))


def test_without_a_scheme_the_labels_are_those_of_all_references(folders):
    predictions, references, write = folders
    write("a", labels(), np.where(labels() == 1, 150, 0).astype(np.uint8))
    write("b", labels(), np.where(labels() == 2, 10, 0).astype(np.uint8))
    found = evaluate(predictions, references)
    assert list(found["summary"]) == ["label 10", "label 150"]
    assert list(found["mean"]) == ["10", "150"]


def test_without_a_scheme_and_without_labels_there_is_nothing_to_score(folders):
    predictions, references, write = folders
    write("a", labels(), np.zeros(SHAPE, np.uint8))
    with pytest.raises(InvresError, match="no labels to score"):
        evaluate(predictions, references)


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".seg.nrrd"])
def test_the_ending_of_a_prediction_may_differ_from_that_of_its_reference(folders, ending):
    predictions, references, write = folders
    write("case.1", None, labels())
    volume = Volume(labels(), geometry())
    if ending == ".seg.nrrd":
        write_segmentation(predictions / f"case.1{ending}", volume, TWO)
    else:
        write_volume(predictions / f"case.1{ending}", volume)
    found = evaluate(predictions, references, TWO)
    assert found["metric_per_case"][0]["name"] == "case.1"
    assert found["foreground_mean"]["Dice"] == 1


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.nii.gz", "a"),
        ("a.b.NII.GZ", "a.b"),
        ("a.seg.nrrd", "a"),
        ("a.nrrd", "a"),
        ("a.mha", "a"),
        ("é 1.hdr", "é 1"),
        ("plain", "plain"),
    ],
)
def test_a_case_is_named_by_its_file_without_the_ending(tmp_path, file, name):
    assert case_name(tmp_path / file) == name


def test_two_files_are_compared_whatever_they_are_called(folders):
    predictions, references, write = folders
    write("result", labels(1), None)
    write("case", None, labels())
    found = evaluate(predictions / "result.nii.gz", references / "case.nii.gz", TWO)
    assert found["metric_per_case"][0]["name"] == "case"
    assert found["mean"]["2"]["Dice"] == 0.5


def test_one_prediction_finds_its_reference_in_a_folder(folders):
    predictions, references, write = folders
    write("a", labels(1), labels())
    write("b", None, labels())
    report = Recorder()
    found = evaluate(predictions / "a.nii.gz", references, TWO, report)
    assert [case["name"] for case in found["metric_per_case"]] == ["a"]
    assert not [event for event in report.events if event["event"] == "warning"]


def test_cases_that_only_one_side_has_are_named_and_left_out(folders):
    predictions, references, write = folders
    write("a", labels(), labels())
    write("b", None, labels())
    write("c", labels(), None)
    report = Recorder()
    found = evaluate(predictions, references, TWO, report)
    assert (found["missing_predictions"], found["missing_references"]) == (["b"], ["c"])
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert len(warnings) == 2 and warnings[0].endswith("b.") and warnings[1].endswith("c.")
    table = summary_table(found)
    assert "no prediction: b." in table and "no reference: c." in table


def test_progress_runs_from_nothing_to_all_cases(folders):
    predictions, references, write = folders
    for name in "abc":
        write(name, labels(), labels())
    report = Recorder()
    evaluate(predictions, references, TWO, report)
    progress = [(event["done"], event["total"]) for event in report.events if event["event"] == "progress"]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (geometry(origin_mm=(-5.0, 8.0, 3.0)), "origin"),
        (geometry(spacing_mm=(3.0, 0.7, 1.2)), "spacing"),
    ],
)
def test_another_grid_is_refused_with_the_difference(folders, grid, words):
    predictions, references, write = folders
    write("a", labels(), labels(), grid=grid)
    with pytest.raises(InvresError, match=f"prediction of a lies on another grid.*{words}"):
        evaluate(predictions, references, TWO)


def test_a_reference_that_preparation_takes_is_scored(folders):
    """A hundredth of a millimetre, as label tools round origins."""
    predictions, references, write = folders
    write("a", labels(), None)
    grid = geometry()
    beside = Geometry(grid.shape, grid.spacing_mm, tuple(np.array(grid.origin_mm) + 0.004), grid.direction)
    write_volume(references / "a.nii.gz", Volume(labels(), beside))
    assert evaluate(predictions, references, TWO)["foreground_mean"]["Dice"] == 1


def test_the_same_voxels_in_another_axis_order_are_the_same_grid(folders):
    """Flipped along H and with D and W exchanged, the geometry along with the array."""
    predictions, references, write = folders
    write("a", None, labels())
    grid = geometry()
    last_h = np.array(grid.origin_mm) + grid.direction[:, 1] * (SHAPE[1] - 1) * SPACING_MM[1]
    direction = np.stack([grid.direction[:, 2], -grid.direction[:, 1], grid.direction[:, 0]], axis=1)
    turned = Geometry(SHAPE[::-1], SPACING_MM[::-1], tuple(float(x) for x in last_h), direction)
    array = np.ascontiguousarray(labels()[:, ::-1].transpose(2, 1, 0))
    write_volume(predictions / "a.nrrd", Volume(array, turned))
    found = evaluate(predictions, references, TWO)
    assert found["foreground_mean"]["Dice"] == 1
    assert found["foreground_mean"]["HD"] == 0


def test_values_that_are_no_label_are_warned_of(folders):
    predictions, references, write = folders
    write("a", np.where(labels() == 2, 7, labels()).astype(np.uint8), labels())
    report = Recorder()
    found = evaluate(predictions, references, TWO, report)
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert len(warnings) == 1 and "prediction of a" in warnings[0] and warnings[0].endswith("7.")
    assert found["mean"]["2"]["Dice"] == 0


def test_empty_masks_are_counted_and_every_number_is_finite(folders):
    predictions, references, write = folders
    only_1 = np.where(labels() == 1, 1, 0).astype(np.uint8)
    write("a", only_1, only_1)
    write("b", only_1, labels())
    write("c", labels(), only_1)
    found = evaluate(predictions, references, TWO)
    assert found["summary"]["tumour"]["empty"] == {"none": 0, "both": 1, "predicted": 1, "reference": 1}
    assert found["summary"]["tumour"]["Dice"]["mean"] == pytest.approx(1 / 3)
    assert found["summary"]["tumour"]["HD95"]["mean"] == pytest.approx(2 * 373.1287 / 3)
    assert found["summary"]["tumour"]["VolumeError_relative"]["n"] == 1
    assert [case["empty"]["2"] for case in found["metric_per_case"]] == ["both", "predicted", "reference"]
    json.dumps(found, allow_nan=False)
    told = "Cases in these means that count as Dice 1 for being empty in both: tumour 1 of 3."
    assert told in summary_table(found).splitlines()


def test_without_empty_masks_none_are_told_of(folders):
    predictions, references, write = folders
    write("a", labels(), labels())
    assert "count as Dice 1" not in summary_table(evaluate(predictions, references, TWO))


def test_one_case_has_no_spread_and_says_so(folders):
    predictions, references, write = folders
    write("a", labels(1), labels())
    found = evaluate(predictions, references, TWO)
    dice = found["summary"]["liver"]["Dice"]
    assert dice["n"] == 1 and dice["sd"] is None and dice["ci95"] is None
    assert "[n/a]" in summary_table(found)


def test_the_interval_holds_the_mean(folders):
    predictions, references, write = folders
    for index, shift in enumerate((0, 0, 1, 1, 2, 3)):
        write(f"case_{index}", labels(shift), labels())
    found = evaluate(predictions, references, TWO)
    dice = found["summary"]["liver"]["Dice"]
    values = [case["metrics"]["1"]["Dice"] for case in found["metric_per_case"]]
    low, high = dice["ci95"]
    assert low < dice["mean"] < high
    half = 2.571 * np.std(values, ddof=1) / math.sqrt(6)
    assert (low, high) == pytest.approx((dice["mean"] - half, min(1, dice["mean"] + half)), rel=1e-3)


def test_a_mean_is_of_the_patients_that_its_interval_is_of(folders):
    predictions, references, write = folders
    for index, shift in enumerate((0, 0, 0, 0, 0, 0, 3, 3, 4)):
        write(f"case_{index}", labels(shift), labels())
    alone = evaluate(predictions, references, TWO)
    patients = {f"case_{index}": "Anna" for index in range(6)}
    found = evaluate(predictions, references, TWO, patients=patients)
    values = [case["metrics"]["1"]["Dice"] for case in found["metric_per_case"]]
    dice, means = found["summary"]["liver"]["Dice"], [values[0], *values[6:]]
    assert (dice["n"], dice["n_patients"]) == (9, 4)
    assert (dice["mean"], dice["sd"]) == pytest.approx((np.mean(means), np.std(means, ddof=1)))
    assert dice["median"] == pytest.approx(np.median(means)) and dice["ci95"][0] < dice["mean"] < dice["ci95"][1]
    assert alone["summary"]["liver"]["Dice"]["mean"] == pytest.approx(np.mean(values)) == found["mean"]["1"]["Dice"]
    assert "The 9 cases are of 4 patients, over whom means, sd and intervals are" in summary_table(found)
    assert "over whom" not in summary_table(alone)


def test_the_table_is_aligned_and_lists_the_three_worst_cases_first(folders):
    predictions, references, write = folders
    for name, shift in (("fine", 0), ("poor", 3), ("good", 1), ("fair", 2)):
        write(name, labels(shift), labels())
    lines = summary_table(evaluate(predictions, references, TWO)).splitlines()
    heading, rule, liver, tumour = lines[:4]
    assert set(rule) == {"-"} and len({line.index("4") for line in (liver, tumour)} | {heading.index("n  ")}) == 1
    distances = lines[lines.index("") + 1 :][:4]
    assert distances[0].split() == ["label", *(word for name in ("HD95", "HD", "ASD", "MHD") for word in (name, "mm"))]
    assert set(distances[1]) == {"-"} and [line.split()[0] for line in distances[2:]] == ["liver", "tumour"]
    assert max(map(len, lines[:9])) <= 120
    start = lines.index("Lowest Dice (mean over labels):")
    assert [line.split()[0] for line in lines[start + 1 :]] == ["poor", "fair", "good"]
    assert "worst tumour: Dice 0.000" in lines[start + 1]


def test_missing_folders_and_names_without_a_partner_are_refused(folders, tmp_path):
    predictions, references, write = folders
    with pytest.raises(InvresError, match="no file or folder of predictions"):
        evaluate(tmp_path / "nowhere", references, TWO)
    with pytest.raises(InvresError, match="holds no volume file"):
        evaluate(predictions, references, TWO)
    write("a", labels(), None)
    write("b", None, labels())
    with pytest.raises(InvresError, match=r"has a reference of the same name.*a, references are b"):
        evaluate(predictions, references, TWO)


def test_two_predictions_of_one_name_are_refused(folders):
    predictions, references, write = folders
    write("a", labels(), labels())
    write("a", labels(), None, ending=".nrrd")
    with pytest.raises(InvresError, match="two volumes of the name 'a'"):
        evaluate(predictions, references, TWO)


def test_a_real_label_map_scores_perfectly_against_itself_and_by_a_voxel_against_its_shifted_self(data_dir, tmp_path):
    files = sorted((data_dir / "hippocampus_msd" / "labels").glob("hippocampus_*.nii.gz"))
    if not files:
        pytest.skip("the hippocampus label maps are not here")
    reference = read_volume(files[0], kind="labels")
    found = evaluate(files[0], files[0])
    assert {int(key) for key in found["mean"]} == set(np.unique(reference.array).tolist()) - {0}
    assert (found["foreground_mean"]["Dice"], found["foreground_mean"]["HD95"]) == (1, 0)
    write_volume(tmp_path / "shifted.nii.gz", Volume(np.roll(reference.array, 1, axis=0), reference.geometry))
    shifted = evaluate(tmp_path / "shifted.nii.gz", files[0])["foreground_mean"]
    assert 0.5 < shifted["Dice"] < 1
    assert shifted["HD"] == pytest.approx(reference.geometry.spacing_mm[0])
