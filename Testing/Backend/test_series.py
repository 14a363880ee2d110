"""Series of frames: each is segmented as if it had come alone, and the result is one 4D label map, or nothing."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_inference import SCHEME, Known, package_of, steps_volume
from test_sides import BRAIN, BRAIN_SIDES
from tiny_datasets import BACKEND, GRIDS, invres

from invres import Cancelled, InvresError
from invres.config import ChannelPlan
from invres.events import Recorder, Reporter
from invres.expectation import Expectation
from invres.files import WRITABLE_ENDINGS
from invres.frames import frames_in_words, open_series
from invres.image_header import TimeAxis
from invres.inference import NetworkKeeper, segment
from invres.prediction import SegmentOptions
from invres.series import segment_series
from invres.volume import Geometry, Volume, read_channels, read_geometry, read_volume, write_series, write_volume
from invres.volume_io import read_header

CPU = SegmentOptions(device="cpu")
VALUES = np.array([0, *(label.output_value for label in SCHEME.labels)], np.uint8)
TIME = TimeAxis(0.25, 0.04)


class Knowing(NetworkKeeper):
    """Gives the network that knows the answer, and counts how often it was asked for."""

    def __init__(self, classes=4):
        super().__init__()
        self.known, self.asked = Known(classes), 0

    def network(self, *_):
        self.asked += 1
        return self.known


def cine(path, frames, grid=GRIDS[0], time=TIME):
    write_series(path, np.stack(frames), grid, time)
    return path


def steps(count, grid=GRIDS[0], seed=0):
    return [steps_volume(grid, seed=seed + number)[0].array.astype(np.int16) for number in range(count)]


def package_on(path, grid=GRIDS[0], **fields):
    """One that resamples nothing of this grid, so that a result is known to the voxel."""
    return package_of(path, spacing_mm=grid.canonical().spacing_mm, **fields)


def labels_of(path):
    return [volume.array for volume in read_channels(path)]


def warnings(recorder):
    return [event["message"] for event in recorder.events if event["event"] == "warning"]


@pytest.mark.parametrize(("grid", "ending"), list(zip((*GRIDS, GRIDS[1]), WRITABLE_ENDINGS, strict=True)))
def test_each_frame_is_segmented_as_if_it_had_come_alone(tmp_path, grid, ending):
    package = package_on(tmp_path / "m", grid)
    frames = steps(3, grid)
    source = cine(tmp_path / f"cine{ending}", frames, grid)
    keeper, report = Knowing(), Recorder()
    found = segment_series(
        package, {"": source}, tmp_path / f"o{ending}", CPU, tmp_path / "v.csv", report, keeper=keeper
    )
    assert keeper.asked == 1, "the network is loaded once"
    header = read_header(found["output"])
    assert header.count == 3 and read_geometry(found["output"]).same_as(read_geometry(source))
    assert header.time.step == pytest.approx(0.04) and header.time.start == pytest.approx(0.25)
    timed = ending.startswith(".nii")
    for number, (frame, labels) in enumerate(zip(frames, labels_of(found["output"]), strict=True)):
        write_volume(tmp_path / f"one{ending}", Volume(frame, grid))
        alone = segment(
            package, {"CT": tmp_path / f"one{ending}"}, tmp_path / "one_o.nii.gz", CPU, network=keeper.known
        )
        assert np.array_equal(labels, read_volume(alone["output"], kind="labels").array)
        assert np.array_equal(labels, VALUES[frame // 100])
        record = found["frames"][number]
        assert record["frame"] == number + 1 and record["volumes_ml"] == alone["volumes_ml"]
        assert record["confidence"] == alone["confidence"]
        assert record["time_s"] == (pytest.approx(0.25 + 0.04 * number) if timed else None)
    assert labels_of(found["output"])[0].dtype == np.uint8
    rows = list(csv.DictReader((tmp_path / "v.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert [row["frame"] for row in rows] == ["1", "2", "3"] and ("time (s)" in rows[0]) == timed
    assert [float(row["a (mL)"]) for row in rows] == [frame["volumes_ml"]["a"] for frame in found["frames"]]
    assert found["settings"]["frames"] == 3 and found["settings"]["windows"] == len(keeper.known.windows) // 2
    assert found["confidence"] == min(frame["confidence"] for frame in found["frames"])


def test_a_3d_channel_serves_every_frame_and_one_that_is_missing_none(tmp_path):
    package = package_on(tmp_path / "m", channels=("A", "B", "C"))
    plan = package.manifest.plan
    channels = tuple(dataclasses.replace(one, optional=one.name != "A") for one in plan.channels)
    plan = dataclasses.replace(plan, channels=channels)
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, plan=plan))
    still, moving = steps(1, seed=5)[0], steps(4)
    write_volume(tmp_path / "still.nii.gz", Volume(still, GRIDS[0]))
    inputs = {"a": tmp_path / "still.nii.gz", "B": cine(tmp_path / "cine.nrrd", moving)}
    seen, report = [], Recorder()

    class Seeing(Known):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    keeper = Knowing()
    keeper.known = Seeing(4)
    options = dataclasses.replace(CPU, window=(32, 32, 32))
    found = segment_series(package, inputs, tmp_path / "o.nii.gz", options, None, report, keeper=keeper)
    assert len(found["frames"]) == 4 and found["missing_channels"] == ["C"]
    assert [event["message"] for event in report.events if event["event"] == "note"] == [
        "There is no C; the model was trained to do without."
    ], "once for all frames"
    assert all(np.array_equal(labels, VALUES[still // 100]) for labels in labels_of(found["output"]))
    sums = [float(x[0, 1].sum()) for x in seen]
    assert len(set(sums)) == 4 and all(float(x[0, 2].abs().sum()) == 0 for x in seen)


def test_a_volume_sequence_of_slicer_is_read(tmp_path):
    """Slicer lists the frames of a voxel beside one another, which ITK takes for a vector."""
    frames = steps(3)
    image = sitk.GetImageFromArray(np.moveaxis(np.stack(frames), 0, -1), isVector=True)
    write_volume(tmp_path / "one.nrrd", Volume(frames[0], GRIDS[0]))
    image.CopyInformation(sitk.ReadImage(str(tmp_path / "one.nrrd")))
    sitk.WriteImage(image, str(tmp_path / "cine.seq.nrrd"))
    package = package_on(tmp_path / "m")
    found = segment_series(package, {"CT": tmp_path / "cine.seq.nrrd"}, tmp_path / "o.nii.gz", CPU, keeper=Knowing())
    for frame, labels in zip(frames, labels_of(found["output"]), strict=True):
        assert np.array_equal(labels, VALUES[frame // 100])


@pytest.mark.parametrize("unit", [("ms", 16, 1000), ("s", 8, 1), ("none", 0, 1)])
def test_the_time_of_a_nifti_file_is_that_of_its_unit(tmp_path, unit):
    _, code, factor = unit
    path = cine(tmp_path / "c.nii", steps(2))
    raw = bytearray(path.read_bytes())
    raw[92:96] = np.float32(0.04 * factor).tobytes()
    raw[136:140] = np.float32(0.25 * factor).tobytes()
    raw[123] = 2 | code
    path.write_bytes(raw)
    time_axis = read_header(path).time
    assert time_axis.in_seconds == bool(code)
    assert (time_axis.start, time_axis.step) == (pytest.approx(0.25), pytest.approx(0.04))
    raw[92:96] = np.float32(0).tobytes()
    path.write_bytes(raw)
    assert read_header(path).time.step == 1.0, "many files leave it out"
    assert not read_header(path).time.in_seconds, "a second that no file names is no time"


def test_warnings_are_told_once_for_all_frames_that_they_are_true_of(tmp_path):
    package = package_of(tmp_path / "m")
    expected = Expectation({"a": [100.0, 200.0]})
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, expected=expected))
    frames = [frame.astype(np.float32) for frame in steps(5)]
    frames[1][:] = 7
    frames[3][0, 0, 0] = np.nan
    report = Recorder()
    source = cine(tmp_path / "cine2024.nii.gz", frames)
    found = segment_series(package, {"": source}, tmp_path / "o.nii.gz", CPU, tmp_path / "v.csv", report, Knowing())
    told = warnings(report)
    assert len(told) == 4, told
    assert told[0].startswith("All 5 frames: The image for CT does not look like CT")
    assert told[1].startswith("Frames 1 and 3 to 5: Unusual volumes: a ")
    assert told[1].endswith("The figures are those of frame 1.")
    assert told[2].startswith("Frame 2: There is nothing to segment in the CT volume")
    assert told[2].endswith("The frame was left empty.")
    assert told[3].startswith("Frame 4: cine2024.nii.gz: 1 voxels are NaN")
    assert not labels_of(found["output"])[1].any() and labels_of(found["output"])[2].any()
    empty = found["frames"][1]
    assert empty["volumes_ml"] == {} and empty["confidence"] is None and found["confidence"] > 0
    row = list(csv.reader((tmp_path / "v.csv").read_text(encoding="utf-8-sig").splitlines()))[2]
    assert row[:3] == ["2", "0.29", ""] and "left empty" in row[-1]


def test_what_is_said_of_two_channels_or_of_a_whole_file_is_not_taken_for_one_thing(tmp_path):
    package = package_of(tmp_path / "m", channels=("T1", "T2"))
    moving = [frame.astype(np.float32) for frame in steps(3)]
    moving[1][0, 0, 0] = np.nan
    source = cine(tmp_path / "mo ving2.nii", moving)
    still = tmp_path / "still.nii"
    write_volume(still, Volume(moving[1], GRIDS[0]))
    for path in (source, still):
        raw = bytearray(path.read_bytes())
        raw[252:256] = bytes(4)  # neither qform nor sform
        path.write_bytes(raw)
    report = Recorder()
    found = segment_series(package, {"T1": source, "T2": still}, tmp_path / "o.nii", CPU, None, report, Knowing())
    told = warnings(report)
    for beginning in (
        "All 3 frames: mo ving2.nii: the header does not say how the image lies",
        "Frame 2: mo ving2.nii: 1 voxels are NaN",
        "All 3 frames: still.nii: the header does not say how the image lies",
        "All 3 frames: still.nii: 1 voxels are NaN",
        "All 3 frames: The image for T1 does not look like CT",
        "All 3 frames: The image for T2 does not look like CT",
    ):
        assert sum(text.startswith(beginning) for text in told) == 1, (beginning, told)
    assert [len(frame["warnings"]) for frame in found["frames"]] == [5, 6, 5]


def test_a_series_in_which_no_frame_shows_anything_is_refused(tmp_path):
    source = cine(tmp_path / "c.nii.gz", [np.zeros(GRIDS[0].shape, np.int16)] * 2)
    with pytest.raises(InvresError, match="There is nothing to segment"):
        segment_series(package_of(tmp_path / "m"), {"": source}, tmp_path / "o.nii.gz", CPU, keeper=Knowing())
    assert not (tmp_path / "o.nii.gz").exists()


def test_left_and_right_are_apart_in_all_frames_or_in_none(tmp_path):
    """Else a value would stand for one side in one frame and for both in the next."""
    values = [label.output_value for label in BRAIN.labels]
    names = {label.name: number + 1 for number, label in enumerate(BRAIN.labels)}
    grid = Geometry((20, 25, 20), (6, 6, 6), (-60, -75, -60), np.eye(3)[:, ::-1])
    head = np.zeros(grid.shape, np.int16)
    d, h, right = np.meshgrid(*(2 * np.arange(size) - size + 1 for size in grid.shape), indexing="ij")
    head[(d / 15) ** 2 + (h / 20) ** 2 + (right / 16) ** 2 < 1] = names["cerebral cortex"]
    head[(d / 12) ** 2 + (h / 17) ** 2 + (right / 13) ** 2 < 1] = names["cerebral white matter"]
    head[(d / 4) ** 2 + (h / 6) ** 2 + ((abs(right) - 5) / 2) ** 2 < 1] = names["lateral ventricle"]
    head[(d / 3) ** 2 + (h / 5) ** 2 + (right / 1.2) ** 2 < 1] = names["third ventricle"]
    shapeless = np.random.default_rng(0).permutation(head.ravel()).reshape(head.shape)
    package = package_on(tmp_path / "m", grid, scheme=BRAIN, patch=(20, 25, 20))
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, sides=BRAIN_SIDES))
    keeper = Knowing(len(values) + 1)
    run = {"options": CPU, "keeper": keeper}
    report = Recorder()
    source = cine(tmp_path / "d.nii", [100 * head, 100 * shapeless], grid)
    found = segment_series(package, {"": source}, tmp_path / "b.nii", report=report, **run)
    told = warnings(report)
    assert any(text.startswith("Frame 2: Left and right could not be told") for text in told)
    assert "Frame 1: Left and right were put into one label here, too, so that all frames are alike." in told
    assert "Left and right were put into one label" in found["frames"][0]["warnings"][-1]
    table = np.array([0, *values])
    for labels, frame in zip(labels_of(found["output"]), (head, shapeless), strict=True):
        assert np.array_equal(labels, table[frame])
    assert list(found["frames"][0]["volumes_ml"]) == list(found["frames"][1]["volumes_ml"]) == list(BRAIN.names)
    for name in ("cerebral cortex", "third ventricle"):
        assert found["frames"][0]["volumes_ml"][name] == pytest.approx((head == names[name]).sum() * 0.216, abs=0.002)


@pytest.mark.parametrize(
    ("frames", "count", "words"),
    [
        ([3], 9, "Frame 3"),
        ([3, 7], 9, "Frames 3 and 7"),
        ([1, 3, 4, 7, 8, 9], 10, "Frames 1, 3, 4 and 7 to 9"),
        ([1, 2, 3], 3, "All 3 frames"),
        ([2, 3, 4], 5, "Frames 2 to 4"),
    ],
)
def test_frames_are_named_in_runs(frames, count, words):
    assert frames_in_words(frames, count) == words


def test_progress_is_that_of_all_frames_and_never_goes_back(tmp_path):
    report = Recorder()
    package = package_of(tmp_path / "m")
    segment_series(package, {"": cine(tmp_path / "c.nii", steps(4))}, tmp_path / "o.nii", CPU, None, report, Knowing())
    events = [event for event in report.events if event["event"] == "progress"]
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == ["segment.read", "segment.tiles", "segment.write"]
    parts = [event["done"] / event["total"] for event in events if event["stage"] == "segment.tiles"]
    assert parts == sorted(parts) and parts[-1] == 1.0
    assert any(0.3 < part < 0.4 for part in parts), "also within a frame"


class CancelledAt(Reporter):
    """Ends a run at its progress event of this part, as the worker does."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def emit(self, event):
        in_frames = event["event"] == "progress" and event["stage"] == "segment.tiles"
        if in_frames and event["done"] >= self.part * event["total"]:
            raise Cancelled()


@pytest.mark.parametrize("part", [0, 0.6, 1])
def test_a_series_that_is_cancelled_leaves_nothing(tmp_path, part):
    source = cine(tmp_path / "c.nii", steps(3))
    package = package_of(tmp_path / "m")
    (tmp_path / "o").mkdir()
    with pytest.raises(Cancelled):
        segment_series(
            package, {"": source}, tmp_path / "o/o.nii.gz", CPU, tmp_path / "o/v.csv", CancelledAt(part), Knowing()
        )
    assert list((tmp_path / "o").iterdir()) == []


def test_frames_of_a_nifti_file_are_held_one_at_a_time(tmp_path):
    grid = Geometry((64, 128, 128), (1, 1, 1), (0, 0, 0), np.eye(3)[:, ::-1])
    source = cine(tmp_path / "c.nii.gz", [np.full(grid.shape, number, np.float32) for number in range(12)], grid)
    script = (
        "import sys, tracemalloc\n"
        "from invres.config import ChannelPlan\n"
        "from invres.frames import open_series\n"
        "from pathlib import Path\n"
        "series = open_series([ChannelPlan('MR')], {'MR': Path(sys.argv[1])}, 'm')\n"
        "tracemalloc.start()\n"
        "assert [volumes[0].array.max() for volumes in series.frames()] == list(range(12))\n"
        "print(tracemalloc.get_traced_memory()[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    peak = subprocess.check_output([sys.executable, "-c", script, str(source)], text=True, env=environment)
    assert int(peak) < 6 * 4 * np.prod(grid.shape), "of 12 frames"


# --- what is refused, and what is said ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    package_of(folder / "one", patch=(24, 24, 24))
    package_of(folder / "two", channels=("T1", "T2"), patch=(24, 24, 24))
    for count in (2, 3):
        cine(folder / f"cine{count}.nii.gz", steps(count))
    cut = (folder / "cine3.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(cut[: len(cut) - 2000])
    write_volume(folder / "still.nii.gz", Volume(steps(1)[0], GRIDS[0]))
    other = dataclasses.replace(GRIDS[0], spacing_mm=(2.0, 2.0, 2.0))
    cine(folder / "elsewhere.nii.gz", steps(3), other)
    (folder / "notes.csv").write_text("case,x\n")
    return folder


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-m", "one", "-i", "still.nii.gz"], "--frames is for 4D files (x, y, z, time), and CT is 3D. Leave"),
        (["-m", "two", "-i", "cine3.nii.gz"], "With --frames a 4D file is one channel in several frames, and the"),
        (["-m", "two", "-i", "T1=cine2.nii.gz", "-i", "T2=cine3.nii.gz"], "numbers of frames: T1 2, T2 3."),
        (["-m", "two", "-i", "T1=cine3.nii.gz", "-i", "T2=elsewhere.nii.gz"], "lie on different grids"),
        (["-m", "one", "-i", "cut.nii.gz"], "cut.nii.gz is damaged or cut short"),
        (["-m", "one", "-i", "cine3.nii.gz", "-o", "o.seg.nrrd"], "o.seg.nrrd cannot hold a series: a .seg.nrrd is"),
        (["-m", "one", "-i", "cine3.nii.gz", "-p", "p.nii.gz"], "--probabilities is for one image."),
        (["-m", "one", "-i", "cine3.nii.gz", "-u", "u.nii.gz"], "--uncertainty is for one image."),
        (["-m", "one", "-i", "cine3.nii.gz", "--ending", ".nii"], "--ending is for --data"),
        (["-m", "one", "-d", "."], "--frames is for one case."),
        (["-m", "one", "-i", "cine3.nii.gz", "--volumes", "v.txt"], "v.txt cannot be the table of volumes, which is a"),
        (["-m", "one", "-i", "cine3.nii.gz", "--volumes", "notes.csv"], "holds something else than a table of volumes"),
        (["-m", "one", "-i", "cine3.nii.gz", "-o", "cine3.nii.gz"], "is an input and would be overwritten"),
    ],
)
def test_what_makes_no_sense_with_frames_is_told(place, monkeypatch, flags, told):
    monkeypatch.chdir(place)
    before = sorted(Path().iterdir())
    output = [] if "-o" in flags else ["-o", "o.nii.gz"]
    outcome = invres("segment", *flags, "--frames", *output, "--device", "cpu")
    assert outcome.code == 2 and told in outcome.err.splitlines()[-1], outcome
    assert "Traceback" not in outcome.err and sorted(Path().iterdir()) == before


def test_a_4d_file_for_one_channel_says_what_to_do(place, monkeypatch):
    monkeypatch.chdir(place)
    for given in ("cine3.nii.gz", "CT=cine3.nii.gz"):
        outcome = invres("segment", "-m", "one", "-i", given, "-o", "o.nii.gz", "--device", "cpu", "--json")
        assert outcome.code == 2 and "segment this file alone with --frames" in outcome.events[-1]["hint"]
    assert "--volumes is for --frames." in invres("segment", "-m", "one", "-i", "x", "-o", "o", "--volumes", "v").err


def test_the_command_prints_the_range_of_volumes_and_writes_the_table_again(place, tmp_path):
    flags = ["--frames", "--volumes", tmp_path / "v.csv", "--provenance", tmp_path / "p.json", "--device", "cpu"]
    command = ["segment", "-m", place / "one", "-i", place / "cine3.nii.gz", "-o", tmp_path / "o.nii", *flags]
    for _ in range(2):
        outcome = invres(*command)
        assert outcome.code == 0, outcome
    assert outcome.out.startswith(f"Segmentation: {tmp_path / 'o.nii'}, 3 frames\n")
    assert f"Volumes of all frames: {tmp_path / 'v.csv'}" in outcome.out and "the least of all frames" in outcome.out
    assert (tmp_path / "p.json").is_file() and len(labels_of(tmp_path / "o.nii")) == 3
    again = invres("rerun", tmp_path / "p.json", "-i", place / "cine3.nii.gz")
    assert again.code == 2 and "The record of o.nii is of all frames of a series" in again.err
    outcome = invres(
        "segment", "-m", place / "one", "-i", place / "cine3.nii.gz", "-o", tmp_path / "o.nii", *flags, "--json"
    )
    result = outcome.events[-1]
    assert result["event"] == "result" and [frame["frame"] for frame in result["frames"]] == [1, 2, 3]


def test_two_channels_in_one_4d_file_are_still_that(place, tmp_path):
    source = cine(tmp_path / "both.nii.gz", steps(2))
    outcome = invres("segment", "-m", place / "two", "-i", source, "-o", tmp_path / "o.nii.gz", "--device", "cpu")
    assert outcome.code == 0 and read_header(tmp_path / "o.nii.gz").count == 1


def test_a_diffusion_scan_is_a_series(data_dir):
    series = open_series([ChannelPlan("MR")], {"MR": data_dir / "dwi_philips" / "dwi.nii.gz"}, "m")
    whole = read_channels(data_dir / "dwi_philips" / "dwi.nii.gz")
    for (volume,), wanted in zip(series.frames(), whole, strict=True):
        assert np.array_equal(volume.array, wanted.array) and volume.geometry.same_as(wanted.geometry)
