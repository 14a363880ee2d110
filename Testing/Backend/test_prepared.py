"""Prepared cases on disk: equal to preparing anew, prepared once, and never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re

import numpy as np
import pytest
from tiny_datasets import files_up_to, leftovers, phantom, write_dataset

from invres import InvresError
from invres.cases import read_dataset
from invres.configjson import to_dict
from invres.events import Recorder
from invres.files import stamps_of
from invres.prepared import prepare_cases
from invres.preprocessing import make_plan, prepare
from invres.volume import write_volume


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return read_dataset(write_dataset(tmp_path_factory.mktemp("phantoms"), cases=3, unlabelled=1))


@pytest.fixture(scope="module")
def plan(dataset):
    return make_plan(dataset, [case.name for case in dataset.cases])


def names_of(dataset):
    return [case.name for case in dataset.cases]


def stamps(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def test_what_is_read_back_equals_preparing_anew(dataset, plan, tmp_path):
    cases = prepare_cases(dataset, names_of(dataset), plan, tmp_path)
    assert [case.name for case in cases] == names_of(dataset)
    for case in cases:
        volumes, label = dataset.load(dataset.case(case.name))
        wanted = prepare(volumes, label, plan, dataset.scheme, case.name)
        assert np.array_equal(case.image, wanted.image) and case.image.dtype == np.float32
        assert isinstance(case.image, np.memmap)
        if wanted.label is None:
            assert case.label is None
        else:
            assert np.array_equal(case.label, wanted.label) and case.label.dtype == np.int16
        for one, other in ((case.geometry, wanted.geometry), (case.original, wanted.original)):
            assert (one.shape, one.spacing_mm, one.origin_mm) == (other.shape, other.spacing_mm, other.origin_mm)
            assert np.array_equal(one.direction, other.direction)
    assert [case.label is None for case in cases] == [True, False, False]
    assert cases[0].image.shape[1:] != dataset.geometry(dataset.cases[0]).canonical().shape, "crop or resampling"


def test_a_case_is_prepared_once(dataset, plan, tmp_path):
    prepare_cases(dataset, names_of(dataset)[:2], plan, tmp_path)
    before = stamps(tmp_path)
    prepare_cases(dataset, names_of(dataset), plan, tmp_path)
    after = stamps(tmp_path)
    assert before.items() <= after.items() and len(after) > len(before)


def test_a_changed_file_and_a_changed_plan_are_prepared_anew(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=1, channels=("T1",), ending=".nii"))
    plan = make_plan(dataset, names_of(dataset))
    first = prepare_cases(dataset, names_of(dataset), plan, tmp_path / "prepared")[0]
    images, _ = phantom(first.original, seed=99)
    before = dataset.cases[0].images[0].stat()
    write_volume(dataset.cases[0].images[0], images[0])
    assert dataset.cases[0].images[0].stat().st_size == before.st_size, "only the time tells"
    os.utime(dataset.cases[0].images[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second = prepare_cases(dataset, names_of(dataset), plan, tmp_path / "prepared")[0]
    assert not np.array_equal(first.image, second.image)
    coarser = dataclasses.replace(plan, spacing_mm=(3.0, 3.0, 3.0))
    third = prepare_cases(dataset, names_of(dataset), coarser, tmp_path / "prepared")[0]
    assert third.geometry.spacing_mm == (3.0, 3.0, 3.0) and third.image.shape != second.image.shape


def test_what_was_prepared_before_plans_said_when_intensities_are_scaled_is_found_again(dataset, plan, tmp_path):
    older = dataclasses.replace(plan, normalise_first=False)
    said = to_dict(older)
    del said["normalise_first"], said["aligned"]
    case = dataset.cases[1]
    content = json.dumps([stamps_of((*case.images, case.label)), said, to_dict(dataset.scheme)])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    prepare_cases(dataset, [case.name], older, tmp_path)
    prepare_cases(dataset, [case.name], plan, tmp_path)
    names = [path.name.rpartition("-")[2] for path in tmp_path.iterdir()]
    assert key in names and len(names) == 2


def test_names_that_look_alike_or_fit_no_file_system_do_not_collide(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=3, channels=("T1",)))
    names = ["a/b:c", "a_b_c", "Größe 海馬 " + "x" * 200]
    renamed = tuple(dataclasses.replace(case, name=name) for case, name in zip(dataset.cases, names, strict=True))
    dataset = dataclasses.replace(dataset, cases=renamed)
    plan = make_plan(dataset, names)
    cases = prepare_cases(dataset, names, plan, tmp_path / "prepared")
    assert [case.name for case in cases] == names
    assert len(list((tmp_path / "prepared").iterdir())) == 3
    assert len({case.image.tobytes() for case in cases}) == 3


def test_what_a_killed_preparation_left_is_replaced(dataset, plan, tmp_path):
    name = names_of(dataset)[1]
    wanted = prepare_cases(dataset, [name], plan, tmp_path / "a")[0]
    folder = next((tmp_path / "a").iterdir()).name
    half = tmp_path / "b" / f"{folder}.tmp"
    half.mkdir(parents=True)
    (half / "image.npy").write_bytes(b"half")
    case = prepare_cases(dataset, [name], plan, tmp_path / "b")[0]
    assert np.array_equal(case.image, wanted.image)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("size_bytes", [0, 100, 9000])
def test_a_full_disk_is_told_and_leaves_nothing(dataset, plan, tmp_path, size_bytes):
    with files_up_to(size_bytes), pytest.raises(InvresError, match="patient01 could not be written") as caught:
        prepare_cases(dataset, ["patient01"], plan, tmp_path)
    assert caught.value.code == "write_failed" and "space" in caught.value.hint
    assert os.listdir(tmp_path) == []
    assert len(prepare_cases(dataset, ["patient01"], plan, tmp_path)) == 1


def test_a_broken_case_is_named_and_the_others_stay_prepared(tmp_path):
    dataset = read_dataset(write_dataset(tmp_path / "data", cases=2, channels=("T1",)))
    plan = make_plan(dataset, names_of(dataset))
    dataset.cases[1].images[0].write_bytes(dataset.cases[1].images[0].read_bytes()[:200])
    with pytest.raises(InvresError, match=re.escape(str(dataset.cases[1].images[0]))):
        prepare_cases(dataset, names_of(dataset), plan, tmp_path / "prepared")
    assert [path.name[:9] for path in (tmp_path / "prepared").iterdir()] == ["patient00"]


def test_progress_counts_cases(dataset, plan, tmp_path):
    report = Recorder()
    prepare_cases(dataset, names_of(dataset), plan, tmp_path, report)
    counted = [(event["done"], event["total"]) for event in report.events if event["event"] == "progress"]
    assert counted == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "grids.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_what_a_power_failure_cut_short_is_prepared_again(dataset, plan, tmp_path, name, size):
    (whole,) = prepare_cases(dataset, names_of(dataset)[1:2], plan, tmp_path)
    wanted = np.array(whole.image), np.array(whole.label)
    (path,) = tmp_path.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:size])
    (again,) = prepare_cases(dataset, names_of(dataset)[1:2], plan, tmp_path)
    assert np.array_equal(again.image, wanted[0]) and np.array_equal(again.label, wanted[1])
    assert len(list(tmp_path.iterdir())) == 1
