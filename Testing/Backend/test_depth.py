"""Memory strategies against depth: the shapes of the curves are those of theory."""

from __future__ import annotations

import pytest

from invres.depth import STRATEGIES, bench_depth, draw_depth


@pytest.fixture(scope="module")
def rows():
    return bench_depth((4, 16, 64))


def peaks(rows, strategy):
    return [row["peak_states"] for row in rows if row["strategy"] == strategy]


def test_every_strategy_has_a_row_for_every_depth(rows):
    assert [(row["strategy"], row["blocks"]) for row in rows] == [(s, d) for s in STRATEGIES for d in (4, 16, 64)]


def test_the_peak_grows_as_theory_says(rows):
    first, second, third = peaks(rows, "stored")
    assert third - second == pytest.approx(4 * (second - first), rel=0.01)
    first, second, third = peaks(rows, "checkpoint")
    assert 1.7 < (third - second) / (second - first) < 2.3
    first, second, third = peaks(rows, "recursive")
    assert third - second == pytest.approx(second - first, rel=0.35)
    assert peaks(rows, "reversible") == pytest.approx([peaks(rows, "reversible")[0]] * 3, rel=0.02)
    assert peaks(rows, "memcnn")[-1] < 0.5 * peaks(rows, "stored")[-1]


def test_the_reversible_engine_computes_a_third_more_than_stored_at_any_depth(rows):
    for row in rows:
        if row["strategy"] == "reversible":
            assert row["flops_ratio"] == pytest.approx(4 / 3, rel=0.01)
        assert row["flops_ratio"] >= 1


def test_the_curves_are_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_depth(rows, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 10_000
