"""Figures of the papers, as printed: each table with its source, each value under the column it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "FCN_4",
    "INVRES_1",
    "INVRES_2",
    "INVRES_3",
    "INVRES_4",
    "IQT_4",
    "IQT_TESTS",
    "MBCONV_CLAIMS",
    "PARAMETERS",
    "Column",
    "PublishedTable",
]


@dataclass(frozen=True)
class Column:
    """title: as printed, with the unit where the paper gives one.

    quantity: "memory", "Dice" or "HD" (Hausdorff), or another word. of: the label it is about, as our layouts name it.
    """

    title: str
    quantity: str
    of: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """rows: the values by our name of the network; None where the table has none. names: as the table calls them."""

    title: str
    source: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float | None, ...]]
    names: Mapping[str, str]


_INVRES = {
    "unet3d": "3D U-Net (baseline)",
    "partially_invres": "Partially-InvRes",
    "fully_invres": "Fully-InvRes",
}
_INVRES_PAPER = "Yamazaki, Rathour and Le, arXiv 2103.09042"
_TISSUES = ("CSF", "GM", "WM")
_TUMOUR = {"WT": "whole_tumour", "ET": "enhancing_tumour", "TC": "tumour_core"}

# How much larger than for 16 layers the printed complexity is for 64: L 4, sqrt L 2, log L 1.5, 1 1; for operations, of
# each layer: L 1, L log L 1.5.
INVRES_1 = PublishedTable(
    title="Networks of L identical layers: memory of activations and operations",
    source=f"{_INVRES_PAPER}, table 1",
    columns=(Column("activations, 64 layers to 16", "memory"), Column("operations of a layer, 64 to 16", "operations")),
    rows={
        "stored": (4.0, 1.0),
        "checkpoint": (2.0, 1.0),
        "recursive": (1.5, 1.5),
        "reversible": (1.0, 1.0),
    },
    names={
        "stored": "Naive: O(L)",
        "checkpoint": "Checkpointing: O(sqrt L)",
        "recursive": "Recursive: O(log L)",
        "reversible": "Invertible Networks: O(1)",
    },
)

INVRES_2 = PublishedTable(
    title="iSeg-2019, patches of 64x64x64",
    source=f"{_INVRES_PAPER}, table 2",
    columns=(
        Column("memory, GB", "memory"),
        *(Column(f"Dice {tissue}, %", "Dice", tissue) for tissue in _TISSUES),
        *(Column(f"Hausdorff {tissue}", "HD", tissue) for tissue in _TISSUES),
    ),
    rows={
        "unet3d": (4.18, 92.50, 90.84, 89.26, 9.45, 6.96, 7.47),
        "partially_invres": (3.60, 95.07, 91.66, 90.92, 9.62, 6.54, 6.87),
        "fully_invres": (2.12, 95.09, 91.32, 90.31, 9.48, 6.87, 6.91),
    },
    names=_INVRES,
)

INVRES_3 = PublishedTable(
    title="BraTS 2020, patches of 128x128x128",
    source=f"{_INVRES_PAPER}, table 3",
    columns=(
        Column("memory, GB", "memory"),
        *(Column(f"Dice {short}, %", "Dice", label) for short, label in _TUMOUR.items()),
        *(Column(f"Hausdorff {short}", "HD", label) for short, label in _TUMOUR.items()),
    ),
    rows={
        "unet3d": (6.8, 84.68, 70.16, 74.13, 11.45, 9.13, 11.37),
        "partially_invres": (5.7, 85.97, 69.70, 74.69, 10.56, 8.71, 11.28),
        "fully_invres": (3.1, 88.20, 72.01, 77.74, 10.46, 6.68, 8.33),
    },
    names=_INVRES,
)

# A cross or a tick each in the paper: 0 or 1.
INVRES_4 = PublishedTable(
    title="Networks for volumetric segmentation, patches of 128x128x128",
    source=f"{_INVRES_PAPER}, table 4",
    columns=(
        Column("memory efficient", "memory efficient"),
        Column("avoid overfitting", "avoid overfitting"),
        Column("high accuracy", "high accuracy"),
    ),
    rows={
        "unet3d": (0, 0, 1),
        "no_new_net": (0, 0, 1),
        "autoencoder_unet": (0, 1, 1),
        "partially_invres": (1, 1, 1),
        "fully_invres": (1, 1, 1),
    },
    names={
        **_INVRES,
        "unet3d": "3D U-Net",
        "no_new_net": "No New-Net",
        "autoencoder_unet": "Autoencoder U-Net",
    },
)

_SECOND_HAND = "second hand, from a table in the README of easthorse's group convolution code on GitHub"
PARAMETERS = {
    "unet3d": (19_069_955, "arXiv 1606.06650, section 2"),
    "no_new_net": (12_430_000, _SECOND_HAND),
    "autoencoder_unet": (40_060_000, _SECOND_HAND),
}
"""Numbers of parameters of the networks in table 4, with their source. The papers of No New-Net (arXiv 1809.10483) and
the Autoencoder U-Net (arXiv 1810.11654) state none that is known to us."""

MBCONV_CLAIMS = PublishedTable(
    title="What reversible mobile inverted bottlenecks make of a fixed amount of memory",
    source="Pendse et al., BrainLes 2020 (LNCS 12659), abstract: 'up to 3x larger', '25% more depth', 'up to 2x'",
    columns=(
        Column("volume, times", "volume"),
        Column("depth, times", "depth"),
        Column("channels, times", "width"),
    ),
    rows={"mbconv_unet": (3.0, 1.25, 2.0)},
    names={"mbconv_unet": "reversible / not reversible"},
)

IQT_4 = PublishedTable(
    title="Root mean square error on 8 test subjects, by network and number of training subjects",
    source="Blumberg et al. 2018, figure 4",
    columns=tuple(
        Column(f"RMSE {region}, {figure}", figure, region)
        for region in ("interior", "exterior", "total")
        for figure in ("mean", "sd")
    ),
    rows={
        "espcn-8": (6.33, 0.30, 14.01, 1.12, 9.72, 0.64),
        "espcn-best-8": (6.29, 0.29, 13.82, 0.31, 9.76, 0.51),
        "espcn_rn2-8": (5.78, 0.28, 13.17, 1.16, 9.06, 0.66),
        "espcn_rn4-8": (5.71, 0.24, 12.84, 1.18, 8.86, 0.66),
        "espcn_rn6-8": (7.33, 1.43, 13.03, 1.19, 9.76, 0.88),
        "espcn_rn8-8": (9.54, 4.38, 12.78, 1.25, 11.08, 2.66),
        "espcn-16": (6.12, 0.29, 13.42, 1.15, 9.33, 0.65),
        "espcn_rn4-16": (5.51, 0.25, 12.40, 1.23, 8.56, 0.68),
        "espcn-32": (6.12, 0.29, 13.42, 1.15, 9.33, 0.65),
        "espcn_rn4-32": (5.58, 0.25, 12.13, 1.24, 8.46, 0.67),
    },
    names={
        "espcn-8": "ESPCN, 8 subjects",
        "espcn-best-8": "ESPCN-best of Tanno et al. 2017, 8 subjects",
        "espcn_rn2-8": "ESPCN-RN2, 8 subjects",
        "espcn_rn4-8": "ESPCN-RN4, 8 subjects",
        "espcn_rn6-8": "ESPCN-RN6, 8 subjects",
        "espcn_rn8-8": "ESPCN-RN8, 8 subjects",
        "espcn-16": "ESPCN, 16 subjects",
        "espcn_rn4-16": "ESPCN-RN4, 16 subjects",
        "espcn-32": "ESPCN, 32 subjects",
        "espcn_rn4-32": "ESPCN-RN4, 32 subjects",
    },
)

IQT_TESTS = {("espcn_rn4-32", "espcn-best-8"): (0, 0.0117), ("espcn_rn4-32", "espcn-32"): (0, 0.0117)}
"""W and p of Wilcoxon's signed-rank test on the totals of 8 test subjects, for pairs of rows of `IQT_4` (the text below
figure 4; p is the normal approximation). Which ESPCN-RN4 is "our best" is not said; that of most subjects is taken."""

FCN_4 = PublishedTable(
    title="Dice by size of the training patches, of the network with all methods",
    source="figure 4 (b), in words: 'outperformed the one with small size by 5%'",
    columns=(Column("Dice gained, %", "Dice"),),
    rows={"256x256x152": (5.0,), "96x96x96": (None,)},
    names={"256x256x152": "patches of 256x256x152", "96x96x96": "patches of 96x96x96"},
)
