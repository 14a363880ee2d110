"""Versions of a model: which one its name stands for, their history, their differences and the way back."""

from __future__ import annotations

import json

import pytest
import torch
from test_transfer import model
from tiny_datasets import invres

from invres import InvresError
from invres.lineage import ACTIVE, active_members
from invres.modelpackage import find_package, import_package, list_packages, save_package
from invres.versions import difference, difference_table, history, history_table, rollback


def save(path, parent="", version="1.0.0", name="Base", change=0.0, **fields):
    manifest, weights = model(**fields)
    return save_package(
        path,
        name=name,
        network=manifest.network,
        state_dict={key: tensor + change for key, tensor in weights.items()},
        plan=manifest.plan,
        scheme=manifest.scheme,
        patch=manifest.patch,
        version=version,
        parent=parent,
    )


@pytest.fixture
def line(tmp_path):
    """(folder of models, base, its tuned version, the tuned version of that one), all imported in this order."""
    folder = tmp_path / "models"
    base = import_package(save(tmp_path / "0").path, folder)
    first = import_package(save(tmp_path / "1", base.id, "1.1.0", change=0.1).path, folder)
    second = import_package(save(tmp_path / "2", first.id, "1.2.0", change=0.2).path, folder)
    return folder, base, first, second


def test_the_name_stands_for_the_newest_version_and_ids_for_all(line):
    folder, *versions = line
    assert find_package("Base", [folder]) == versions[-1]
    for package in versions:
        assert find_package(package.id[:8], [folder]) == package


def test_rolling_back_makes_the_parent_active_and_deletes_nothing(line):
    folder, base, first, second = line
    installed = list_packages([folder])
    assert rollback(second, installed, folder) == first
    assert find_package("Base", [folder]) == first
    assert rollback(first, installed, folder) == base
    assert find_package("Base", [folder]) == base
    assert list_packages([folder]) == installed
    import_package(second.path, folder)
    assert find_package("base", [folder]) == second, "importing it again is the way forward"


def test_importing_a_tuned_model_makes_it_active_also_beside_a_sibling(line, tmp_path):
    folder, base, first, _ = line
    sibling = import_package(save(tmp_path / "3", base.id, "1.1.0", change=0.3).path, folder)
    assert find_package("Base", [folder]) == sibling
    assert {one["version"] for one in history(first, list_packages([folder]), [folder])} == {"1.0.0", "1.1.0", "1.2.0"}


def test_a_tuned_version_of_a_model_in_another_folder_is_active_too(tmp_path):
    bundled, own = tmp_path / "bundled", tmp_path / "own"
    base = save(bundled / "base")
    tuned = import_package(save(tmp_path / "1", base.id, "1.1.0").path, own)
    assert find_package("Base", [bundled, own]) == tuned
    rollback(tuned, list_packages([bundled, own]), own)
    assert find_package("Base", [bundled, own]) == base


def test_two_models_of_one_name_that_have_nothing_to_do_with_one_another_stay_ambiguous(tmp_path):
    for name in "ab":
        save(tmp_path / name)
    with pytest.raises(InvresError, match="2 models fit"):
        find_package("Base", [tmp_path])
    outcome = invres("models", "list", "--models-dir", tmp_path)
    starred = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("*")]
    assert outcome.code == 0 and starred and "Base" not in starred, "its name stands for neither"
    assert "2 models have the name Base, so `-m` needs " in outcome.err and str(tmp_path / "b") in outcome.err


def test_an_import_says_what_a_name_that_is_taken_stands_for(tmp_path):
    base, mine = save(tmp_path / "base"), tmp_path / "mine"

    def told(package):
        return invres("models", "import", package.path, "--models-dir", mine).err

    assert told(base) == ""
    tuned = save(tmp_path / "tuned", base.id, "1.1.0")
    assert "`-m Base` takes version 1.1.0, " in told(tuned)
    listed = invres("models", "list", "--models-dir", mine).out.splitlines()
    assert [line.split()[2] for line in listed if line.startswith("* Base")] == ["1.1.0"]
    stranger = save(tmp_path / "stranger")
    err = told(stranger)
    assert err.startswith("Another model has the name Base too, so `-m` needs ") and stranger.id[:8] in err


@pytest.mark.parametrize("content", ["", "[]", '{"1": 2}', "{"])
def test_a_damaged_list_of_active_versions_says_nothing(line, content):
    folder, _, _, second = line
    (folder / ACTIVE).write_text(content, encoding="utf-8")
    assert find_package("Base", [folder]) == second


def test_parents_in_a_circle_end(tmp_path):
    one, two = "1" * 32, "2" * 32
    first, second = model()[0], model()[0]
    object.__setattr__(first, "parent", two)
    object.__setattr__(second, "id", two)
    object.__setattr__(second, "parent", one)
    assert active_members([first, second], {})


def test_the_history_goes_from_the_first_version_to_the_last(line):
    folder, base, first, second = line
    found = history(first, list_packages([folder]), [folder])
    assert [one["id"] for one in found] == [base.id, first.id, second.id]
    assert [one["active"] for one in found] == [False, False, True]
    lines = history_table(found).splitlines()
    assert lines[0] == "Base" and lines[-1].startswith("*") and "1.2.0" in lines[-1]


def test_a_difference_shows_configuration_labels_channels_and_how_far_each_tensor_moved(line, tmp_path):
    folder, base, first, _ = line
    found = difference(first, None, list_packages([folder]))
    assert (found["older"]["id"], found["newer"]["id"]) == (base.id, first.id)
    assert found["configuration"]["version"] == ["1.0.0", "1.1.0"]
    old, new = base.load_weights(), first.load_weights()
    for one in found["tensors"]:
        moved, size = (new[one["name"]] - old[one["name"]]).norm(), old[one["name"]].norm()
        assert one["change"] is None if not size else one["change"] == pytest.approx(float(moved / size), rel=1e-4)
    other = save(tmp_path / "other", labels=("upper", "core"), channels=("T1",))
    found = difference(base, other)
    assert found["labels"] == {"added": ["core"], "removed": ["lower"]}
    assert found["channels"] == {"added": [], "removed": ["T2"]}
    assert next(one for one in found["tensors"] if one["name"] == "stem.weight")["change"] is None
    text = difference_table(found)
    assert "labels added: core" in text and "channels removed: T2" in text
    assert "  plan.channels.T2: " in text and not set("{}'[") & set(text.split("tensors differ")[0])
    json.dumps(found, allow_nan=False)


def test_equal_weights_do_not_differ(tmp_path):
    one, two = save(tmp_path / "1"), save(tmp_path / "2")
    assert all(entry["change"] == 0 for entry in difference(one, two)["tensors"])
    assert "0 of" in difference_table(difference(one, two))


def test_what_has_no_parent_cannot_be_rolled_back_or_compared(line, tmp_path):
    folder, base, *_ = line
    orphan = save(tmp_path / "orphan", parent="f" * 32)
    for package, told in ((base, "was not tuned from another model"), (orphan, "is not installed")):
        for call in (lambda p: rollback(p, list_packages([folder]), folder), lambda p: difference(p, None)):
            with pytest.raises(InvresError, match=told) as caught:
                call(package)
            assert caught.value.hint
    assert torch.is_tensor(base.load_weights()["stem.weight"])
