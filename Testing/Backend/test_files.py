"""A file appears whole or not at all, and nothing is left beside it."""

from __future__ import annotations

import json

import pytest
from tiny_datasets import files_up_to

from invres import InvresError
from invres.files import stamps_of, write_changed, write_json, written_whole


@pytest.mark.parametrize("name", ["metrics.json", "v.1.2.nii.gz", "no_ending", "x" * 250 + ".json"])
def test_the_file_appears_under_its_name_in_a_folder_that_is_made(tmp_path, name):
    path = tmp_path / "new" / "folder" / name
    with written_whole(path) as temporary:
        temporary.write_text("all", encoding="utf-8")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == path.suffix
    assert path.read_text(encoding="utf-8") == "all"
    assert list(path.parent.iterdir()) == [path]


def test_the_temporary_name_has_the_ending_asked_for(tmp_path):
    with written_whole(tmp_path / "image.nii.gz", ".nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.touch()


def test_what_stands_there_already_is_not_written_again(tmp_path):
    path = tmp_path / "run.json"
    write_changed(path, "größe")
    before = path.stat()
    with files_up_to(0):
        write_changed(path, "größe")
        with pytest.raises(OSError):
            write_changed(path, "größer")
    assert path.stat().st_ino == before.st_ino and path.read_text(encoding="utf-8") == "größe"


def test_a_json_file_holds_what_was_given_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new folder" / "métrics.json"
    write_json(path, {"a": 1}, "metrics")
    write_json(path, {"mean": {"Leber é": 0.5}}, "metrics")
    assert json.loads(path.read_text(encoding="utf-8")) == {"mean": {"Leber é": 0.5}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_number_that_is_not_finite_leaves_the_old_json_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1}, "metrics")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")}, "metrics")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_json_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    target = tmp_path / "metrics.json"
    target.mkdir()
    with pytest.raises(InvresError, match=r"The comparison cannot be written to .*metrics.json: "):
        write_json(target, {"a": 1}, "comparison")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(("header", "voxels"), [("a.hdr", "a.img"), ("a.mhd", "a.raw"), ("a[1].nhdr", "a[1].raw.gz")])
def test_new_voxels_behind_an_old_header_change_the_stamp(tmp_path, header, voxels):
    for name in (header, voxels, "ab.img"):
        (tmp_path / name).write_bytes(b"1")
    before = stamps_of([tmp_path / header, None, tmp_path / "gone"])
    assert [name for name, _, _ in before] == [str(tmp_path / header), str(tmp_path / voxels)]
    (tmp_path / voxels).write_bytes(b"12")
    assert stamps_of([tmp_path / header]) != before


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("not finite"), KeyboardInterrupt()], ids=repr)
def test_an_error_on_the_way_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "metrics.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(type(error)), written_whole(path) as temporary:
        temporary.write_text("ha", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "metrics.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    path = tmp_path / "metrics.json"
    path.mkdir()
    with pytest.raises(OSError), written_whole(path) as temporary:
        temporary.touch()
    assert list(tmp_path.iterdir()) == [path]
