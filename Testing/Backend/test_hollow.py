"""Hollow tensors behave as torch's fake tensors do, in whole training steps too, and never hold memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from invres import hollow
from invres.benchmark import ENGINE_TABLE
from invres.hollow import HollowTensors
from invres.memory import measure_training, predict_training
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.reversible import abridged, same_memory

RUNS = [
    *((name, {}, {"engine": engine}) for name in ENGINE_TABLE for engine in ENGINE_TABLE[name]),
    ("fully_invres", {"learnable_resampling": True}, {"precision": "bf16", "engine": "stored"}),
    ("fully_invres", {"vae": VAEConfig(latent=4)}, {"precision": "bf16", "memory": "lowest"}),
    ("fully_invres", {"dropout": 0.2}, {"batch_size": 2, "regions": True}),
    ("partially_invres", {"norm": "batch"}, {"precision": "fp16"}),
    ("partially_invres", {"dropout": 0.2, "norm": "group"}, {"engine": "recursive"}),
    ("partially_invres", {"vae": VAEConfig(latent=4)}, {"engine": "memcnn", "precision": "bf16"}),
]


@pytest.mark.parametrize(("name", "network", "options"), RUNS, ids=str)
def test_a_training_step_takes_what_it_takes_on_fake_tensors(name, network, options):
    config = NetworkConfig(name=name, in_channels=2, out_channels=3, channels=(4, 16), **network)

    def step(mode):
        with mode(), abridged():
            return measure_training(config, (13, 12, 16), **options)

    assert step(HollowTensors) == step(FakeTensorMode)


def test_shape_type_device_and_storage_are_those_of_a_real_tensor():
    with HollowTensors():
        a = torch.zeros(2, 3, 4, dtype=torch.float64)
        part = a[:, 1:].transpose(0, 2)
        assert (part.shape, part.stride(), part.dtype) == ((4, 2, 2), (1, 4, 12), torch.float64)
        assert part.device == torch.device("cpu") and part._is_view() and same_memory(part, a)
        assert a.untyped_storage().nbytes() == 2 * 3 * 4 * 8
        b = a.add_(1).float()
        assert not same_memory(a, b) and b.untyped_storage().nbytes() == 2 * 3 * 4 * 4
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert functional.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3)).dtype == torch.bfloat16


def test_a_result_seen_before_is_a_tensor_of_its_own_of_the_right_type():
    with HollowTensors():
        whole = torch.ones(4, dtype=torch.int32)
        assert [(whole * factor).dtype for factor in (2, 2.0, True)] == [torch.int32, torch.float32, torch.int32]
        first, second = whole * 2, whole * 2
        assert not same_memory(first, second)
        assert (whole * 2.0).requires_grad is False
        folded, again = (torch.ops.aten._unsafe_view(whole, [2, 2]) for _ in range(2))
        assert same_memory(folded, whole) and same_memory(again, whole)


def test_tensors_from_outside_keep_their_values():
    outside = torch.arange(3)
    with HollowTensors():
        assert (outside + 1).tolist() == [1, 2, 3]
        mixed = outside + torch.zeros(3)
        assert mixed.dtype == torch.float32
        with pytest.raises((NotImplementedError, RuntimeError)):
            mixed.sum().item()
    assert outside.tolist() == [0, 1, 2]


def test_a_storage_may_be_emptied_and_filled_again_but_a_shape_not_changed_in_place():
    with HollowTensors():
        a, b = torch.zeros(100), torch.zeros(100)
        a.untyped_storage().resize_(0)
        assert a.untyped_storage().nbytes() == 0
        a.set_(b)
        assert same_memory(a, b)
        for change in (lambda t: t.resize_(1000), lambda t: t.unsqueeze_(0)):
            with pytest.raises(NotImplementedError, match="cannot change its shape in place"):
                change(torch.zeros(4))


def test_what_was_seen_is_forgotten_when_it_is_too_much_and_a_prediction_is_made_once(monkeypatch):
    config = NetworkConfig(out_channels=3, channels=(8, 16))
    predict_training.cache_clear()
    hollow._RESULTS.clear()
    first = predict_training(config, (16, 16, 24))
    assert hollow._RESULTS and predict_training(config, (16, 16, 24)) is first
    monkeypatch.setattr(hollow, "_MOST_RESULTS", 0)
    with HollowTensors():
        assert not hollow._RESULTS
    predict_training.cache_clear()
    again = predict_training(config, (16, 16, 24))
    assert again is not first and again == first


def test_a_large_tensor_takes_no_memory_and_the_context_can_be_left_by_an_error():
    with contextlib.suppress(ZeroDivisionError), HollowTensors():
        huge = torch.zeros(2**20, 2**20)
        assert (huge @ huge).untyped_storage().nbytes() == 2**42
        raise ZeroDivisionError
    assert HollowTensors.active() is None and torch.zeros(2).tolist() == [0, 0]


def test_where_torch_lacks_what_they_need_its_own_fake_tensors_predict_the_same(monkeypatch):
    config = NetworkConfig(out_channels=3, channels=(8, 16))
    assert hollow._hollow_works()
    expected = predict_training(config, (16, 24, 16))
    monkeypatch.setattr(hollow, "_hollow_works", lambda: False)
    predict_training.cache_clear()
    assert not isinstance(hollow.without_values(), HollowTensors)
    assert predict_training(config, (16, 24, 16)) == expected
