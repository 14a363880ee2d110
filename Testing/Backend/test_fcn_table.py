"""Table 1 of the memory-efficient FCN: parameter counts as published, and memory that goes the published way."""

from __future__ import annotations

import pytest

from invres import fcn_table
from invres.events import Recorder
from invres.fcn_table import SIZES, VARIANTS, compare_table


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcn_table, "SIZES", {"96x96x96": (32, 32, 32), "256x256x234": (24, 16, 16)})
        report = Recorder()
        found = compare_table(tuple(fcn_table.SIZES), report)
    assert [e["done"] for e in report.events] == list(range(len(found) + 1))
    return found


def test_parameter_counts_are_within_five_percent_of_the_published_ones(rows):
    counted = [row for row in rows if row["published_parameters"] is not None]
    assert {row["published_parameters"] for row in counted} == {9.5e6, 3.2e6, 2.7e6, 2.6e6}
    for row in counted:
        assert row["parameters"] == pytest.approx(row["published_parameters"], rel=0.05), row["network"]


def test_every_variant_has_a_row_at_every_size_beside_what_is_published(rows):
    assert [row["network"] for row in rows] == 2 * [variant.title for variant in VARIANTS]
    at = {(row["network"], row["size"]): row for row in rows}
    assert at["Baseline+CCBlock", "96x96x96"]["published_gb"] == 3.0
    assert at["Baseline+CCBlock", "96x96x96"]["published_ratio"] == pytest.approx(3.0 / 3.7)
    whole = at["Baseline+CCBlock+Inplace-ABN+MP", "256x256x234"]
    assert (whole["published_gb"], whole["published_ratio"]) == (17.6, None), "the baseline did not fit a card of 32 GB"
    assert at["Baseline U-Net", "256x256x234"]["published_gb"] is None
    assert set(SIZES.values()) == {(96, 96, 96), (152, 256, 256), (234, 256, 256)}


def test_in_place_norms_and_mixed_precision_save_what_the_paper_says_they_do(rows):
    ratio = {row["network"]: row["ratio"] for row in rows if row["size"] == "96x96x96"}
    assert ratio["Baseline U-Net"] == 1
    compact = ratio["Baseline+CCBlock"]
    assert 0.9 < compact < 1.15, "the blocks save parameters, hardly memory"
    assert ratio["Baseline+CCBlock+Inplace-ABN"] < 0.8 * compact
    assert ratio["Baseline+CCBlock+Inplace-ABN+MP"] < 0.7 * ratio["Baseline+CCBlock+Inplace-ABN"]
    assert ratio["fully_invres"] < 0.5 * ratio["Baseline+CCBlock+Inplace-ABN+MP"]
