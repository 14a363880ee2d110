"""What a fixed amount of memory holds with and without reversibility: volume, depth, width, searched on predictions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from . import InvresError
from .events import SILENT, Reporter, format_bytes
from .networkconfig import NetworkConfig
from .published import MBCONV_CLAIMS
from .reproduction import Comparison, Request, Row, table

__all__ = ["Holding", "holdings", "largest"]

STEP = 16
"""Voxels by which cubes grow: what the deepest level divides a side by, so that nothing is filled up."""
SIDE = 128
EIGHTHS = 8
"""Widths grow by eighths of the default ones, which are multiples of 16."""
LARGEST_SIDE, MOST_BLOCKS, WIDEST = 40, 4, 16 * EIGHTHS
"""Where the searches end: steps of a side, blocks added to every level, eighths of a width."""
ENGINES = ("stored", "reversible")
GB = 2**30


@dataclass(frozen=True)
class Holding:
    """What the budget holds under one engine. side: of the largest cube, in voxels, at the default depth and width.

    blocks: all blocks of the deepest network, width: that of the finest level of the widest, both for a cube of
    `at_side`. complete: False where a search ended before the budget did, so that it holds at least this.
    """

    engine: str
    side: int
    blocks: int
    width: int
    at_side: int
    complete: tuple[bool, bool, bool]


def largest(fits: Callable[[int], bool], start: int, end: int) -> int:
    """The largest whole number from `start` to `end` that fits; whatever fits, all smaller ones must fit as well.

    start - 1 where not even `start` fits. Goes up in doubling steps, then halves the rest.
    """
    if not fits(start):
        return start - 1
    low, step = start, 1
    while low < end and fits(min(low + step, end)):
        low, step = min(low + step, end), 2 * step
    high = min(low + step, end + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def holdings(config: NetworkConfig, budget_bytes: int, report: Reporter = SILENT) -> tuple[Holding, Holding]:
    """What `budget_bytes` of live tensors hold of the network under `stored` and under `reversible`.

    Depth and width are compared at the largest cube that `stored` can be trained on. Raises InvresError where it
    cannot be trained at all.
    """
    import torch

    from .memory import predict_training
    from .networks import build

    with torch.device("meta"):
        full = build(config).config

    @functools.cache
    def needed(network: NetworkConfig, side: int, engine: str) -> int:
        return predict_training(network, (side,) * 3, engine=engine).peak_bytes

    def longest(engine: str, start: int, end: int, case: Callable[[int], tuple[NetworkConfig, int]]) -> int:
        return largest(lambda number: needed(*case(number), engine) <= budget_bytes, start, end)

    def deeper(more: int) -> NetworkConfig:
        blocks, decoder_blocks = (tuple(b + more for b in counts) for counts in (full.blocks, full.decoder_blocks))
        return dataclasses.replace(full, blocks=blocks, decoder_blocks=decoder_blocks)

    def wider(eighths: int) -> NetworkConfig:
        return dataclasses.replace(full, channels=tuple(c * eighths // EIGHTHS for c in full.channels))

    sides: dict[str, int] = {}
    for done, engine in enumerate(ENGINES):
        report.progress("reproduce", done, 6)
        # What is stored is what grows with the volume, so the reversible network holds at least the same.
        start = sides.get("stored", 2)
        sides[engine] = longest(engine, start, LARGEST_SIDE, lambda steps: (full, steps * STEP))
    at_side = sides["stored"] * STEP
    if sides["stored"] < 2:
        raise InvresError(
            f"{format_bytes(budget_bytes)} are too little to train {config.name} without reversibility; a cube of "
            f"{2 * STEP} voxels takes {format_bytes(needed(full, 2 * STEP, 'stored'))}.",
            hint="Give more memory.",
        )
    found = []
    for done, engine in enumerate(ENGINES):
        report.progress("reproduce", 2 + 2 * done, 6)
        more = longest(engine, 0, MOST_BLOCKS, lambda more: (deeper(more), at_side))
        report.progress("reproduce", 3 + 2 * done, 6)
        eighths = longest(engine, EIGHTHS, WIDEST, lambda eighths: (wider(eighths), at_side))
        blocks = sum(deeper(more).blocks) + sum(deeper(more).decoder_blocks)
        complete = (sides[engine] < LARGEST_SIDE, more < MOST_BLOCKS, eighths < WIDEST)
        found.append(Holding(engine, sides[engine] * STEP, blocks, wider(eighths).channels[0], at_side, complete))
    report.progress("reproduce", 6, 6)
    return found[0], found[1]


@table("mbconv-claims", MBCONV_CLAIMS.title, MBCONV_CLAIMS.source, takes_vram=True)
def _mbconv_claims(request: Request) -> Comparison:
    from .memory import CONTEXT_BYTES, ROUNDING, predict_training

    if request.device:
        raise InvresError(
            "mbconv-claims is a search among predictions and measures nothing.", hint="Leave --device out."
        )
    config = NetworkConfig(name="mbconv_unet", in_channels=4, out_channels=4)
    if request.vram_bytes:
        budget = int((request.vram_bytes - CONTEXT_BYTES) / ROUNDING)
        meaning = f"what a card of {format_bytes(request.vram_bytes)} leaves for live tensors"
    else:
        budget = predict_training(config, (SIDE,) * 3, engine="stored").peak_bytes
        meaning = f"what {config.name} needs without reversibility at {SIDE}x{SIDE}x{SIDE}"
    stored, reversible = holdings(config, budget, report=request.report)
    cube = f"at {stored.at_side}x{stored.at_side}x{stored.at_side}"
    ours = (
        (reversible.side / stored.side) ** 3,
        reversible.blocks / stored.blocks,
        reversible.width / stored.width,
    )
    figures = (("side of the largest cube, voxels", "side"), (f"blocks {cube}", "blocks"), (f"width {cube}", "width"))
    rows = [Row("budget", "memory, GB", None, budget / GB, meaning)]
    for holding in (stored, reversible):
        name = "not reversible" if holding is stored else "reversible"
        for (figure, key), complete in zip(figures, holding.complete, strict=True):
            remark = "" if complete else "at least: the search ended here"
            rows.append(Row(name, figure, None, getattr(holding, key), remark))
    ((network, claims),) = MBCONV_CLAIMS.rows.items()
    for column, claim, value, complete in zip(MBCONV_CLAIMS.columns, claims, ours, reversible.complete, strict=True):
        rows.append(Row(MBCONV_CLAIMS.names[network], column.title, claim, value, "" if complete else "at least"))
    notes = [
        f"Both are {config.name} with the same parameters, the one under engine `stored` and the other under "
        "`reversible`: a training step in float32 with Adam, batch of 1, 4 channels, 4 classes; live tensors, "
        f"predicted without allocating. Cubes grow by {STEP} voxels, depth by a block in every level, widths by an "
        "eighth.",
        "The abstract gives neither widths, depths and sizes nor the amount of memory that its figures are for.",
    ]
    return Comparison(rows, notes)
