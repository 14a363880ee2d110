"""Table 1 of the memory-efficient FCN: parameter counts as published, and memory that goes the published way."""

from __future__ import annotations

import dataclasses

import pytest

from invres import fcn_table
from invres.events import Recorder
from invres.fcn_table import SIZES, VARIANTS, compare_table
from invres.memory import predict_training


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcn_table, "SIZES", {size: (16, 16, 24 + 8 * place) for place, size in enumerate(SIZES)})
        report = Recorder()
        found = compare_table(("96x96x96", "256x256x234"), report)
    assert [e["done"] for e in report.events] == list(range(len(found) + 1))
    return found


def test_parameter_counts_are_within_two_percent_of_the_published_ones(rows):
    counted = [row for row in rows if row["published_parameters"] is not None]
    assert {row["published_parameters"] for row in counted} == {9.5e6, 3.2e6, 2.7e6, 2.6e6}
    for row in counted:
        assert row["parameters"] == pytest.approx(row["published_parameters"], rel=0.02), row["network"]


def test_every_variant_has_a_row_at_every_size_beside_what_is_published(rows):
    assert [row["network"] for row in rows] == 2 * [variant.title for variant in VARIANTS]
    at = {(row["network"], row["size"]): row for row in rows}
    assert at["Baseline+CCBlock", "96x96x96"]["published_gb"] == 3.0
    assert at["Baseline+CCBlock", "96x96x96"]["published_ratio"] == pytest.approx(3.0 / 3.7)
    whole = at["Baseline+CCBlock+Inplace-ABN+MP", "256x256x234"]
    assert (whole["published_gb"], whole["published_ratio"]) == (17.6, None), "the baseline did not fit a card of 32 GB"
    assert at["Baseline U-Net", "256x256x234"]["published_gb"] is None
    assert set(SIZES.values()) == {(96, 96, 96), (152, 256, 256), (234, 256, 256)}


def test_in_place_norms_and_mixed_precision_save_about_what_the_paper_says():
    """Two levels of the same widths, at a size where maps outweigh weights as they do at 96x96x96."""
    peaks = []
    for variant in (VARIANTS[0], *VARIANTS[3:6]):
        network = dataclasses.replace(variant.network, channels=(40, 80))
        peaks.append(predict_training(network, (40, 40, 40), precision=variant.precision).peak_bytes)
    plain, compact, inplace, mixed = peaks
    assert 0.9 * plain < compact < 1.15 * plain, "the blocks save weights, hardly memory"
    assert inplace < 0.7 * compact  # published: 20.0 of 27.2 GB
    assert mixed < 0.6 * inplace  # published: 11.7 of 20.0 GB


def test_ratios_are_to_the_baseline_of_the_same_size(rows):
    for row in rows:
        (base,) = (r for r in rows if r["network"] == "Baseline U-Net" and r["size"] == row["size"])
        assert row["ratio"] == row["peak_bytes"] / base["peak_bytes"]
