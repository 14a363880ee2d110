"""A segmentation says how it was made: in its own header, in a file beside it, and in the record of many cases."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from test_inference import package_of
from test_segmentation_file import slicer_reads
from tiny_datasets import BACKEND, GRIDS, invres, phantom

from invres import InvresError
from invres.files import digest_of
from invres.provenance import FIELD, PARTS, read_provenance
from invres.volume import read_volume, write_volume

ODD = 'Läsion "5" \\ n.nii.gz'  # what JSON and NRRD both have their own way with


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of two channels and its inputs, in a folder whose name says whose they are."""
    folder = tmp_path_factory.mktemp("Eve Example")
    package_of(folder / "model", channels=("T1", "T2"))
    for name, volume in zip(("t1.nii.gz", ODD), phantom(GRIDS[0], 2)[0], strict=True):
        write_volume(folder / name, volume)
    return folder


def segmenting(place, output, *more):
    inputs = ("-i", f"T1={place / 't1.nii.gz'}", "-i", f"T2={place / ODD}")
    return ("segment", "-m", place / "model", *inputs, "-o", output, "--device", "cpu", "--json", *more)


@pytest.fixture(scope="module")
def segmented(place, tmp_path_factory):
    """The file, the provenance beside it, and the result of the command."""
    folder = tmp_path_factory.mktemp("results")
    outcome = invres(*segmenting(place, folder / "a.seg.nrrd", "--provenance", folder / "a.json"))
    assert outcome.code == 0, outcome.out
    return folder / "a.seg.nrrd", folder / "a.json", outcome.of("result")[0]


def test_a_segmentation_says_how_it_was_made(place, segmented):
    path, _, result = segmented
    record = read_provenance(path)
    assert record == {"format_version": 1, **{key: result[key] for key in PARTS}}
    digests = [hashlib.sha256((place / name).read_bytes()).hexdigest() for name in ("t1.nii.gz", ODD)]
    assert record["inputs"] == [
        {"channel": "T1", "file": "t1.nii.gz", "sha256": digests[0]},
        {"channel": "T2", "file": ODD, "sha256": digests[1]},
    ]
    assert record["model_sha256"] == digest_of(place / "model" / "model.safetensors")
    assert {"invres", "python", "torch", "numpy", "scipy", "SimpleITK"} == record["software"].keys()
    assert all(record["software"].values()) and record["device_title"]
    assert (record["device"], record["precision"]) == ("cpu", "fp32") and record["threads"] >= 1
    assert record["manifest_sha256"] == digest_of(place / "model" / "manifest.json") and record["locator"] is None
    assert record["settings"]["window"] == [8, 9, 7] and record["settings"]["overlap"] == 0.5
    assert b"Eve" not in path.read_bytes().split(b"\n\n")[0], "folders may name a person"


def test_the_file_beside_it_has_the_same_with_name_and_date(segmented):
    path, beside, _ = segmented
    record = json.loads(beside.read_text(encoding="utf-8"))
    assert record.pop("output") == "a.seg.nrrd" and record.pop("date").endswith("+00:00")
    assert record == read_provenance(path)


def test_the_same_again_is_the_same_to_the_byte_and_other_endings_get_no_file_of_their_own(place, segmented, tmp_path):
    for name in ("a.seg.nrrd", "a.nii.gz"):
        assert invres(*segmenting(place, tmp_path / name)).code == 0
    assert (tmp_path / "a.seg.nrrd").read_bytes() == segmented[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "a.seg.nrrd"]
    with pytest.raises(InvresError, match="does not say how it was made"):
        read_provenance(tmp_path / "a.nii.gz")


def test_slicer_and_others_read_the_file_as_before(segmented, tmp_path):
    path = segmented[0]
    assert sitk.ReadImage(str(path)).GetMetaData(FIELD).startswith('{"format_version": 1')
    labels = read_volume(path, kind="labels")
    slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install slicer-core")
    scene = slicer.vtkMRMLScene()
    try:
        segmentation = slicer_reads(slicer, scene, path).GetSegmentation()
        names = [segmentation.GetNthSegment(number).GetName() for number in range(segmentation.GetNumberOfSegments())]
        assert names == ["a", "b", "c"] and {0} < set(np.unique(labels.array).tolist()) <= {0, 10, 150, 250}
    finally:
        scene.Clear(1)


def test_describe_tells_it_without_any_other_package(segmented, tmp_path):
    path, _, result = segmented
    outcome = invres("describe", path)
    assert outcome.code == 0 and f"T1 = t1.nii.gz, T2 = {ODD}" in outcome.out
    assert f"known 1.0.0 (id {result['model_id'][:8]})" in outcome.out and "window 8 9 7" in outcome.out
    code = (
        "import sys; from invres.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('numpy', 'torch', 'SimpleITK')))"
    )
    command = [sys.executable, "-c", code, "describe", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={"PYTHONPATH": str(BACKEND)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["provenance"] == read_provenance(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model": 1}', json.dumps({"format_version": 1, **dict.fromkeys(PARTS, "x")})]
)
def test_a_file_that_does_not_say_it_is_told_so(tmp_path, text):
    image = sitk.Image(3, 3, 3, sitk.sitkUInt8)
    if text:
        image.SetMetaData(FIELD, text)
    sitk.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    outcome = invres("describe", tmp_path / "a.seg.nrrd", "--json")
    assert outcome.code == 2 and "does not say how it was made" in outcome.of("error")[0]["message"]
    missing = invres("describe", tmp_path / "b.seg.nrrd", "--json")
    assert missing.code == 2 and "b.seg.nrrd cannot be read" in missing.of("error")[0]["message"]


def test_a_provenance_overwrites_its_like_alone(place, segmented, tmp_path):
    (tmp_path / "other.json").write_text('{"summary": {}}', encoding="utf-8")
    for name, told in (("other.json", "something else than a provenance"), ("a.txt", "which is a .json file")):
        outcome = invres(*segmenting(place, tmp_path / "a.nii.gz", "--provenance", tmp_path / name))
        assert outcome.code == 2 and told in outcome.of("error")[0]["message"]
        assert not (tmp_path / "a.nii.gz").exists(), "told before any work"
    before = json.loads(segmented[1].read_text(encoding="utf-8"))
    outcome = invres(*segmenting(place, segmented[1].with_name("b.nii.gz"), "--provenance", segmented[1]))
    assert outcome.code == 0, outcome.out
    after = json.loads(segmented[1].read_text(encoding="utf-8"))
    assert after["output"] == "b.nii.gz" and after["inputs"] == before["inputs"]


def test_the_record_of_many_cases_names_software_and_device_of_each(tmp_path):
    package = package_of(tmp_path / "model")
    for name in "ab":
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", phantom(GRIDS[0])[0][0])
    command = (
        "segment",
        "-m",
        package.path,
        "-d",
        tmp_path / "scans",
        "-o",
        tmp_path / "out",
        "--device",
        "cpu",
        "--json",
    )
    refused = invres(*command, "--provenance", tmp_path / "a.json")
    assert refused.code == 2 and "segmentations.json" in refused.of("error")[0]["hint"]
    assert invres(*command, "--ending", ".seg.nrrd").code == 0
    record = json.loads((tmp_path / "out" / "segmentations.json").read_text(encoding="utf-8"))
    for name, entry in record["cases"].items():
        found = read_provenance(tmp_path / "out" / entry["output"])
        assert found["inputs"][0]["file"] == f"{name}.nii.gz"
        assert (found["software"], found["device_title"]) == (entry["software"], entry["device_title"])


def test_the_digest_of_several_files_is_that_of_their_list(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    for name in ("2.dcm", "1.dcm", ".DS_Store"):
        (folder / name).write_bytes(name.encode())
    one, two = (hashlib.sha256(name).hexdigest() for name in (b"1.dcm", b"2.dcm"))
    assert digest_of(folder) == hashlib.sha256(f"{one}  1.dcm\n{two}  2.dcm\n".encode()).hexdigest()
    for name in ("a.hdr", "a.img", "b.hdr"):
        (tmp_path / name).write_bytes(b"x")
    alone = hashlib.sha256(b"x").hexdigest()
    assert digest_of(tmp_path / "b.hdr") == alone != digest_of(tmp_path / "a.hdr")
    before = digest_of(tmp_path / "a.hdr")
    (tmp_path / "a.img").write_bytes(b"y")
    assert digest_of(tmp_path / "a.hdr") != before
