"""Segmenting all cases of a folder: which they are, one result for each, and nothing lost or done twice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny_layouts
from test_inference import package_of
from tiny_datasets import GRIDS, invres, phantom

from invres import InvresError
from invres.batch import segment_cases
from invres.batchrecord import BatchRecord, result_name
from invres.caseinputs import CaseInputs, cases_to_segment, chosen_channels
from invres.config import ChannelPlan
from invres.events import Recorder
from invres.volume import Geometry, Volume, read_volume, write_volume

GRID = GRIDS[0]


def channels(*names, optional=()):
    return tuple(ChannelPlan(name, optional=name in optional) for name in names)


def found(path, *names, chosen=(), optional=()):
    own = channels(*names, optional=optional)
    cases = cases_to_segment(path, own, "known", chosen_channels(chosen, own, "known"))
    return {
        case.name: {name: file.relative_to(path).as_posix() for name, file in case.inputs.items()} for case in cases
    }


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_files_numbered_as_for_nnunet_are_the_channels_in_the_models_order(tmp_path):
    folder = files(tmp_path / "imagesTs", *(f"{case}_000{n}.nii.gz" for case in "ab" for n in (0, 1)))
    assert found(folder, "T1", "FLAIR") == {
        case: {"T1": f"{case}_0000.nii.gz", "FLAIR": f"{case}_0001.nii.gz"} for case in "ab"
    }


def test_a_dataset_json_beside_the_folder_says_which_number_is_which_channel(tmp_path):
    folder = files(tmp_path / "imagesTs", *(f"a_000{n}.nii.gz" for n in (0, 1, 2)))
    description = {"channel_names": {"0": "T2", "1": "flair", "2": "T1"}, "labels": {"background": 0, "x": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert found(folder, "T1", "FLAIR") == {"a": {"T1": "a_0002.nii.gz", "FLAIR": "a_0001.nii.gz"}}
    assert found(folder, "MR", chosen=["MR=T2"]) == {"a": {"MR": "a_0000.nii.gz"}}


def test_four_digits_that_are_no_channel_belong_to_the_name(tmp_path):
    folder = files(tmp_path / "scans", "scan_0001.nii.gz", "scan_0002.nii.gz")
    assert found(folder, "T1") == {name: {"T1": f"{name}.nii.gz"} for name in ("scan_0001", "scan_0002")}
    assert found(files(tmp_path / "nnunet", "a_0000.nii.gz"), "T1") == {"a": {"T1": "a_0000.nii.gz"}}


def test_files_named_by_channel_and_others_beside_them(tmp_path):
    folder = files(tmp_path / "x", "a_t1.nii.gz", "a-FLAIR.nrrd", "a_T2.nii.gz", "a_seg.nii.gz", "b_T1.nii.gz")
    assert found(folder, "T1", "FLAIR") == {
        "a": {"T1": "a_t1.nii.gz", "FLAIR": "a-FLAIR.nrrd"},
        "b": {"T1": "b_T1.nii.gz"},
    }
    assert found(folder, "MR", chosen=["mr=T2"]) == {"a": {"MR": "a_T2.nii.gz"}}


def test_any_files_are_cases_of_one_channel_but_label_maps_are_not(tmp_path):
    names = ("one.nii.gz", "two.mha", "one_seg.nii.gz", "two-label.mha", "one.seg.nrrd", "labels.nii.gz", ".two.mha")
    folder = files(tmp_path / "x", *names)
    report = Recorder()
    cases_to_segment(folder, channels("T1"), "known", {"T1": "T1"}, report)
    (note,) = [event["message"] for event in report.events]
    assert note.endswith(": labels.nii.gz, one.seg.nrrd, one_seg.nii.gz, two-label.mha."), note
    assert found(folder, "T1") == {"one": {"T1": "one.nii.gz"}, "two": {"T1": "two.mha"}}
    assert found(folder, "T1", "T2") == {"one": {"": "one.nii.gz"}, "two": {"": "two.mha"}}, "files of all channels"


def test_dicom_folders_are_cases_or_channels(tmp_path):
    one = files(tmp_path / "one", "a/1.dcm", "a/2.dcm", "b/IM0001", "empty/.hidden")
    assert found(one, "CT") == {"a": {"CT": "a"}, "b": {"CT": "b"}}
    several = files(tmp_path / "several", "a/t1/1.dcm", "a/FLAIR/1.dcm", "a/localizer/1.dcm", "b/T1/1.dcm")
    assert found(several, "T1", "FLAIR") == {"a": {"T1": "a/t1", "FLAIR": "a/FLAIR"}, "b": {"T1": "b/T1"}}


@pytest.mark.parametrize("layout", [tiny_layouts.iseg, tiny_layouts.brats, tiny_layouts.hcp])
def test_published_data_sets_are_read_as_for_training(tmp_path, layout):
    cases = found(layout(tmp_path), "T2", "T1")
    assert len(cases) >= 2
    assert all(list(inputs) == ["T2", "T1"] and "label" not in str(inputs) for inputs in cases.values())


def test_an_only_channel_needs_no_name_and_one_of_several_does(tmp_path):
    assert len(found(tiny_layouts.kits19(tmp_path), "anything")) > 1
    root = tiny_layouts.brats(tmp_path)
    with pytest.raises(InvresError) as caught:
        found(root, "MR")
    assert "takes the channel MR, and the data set (BraTS 2020) has T1, T1ce, T2, FLAIR" in caught.value.message
    assert "--input MR=T1" in caught.value.hint
    assert {tuple(inputs) for inputs in found(root, "MR", chosen=["MR=flair"]).values()} == {("MR",)}


def test_files_of_all_channels_must_hold_just_the_models(tmp_path):
    root = tiny_layouts.task01(tmp_path)
    names = [name.strip() for name in json.loads((root / "dataset.json").read_text())["modality"].values()]
    assert all(list(inputs) == [""] for inputs in found(root, *names).values())
    for wrong in (names[::-1], names[:1]):
        with pytest.raises(InvresError, match=r"Each file of the data set .* holds the channels"):
            found(root, *wrong)


def test_what_is_no_data_and_names_given_twice_are_refused(tmp_path):
    with pytest.raises(InvresError, match="There is no data set at"):
        found(tmp_path / "nowhere", "T1")
    (tmp_path / "void").mkdir()
    with pytest.raises(InvresError, match="No data set format was recognised"):
        found(tmp_path / "void", "T1")
    with pytest.raises(InvresError, match=r"Two cases in .* have the name a"):
        found(files(tmp_path / "x", "a.nii.gz", "a.nrrd"), "T1")


@pytest.mark.parametrize("text", ["T2=x", "T1", "T1=", "T1=a T1=b"])
def test_a_choice_of_channels_that_means_nothing_is_refused(text):
    with pytest.raises(InvresError, match="--input says which of the data's channels is which"):
        chosen_channels(text.split(), channels("T1", "FLAIR"), "known")


# --- doing it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path):
    """Three scans, and a model of one channel."""
    folder = tmp_path / "scans"
    for number, name in enumerate("abc"):
        write_volume(folder / f"{name}.nii.gz", phantom(GRID, 1, number)[0][0])
    return folder, package_of(tmp_path / "model", patch=(24, 24, 24))


def command(folder, package, output, *more):
    return invres("segment", "-m", package.path, "-d", folder, "-o", output, "--device", "cpu", *more)


def rows(output):
    with open(output / "volumes.csv", encoding="utf-8-sig", newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def stamps(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}


def test_each_case_comes_out_as_if_it_had_been_segmented_alone(scans, tmp_path):
    folder, package = scans
    outcome = command(folder, package, tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    (result,) = outcome.of("result")
    assert (result["segmented"], result["there_before"]) == (3, 0)
    for name in "abc":
        scan = folder / f"{name}.nii.gz"
        alone = invres("segment", "-m", package.path, "-i", scan, "-o", tmp_path / "alone.nii.gz", "--json")
        together, apart = (
            read_volume(p, kind="labels") for p in (tmp_path / f"out/{name}.nii.gz", tmp_path / "alone.nii.gz")
        )
        assert np.array_equal(together.array, apart.array)
        assert together.geometry.same_as(apart.geometry)
        volumes = {f"{label} (mL)": str(value) for label, value in alone.of("result")[0]["volumes_ml"].items()}
        assert rows(tmp_path / "out")[name].items() >= volumes.items()
    assert sum(float(row["c (mL)"]) for row in rows(tmp_path / "out").values()) > 0, "there is something to compare"


def test_a_person_reads_volumes_and_confidence(scans, tmp_path):
    folder, package = scans
    one = ("segment", "-m", package.path, "-i", folder / "a.nii.gz", "--device", "cpu", "-o", tmp_path / "a.nii.gz")
    (result,) = invres(*one, "--json").of("result")
    (line,) = (line for line in invres(*one).out.splitlines() if "Confidence" in line)
    assert line == f"  Confidence: {result['confidence']:.2f} of 1", "nothing was measured when it was made"


def test_the_list_says_what_would_be_segmented_and_does_nothing(scans, tmp_path):
    folder, package = scans
    outcome = invres("segment", "-m", package.path, "-d", folder, "--list")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        *(f"{name} is CT={name}.nii.gz" for name in "abc"),
        "3 cases; nothing was segmented.",
    ]
    (result,) = invres("segment", "-m", package.path, "-d", folder, "--list", "--json").of("result")
    assert result["cases"][0] == {"name": "a", "inputs": {"CT": str(folder / "a.nii.gz")}}
    assert "--list is for --data" in invres("segment", "-m", package.path, "-i", folder / "a.nii.gz", "--list").err


def test_the_same_command_goes_on_and_does_only_what_is_new(scans, tmp_path):
    folder, package = scans
    output = tmp_path / "out"
    hidden = (folder / "c.nii.gz").rename(tmp_path / "c.nii.gz")
    assert command(folder, package, output).code == 0
    before = stamps(output)
    hidden.rename(folder / "c.nii.gz")
    write_volume(folder / "b.nii.gz", phantom(GRID, 1, 9)[0][0])
    outcome = command(folder, package, output, "--json")
    assert outcome.of("result")[0]["segmented"] == 2
    after = stamps(output)
    assert after["a.nii.gz"] == before["a.nii.gz"], "what was done is left alone"
    assert after["b.nii.gz"] != before["b.nii.gz"], "another image is segmented anew"
    assert set(rows(output)) == {"a", "b", "c"}


def test_a_result_that_was_corrected_by_hand_is_never_overwritten(scans, tmp_path):
    folder, package = scans
    output = tmp_path / "out"
    command(folder, package, output)
    corrected = read_volume(output / "b.nii.gz", kind="labels")
    corrected.array[:] = 7
    write_volume(output / "b.nii.gz", corrected)
    write_volume(folder / "b.nii.gz", phantom(GRID, 1, 9)[0][0])
    outcome = command(folder, package, output)
    assert "b: Its images have changed, but so has b.nii.gz, which is left as it is." in outcome.err
    assert (read_volume(output / "b.nii.gz", kind="labels").array == 7).all()


def test_a_case_that_fails_after_it_was_done_is_done_again_once_it_is_mended(scans, tmp_path):
    folder, package = scans
    output = tmp_path / "out"
    command(folder, package, output)
    good, before = (folder / "b.nii.gz").read_bytes(), (output / "b.nii.gz").read_bytes()
    (folder / "b.nii.gz").write_bytes(good[:300])
    assert command(folder, package, output).code == 2
    assert (output / "b.nii.gz").read_bytes() == before, "the older result stays"
    (folder / "b.nii.gz").write_bytes(good)
    outcome = command(folder, package, output, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.of("result")[0]["segmented"] == 1


def test_a_kill_between_the_result_and_its_record_locks_nobody_out(scans, tmp_path, monkeypatch):
    folder, package = scans
    output = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BatchRecord, "end", killed)
        assert command(folder, package, output).code == 130
    assert set(stamps(output)) == {"a.nii.gz"}
    outcome = command(folder, package, output, "--json")
    assert outcome.code == 0 and outcome.of("result")[0]["segmented"] == 3


@pytest.mark.parametrize("name", ["sub 01.v2", "größe", "a-b_c (1)"])
def test_results_are_called_as_the_images_are(scans, tmp_path, name):
    folder, package = scans
    (folder / "a.nii.gz").rename(folder / f"{name}.nii.gz")
    assert command(folder, package, tmp_path / "out").code == 0
    assert f"{name}.nii.gz" in stamps(tmp_path / "out")
    assert {result_name("a/b", ".nii"), result_name("a?b", ".nii")}.isdisjoint({"a/b.nii", "a?b.nii", "a_b.nii"})


def test_a_table_of_somebody_else_stays(scans, tmp_path):
    folder, package = scans
    (tmp_path / "out").mkdir()
    (tmp_path / "out/volumes.csv").write_text("mine")
    outcome = command(folder, package, tmp_path / "out")
    assert outcome.code == 2 and "volumes.csv is there already, was not written by this command" in outcome.err
    assert (tmp_path / "out/volumes.csv").read_text() == "mine"


def test_the_same_folder_by_another_path_is_the_same(scans, tmp_path, monkeypatch):
    folder, package = scans
    command(folder, package, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    outcome = command("scans", package, "out", "--json")
    assert outcome.of("result")[0]["segmented"] == 0
    assert "with other settings" in command("scans", package, "out", "--ending", ".nrrd").err


def test_a_case_that_fails_is_named_and_the_rest_is_done(scans, tmp_path):
    folder, package = scans
    output = tmp_path / "out"
    good = (folder / "b.nii.gz").read_bytes()
    (folder / "b.nii.gz").write_bytes(b"no image")
    outcome = command(folder, package, output)
    assert outcome.code == 2
    assert "1 of 3 cases could not be segmented: b. The others are in" in outcome.err
    assert set(stamps(output)) == {"a.nii.gz", "c.nii.gz"}
    assert "is not an image that can be read" in rows(output)["b"]["remarks"]
    before = stamps(output)
    (folder / "b.nii.gz").write_bytes(good)
    assert command(folder, package, output).code == 0
    assert stamps(output).items() > before.items()
    assert "is not an image" not in rows(output)["b"]["remarks"]


def test_warnings_are_told_with_their_case_and_kept(scans, tmp_path):
    folder, package = scans
    # The model is one of CT, and these scans have no value of air.
    report = Recorder()
    cases = [CaseInputs(name, {"CT": folder / f"{name}.nii.gz"}) for name in "abc"]
    found = segment_cases(package, cases, tmp_path / "out", report=report)
    said = [event for event in report.events if event["event"] == "warning"]
    assert {event["case"] for event in said} == set(found["warned"]) != set()
    for name in found["warned"]:
        own = [event["message"] for event in said if event["case"] == name]
        assert all(message.startswith(f"{name}: ") for message in own)
        assert rows(tmp_path / "out")[name]["remarks"] == " ".join(m.removeprefix(f"{name}: ") for m in own)
    progress = [event["done"] for event in report.events if event["event"] == "progress"]
    assert progress == [0, 1, 2, 3], "counted in cases"


def test_a_folder_of_another_model_or_of_somebody_else_is_left_alone(scans, tmp_path):
    folder, package = scans
    output = tmp_path / "out"
    command(folder, package, output)
    kept = {path.name: path.read_bytes() for path in output.iterdir()}
    told = command(folder, package, output, "--overlap", "0.25").err
    assert f"{output} holds what known {package.manifest.version} has segmented with other settings." in told
    other = package_of(tmp_path / "other", channels=("CT",), patch=(8, 8, 8))
    assert "has segmented." in command(folder, other, output).err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == kept
    shutil.rmtree(output)
    output.mkdir()
    write_volume(output / "b.nii.gz", Volume(np.zeros(GRID.shape, np.uint8), GRID))
    outcome = command(folder, package, output)
    assert outcome.code == 2 and "b.nii.gz is there already, was not written by this command" in outcome.err
    assert set(stamps(output)) == {"b.nii.gz"}, "nothing is done before that is told"


@pytest.mark.parametrize("where", [".", "inside"])
def test_results_among_the_data_are_refused(scans, where):
    folder, package = scans
    outcome = command(folder, package, folder / where)
    assert outcome.code == 2 and "The results would lie among the data" in outcome.err
    assert sorted(path.name for path in folder.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_a_damaged_record_is_told(scans, tmp_path):
    folder, package = scans
    command(folder, package, tmp_path / "out")
    (tmp_path / "out/segmentations.json").write_text("{")
    assert "segmentations.json is damaged" in command(folder, package, tmp_path / "out").err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Nothing to segment was named. Give the files of one case (--input), or a folder with cases (--data)."),
        (("-d", ".", "-p", "x.nii.gz"), "--probabilities is for one case."),
        (("-d", ".", "-u", "x.nii.gz"), "--uncertainty is for one case."),
        (("-i", "a.nii.gz", "--ending", ".nrrd"), "--ending is for --data"),
    ],
)
def test_options_that_do_not_go_together(scans, tmp_path, arguments, told):
    outcome = invres("segment", "-m", scans[1].path, "-o", tmp_path / "out", *arguments)
    assert outcome.code == 2 and told in outcome.err


def test_real_dicom_series_are_segmented_case_by_case(tmp_path):
    grid = Geometry((6, 20, 24), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    for name in ("one", "two"):
        _write_series(tmp_path / "data" / name, grid)
    package = package_of(tmp_path / "model", patch=(24, 24, 24))
    outcome = command(tmp_path / "data", package, tmp_path / "out", "--ending", ".seg.nrrd")
    assert outcome.code == 0, outcome.err
    for name in ("one", "two"):
        result, series = (
            read_volume(tmp_path / f"out/{name}.seg.nrrd", kind="labels"),
            read_volume(tmp_path / "data" / name),
        )
        assert result.geometry.same_as(series.geometry)
    slice_file = tmp_path / "data/two/3.dcm"
    slice_file.write_bytes(slice_file.read_bytes() + bytes(2))
    outcome = command(tmp_path / "data", package, tmp_path / "out", "--ending", ".seg.nrrd", "--json")
    assert outcome.of("result")[0]["segmented"] == 1, "a slice that was written anew is noticed"


def _write_series(folder: Path, grid: Geometry) -> None:
    folder.mkdir(parents=True)
    slices = np.random.default_rng(1).integers(0, 300, grid.shape).astype(np.int16)
    for number, plane in enumerate(slices):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing([float(mm) for mm in grid.spacing_mm[::-1]])
        place = f"0\\0\\{number * grid.spacing_mm[0]:g}"
        tags = {
            "0008|0060": "CT",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0032": place,
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0018|0050": f"{grid.spacing_mm[0]:g}",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(image)
