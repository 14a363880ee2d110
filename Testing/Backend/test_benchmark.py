"""`invres bench`: complete rows, ratios to the first row of the same run, gradients that agree, a readable table."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_datasets import invres

from invres import benchmark, cube, variants
from invres.benchmark import ENGINE_TABLE, bench_gradients, bench_memory, bench_time, describe_machine, table
from invres.events import Recorder
from invres.memory import CONTEXT_BYTES, predict_training
from invres.networkconfig import NETWORKS, NetworkConfig
from invres.networks import build
from invres.operations import Operations
from invres.peers import PEERS, build_peer
from invres.reversible.steps import Couple

PATCH = (17, 9, 12)
PAIRS = [(name, engine) for name in NETWORKS for engine in ENGINE_TABLE[name]]


@pytest.fixture(autouse=True)
def only_our_networks(monkeypatch):
    """Peers have tests of their own."""
    monkeypatch.setattr(benchmark, "PEERS", {})


@pytest.fixture
def small_networks(monkeypatch):
    """The same networks two levels deep: what is measured differs, the rows do not."""
    complete = benchmark.NetworkConfig
    monkeypatch.setattr(benchmark, "NetworkConfig", lambda **values: complete(channels=(4, 16), **values))


@pytest.fixture
def few_networks(small_networks, monkeypatch):
    """Three of them, where a test is not about all."""
    monkeypatch.setattr(benchmark, "NETWORKS", ("unet3d", "partially_invres", "fully_invres"))


def assert_progress_is_complete(recorder, stages=1):
    steps = [e for e in recorder.events if e["event"] == "progress"]
    ends = [e for e in steps if e["done"] == e["total"]]
    assert len(ends) == stages and ends[-1] is steps[-1]
    assert all(0 <= e["done"] <= e["total"] for e in steps)


def test_the_engine_table_lists_every_engine_of_every_network():
    for name, engines in ENGINE_TABLE.items():
        assert engines == build(benchmark.NetworkConfig(name=name, levels=2)).engines
    assert tuple(ENGINE_TABLE) == NETWORKS


@pytest.mark.parametrize(
    ("networks", "measure"), [("small_networks", False), ("few_networks", True)], ids=["predicted", "measured"]
)
@pytest.mark.slow
def test_memory_has_a_row_for_every_network_and_engine(request, networks, measure):
    request.getfixturevalue(networks)
    recorder = Recorder()
    rows = bench_memory(PATCH, 2, 3, measure=measure, report=recorder)
    wanted = [(name, *row) for name in benchmark.NETWORKS for row in benchmark._rows_of(name)]
    assert [(row["network"], row["engine"], row["memory"], row["precision"]) for row in rows] == wanted
    assert not any("error" in row for row in rows)
    assert (rows[0]["ratio"], rows[0]["activation_ratio"]) == (1.0, 1.0)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["peak_bytes"] / rows[0]["peak_bytes"])
        assert row["activation_ratio"] == pytest.approx(row["activation_bytes"] / rows[0]["activation_bytes"])
        assert row["peak_bytes"] > row["activation_bytes"] > 0
        assert row["allocated_bytes"] == 0
        assert row["flops_ratio"] >= 1
    ratio = {(row["network"], row["engine"]): row["ratio"] for row in rows if row["precision"] == "fp32"}
    assert ratio["fully_invres", "reversible"] < ratio["fully_invres", "memcnn"] < 1
    assert_progress_is_complete(recorder)


def test_time_compares_the_engines_of_each_network(small_networks):
    recorder = Recorder()
    rows = bench_time(PATCH, 2, 3, rounds=2, report=recorder)
    assert [(row["network"], row["engine"]) for row in rows if row["memory"] == "low"] == PAIRS
    assert {row["memory"] for row in rows} == {"low", "lower", "lowest"}
    stored = {row["network"]: row["seconds"] for row in rows if row["engine"] == "stored"}
    for row in rows:
        assert row["seconds"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / stored[row["network"]])
        if "memcnn" in ENGINE_TABLE[row["network"]]:
            memcnn = next(r["seconds"] for r in rows if (r["network"], r["engine"]) == (row["network"], "memcnn"))
            assert row["ratio_to_memcnn"] == pytest.approx(row["seconds"] / memcnn)
    assert all(row["ratio"] == 1 for row in rows if row["engine"] == "stored")
    assert_progress_is_complete(recorder, stages=len(NETWORKS))


def test_gradients_agree_under_every_engine(small_networks):
    recorder = Recorder()
    rows = bench_gradients(PATCH, 2, 3, draws=2, report=recorder)
    invertible = [(name, engine) for name, engine in PAIRS if "reversible" in ENGINE_TABLE[name]]
    for dtype, limit in (("float64", 1e-9), ("float32", 1e-4)):
        errors = {
            (row["network"], row["engine"]): row["relative_error"]
            for row in rows
            if row["dtype"] == dtype and row["memory"] == "low" and not row["activation"] and not row["image"]
        }
        assert list(errors) == invertible
        assert max(row["relative_error"] for row in rows if row["dtype"] == dtype) < limit
        assert max(errors.values()) < limit, errors
        assert all(error == 0 for (_, engine), error in errors.items() if engine == "stored")
        assert all(error > 0 for (_, engine), error in errors.items() if engine == "reversible"), "recomputed, not kept"
        linear = {
            (row["network"], row["engine"], row["image"]): row
            for row in rows
            if row["dtype"] == dtype and row["activation"] == "linear"
        }
        assert len(linear) == len({name for name, _ in invertible}) * (2 if dtype == "float64" else 3)
        assert all(row["relative_error"] < 1e-5 for row in linear.values()), "without the kink float32 is exact enough"
    for row in rows:
        assert ("error_to_float64" in row) == ("median_error" in row) == (row["dtype"] == "float32")
    controls = [row for row in rows if row["image"] == "last digit"]
    assert controls and all(row["engine"] == "stored" and row["relative_error"] > 0 for row in controls)
    assert_progress_is_complete(recorder)


def test_wrong_gradients_are_reported_as_such(few_networks, monkeypatch):
    """A recomputation of another function than the one that ran must show in the rows."""
    original = Couple._retreat_half

    def wrong(state, gradients, sink, function, target, source):
        original(state, gradients, sink, function, target, source)
        gradients.writable(source).mul_(1.001)

    monkeypatch.setattr(Couple, "_retreat_half", staticmethod(wrong))
    rows = bench_gradients(PATCH, 1, 2, draws=1)
    plain = [row for row in rows if not row["image"]]
    assert all((row["relative_error"] > 1e-4) == (row["engine"] == "reversible") for row in plain), rows


def test_a_table_renders_bytes_figures_and_gaps_in_aligned_columns():
    rows = [
        {"network": "unet3d", "peak_bytes": 3 * 2**30, "ratio": 1.0, "relative_error": 1.21e-16},
        {"network": "fully_invres", "peak_bytes": 512, "ratio": 0.12345, "seconds": 2},
    ]
    assert table(rows, ("network", "peak_bytes", "ratio", "relative_error", "seconds")).splitlines() == [
        "| network      | peak_bytes | ratio | relative_error | seconds |",
        "| ------------ | ---------- | ----- | -------------- | ------- |",
        "| unet3d       | 3.00 GiB   | 1.000 | 1.2e-16        |         |",
        "| fully_invres | 512 B      | 0.123 |                | 2       |",
    ]


def test_the_machine_is_named_in_words():
    assert describe_machine("cpu") == f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def test_a_network_that_fails_costs_only_its_own_row(few_networks, monkeypatch):
    real = benchmark.predict_training

    def failing(config, *arguments, **options):
        if config.name == "partially_invres":
            raise RuntimeError("no room\nand more")
        return real(config, *arguments, **options)

    monkeypatch.setattr(benchmark, "predict_training", failing)
    rows = bench_memory(PATCH, 2, 3)
    for row in rows:
        assert row.get("error") == ("RuntimeError: no room" if row["network"] == "partially_invres" else None)


def test_an_engine_that_fails_costs_neither_the_times_of_the_others_nor_their_base(few_networks, monkeypatch):
    """`stored` is the first for which a small card has no memory, and memcnn the package that may not be there."""
    real_step, real_memory = benchmark.training_step, benchmark.predict_training

    def failing(network, *arguments):
        if network.engine in ("stored", "memcnn"):
            raise RuntimeError("no room")
        return real_step(network, *arguments)

    def full(config, *arguments, **options):
        if options["engine"] == "stored":
            raise RuntimeError("no room")
        return real_memory(config, *arguments, **options)

    wanted = {key(row): row["flops_ratio"] for row in bench_memory(PATCH, 2, 3) if "flops_ratio" in row}
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "training_step", failing)
        rows = bench_time(PATCH, 2, 3, rounds=1)
    for row in rows:
        assert ("seconds" in row) == (row["engine"] not in ("stored", "memcnn"))
        assert row.get("error") == (None if "seconds" in row else "RuntimeError: no room")
        assert "ratio" not in row and "ratio_to_memcnn" not in row
    monkeypatch.setattr(benchmark, "predict_training", full)
    found = {key(row): row["flops_ratio"] for row in bench_memory(PATCH, 2, 3) if "flops_ratio" in row}
    assert found == {one: ratio for one, ratio in wanted.items() if one[1] != "stored"}


def key(row):
    return row["network"], row["engine"], row["memory"], row["precision"]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_a_training_step_and_its_memory_is_known(name):
    peer = build_peer(name, 2, 3, (32, 32, 32))
    if peer is None:
        pytest.skip(f"{PEERS[name][0]} is not installed")
    image, target = torch.randn(1, 2, 32, 32, 32), torch.randint(0, 3, (1, 32, 32, 32))
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.1)
    benchmark._peer_step(peer.train(), optimizer, image, target)
    found_gradients = [p.grad for p in peer.parameters() if p.grad is not None]  # MONAI's VAE has a layer it never uses
    assert len(found_gradients) > 10 and all(g.isfinite().all() for g in found_gradients)
    found = benchmark._peer_memory(name, (32, 32, 32), 2, 3, "cpu", real=False)
    assert found is not None and found.activation_bytes > found.by_role["input"] > 0


def test_a_peer_that_does_what_hollow_tensors_cannot_is_measured_all_the_same(monkeypatch):
    """As iUNet, which frees its input by shrinking it in place."""

    class Shrinking(torch.nn.Conv3d):
        def forward(self, image):
            torch.empty(4, 4).resize_(2)
            return super().forward(image)

    monkeypatch.setitem(PEERS, "shrinking", ("torch", lambda c, k, patch: Shrinking(c, k, 3, padding=1), ()))
    predicted, real = (benchmark._peer_memory("shrinking", (8, 8, 8), 2, 3, "cpu", real) for real in (False, True))
    assert predicted.peak_bytes == real.peak_bytes > 0


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setitem(PEERS, "nobody", ("no_such_library", None, ()))
    assert build_peer("nobody", 1, 2, (8, 8, 8)) is None


def test_the_largest_cube_is_found_by_halving(monkeypatch):
    """On a made-up card: what fits is decided by the side alone."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * 2**30))
    limits = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: limits.append(fraction * 10 * 2**30)
    )
    monkeypatch.setattr(cube, "_fits", lambda config, side, *rest: side <= (160 if config.name == "unet3d" else 304))
    rows = cube.bench_cube(4, 4, "cuda:0", time.monotonic() + 60)
    assert {(row["network"], row["side"], row["complete"]) for row in rows} == {
        ("unet3d", 160, True),
        ("fully_invres", 304, True),
    }
    assert {row["card_gib"] for row in rows} == {8}, "cards larger than the one at hand are left out"
    assert limits[0] == pytest.approx(8 * 2**30 - CONTEXT_BYTES), "what the plan for such a card leaves to the tensors"
    rows = cube.bench_cube(4, 4, "cuda:0", time.monotonic() - 1)
    assert not any(row["complete"] for row in rows)
    assert all(row["side"] is None for row in rows), "nothing was tried, so nothing is known to fit"


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_in_groups_counts_a_groups_share_forward_and_twice_that_backward(groups):
    image = torch.randn(2, 8, 5, 6, 7, requires_grad=True)
    convolution = torch.nn.Conv3d(8, 8, 3, padding=1, groups=groups)
    with Operations() as forward:
        output = convolution(image)
    with Operations() as backward:
        output.sum().backward()
    assert forward.total == 2 * (8 * 8 // groups) * 3**3 * (2 * 5 * 6 * 7)
    assert backward.total == 2 * forward.total


@pytest.mark.slow
def test_variants_stand_beside_what_they_are_variants_of(monkeypatch):
    """Small patches, but the networks as they are: the figures themselves are the command's."""
    monkeypatch.setattr(variants, "WHOLE_VOLUME", (48, 48, 32))
    monkeypatch.setattr(variants, "DEEP", 4)
    recorder = Recorder()
    rows = variants.bench_variants((32, 32, 32), 4, 4, recorder)
    assert_progress_is_complete(recorder)
    by_key = {(row["network"], row["variant"], row["memory"]): row for row in rows}
    assert len(by_key) == len(rows) == 13
    for name in variants.INVERTIBLE:
        config = NetworkConfig(name=name, in_channels=4, out_channels=4)
        assert by_key[name, "plain", "low"]["peak_bytes"] == predict_training(config, (32, 32, 32)).peak_bytes
        deep, single = (by_key[name, f"{count} block{'s' * (count > 1)} a level", "low"] for count in (4, 1))
        assert deep["activation_ratio"] == deep["activation_bytes"] / single["activation_bytes"] < 1.02
        assert deep["ratio"] > 1.5, "parameters grow with depth, maps do not"
        many = by_key[name, "104 classes", "low"]
        assert many["ratio"] == many["peak_bytes"] / by_key[name, "plain", "low"]["peak_bytes"]
    baseline, *ours = [row for row in rows if row["variant"] == "whole volume"]
    assert baseline["network"] == "unet3d" and baseline["ratio"] == 1 and all(row["ratio"] < 1 for row in ours)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_table_of_nothing_but_errors_is_an_error(monkeypatch, tmp_path, all_of_them):
    rows = [{"network": "unet3d", "error": "ValueError: too small."}]
    rows += [] if all_of_them else [{"network": "unet3d", "peak_bytes": 8}]
    monkeypatch.setattr(benchmark, "bench_memory", lambda *_: rows)
    outcome = invres("bench", "memory", "-o", tmp_path, "--json")
    assert outcome.code == (2 if all_of_them else 0), outcome
    if all_of_them:
        assert "the first error is: ValueError: too small." in outcome.events[-1]["message"]
    assert "too small" in (tmp_path / "bench.md").read_text(encoding="utf-8")
