"""Checkpoints: whole or not at all, exact, and never a way to run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import random

import pytest
import torch
from tiny_datasets import files_up_to, leftovers

from invres import InvresError
from invres.checkpoint import CHECKPOINT, load_checkpoint, random_state, restore_random_state, save_checkpoint

STATE = {
    "network": {"name": "fully_invres", "channels": [4, 16], "vae": None},
    "weights": {"stem.weight": torch.randn(4, 2, 3, 3, 3), "counts": torch.arange(5)},
    "history": [{"epoch": 1, "dice": {"Größe 海馬": 0.5}, "seconds": 1.25}],
    "best_dice": None,
    "epoch_losses": [[0.1, float("nan")]],
    "half": torch.randn(7).half(),
}


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    assert save_checkpoint(tmp_path, STATE) == tmp_path / CHECKPOINT
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded["weights"]["stem.weight"], STATE["weights"]["stem.weight"])
    assert torch.equal(loaded["half"], STATE["half"]) and loaded["half"].dtype == torch.float16
    for key in ("network", "history", "best_dice"):
        assert loaded[key] == STATE[key]
    assert str(loaded["epoch_losses"]) == str(STATE["epoch_losses"])
    assert os.listdir(tmp_path) == [CHECKPOINT]


@pytest.mark.parametrize("size_bytes", [0, 1, 300, 2000])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, size_bytes):
    save_checkpoint(tmp_path, {"iteration": 1})
    with files_up_to(size_bytes), pytest.raises(OSError):
        save_checkpoint(tmp_path, STATE)
    assert load_checkpoint(tmp_path) == {"iteration": 1}
    assert os.listdir(tmp_path) == [CHECKPOINT]


def test_a_refused_rename_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"iteration": 1})

    def refuse(*_):
        raise PermissionError(13, "held by another program")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path, STATE)
    assert load_checkpoint(tmp_path) == {"iteration": 1}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
def test_a_checkpoint_that_was_cut_short_is_told_in_a_sentence(tmp_path, part):
    data = save_checkpoint(tmp_path, STATE).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: int(part * len(data))])
    with pytest.raises(InvresError, match=r"checkpoint\.pt is damaged") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"\0" * 500, random.Random(0).randbytes(4000), b"PK\x03\x04 not a zip"])
def test_a_file_that_is_no_checkpoint_is_told_in_a_sentence(tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(InvresError, match="damaged or is none of InvResSegment's"):
        load_checkpoint(tmp_path)


def test_a_file_of_tensors_alone_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / CHECKPOINT)
    with pytest.raises(InvresError, match="damaged or is none of InvResSegment's"):
        load_checkpoint(tmp_path)


def save_plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, save_plain_pickle])
def test_opening_a_malicious_pickle_runs_nothing(tmp_path, write):
    trap = tmp_path / "code_was_run"
    write({"network": RunsCode(trap)}, tmp_path / CHECKPOINT)
    with pytest.raises(InvresError, match="damaged or is none of InvResSegment's"):
        load_checkpoint(tmp_path)
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(tmp_path / CHECKPOINT, weights_only=False)
    assert trap.exists(), "the trap works where pickles are opened"


def test_a_missing_checkpoint_is_told_with_the_next_step(tmp_path):
    with pytest.raises(InvresError, match="no checkpoint") as caught:
        load_checkpoint(tmp_path)
    assert "--resume" in caught.value.hint


def test_a_restored_random_state_draws_the_same_again(tmp_path):
    cpu = torch.device("cpu")
    save_checkpoint(tmp_path, {"random": random_state(cpu)})
    first = torch.rand(5), torch.nn.functional.dropout(torch.ones(50), 0.5)
    torch.manual_seed(123)
    restore_random_state(load_checkpoint(tmp_path)["random"], cpu)
    second = torch.rand(5), torch.nn.functional.dropout(torch.ones(50), 0.5)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
