"""Which loaded volume belongs to which channel of a model: told from headers, names and values, never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from slicer.i18n import tr as _

from .ContrastNames import Contrast, contrastOfChannel, contrastOfName, rejectedName, wordsOf
from .VolumeDescription import IntensityStatistics, VolumeDescription, describeVolume

__all__ = [
    "ACCEPTED",
    "MARGIN",
    "ChannelMatch",
    "IntensityStatistics",
    "Score",
    "VolumeDescription",
    "describeVolume",
    "match",
    "score",
]

ACCEPTED = 0.6
"""Confidence from which a volume is put into a channel."""
MARGIN = 0.15
"""By so much an assignment must beat every other one; else the channel stays empty."""


@dataclass(frozen=True)
class Score:
    """How well a volume fits a channel, from 0 to 1, and why, in words."""

    confidence: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ChannelMatch:
    """What was found for a channel. volume: None if it stays empty; sentence: why, or how sure it is."""

    channel: str
    volume: VolumeDescription | None
    confidence: float
    sentence: str
    reasons: tuple[str, ...] = ()


# ---------------------------------------------------------------- assignment


def match(channels: Sequence[Any], volumes: Sequence[VolumeDescription]) -> list[ChannelMatch]:
    """One match per channel (objects with `name` and `modality`), no volume twice, the best in sum.

    A channel stays empty where nothing fits well enough, and where another assignment would be nearly as good.
    """
    scores = [[score(channel, volume) for volume in volumes] for channel in channels]
    gains = np.array([[each.confidence for each in row] for row in scores]).reshape(len(channels), len(volumes))
    gains[gains < ACCEPTED] = 0
    chosen = _assign(gains)
    best = _total(gains, chosen)
    found = []
    for row, (channel, column) in enumerate(zip(channels, chosen, strict=True)):
        if column is None or gains[row, column] == 0:
            found.append(_empty(channel, volumes, scores[row]))
            continue
        without = gains.copy()
        without[row, column] = 0
        other = _assign(without)
        rival = other[row]
        # Only another volume for this channel makes it ambiguous; leaving it empty does not.
        if rival is not None and without[row, rival] > 0 and best - _total(without, other) < MARGIN:
            sentence = _("{first} and {second} fit the channel {channel} about equally well; choose one.").format(
                first=volumes[column].name, second=volumes[rival].name, channel=channel.name
            )
            found.append(ChannelMatch(channel.name, None, 0.0, sentence, scores[row][column].reasons))
            continue
        confidence, reasons = scores[row][column].confidence, scores[row][column].reasons
        sentence = _("{name}, {percent} % sure: {reasons}.").format(
            name=volumes[column].name, percent=round(100 * confidence), reasons=", ".join(reasons)
        )
        found.append(ChannelMatch(channel.name, volumes[column], confidence, sentence, reasons))
    return found


def _empty(channel: Any, volumes: Sequence[VolumeDescription], row: Sequence[Score]) -> ChannelMatch:
    order = sorted(range(len(row)), key=lambda index: -row[index].confidence)
    if not order:
        return ChannelMatch(channel.name, None, 0.0, _("No volume is loaded."))
    first = row[order[0]]
    if first.confidence >= ACCEPTED:
        sentence = _("{name} fits {channel}, but fits another channel better; choose a volume.")
    elif first.confidence >= ACCEPTED / 2:
        sentence = _("{name} may be {channel}, but that is not certain ({reasons}); choose a volume.")
    else:
        sentence = _("No loaded volume can be told to be {channel}; choose one.")
    text = sentence.format(name=volumes[order[0]].name, channel=channel.name, reasons=", ".join(first.reasons))
    return ChannelMatch(channel.name, None, 0.0, text, first.reasons)


def _total(gains: np.ndarray, chosen: Sequence[int | None]) -> float:
    return float(sum(gains[row, column] for row, column in enumerate(chosen) if column is not None))


def _assign(gains: np.ndarray) -> list[int | None]:
    """For each row its column, or None, so that the sum is largest and no column is used twice (Kuhn 1955)."""
    rows, count = gains.shape
    # A column of its own for every row stands for "none", so that each row finds a place.
    cost = np.hstack([-gains, np.zeros((rows, rows))])
    columns = cost.shape[1]
    ofRow, ofColumn = np.zeros(rows + 1), np.zeros(columns + 1)
    rowAt = np.zeros(columns + 1, dtype=int)  # rows are counted from 1; 0 is none
    for row in range(1, rows + 1):
        rowAt[0], column = row, 0
        slack, cameFrom = np.full(columns + 1, np.inf), np.zeros(columns + 1, dtype=int)
        used = np.zeros(columns + 1, dtype=bool)
        while rowAt[column]:
            used[column] = True
            reduced = cost[rowAt[column] - 1] - ofRow[rowAt[column]] - ofColumn[1:]
            better = ~used[1:] & (reduced < slack[1:])
            slack[1:][better], cameFrom[1:][better] = reduced[better], column
            free = np.flatnonzero(~used[1:]) + 1
            nearest = int(free[slack[free].argmin()])
            step = slack[nearest]
            ofRow[rowAt[used]] += step
            ofColumn[used] -= step
            slack[~used] -= step
            column = nearest
        while column:
            rowAt[column] = rowAt[cameFrom[column]]
            column = cameFrom[column]
    chosen: list[int | None] = [None] * rows
    for column in range(1, count + 1):
        if rowAt[column]:
            chosen[rowAt[column] - 1] = column - 1
    return chosen


# ---------------------------------------------------------------- one volume, one channel


def score(channel: Any, volume: VolumeDescription) -> Score:
    """How well `volume` fits the channel (an object with `name` and `modality`)."""
    if reason := _rejected(volume):
        return Score(0.0, (reason,))
    wanted = contrastOfChannel(channel.name)
    modality = (getattr(channel, "modality", "") or "").upper()
    if wanted in (Contrast.MR, Contrast.CT, Contrast.PET):
        modality = wanted.value
    elif wanted is not None:
        modality = "MR"
    fits = _modality(volume, modality)
    if fits is not None and fits.confidence == 0:
        return fits
    if wanted in (Contrast.MR, Contrast.CT, Contrast.PET):
        return fits or Score(0.3, (_("nothing says what kind of image it is"),))
    if wanted is None:
        return _byWords(channel.name, volume)
    return _byContrast(wanted, volume)


def _rejected(volume: VolumeDescription) -> str:
    """Why this volume is no input of any model; "" if it may be one."""
    statistics = volume.statistics
    if statistics is not None and statistics.minimum == statistics.maximum:
        return _("all of its voxels have the same value")
    for text in (volume.seriesDescription, volume.name):
        if kind := rejectedName(text):
            return _("its name says that it is {kind}").format(kind=kind)
    if "LOCALIZER" in volume.imageType.upper():
        return _("its header says localizer")
    if statistics is not None and statistics.whole and statistics.minimum >= 0 and statistics.distinct <= 12:
        return _("it has only {count} different values, like a label map").format(count=statistics.distinct)
    return ""


def _modality(volume: VolumeDescription, wanted: str) -> Score | None:
    """How the volume's modality fits; None if nothing is known of it. Confidence 0 rules it out."""
    known = {"MR": "MR", "CT": "CT", "PT": "PET", "PET": "PET"}
    wanted = known.get(wanted, "")
    header = volume.modality.upper()
    if header and wanted:
        if known.get(header, header) == wanted:
            return Score(0.85 if wanted == "MR" else 0.95, (_("its header says {name}").format(name=header),))
        return Score(0.0, (_("its header says {name}").format(name=header),))
    named = contrastOfName(f"{volume.seriesDescription} {volume.name}")
    ofName = named if named in (Contrast.CT, Contrast.PET) else Contrast.MR if named else None
    if ofName and wanted:
        reason = _("its name says {name}").format(name=named.value)
        return Score(0.8 if ofName.value == wanted else 0.0, (reason,))
    statistics = volume.statistics
    if statistics is not None and wanted in ("MR", "CT"):
        hounsfield = statistics.minimum <= -500 and statistics.maximum > 200
        reason = _("its values look like Hounsfield units") if hounsfield else ""
        if wanted == "CT" and hounsfield:
            return Score(0.75, (reason,))
        if wanted == "MR" and hounsfield:
            return Score(0.0, (reason,))
        if wanted == "CT" and statistics.minimum >= 0:
            return Score(0.3, (_("its values do not look like Hounsfield units"),))
        if wanted == "MR" and statistics.minimum >= 0:
            return Score(0.65, (_("its values may be those of an MR image"),))
    return None


def _byWords(channel: str, volume: VolumeDescription) -> Score:
    """For channels with a name of their own: all of its words in the volume's name."""
    wanted = wordsOf(channel)
    for text in (volume.seriesDescription, volume.name):
        if wanted and wanted <= wordsOf(text):
            return Score(0.75, (_('its name holds "{name}"').format(name=channel),))
    return Score(0.0, (_("its name does not say {name}").format(name=channel),))


def _byContrast(wanted: Contrast, volume: VolumeDescription) -> Score:
    """For channels with a contrast that is known: name and header, together."""
    text = volume.seriesDescription or volume.name
    named = contrastOfName(text)
    if named is None and volume.seriesDescription:
        text = volume.name
        named = contrastOfName(text)
    physical, why = _fromHeader(volume)
    if named is Contrast.CONFLICT:
        return Score(0.2, (_('"{name}" names several contrasts').format(name=text),))
    reasons = []
    if named:
        reasons.append(_("called {name}").format(name=named.words()))
    if physical:
        reasons.append(why)
    if named and physical:
        agrees = named.base is physical.base
        kind, confidence = named, 0.95 if agrees else 0.35
        if not agrees:
            reasons[-1] = _("but {why}").format(why=why)
    elif named or physical:
        kind, confidence = (named, 0.85) if named else (physical, 0.75)
    else:
        return Score(0.0, (_("neither its name nor its header says what it is"),))
    if kind.base is not wanted.base:
        other = physical if named and physical and physical.base is wanted.base else None
        return Score(0.3 if other else 0.0, tuple(reasons))
    if wanted.base is Contrast.T1:
        return _contrastAgent(wanted, kind, volume, confidence, reasons)
    return Score(confidence, tuple(reasons))


def _contrastAgent(
    wanted: Contrast, kind: Contrast, volume: VolumeDescription, confidence: float, reasons: list[str]
) -> Score:
    """T1 with and without contrast agent must not be mistaken for each other."""
    agent = re.sub(r"\W", "", volume.contrastAgent).casefold()
    given = bool(agent) and agent not in ("no", "none", "n", "na", "without", "nocontrast", "0", "0ml")
    stated = kind if kind in (Contrast.T1_ENHANCED, Contrast.T1_PLAIN) else None
    ofHeader = None
    if given:
        ofHeader = Contrast.T1_ENHANCED
        reasons.append(_("its header names a contrast agent"))
    elif volume.echoTime is not None:
        ofHeader = Contrast.T1_PLAIN
    enhanced = wanted is Contrast.T1_ENHANCED
    if stated:
        fits = (stated is Contrast.T1_ENHANCED) == enhanced
        if ofHeader is Contrast.T1_ENHANCED and stated is Contrast.T1_PLAIN:
            confidence = min(confidence, 0.65)  # some scanners keep the agent in all series of an examination
        return Score(confidence if fits else 0.1, tuple(reasons))
    if ofHeader is Contrast.T1_ENHANCED:
        return Score(min(confidence, 0.85) if enhanced else 0.15, tuple(reasons))
    if enhanced:
        reasons.append(_("nothing says that contrast agent was given"))
        return Score(0.25, tuple(reasons))
    return Score(confidence if ofHeader else min(confidence, 0.8), tuple(reasons))


def _fromHeader(volume: VolumeDescription) -> tuple[Contrast | None, str]:
    """The contrast that the times of the sequence make, and why, in words. Bounds as in textbooks for 1.5 and 3 T."""
    te, tr, ti = volume.echoTime, volume.repetitionTime, volume.inversionTime
    sequence = set(re.split(r"[\\\s,]+", volume.scanningSequence.upper())) - {""}
    if volume.diffusionBValue:
        return Contrast.DWI, _("b value {b} s/mm2").format(b=f"{volume.diffusionBValue:g}")
    if te is None or tr is None:
        return None, ""
    times = _("TE {te}, TR {tr} ms").format(te=f"{te:.4g}", tr=f"{tr:.4g}")
    if "EP" in sequence:
        return None, ""
    inverted = "IR" in sequence or bool(ti)
    if inverted and ti:
        times = _("TE {te}, TR {tr}, TI {ti} ms").format(te=f"{te:.4g}", tr=f"{tr:.4g}", ti=f"{ti:.4g}")
    if inverted and te >= 60 and tr >= 4000:
        # A short inversion time suppresses fat, a long one fluid.
        return (Contrast.FLAIR, times) if ti is None or ti >= 1400 else (Contrast.STIR, times)
    if "GR" in sequence and not inverted:
        if te >= 14 and (volume.flipAngle or 0) <= 35:
            return Contrast.T2_STAR, times
        return (Contrast.T1, times) if te < 10 and tr < 60 and (volume.flipAngle or 0) >= 8 else (None, "")
    if te <= 30 and (tr <= 1000 or (inverted and tr <= 3500 and (ti is None or ti >= 500))):
        return Contrast.T1, times
    if not inverted and te >= 60 and tr >= 1800:
        return Contrast.T2, times
    if not inverted and te <= 40 and tr >= 1800:
        return Contrast.PD, times
    return None, ""
