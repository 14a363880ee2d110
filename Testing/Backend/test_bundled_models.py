"""The models that come with InvResSegment: whole, small, with a card that says where they come from, and of use."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_datasets import invres

from invres import demo
from invres.locating import can_locate
from invres.modelpackage import bundled_models_dir, verify_package
from invres.volume import read_volume, write_volume

NAMES = ("brain-any-contrast", "hippocampus-t1")
LARGEST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def packages():
    return {name: verify_package(bundled_models_dir() / name) for name in NAMES}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The real ICBM152 T1 as a file, and its tissues."""
    pytest.importorskip("nilearn")
    path = tmp_path_factory.mktemp("head") / "t1.nii.gz"
    t1, tissues = demo.template()
    write_volume(path, t1)
    return path, tissues


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_whole_small_and_says_where_it_comes_from(packages, name):
    package = packages[name]
    manifest = package.manifest
    assert package.name == name and manifest.network.name == "fully_invres"
    assert sum(path.stat().st_size for path in package.path.iterdir()) < LARGEST_BYTES
    assert manifest.licence and manifest.training.data and manifest.description
    assert set(manifest.metrics) == set(manifest.scheme.names) == set(manifest.expected.volumes_ml)
    assert manifest.expected.confidence > 0.5
    assert all(label.colour and label.terminology for label in manifest.scheme.labels)
    assert (package.path / "training.jsonl").is_file()


def test_one_finds_the_place_for_the_other(packages):
    brain, hippocampus = (packages[name].manifest for name in NAMES)
    assert hippocampus.plan.crop is not None and can_locate(brain.scheme, hippocampus.plan.crop)


@pytest.mark.slow
def test_the_brain_model_finds_grey_and_white_matter_in_a_real_t1(packages, head, tmp_path):
    path, tissues = head
    outcome = invres("segment", "-m", NAMES[0], "-i", f"MR={path}", "-o", tmp_path / "out.nii.gz", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    labels = read_volume(tmp_path / "out.nii.gz", kind="labels")
    found = demo.tissues_of(labels.array, packages[NAMES[0]].manifest.output_scheme)
    dice = [2 * ((found == t) & (tissues == t)).sum() / ((found == t).sum() + (tissues == t).sum()) for t in (2, 3)]
    assert dice[0] > 0.86 and dice[1] > 0.88, "as in RESULTS.md, less rounding"
    across = labels.canonical().array
    for left, right in ((17, 53), (10, 49), (12, 51)):
        places = [np.argwhere(across == value)[:, 2] for value in (left, right)]
        assert 0.7 < len(places[0]) / len(places[1]) < 1.4 and places[0].max() <= across.shape[2] / 2 + 3
        assert places[1].min() >= across.shape[2] / 2 - 3


@pytest.mark.slow
def test_both_in_sequence_find_two_hippocampi(packages, head, tmp_path):
    path, _ = head
    arguments = ["-m", NAMES[1], "--locate", NAMES[0], "-i", f"T1={path}", "-o", tmp_path / "out.nii.gz"]
    outcome = invres("segment", *arguments, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    (result,) = outcome.of("result")
    assert len(result["settings"]["boxes_mm"]) == 2
    # About 3.3 mL a side are usual, and this template is larger than most heads; front and back are about equal.
    volumes = result["volumes_ml"]
    assert [*volumes] == [
        f"{side} {part} hippocampus" for part in ("anterior", "posterior") for side in ("left", "right")
    ]
    assert all(1.2 < volume < 3 for volume in volumes.values())
    labels = read_volume(tmp_path / "out.nii.gz", kind="labels").canonical()
    right, left = labels.array[:, :, labels.array.shape[2] // 2 :], labels.array[:, :, : labels.array.shape[2] // 2]
    assert set(np.unique(left)) == {0, 1, 2} and set(np.unique(right)) == {0, 11, 12}
    sizes = [int(np.count_nonzero(side)) for side in (right, left)]
    assert 0.75 < sizes[0] / sizes[1] < 1.33
    places = [np.argwhere(np.isin(labels.array, values))[:, 1].mean() for values in ((1, 11), (2, 12))]
    assert places[0] > places[1], "the anterior part lies in front"
