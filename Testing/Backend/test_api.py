"""invres from Python: the voxels of the command line, from files and from memory; any verb as a function."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from grids import RAS, REGIONS, rotation
from test_inference import package_of, steps_volume
from test_locating import CROP, HEAD, PARTS, saved
from test_locating import image as head_image
from tiny_datasets import BACKEND, GRIDS, invres, leftovers, phantom, write_dataset, write_recipe

import invres as package
from invres import Cancelled, InvresError, demo, image_from_array, load_model, run
from invres.volume import Geometry, Volume, read_volume, write_volume

pytestmark = pytest.mark.filterwarnings("ignore:The image for .* does not look like CT:UserWarning")

README = BACKEND.parent / "README.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of two channels and a model of regions, and the images of a case."""
    folder = tmp_path_factory.mktemp("place")
    package_of(folder / "model", channels=("T1", "T2"), patch=(24, 20, 16))
    package_of(folder / "regions", REGIONS, patch=(24, 20, 16))
    for name, volume in zip(("t1", "t2"), phantom(GRIDS[0], 2)[0], strict=True):
        write_volume(folder / f"{name}.nii.gz", volume)
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "model", device="cpu")


def images(place):
    return {"T1": place / "t1.nii.gz", "T2": str(place / "t2.nii.gz")}


def on_command_line(place, output, *more, model="model", given=("T1=t1", "T2=t2")):
    files = [f"{one.partition('=')[0]}={place / one.partition('=')[2]}.nii.gz" for one in given]
    inputs = [word for file in files for word in ("--input", file)]
    outcome = invres(
        *("segment", "--model", place / model, *inputs, "--output", output, "--device", "cpu", "--json", *more)
    )
    assert outcome.code == 0, outcome.out
    return outcome


# --- the voxels of the command line --------------------------------------------------------------------------------

OPTIONS = {
    "plain": ({}, ()),
    "mirrored": ({"mirror": (0, 2)}, ("--mirror", 0, 2)),
    "window": ({"window": [20, 16, 18], "overlap": 0.25}, ("--window", 20, 16, 18, "--overlap", 0.25)),
    "box": ({"roi": (-5, 8, -9, 3.5, -2, 30)}, ("--roi", -5, 8, -9, 3.5, -2, 30)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_case_in_files_gives_the_bytes_and_figures_of_the_command_line(place, model, tmp_path, name):
    keywords, flags = OPTIONS[name]
    maps = ("--probabilities", tmp_path / "cli_p", "--uncertainty", tmp_path / "cli_u.nii.gz")
    outcome = on_command_line(place, tmp_path / "cli.seg.nrrd", *flags, *maps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.segment(images(place), probabilities=True, **keywords)
    found.save(tmp_path / "api.seg.nrrd", probabilities=tmp_path / "api_p", uncertainty=tmp_path / "api_u.nii.gz")
    for ending in (".seg.nrrd", "_p_background.nii.gz", "_p_b.nii.gz", "_u.nii.gz"):
        assert (tmp_path / f"api{ending}").read_bytes() == (tmp_path / f"cli{ending}").read_bytes(), ending
    (result,) = outcome.of("result")
    assert (found.volumes_ml, found.confidence) == (result["volumes_ml"], result["confidence"])
    assert list(found.warnings) == [event["message"] for event in outcome.of("warning")]
    assert found.provenance.items() <= result.items() and found.array.any()
    assert (found.probability("b") == read_volume(tmp_path / "cli_p_b.nii.gz").array).all()


@pytest.mark.parametrize("number", range(len(GRIDS)))
def test_images_in_memory_give_the_same_voxels_on_the_same_grid(place, tmp_path, number, model):
    for name, volume in zip(("t1", "t2"), phantom(GRIDS[number], 2)[0], strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    wanted = model.segment(images(tmp_path))
    read = {name: sitk.ReadImage(str(path)) for name, path in images(tmp_path).items()}
    placed = {
        name: {"spacing": one.GetSpacing(), "origin": one.GetOrigin(), "direction": one.GetDirection()}
        for name, one in read.items()
    }
    arrays = {name: sitk.GetArrayFromImage(one) for name, one in read.items()}
    turned = {name: one.transpose() for name, one in arrays.items()}
    cases = {
        "SimpleITK": read,
        "one image of four axes": sitk.JoinSeries(list(read.values())),
        "arrays": {name: image_from_array(arrays[name], **placed[name]) for name in read},
        "nibabel": {name: image_from_array(turned[name], affine=wanted.affine, order="ijk") for name in read},
        "Slicer": {name: image_from_array(arrays[name], affine=wanted.affine, order="kji") for name in read},
        "both": {"t1": read["T1"], "T2": tmp_path / "t2.nii.gz"},
    }
    assert wanted.array.any()
    for name, case in cases.items():
        found = model.segment(case)
        assert (found.array == wanted.array).all(), name
        assert found.labels.geometry.same_as(wanted.labels.geometry), name
        image = found.image
        assert (sitk.GetArrayFromImage(image) == wanted.array).all()
        assert np.allclose(image.GetSpacing(), read["T1"].GetSpacing())
        assert np.allclose(image.GetOrigin(), read["T1"].GetOrigin(), atol=1e-4)
        assert np.allclose(image.GetDirection(), read["T1"].GetDirection(), atol=1e-6)
    found.save(tmp_path / "out.seg.nrrd")
    (record,) = invres("describe", tmp_path / "out.seg.nrrd", "--json").of("result")
    assert [one["file"] for one in record["provenance"]["inputs"]] == ["t2.nii.gz", ""]
    assert "t1 = in memory" in invres("describe", tmp_path / "out.seg.nrrd").out


def test_regions_are_as_on_the_command_line(place, tmp_path):
    volume, _ = steps_volume(Geometry((20, 22, 24), (1, 1, 1), (0, 0, 0), RAS))
    write_volume(tmp_path / "ct.nii.gz", volume)
    on_command_line(place, tmp_path / "cli.seg.nrrd", model="regions", given=(f"CT={tmp_path / 'ct'}",))
    found = load_model(place / "regions", device="cpu").segment({"CT": tmp_path / "ct.nii.gz"})
    found.save(tmp_path / "api.seg.nrrd")
    assert (tmp_path / "api.seg.nrrd").read_bytes() == (tmp_path / "cli.seg.nrrd").read_bytes()
    assert found.probability_names == ("whole", "core", "hot") and set(found.label_names.values()) == {*REGIONS.names}


def test_two_models_in_sequence_are_as_on_the_command_line(tmp_path, monkeypatch):
    head, _ = saved(tmp_path / "head", HEAD, "CT"), saved(tmp_path / "parts", PARTS, "MR", CROP)
    write_volume(tmp_path / "image.nii.gz", head_image(Geometry((26, 24, 28), (1, 1, 1), (3, 4, 5), rotation(5) @ RAS)))
    crops = load_model(tmp_path / "parts", device="cpu")
    with pytest.raises(InvresError, match="larger"):
        crops.segment(tmp_path / "image.nii.gz")
    boxes = [(5.0, 14.0, 8.0, 18.0, 8.0, 20.0), (18.0, 29.0, 8.0, 18.0, 8.0, 19.0)]
    # Random weights find nothing that could be relied on.
    monkeypatch.setattr("invres.locating.locate", lambda model, *_: (boxes if model.id == head.id else [], 0))
    locating = ("segment", "-m", tmp_path / "parts", "-i", tmp_path / "image.nii.gz", "--locate", tmp_path / "head")
    outcome = invres(*locating, "-o", tmp_path / "cli.seg.nrrd", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.out
    for locate in (tmp_path / "head", load_model(tmp_path / "head", device="cpu")):
        found = crops.segment(tmp_path / "image.nii.gz", locate=locate)
        found.save(tmp_path / "api.seg.nrrd")
        assert (tmp_path / "api.seg.nrrd").read_bytes() == (tmp_path / "cli.seg.nrrd").read_bytes()
        assert found.provenance["locator"]["model_id"] == head.id and found.array.any()
    with pytest.raises(InvresError, match="segments whole images"):
        load_model(tmp_path / "head", device="cpu").segment(tmp_path / "image.nii.gz", locate=tmp_path / "parts")


# --- what a caller meets -------------------------------------------------------------------------------------------


def test_the_package_offers_it_and_imports_nothing_before():
    code = "import sys, invres; names = dir(invres); sys.exit(any(n in sys.modules for n in ('numpy', 'invres.api')))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(BACKEND)}).returncode == 0
    assert {*package.__all__} <= {*dir(package)}
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_modl'"):
        _ = package.load_modl


def test_probabilities_are_kept_on_demand_only(place, model, tmp_path):
    found = model.segment(images(place))
    for ask in (
        found.uncertainty,
        lambda: found.probability("a"),
        lambda: found.save(tmp_path / "a.nii.gz", uncertainty=tmp_path / "u.nii.gz"),
    ):
        with pytest.raises(InvresError, match="were not kept"):
            ask()
    assert not list(tmp_path.iterdir()), "refused before anything is written"
    with pytest.raises(InvresError, match="no probability of 'x', but of background, a, b, c"):
        found.probability("x")
    with pytest.raises(InvresError, match="is an input and would be overwritten"):
        found.save(place / "t1.nii.gz")


def test_mistakes_are_told_in_a_sentence(place, model, tmp_path):
    array = np.zeros((4, 5, 6), np.float32)
    for wrong, told in (
        (array, "image_from_array"),
        ({"T1": place / "t1.nii.gz"}, "takes the 2 channels T1, T2; got T1"),
        (tmp_path / "none.nii.gz", "There is no file"),
        (sitk.Image(4, 4, 4, sitk.sitkVectorFloat32), "values per voxel"),
        (sitk.Image(4, 4, sitk.sitkFloat32), "flat"),
        (sitk.Image(4, 4, 4, sitk.sitkComplexFloat32), "plain numbers"),
        (place / "t1.nii.gz", "holds 1 volume"),
        (sitk.Image(4, 4, 4, sitk.sitkFloat32), "holds 1 volume"),
    ):
        with pytest.raises(InvresError, match=told):
            model.segment(wrong)
    with pytest.raises(InvresError, match="three sizes"):
        model.segment(images(place), window=(8, 8))
    for keywords, told in (
        ({}, "by its spacing or by its affine"),
        ({"affine": np.eye(4)}, "order of the array's axes"),
        ({"affine": np.eye(3), "order": "ijk"}, "4x4"),
        ({"affine": np.zeros((4, 4)), "order": "ijk"}, "voxel size"),
        ({"spacing": (1, 2)}, "spacing of 3 numbers"),
    ):
        with pytest.raises(InvresError, match=told):
            image_from_array(array, **keywords)
    with pytest.raises(InvresError, match="three axes"):
        image_from_array(array[0], spacing=(1, 1, 1))
    with pytest.raises(InvresError, match="There is no model"):
        load_model("brain-any-contrat")
    with pytest.raises(InvresError, match="There is no device"):
        load_model(place / "model", device="gpu")


def test_sheared_axes_and_odd_values_are_repaired_with_a_warning(place):
    affine = np.diag([1.0, 1, 1, 1])
    affine[0, 1] = 0.2
    with pytest.warns(UserWarning, match="strongly sheared"):
        image = image_from_array(np.ones((20, 20, 20), bool), affine=affine, order="ijk")
    assert image.array.dtype == np.uint8
    broken = image_from_array(np.where(np.eye(20)[..., None], np.nan, np.arange(20.0)), spacing=(1, 1, 1))
    with pytest.warns(UserWarning, match="400 voxels are NaN"):
        found = load_model(place / "regions", device="cpu").segment(broken)
    assert any("400 voxels are NaN" in sentence for sentence in found.warnings)


def test_progress_is_told_and_a_cancel_ends_it(place, model):
    events = []
    model.segment(images(place), on_event=events.append)
    stages = [event["stage"] for event in events if event["event"] == "progress"]
    assert list(dict.fromkeys(stages)) == [f"segment.{name}" for name in ("read", "prepare", "tiles", "restore")]
    cancel, seen = threading.Event(), []

    def at_first_tile(event):
        seen.append(event)
        if event.get("stage") == "segment.tiles":
            cancel.set()

    with pytest.raises(Cancelled):
        model.segment(images(place), on_event=at_first_tile, cancel=cancel)
    assert seen[-1]["stage"] == "segment.tiles" and seen[-1]["done"] == 0
    with pytest.raises(ZeroDivisionError):
        model.segment(images(place), on_event=lambda event: 1 / 0)
    assert model.segment(images(place)).array.any(), "and the model is as good as before"


# --- any verb ------------------------------------------------------------------------------------------------------


def test_a_verb_gives_its_result_and_prints_nothing(place, tmp_path, capfd):
    events = []
    found = run("describe", place / "model")
    assert found["manifest"]["name"] == "known" and "event" not in found
    found = run(
        *("segment", "-m", place / "model", "-i", f"T1={place / 't1.nii.gz'}", "-i", f"T2={place / 't2.nii.gz'}"),
        *("-o", tmp_path / "a.nii.gz", "--device", "cpu", "--overlap", 0.5),
        on_event=events.append,
    )
    assert found["output"] == str(tmp_path / "a.nii.gz") and found["settings"]["overlap"] == 0.5
    assert {"progress", "result"} <= {event["event"] for event in events}
    assert capfd.readouterr() == ("", "")
    assert run("segment", "--help") == {} and "usage" in capfd.readouterr().out


def test_what_a_verb_refuses_is_raised(place, tmp_path, capfd):
    for words, told in (
        (("segmet",), "invalid choice"),
        ((), "required"),
        (("segment", "--model", "x", "--output", "o"), "There is no model 'x'"),
        (("worker",), "process of its own"),
        (("check", "--data", tmp_path / "none"), "none"),
    ):
        with pytest.raises(InvresError, match=told) as raised:
            run(*words)
        assert raised.value.code
    (tmp_path / "locked").mkdir()
    with pytest.raises(InvresError):  # an OSError in plain words
        run("models", "export", place / "model", "--output", tmp_path / "locked")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("aside", [False, True], ids=["main thread", "another thread"])
def test_a_training_that_is_cancelled_saves_first(tmp_path, aside):
    data = write_dataset(tmp_path / "data", cases=2, channels=("T1",))
    recipe = write_recipe(tmp_path / "tiny.json", epochs=4)
    words = ("train", "--data", data, "--recipe", recipe, "--output", tmp_path / "run", "--device", "cpu")
    cancel, outcome = threading.Event(), []

    def after_an_epoch(event):
        if event["event"] == "epoch":
            cancel.set()

    def begin():
        try:
            outcome.append(run(*words, on_event=after_an_epoch, cancel=cancel))
        except InvresError as error:
            outcome.append(error)

    if aside:
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
    else:
        begin()
    assert isinstance(outcome[0], Cancelled) and (tmp_path / "run" / "checkpoint.pt").is_file()
    assert leftovers(tmp_path / "run") == []
    epochs = []
    found = run(*words, "--resume", on_event=lambda event: epochs.append(event.get("epoch")))
    assert Path(found["model"]).is_dir() and min(filter(None, epochs)) > 1, "it went on"


# --- the words of the README ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("nilearn")
    (block,) = re.findall(r"```python\n(import SimpleITK\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    t1, _ = demo.template()
    part = (slice(50, 110), slice(80, 150), slice(60, 130))  # a part of the real head, to be quick
    write_volume(tmp_path / "head.nii.gz", Volume(np.ascontiguousarray(t1.array[part]), t1.geometry.crop(part)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a part of a head
        exec(compile(block, str(README), "exec"), names)
    assert {"head.seg.nrrd", "quick.nii.gz", "scores.json"} <= {path.name for path in tmp_path.iterdir()}
    dice = [of["Dice"]["mean"] for of in names["scores"]["summary"].values()]
    assert len(dice) > 20 and 0.5 < np.mean(dice) < 1
    whole = read_volume(tmp_path / "head.seg.nrrd", kind="labels")
    assert (names["found"].array == whole.array).all(), "from memory as from the file"
    assert names["hippocampus"].max() > 0.5


def test_the_line_for_slicers_console_finds_the_package(tmp_path):
    (line,) = re.findall(r"`(import sys, InvResSegmentLib[^`]*)`", README.read_text(encoding="utf-8"))
    code = f"{line}; import invres; print(invres.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(README.parent / "InvResSegment")}
    # -S: without what is installed; Slicer knows the module's folder.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and Path(done.stdout.strip()).samefile(BACKEND / "invres" / "__init__.py"), done.stderr
