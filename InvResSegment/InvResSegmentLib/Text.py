"""Bytes, seconds, confidence and lists in the words of the panel."""

import html
import math

from slicer.i18n import tr as _

__all__ = [
    "bullets",
    "confidenceInWords",
    "escape",
    "firstOf",
    "formatBytes",
    "formatSeconds",
    "framesInWords",
    "paragraphs",
]


def formatBytes(count: float | None) -> str:
    """1 500 000 000 as "1.4 GiB"; "unknown" for None."""
    if count is None:
        return _("unknown")
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def formatSeconds(seconds: float | None) -> str:
    """95 as "1 min 35 s"; "" for None or what is no time."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return ""
    if seconds < 60:
        return _("{count} s").format(count=max(1, round(seconds)))
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _("{minutes} min {seconds} s").format(minutes=minutes, seconds=rest)
    return _("{hours} h {minutes} min").format(hours=minutes // 60, minutes=minutes % 60)


def confidenceInWords(confidence: float, least: float) -> str:
    """How sure the model is of a result, from 0 to 1. least: on the images that it was tested with; 0 is not known."""
    if confidence <= 0:
        return _("Confidence: none, for nothing was found.")
    values = {"confidence": f"{confidence:.2f}", "least": f"{least:.2f}"}
    if not least:
        return _("Confidence {confidence} of 1.").format(**values)
    if confidence < least:
        text = _(
            "Confidence {confidence} of 1, less than on all images that the model was tested with ({least} or more)."
        )
    else:
        text = _("Confidence {confidence} of 1 ({least} or more on the images the model was tested with).")
    return text.format(**values)


def framesInWords(frames: list[int], count: int) -> str:
    """Frames, counted from 1 and in order, of so many: "Frames 3, 7, 9 to 12"."""
    if len(frames) == count:
        return _("All {count} frames").format(count=count)
    if len(frames) == 1:
        return _("Frame {number}").format(number=frames[0])
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    parts = []
    for run in runs:
        parts += [_("{first} to {last}").format(first=run[0], last=run[-1])] if len(run) > 2 else map(str, run)
    return _("Frames {numbers}").format(numbers=", ".join(parts))


def escape(text: object) -> str:
    """Text for a label that reads rich text: names of nodes and models may hold anything."""
    return html.escape(str(text), quote=False)


def paragraphs(sentences: list[str]) -> str:
    """Sentences as rich text, one below the other."""
    return "<br>".join(escape(sentence) for sentence in sentences)


def bullets(title: str, sentences: list[str]) -> str:
    """A title with points under it, as plain text for a tool tip."""
    return "\n".join([title, *(f"\u2022 {sentence}" for sentence in sentences)])


def firstOf(texts: list[str], most: int) -> list[str]:
    """The first ones, and how many more there are."""
    if len(texts) <= most:
        return texts
    return [*texts[:most], _("and {count} more").format(count=len(texts) - most)]
