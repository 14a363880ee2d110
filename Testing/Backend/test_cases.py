"""Data sets: every layout is recognised by itself, mistakes are told in one sentence, splits go by patient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_datasets import invres

from invres import InvresError
from invres.cases import (
    case_problems,
    described,
    read_dataset,
    split_by_count,
    split_cases,
    write_dataset_json,
    write_splits,
)
from invres.config import Label, LabelScheme
from invres.volume import Geometry, Volume, read_volume, write_segmentation, write_volume

GRID = Geometry((5, 7, 6), (2.5, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3)[:, ::-1])


def put(path, values=None, dtype=np.int16):
    """A small volume file; label files get the given values. Analyze is written by SimpleITK itself."""
    array = np.arange(np.prod(GRID.shape)).reshape(GRID.shape) if values is None else np.zeros(GRID.shape)
    for index, value in enumerate(values or ()):
        array[1, index] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".hdr":
        import SimpleITK

        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.astype(dtype)), str(path.with_suffix(".img")))
    else:
        write_volume(path, Volume(array.astype(dtype), GRID))


def nnunet(folder, labels=None, cases=("a", "b"), channels=("T1", "CT "), **more):
    for case in cases:
        for channel in range(len(channels)):
            put(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        put(folder / "labelsTr" / f"{case}.nii.gz", [1, 2])
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels or {"background": 0, "core": 1, "shell": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def listed(folder, patients):
    """An nnU-Net data set that lists empty files: enough where no volume is opened."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for index, patient in enumerate(patients):
        for kind in ("image", "label"):
            (folder / f"{kind}{index:03d}.nii").touch()
        entries[f"case{index:03d}"] = {
            "images": [f"image{index:03d}.nii"],
            "label": f"label{index:03d}.nii",
            "patient": patient,
        }
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "dataset": entries}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return read_dataset(folder)


@pytest.mark.parametrize("by_file", [True, False])
def test_an_nnunet_folder_is_read_from_its_json_or_its_folder(tmp_path, by_file):
    nnunet(tmp_path)
    dataset = read_dataset(tmp_path / "dataset.json" if by_file else tmp_path)
    assert dataset.layout == "nnU-Net v2"
    assert dataset.modalities == ("MR", "CT")
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert [path.name for path in dataset.cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    assert [(label.name, label.values, label.output_value) for label in dataset.scheme.labels] == [
        ("core", (1,), 1),
        ("shell", (2,), 2),
    ]
    volumes, label = dataset.load(dataset.cases[0])
    assert len(volumes) == 2 and set(np.unique(label.array)) == {0, 1, 2}


def test_nnunet_regions_keep_their_order_and_the_ignore_label(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": "3", "ignore": 4}
    scheme = read_dataset(nnunet(tmp_path, labels, regions_class_order=[1, 2, 3])).scheme
    assert scheme.regions and scheme.ignore_value == 4
    assert [(label.name, label.values, label.output_value) for label in scheme.labels] == [
        ("whole", (1, 2, 3), 1),
        ("core", (2, 3), 2),
        ("enhancing", (3,), 3),
    ]


def test_label_values_with_gaps_and_as_text_are_taken_as_they_are(tmp_path):
    scheme = read_dataset(nnunet(tmp_path, {"background": "0", "white": "250", "grey": 150})).scheme
    assert [(label.name, label.values, label.output_value) for label in scheme.labels] == [
        ("grey", (150,), 150),
        ("white", (250,), 250),
    ]


def test_a_decathlon_folder_has_one_4d_file_per_case(tmp_path):
    import nibabel

    for name in ("a", "b"):
        for kind, shape in (("imagesTr", (6, 7, 5, 2)), ("labelsTr", (6, 7, 5))):
            (tmp_path / kind).mkdir(exist_ok=True)
            array = np.random.default_rng(0).integers(0, 3, shape).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / f"{name}.nii.gz")
    description = {
        "name": "TINY",
        "modality": {"1": "CT", "0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ba"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "Medical Segmentation Decathlon" and dataset.modalities == ("MR", "CT")
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.scheme.names == ("Anterior", "Posterior")
    volumes, label = dataset.load(dataset.cases[0])
    assert len(volumes) == 2 and volumes[0].array.shape == label.array.shape == (5, 7, 6)
    write_dataset_json(dataset, tmp_path / "again.json")
    again = read_dataset(tmp_path / "again.json")
    assert again.channels_in_one_file and [c.name for c in again.cases] == ["a", "b"]


def segmentations(folder, *names):
    """images/ and labels/ with a Slicer segmentation for each pair of names of the values 1 and 2."""
    for number, pair in enumerate(names):
        put(folder / "images" / f"c{number}.nrrd")
        volume = read_volume(folder / "images" / f"c{number}.nrrd")
        array = np.zeros(volume.array.shape, np.uint8)
        array[0], array[1] = 1, 2
        scheme = LabelScheme(tuple(Label(name, (value,), value) for value, name in enumerate(pair, start=1)))
        write_segmentation(folder / "labels" / f"c{number}.seg.nrrd", Volume(array, volume.geometry), scheme)
    return folder


def test_slicers_segmentations_name_their_labels(tmp_path):
    dataset = read_dataset(segmentations(tmp_path, ("hippocampus", "amygdala"), ("Hippocampus ", "amygdala")))
    assert dataset.scheme.names == ("hippocampus", "amygdala")
    assert [label.values for label in dataset.scheme.labels] == [(1,), (2,)]


def test_a_value_that_stands_for_two_structures_is_refused(tmp_path):
    folder = segmentations(tmp_path, ("hippocampus", "amygdala"), ("amygdala", "hippocampus"))
    with pytest.raises(
        InvresError, match=r"1 is hippocampus in labels.c0\.seg\.nrrd and amygdala in labels.c1\.seg\.nrrd"
    ):
        read_dataset(folder)


def test_a_structure_with_two_values_is_refused_and_told_by_its_place(tmp_path):
    folder = segmentations(tmp_path, ("liver", "spleen"), ("tumour", "Liver"))
    for number in range(2):
        case = tmp_path / "cases" / f"c{number}"
        case.mkdir(parents=True)
        (folder / "images" / f"c{number}.nrrd").rename(case / "CT.nrrd")
        (folder / "labels" / f"c{number}.seg.nrrd").rename(case / "label.seg.nrrd")
    # Value 1 comes first; without that only the name is left to speak of.
    with pytest.raises(InvresError, match=r"1 is liver in c0.label\.seg\.nrrd and tumour in c1.label\.seg\.nrrd"):
        read_dataset(tmp_path / "cases")
    other = segmentations(tmp_path / "other", ("Segment_1", "Liver"), ("liver", "Segment"))
    with pytest.raises(InvresError, match=r"liver has the label value 2 in labels.c0.* and 1 in labels.c1"):
        read_dataset(other)


def test_what_slicer_calls_a_segment_without_a_name_is_no_name(tmp_path):
    assert read_dataset(segmentations(tmp_path, ("Segment_1", "Segment_2"))).scheme.names == ("label_1", "label_2")
    mixed = segmentations(tmp_path / "mixed", ("Segment_1", "Segment_2"), ("liver", "Segment 3"))
    assert read_dataset(mixed).scheme.names == ("liver", "label_2")


@pytest.mark.parametrize("sessions", [["ses-1", "ses-2"], [""]])
@pytest.mark.parametrize("derived", [True, False])
def test_bids_subjects_are_patients_and_names_come_from_the_table(tmp_path, sessions, derived):
    for subject in ("sub-01", "sub-02"):
        for session in sessions:
            name = "_".join(part for part in (subject, session) if part)
            anat = tmp_path / subject / session / "anat"
            put(anat / f"{name}_T1w.nii.gz")
            put(anat / f"{name}_FLAIR.nii.gz")
            where = tmp_path / "derivatives" / "manual" / subject / session / "anat" if derived else anat
            put(where / f"{name}_dseg.nii.gz", [3])
    (tmp_path / "derivatives").mkdir(exist_ok=True)
    (tmp_path / "manual_dseg.tsv").write_text("index\tname\n0\tBackground\n3\tLesion\n", encoding="utf-8")
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "BIDS derivatives" and dataset.channel_names == ("FLAIR", "T1w")
    assert len(dataset.cases) == 2 * len(sessions) == len(dataset.labelled_cases)
    assert {case.patient for case in dataset.cases} == {"sub-01", "sub-02"}
    assert [(label.name, label.values) for label in dataset.scheme.labels] == [("Lesion", (3,))]


@pytest.mark.parametrize("prefix", ["", "{}_", "{}-"])
@pytest.mark.parametrize("label", ["label", "seg", "Segmentation", "labels"])
def test_a_folder_per_case_is_read_with_its_label_values(tmp_path, label, prefix):
    for case in ("anna", "bert"):
        for channel in ("T2", "T1"):
            put(tmp_path / case / f"{prefix.format(case)}{channel}.nii.gz")
    put(tmp_path / "bert" / f"{prefix.format('bert')}{label}.nrrd", [7, 2])
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "a folder per case" and dataset.channel_names == ("T1", "T2")
    assert [case.label is None for case in dataset.cases] == [True, False]
    assert [(entry.name, entry.values) for entry in dataset.scheme.labels] == [("label_2", (2,)), ("label_7", (7,))]


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr")])
@pytest.mark.parametrize("named", [True, False])
def test_a_pair_of_folders_is_read_with_or_without_names(tmp_path, folders, named):
    for case in ("a", "b"):
        put(tmp_path / folders[0] / f"{case}.nii.gz")
        put(tmp_path / folders[1] / f"{case}.nii.gz", [1, 4])
    (tmp_path / folders[0] / "._a.nii.gz").write_bytes(b"macOS leftover")
    if named:
        (tmp_path / "labels.json").write_text('{"1": "anterior", "4": "posterior"}')
    dataset = read_dataset(tmp_path)
    assert len(dataset.cases) == 2 and dataset.channel_names == ("image",)
    assert dataset.scheme.names == (("anterior", "posterior") if named else ("label_1", "label_4"))


@pytest.mark.parametrize("kind", [np.uint8, np.int16])
def test_a_label_value_of_one_case_in_thirty_is_found(tmp_path, kind):
    for number in range(30):
        put(tmp_path / f"c{number:02d}" / "T1.nii.gz")
        put(tmp_path / f"c{number:02d}" / "label.nii.gz", [1, 2] if number == 14 else [1], kind)
    assert read_dataset(tmp_path).scheme.names == ("label_1", "label_2")


@pytest.mark.parametrize("ending", [".hdr", ".nii", ".nii.gz"])
def test_iseg_is_known_by_its_file_names(tmp_path, ending):
    for subject in (1, 2, 10):
        for channel in ("T1", "T2"):
            put(tmp_path / f"subject-{subject}-{channel}{ending}")
        if subject != 10:
            put(tmp_path / f"subject-{subject}-label{ending}", [10, 150, 250], np.uint8)
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "iSeg" and dataset.channel_names == ("T1", "T2")
    assert [(label.name, label.values[0]) for label in dataset.scheme.labels] == [("CSF", 10), ("GM", 150), ("WM", 250)]
    assert {case.name: case.label is not None for case in dataset.cases} == {
        "subject-1": True,
        "subject-10": False,
        "subject-2": True,
    }
    volumes, label = dataset.load(dataset.cases[0])
    assert len(volumes) == 2 and set(np.unique(label.array)) == {0, 10, 150, 250}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_brats_has_four_channels_and_three_regions(tmp_path, ending):
    for case, label in (("BraTS20_Training_001", "BraTS20_Training_001_seg"), ("BraTS20_Training_355", "W39_Segm")):
        for channel in ("t1", "t1ce", "t2", "flair"):
            put(tmp_path / case / f"{case}_{channel}{ending}")
        put(tmp_path / case / f"{label}{ending}", [1, 2, 4])
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "BraTS 2020" and dataset.channel_names == ("T1", "T1ce", "T2", "FLAIR")
    assert len(dataset.labelled_cases) == 2 and dataset.scheme.regions
    assert [(label.values, label.output_value) for label in dataset.scheme.labels] == [
        ((1, 2, 4), 2),
        ((1, 4), 1),
        ((4,), 4),
    ]


def test_brats_2023_has_the_channels_and_regions_of_2020_and_visits_of_patients(tmp_path):
    for name in ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-MET-00002-000"):
        for channel in ("t1n", "t1c", "t2w", "t2f"):
            put(tmp_path / name / f"{name}-{channel}.nii.gz")
        if "MET" not in name:
            put(tmp_path / name / f"{name}-seg.nii.gz", [1, 2, 3])
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "BraTS 2023" and dataset.channel_names == ("T1", "T1ce", "T2", "FLAIR")
    endings = [path.name.rpartition("-")[2] for path in dataset.cases[0].images]
    assert endings == ["t1n.nii.gz", "t1c.nii.gz", "t2w.nii.gz", "t2f.nii.gz"]
    assert [case.patient for case in dataset.cases] == ["BraTS-GLI-00001", "BraTS-GLI-00001", "BraTS-MET-00002"]
    assert len(dataset.labelled_cases) == 2 and dataset.scheme.regions
    assert [(label.name, label.values, label.output_value) for label in dataset.scheme.labels] == [
        ("whole_tumour", (1, 2, 3), 2),
        ("tumour_core", (1, 3), 1),
        ("enhancing_tumour", (3,), 3),
    ]


def test_other_cases_of_brats_are_folders_with_the_values_found(tmp_path):
    put(tmp_path / "BraTS-PED-00001-000" / "BraTS-PED-00001-000-t1n.nii.gz")
    put(tmp_path / "BraTS-PED-00001-000" / "BraTS-PED-00001-000-seg.nii.gz", [1, 4])
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "a folder per case" and dataset.channel_names == ("t1n",)
    assert dataset.scheme.names == ("label_1", "label_4")


def test_kits_is_ct_and_its_test_cases_have_no_label(tmp_path):
    put(tmp_path / "case_00000" / "imaging.nii.gz")
    put(tmp_path / "case_00000" / "segmentation.nii.gz", [1, 2])
    put(tmp_path / "case_00210" / "imaging.nii.gz")
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "KiTS19" and dataset.modalities == ("CT",)
    assert dataset.scheme.names == ("kidney", "tumour")
    assert [case.name for case in dataset.labelled_cases] == ["case_00000"]


def test_hcp_has_t1_and_t2_with_the_cortical_ribbon(tmp_path):
    for subject in ("100307", "100408", "101006"):
        put(tmp_path / subject / "T1w" / "T1w_acpc_dc_restore.nii.gz")
        put(tmp_path / subject / "T1w" / "T1w_acpc_dc_restore_brain.nii.gz")
        put(tmp_path / subject / "T1w" / "T2w_acpc_dc_restore.nii.gz")
        put(tmp_path / subject / "T1w" / "ribbon.nii.gz", [2, 3, 41, 42])
    (tmp_path / "101006" / "T1w" / "ribbon.nii.gz").unlink()
    put(tmp_path / "100307" / "MNINonLinear" / "T1w_restore.nii.gz")
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "HCP" and dataset.channel_names == ("T1", "T2")
    assert [case.name for case in dataset.cases] == ["100307", "100408", "101006"]
    assert [case.name for case in dataset.labelled_cases] == ["100307", "100408"]
    assert [path.name for path in dataset.cases[0].images] == [
        "T1w_acpc_dc_restore.nii.gz",
        "T2w_acpc_dc_restore.nii.gz",
    ]
    images, label = dataset.load(dataset.cases[0])
    assert len(images) == 2 and set(label.array[label.array > 0]) == {2, 3, 41, 42}
    assert [found.output_value for found in dataset.scheme.labels] == [2, 3, 41, 42]


def test_hcp_subject_without_t2_is_named(tmp_path):
    for subject in ("100307", "100408"):
        put(tmp_path / subject / "T1w" / "T1w_acpc_dc_restore.nii.gz")
        put(tmp_path / subject / "T1w" / "T2w_acpc_dc_restore.nii.gz")
    (tmp_path / "100408" / "T1w" / "T2w_acpc_dc_restore.nii.gz").unlink()
    with pytest.raises(InvresError, match="The case 100408 has no file of T2"):
        read_dataset(tmp_path)
    dataset = read_dataset(tmp_path, partial=True)
    assert dataset.channel_names == ("T1", "T2") and dataset.cases[1].images[1] is None


def break_json(folder):
    (folder / "dataset.json").write_text("{not json")


def break_nothing_known(folder):
    (folder / "dataset.json").unlink()
    for sub in ("imagesTr", "labelsTr"):
        for file in (folder / sub).iterdir():
            file.unlink()
        (folder / sub).rmdir()


def break_missing_label(folder):
    (folder / "labelsTr" / "b.nii.gz").unlink()


def break_missing_image(folder):
    for file in (folder / "imagesTr").glob("b_*"):
        file.unlink()


def break_missing_channel(folder):
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()


def break_channel_count(folder):
    put(folder / "imagesTr" / "b_0002.nii.gz")


def break_no_case(folder):
    for file in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        file.unlink()


def edit(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (break_json, "not readable JSON"),
        (break_nothing_known, "No data set format was recognised"),
        (break_missing_label, "label file .* does not exist"),
        (break_missing_image, "image file .*b_0000.nii.gz of b does not exist"),
        (break_missing_channel, "image file .*b_0001.nii.gz of b does not exist"),
        (break_channel_count, r"b has 3 image files \(b_0000.nii.gz, b_0001.nii.gz, b_0002.nii.gz\)"),
        (break_no_case, "has no training case"),
        (lambda f: edit(f, channel_names={}), "must number the channels"),
        (lambda f: edit(f, labels={"x": 1, "y": 1}), "value 1 stands for x and y"),
        (lambda f: edit(f, labels={"x": 1.5}), "whole number"),
        (lambda f: edit(f, labels={"x": [1, 2], "y": 2}), "regions_class_order"),
        (lambda f: edit(f, dataset={"a": ["x.nii"]}), "list `images`"),
        (lambda f: (f / "dataset.json").write_text("[1]"), "neither"),
        (lambda f: (f / "dataset.json").write_text('{"labels": {"x": 1, "x": 2}}'), "'x' twice"),
    ],
)
def test_a_mistake_is_one_sentence_with_a_next_step(tmp_path, break_it, words):
    break_it(nnunet(tmp_path))
    with pytest.raises(InvresError, match=words) as caught:
        read_dataset(tmp_path)
    assert caught.value.hint


def test_a_path_that_is_no_data_set_is_told(tmp_path):
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path / "notes.txt", tmp_path / "absent"):
        with pytest.raises(InvresError, match="no data set"):
            read_dataset(path)


def test_a_case_name_given_twice_is_told(tmp_path):
    for name in ("a.nii.gz", "a.nrrd"):
        put(tmp_path / "images" / name)
    with pytest.raises(InvresError, match="a occurs 2 times"):
        read_dataset(tmp_path)


def lacking(folder, sets, bids=False):
    """A data set with a case for each set of channels, as folders or as BIDS."""
    for index, channels in enumerate(sets):
        name = f"sub-{index:02d}"
        for channel in channels:
            put(folder / name / "anat" / f"{name}_{channel}.nii.gz" if bids else folder / name / f"{channel}.nii.gz")
    return read_dataset(folder, checked=False)


@pytest.mark.parametrize("bids", [True, False])
def test_a_channel_that_cases_lack_is_none_and_the_channels_are_all_that_there_are(tmp_path, bids):
    """The most frequent set of channels is not the whole one, and no case has them all."""
    sets = (["T1w"], ["T1w", "T2w"], ["FLAIR", "T1w"], ["T1w"], ["FLAIR", "T1w"], ["T2w"])
    dataset = lacking(tmp_path, sets, bids)
    assert dataset.channel_names == ("FLAIR", "T1w", "T2w")
    for case, channels in zip(dataset.cases, sets, strict=True):
        names = [None if image is None else image.name.split("_")[-1].split(".")[0] for image in case.images]
        assert names == [name if name in channels else None for name in dataset.channel_names]
    with pytest.raises(InvresError, match="The case sub-00 has no file of FLAIR") as caught:
        read_dataset(tmp_path)
    assert "--channel-dropout" in caught.value.hint
    volumes, _ = read_dataset(tmp_path, partial=True).load(dataset.cases[1])
    assert [volume is None for volume in volumes] == [True, False, False]


@pytest.mark.parametrize(
    ("sets", "channels"),
    [
        ([["T1", "T2"], ["T1"], ["T1"], ["T1"]], ("T1", "T2")),
        ([["T1", "t2"], *[["T1", "T2"]] * 4], ("T1", "T2")),
        ([["T1", "old"], ["T1", "old"], *[["T1"]] * 39], ("T1",)),
        ([["T1", "T2"], ["T1", "T2"], *[["T1"]] * 38], ("T1", "T2")),
        ([["a"], ["b"], ["c"], ["d"], ["e"]], ("a",)),
    ],
)
def test_what_hardly_any_case_has_is_no_channel_and_is_named_with_its_case(tmp_path, sets, channels):
    dataset = lacking(tmp_path, sets)
    assert dataset.channel_names == channels
    too_many = {name for name, code, _ in case_problems(dataset, partial=True) if code == "channel_count"}
    assert too_many == {f"sub-{index:02d}" for index, names in enumerate(sets) if set(names) - set(channels)}


def test_check_tells_which_channel_is_missing_where(tmp_path):
    lacking(tmp_path, (["T1"], ["T1", "T2"], ["T1", "T2"]))
    outcome = invres("check", "--data", tmp_path, "--json")
    assert outcome.of("result")[0]["contents"]["cases"][0]["images"][1] is None
    messages = [one["message"] for one in outcome.of("result")[0]["findings"] if one["code"] == "missing_channel"]
    assert messages == ["The case sub-00 has no file of T2."]
    assert "Channels: T1, T2 (in 2 of 3 cases)." in invres("check", "--data", tmp_path).out


def test_two_images_of_one_channel_are_told(tmp_path):
    for run in ("run-1", "run-2"):
        put(tmp_path / "sub-1" / "anat" / f"sub-1_{run}_T1w.nii.gz")
    with pytest.raises(InvresError, match="two T1w files"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("regions", [True, False])
def test_a_written_dataset_json_gives_the_same_data_set_back(tmp_path, regions):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 5} if regions else None
    dataset = read_dataset(nnunet(tmp_path / "söurce", labels, regions_class_order=[1, 2]))
    target = tmp_path / "other" / "dataset.json"
    target.parent.mkdir()
    write_dataset_json(dataset, target)
    again = read_dataset(target)
    assert again.scheme == dataset.scheme and again.channel_names == dataset.channel_names
    for mine, theirs in zip(again.cases, dataset.cases, strict=True):
        assert mine.name == theirs.name and mine.label.resolve() == theirs.label.resolve()
    assert [file.name for file in target.parent.iterdir()] == ["dataset.json"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 11])
def test_folds_cover_each_case_once_and_never_share_a_patient(tmp_path, count):
    patients = [f"p{index // 2}" for index in range(2 * count)]
    dataset = listed(tmp_path, patients)
    folds = min(5, count)
    seen = []
    for fold in range(folds):
        train, validation = split_cases(dataset, seed=3, fold=fold)
        assert train and validation
        assert {dataset.case(n).patient for n in train}.isdisjoint(dataset.case(n).patient for n in validation)
        assert len(train) + len(validation) == 2 * count
        seen += validation
    assert sorted(seen) == [case.name for case in dataset.cases]
    with pytest.raises(InvresError, match=f"no fold {folds}"):
        split_cases(dataset, fold=folds)
    if count <= 4:
        assert len({dataset.case(n).patient for n in validation}) == 1


def test_splits_follow_the_seed(tmp_path):
    dataset = listed(tmp_path, [f"p{i}" for i in range(20)])
    assert split_cases(dataset, seed=1) == split_cases(dataset, seed=1) != split_cases(dataset, seed=2)


def test_seed_12345_repeats_nnunets_split(tmp_path):
    sklearn = pytest.importorskip("sklearn.model_selection")
    dataset = listed(tmp_path, [f"p{i:02d}" for i in range(13)])
    names = np.array([case.name for case in dataset.cases])
    kfold = sklearn.KFold(n_splits=5, shuffle=True, random_state=12345)
    for fold, (train, validation) in enumerate(kfold.split(names)):
        assert split_cases(dataset, seed=12345, fold=fold) == (tuple(names[train]), tuple(names[validation]))


def test_a_single_case_trains_and_validates_on_itself(tmp_path):
    assert split_cases(listed(tmp_path, ["p"])) == (("case000",), ("case000",))


def test_a_splits_file_is_used_as_it_is(tmp_path):
    dataset = listed(tmp_path, ["p", "q", "r"])
    (tmp_path / "splits_final.json").write_text('[{"train": ["case002"], "val": ["case000"]}]')
    assert split_cases(dataset, seed=9) == (("case002",), ("case000",))
    (tmp_path / "splits_final.json").write_text('[{"train": ["case002"], "val": ["gone"]}]')
    with pytest.raises(InvresError, match="'gone'"):
        split_cases(dataset)
    (tmp_path / "splits_final.json").write_text('[{"train": ["case002", "case000"], "val": ["case000"]}]')
    with pytest.raises(InvresError, match="patient p on both sides"):
        split_cases(dataset)
    (tmp_path / "splits_final.json").write_text('{"train": []}')
    with pytest.raises(InvresError, match="must be a list"):
        split_cases(dataset)


def test_written_splits_are_the_splits(tmp_path):
    dataset = listed(tmp_path, [f"p{i}" for i in range(7)])
    before = [split_cases(dataset, seed=4, fold=fold) for fold in range(5)]
    write_splits(dataset, tmp_path, seed=4)
    assert [split_cases(dataset, seed=0, fold=fold) for fold in range(5)] == before


def test_cases_without_a_label_are_never_split(tmp_path):
    put(tmp_path / "a" / "T1.nii.gz")
    dataset = read_dataset(tmp_path)
    assert dataset.labelled_cases == () and dataset.scheme.labels == ()
    with pytest.raises(InvresError, match="no case with a label"):
        split_cases(dataset)


def test_a_count_split_takes_whole_patients(tmp_path):
    dataset = listed(tmp_path, ["p", "p", "q", "q", "r", "r"])
    train, validation = split_by_count(dataset, 1, seed=0)
    assert len(train) == 4 and len(validation) == 2
    for count in (0, 6, 5):
        with pytest.raises(InvresError, match="validation"):
            split_by_count(dataset, count)


def test_the_hippocampus_data_are_recognised_and_split(data_dir):
    dataset = read_dataset(data_dir / "hippocampus_msd")
    assert dataset.layout == "images and labels folders" and len(dataset.cases) == 200
    assert [label.values for label in dataset.scheme.labels] == [(1,), (2,)]
    train, validation = split_by_count(dataset, 40, seed=0)
    assert (len(train), len(validation)) == (160, 40) and not set(train) & set(validation)
    assert (train, validation) == split_by_count(dataset, 40, seed=0) != split_by_count(dataset, 40, seed=1)


def test_a_data_set_is_described_for_programs_with_files_that_are_there(tmp_path):
    nnunet(tmp_path / "a b", labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    dataset = read_dataset(tmp_path / "a b")
    found = json.loads(json.dumps(described(dataset)))
    assert [tuple(channel.values()) for channel in found["channels"]] == [("T1", "MR"), ("CT", "CT")]
    assert found["regions"] and found["labels"][0] == {"name": "whole", "values": [1, 2], "output_value": 1}
    assert [case["name"] for case in found["cases"]] == ["a", "b"] and found["splits"] == []
    split = [{"train": ["a"], "val": ["b"]}]
    (dataset.root / "splits_final.json").write_text(json.dumps(split), encoding="utf-8")
    assert described(dataset)["splits"] == split
    (dataset.root / "splits_final.json").write_text("[", encoding="utf-8")
    assert described(dataset)["splits"] == []
    files = [Path(file) for case in found["cases"] for file in (*case["images"], case["label"])]
    assert len(files) == 6 and all(file.is_absolute() and file.is_file() for file in files)
