"""The memory probe counts exactly; what is predicted on fake tensors is what a real step takes."""

from __future__ import annotations

import dataclasses
import gc
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from invres import InvresError
from invres.benchmark import ENGINE_TABLE
from invres.config import MEMORY_SETTINGS
from invres.hollow import HollowTensors
from invres.livebytes import LiveBytes
from invres.memory import measure_training, predict_training
from invres.networkconfig import NETWORKS, NetworkConfig, VAEConfig
from invres.networks import build
from invres.reversible import SETTINGS, readout
from invres.reversible.roles import ROLES, role, tell

MIB = 2**20
PAIRS = [(name, engine) for name in NETWORKS for engine in ENGINE_TABLE[name]]


@pytest.fixture(params=["real tensors", "hollow tensors", "torch's fake tensors"])
def probe(request):
    """An empty `LiveBytes`, on real tensors and on both kinds that take no memory."""
    if request.param == "real tensors":
        yield LiveBytes()
    else:
        with HollowTensors() if request.param == "hollow tensors" else FakeTensorMode():
            yield LiveBytes()


def test_a_new_tensor_counts_its_bytes_and_a_dropped_one_no_longer(probe):
    with probe:
        a = torch.zeros(100)
        assert probe.current == 400
        b = torch.zeros(10, dtype=torch.float64)
        assert (probe.current, probe.peak) == (480, 480)
        del a
        assert (probe.current, probe.peak) == (80, 480)
        c = b + 1
        assert probe.current == 160
        del b, c
        assert (probe.current, probe.peak, probe.peak_op) == (0, 480, "aten.zeros.default")


def test_views_of_one_storage_count_once_and_keep_all_of_it(probe):
    with probe:
        a = torch.zeros(100)
        views = [a[90:], a.view(10, 10), a.detach(), *a.chunk(2)]
        assert probe.current == 400
        last = views.pop(0)
        del a, views
        assert probe.current == 400, "ten elements are seen, but the whole storage is held"
        copied = last.clone()
        del last
        assert probe.current == copied.numel() * 4 == 40


def test_changing_a_tensor_in_place_takes_no_memory(probe):
    with probe:
        a, b = torch.ones(50), torch.ones(50)
        a.add_(b)
        a[:10].mul_(3)
        torch.nn.functional.relu_(a)
        assert (probe.current, probe.peak) == (400, 400)


def test_a_storage_that_is_resized_counts_by_its_new_size():
    with LiveBytes() as probe:
        a = torch.zeros(100)
        a.resize_(1000)
        assert (probe.current, probe.peak) == (4000, 4000)


def test_a_storage_that_is_emptied_behind_the_operators_backs_is_not_counted():
    """As memcnn does with its inputs; the peak that comes after must not hold them either."""
    probe = LiveBytes()
    with probe:
        a = torch.zeros(100)
        a.untyped_storage().resize_(0)
        assert (probe.current, probe.peak) == (0, 400)
        b = torch.zeros(50)
        assert (probe.current, probe.peak) == (200, 400)
        c = torch.zeros(60)
        assert (probe.current, probe.peak) == (440, 440)
        b.untyped_storage().resize_(0)
        d = torch.zeros(51)  # 644 bytes with b's, but nobody looked at `current` in between
        assert probe.peak == 444
        del a, b, c, d
        assert probe.current == 0


def test_what_autograd_keeps_is_counted_until_backward_has_freed_it(probe):
    x = torch.ones(100)
    w = torch.ones(100, requires_grad=True)
    probe.watch([x, w, x[3:]])
    assert probe.current == 800
    with probe:
        y = (w * x).exp().sum()  # keeps exp's output; the product is gone
        assert probe.current == 800 + 400 + 4
        y.backward()
        del y
        gc.collect()
        assert probe.current == 800 + 400, "the gradient stays"
        assert w.grad is not None
        probe.reset_peak()
        assert (probe.peak, probe.peak_op) == (1200, "")


def test_what_is_alive_at_the_peak_is_told_by_role(probe):
    probe.watch([torch.zeros(10)], "parameters")
    kept = torch.zeros(20)
    probe.watch([kept], "input")
    with probe:
        state = torch.ones(30)
        with role("loss"):
            of_loss = torch.ones(40)
        tell("state", state, kept)  # what has a role keeps it
        assert probe.peak_by_role() == dict.fromkeys(ROLES, 0) | {"input": 80, "state": 120, "loss": 160}
        of_loss = of_loss[:1].clone()  # outside of the role
        probe.reset_peak()
        later = torch.ones(5)
        tell("gradients", later)
        del state
        by_role = probe.peak_by_role()
    tell("state", later)  # nobody listens any more
    assert by_role == dict.fromkeys(ROLES, 0) | {"input": 80, "state": 120, "recompute": 4, "gradients": 20}
    assert sum(by_role.values()) == probe.peak == 80 + 120 + 4 + 20


def test_tensors_made_before_are_counted_only_if_they_are_watched(probe):
    a, b = torch.zeros(10), torch.zeros(20)
    probe.watch([b])
    with probe:
        a.add_(1)
        assert probe.current >= 80
        c = a[:2] + 1
        assert probe.current == 80 + 40 + c.numel() * 4, "an operator that returns a makes it known"


@pytest.fixture
def fine(monkeypatch):
    """Settings that cut even tiny maps into many slabs and parts."""
    for name, setting in SETTINGS.items():
        monkeypatch.setitem(SETTINGS, name, dataclasses.replace(setting, slab_minimum=64))
    monkeypatch.setattr(readout, "MINIMUM_LOGITS", 64)
    predict_training.cache_clear()
    yield
    predict_training.cache_clear()


def small(name, **changes):
    return NetworkConfig(name=name, in_channels=2, out_channels=3, channels=(4, 16), **changes)


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_the_predicted_peak_is_the_measured_peak(name, engine):
    patch = (17, 12, 16)
    predicted = predict_training(small(name), patch, engine=engine)
    measured = measure_training(small(name), patch, engine=engine)
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.01 * measured.peak_bytes
    assert dataclasses.astuple(predicted)[1:4] == dataclasses.astuple(measured)[1:4]


def test_the_peak_is_told_apart_by_role_to_the_last_byte():
    config = small("fully_invres")
    for engine, precision, memory in (
        ("reversible", "fp32", "low"),
        ("reversible", "bf16", "lowest"),
        ("stored", "fp32", "low"),
    ):
        options = {"engine": engine, "precision": precision, "memory": memory}
        found = predict_training(config, (32, 32, 32), **options)
        assert found.by_role == measure_training(config, (32, 32, 32), **options).by_role
        assert sum(found.by_role.values()) == found.peak_bytes and set(found.by_role) == set(ROLES)
        assert found.by_role["parameters"] == found.parameter_bytes
        assert found.by_role["input"] == 32**3 * (2 * 4 + 2)  # two channels, labels of 16 bits
        voxel_bytes = (2 if memory == "lowest" else 4) + (4 if precision == "fp32" else 2)
        assert found.by_role["state"] == (0 if engine == "stored" else 4 * 32**3 * voxel_bytes)
    padded = predict_training(config, (31, 32, 32)).by_role["input"]
    assert padded == 31 * 32**2 * (2 * 4 + 2) + 32**3 * 2 * 4


@pytest.mark.parametrize(
    ("options", "vae"),
    [
        ({"batch_size": 3}, None),
        ({"regions": True}, None),
        ({"precision": "bf16"}, VAEConfig(latent=4)),
        ({"engine": "stored", "precision": "bf16"}, None),
        ({"engine": "memcnn"}, VAEConfig(latent=4)),
    ],
    ids=str,
)
def test_the_prediction_holds_for_every_kind_of_step(options, vae):
    config = small("fully_invres", vae=vae, learnable_resampling=True)
    predicted, measured = (f(config, (12, 9, 8), **options) for f in (predict_training, measure_training))
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.01 * measured.peak_bytes


@pytest.mark.parametrize("memory", MEMORY_SETTINGS)
@pytest.mark.parametrize(
    ("name", "precision"), [("partially_invres", "fp32"), ("fully_invres", "fp32"), ("fully_invres", "bf16")]
)
def test_the_prediction_holds_for_every_memory_setting(name, memory, precision, fine):
    """Of many slabs only three are predicted, and that must be enough."""
    options = {"memory": memory, "precision": precision}
    config = small(name, vae=VAEConfig(latent=4))
    predicted, measured = (f(config, (25, 24, 32), **options) for f in (predict_training, measure_training))
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.01 * measured.peak_bytes


def test_each_memory_setting_needs_less_than_the_one_before():
    config = NetworkConfig(in_channels=4, out_channels=4, channels=(12, 32))
    for precision in ("fp32", "bf16"):
        peaks = [predict_training(config, (96, 96, 96), memory=m, precision=precision) for m in MEMORY_SETTINGS]
        low, lower, lowest = (found.activation_bytes for found in peaks)
        assert low > 1.05 * lower > 1.1 * lowest


def test_many_classes_cost_no_more_than_few():
    few, many = (
        predict_training(NetworkConfig(in_channels=4, out_channels=k, channels=(12, 32)), (64, 64, 64)).peak_bytes
        for k in (3, 104)
    )
    assert many < 1.15 * few


@pytest.mark.parametrize("name", ["partially_invres", "fully_invres"])
def test_the_vae_branch_takes_at_most_a_twentieth_more(name):
    config = NetworkConfig(name=name, in_channels=4, out_channels=4)
    with_branch = dataclasses.replace(config, vae=VAEConfig())
    plain, branched = (predict_training(c, (128, 128, 128)).peak_bytes for c in (config, with_branch))
    assert branched < 1.05 * plain


@pytest.mark.slow
def test_the_default_network_keeps_to_its_share_of_the_baselines_memory():
    """The figures that Testing/Benchmarks/RESULTS.md gives for 128 x 128 x 128 with 4 channels."""
    base = predict_training(NetworkConfig(name="unet3d", in_channels=4, out_channels=4), (128,) * 3)
    for name, memory, precision, total, activations in (
        ("fully_invres", "low", "fp32", 0.18, 0.14),
        ("fully_invres", "lower", "fp32", 0.155, 0.12),
        ("fully_invres", "lower", "bf16", 0.13, 0.095),
        ("fully_invres", "lowest", "bf16", 0.10, 0.065),
        ("partially_invres", "low", "fp32", 0.25, 0.24),
    ):
        config = NetworkConfig(name=name, in_channels=4, out_channels=4)
        found = predict_training(config, (128,) * 3, memory=memory, precision=precision)
        assert found.peak_bytes <= total * base.peak_bytes, (name, memory, precision)
        assert found.activation_bytes <= activations * base.activation_bytes, (name, memory, precision)


@pytest.mark.parametrize("memory", MEMORY_SETTINGS)
def test_the_prediction_holds_for_parts_of_bottlenecks(memory, fine):
    """Exactly in single precision; under autocast it is up to a tenth above what is measured, never below."""
    config = small("mbconv_unet")
    for precision, above in (("fp32", 0.01), ("bf16", 0.12)):
        options = {"memory": memory, "precision": precision}
        predicted, measured = (f(config, (9, 8, 16), **options) for f in (predict_training, measure_training))
        assert -0.01 <= predicted.peak_bytes / measured.peak_bytes - 1 <= above


def test_bottlenecks_keep_to_their_share_of_the_memory_of_the_same_network_that_stores_its_maps():
    """The figures behind `invres reproduce mbconv-claims`, at half the side."""
    config = NetworkConfig(name="mbconv_unet", in_channels=4, out_channels=4)
    stored, reversible = (predict_training(config, (64,) * 3, engine=engine) for engine in ("stored", "reversible"))
    assert reversible.peak_bytes <= 0.1 * stored.peak_bytes
    assert reversible.activation_bytes <= 0.06 * stored.activation_bytes


def test_the_parts_of_the_prediction_are_those_of_the_network():
    config = small("fully_invres")
    found = predict_training(config, (8, 8, 16))
    parameters = list(build(config).parameters())
    size = sum(p.numel() for p in parameters) * 4
    assert (found.parameter_bytes, found.gradient_bytes) == (size, size)
    assert found.optimizer_bytes == 2 * size + 4 * len(parameters)  # two moments, and a step count for each tensor
    assert found.activation_bytes == found.peak_bytes - 4 * size - 4 * len(parameters)
    assert found.by_role["optimizer"] >= found.optimizer_bytes
    assert found.peak_op.startswith("aten.")


@pytest.mark.parametrize("name", ["partially_invres", "fully_invres"])
def test_the_reversible_engine_needs_least(name):
    config = NetworkConfig(name=name, in_channels=4, out_channels=4)
    best = predict_training(config, (48, 48, 48), engine="reversible")
    for engine in ("memcnn", "stored"):
        other = predict_training(config, (48, 48, 48), engine=engine)
        assert best.peak_bytes < other.peak_bytes, engine
        assert best.activation_bytes < 0.75 * other.activation_bytes, engine


def test_the_reversible_engine_works_in_less_than_four_times_its_state():
    """State, gradient, and the working set of one function on half of the channels; a copy of any would be too much."""
    found = predict_training(NetworkConfig(in_channels=1), (48, 48, 48), engine="reversible")
    state_bytes = 16 * 48**3 * 4
    assert 2 * state_bytes < found.activation_bytes < 4 * state_bytes


def test_depth_costs_no_activations():
    def activations(blocks, engine):
        config = NetworkConfig(channels=(16, 32), blocks=(blocks,) * 2, decoder_blocks=(blocks,))
        return predict_training(config, (64, 64, 64), engine=engine).activation_bytes

    assert activations(16, "reversible") < 1.02 * activations(1, "reversible")
    assert activations(8, "stored") > 4 * activations(1, "stored")


def test_predicting_a_huge_patch_allocates_nothing():
    resource = pytest.importorskip("resource", reason="no count of resident memory here")
    unit = 1 if sys.platform == "darwin" else 1024

    def resident():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    config = NetworkConfig(channels=(4, 16))
    predict_training(config, (8, 8, 8))  # imports what is imported on first use
    before = resident()
    found = predict_training(config, (256, 256, 256))
    assert found.peak_bytes > 512 * MIB
    assert resident() - before < 64 * MIB


def test_a_configuration_that_makes_no_network_is_refused_before_anything_runs():
    with pytest.raises(InvresError, match=r"network\.channels must be even"):
        predict_training(NetworkConfig(name="partially_invres", channels=(3, 8)), (8, 8, 8))
    with pytest.raises(InvresError, match="unet3d does not run under the engine 'reversible'"):
        predict_training(NetworkConfig(name="unet3d"), (32, 32, 32), engine="reversible")
