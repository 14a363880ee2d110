"""What a model says of itself, as the card under the list of models."""

from slicer.i18n import tr as _

from .Text import escape, firstOf, formatBytes

__all__ = ["cardText", "matchesSearch"]

LABELS_SHOWN = 12
METRICS_SHOWN = 4


def cardText(model, memory: str = "") -> str:
    """The card of a `ModelInfo`, as rich text. memory: what it needs, in words, once that is known."""
    rows = [
        (_("Version"), escape(_version(model))),
        (_("Channels"), ", ".join(_withModality(channel) for channel in model.channels)),
        (_("Labels"), _labels(model)),
        (_("Spacing"), _("{spacing} mm").format(spacing=" \u00d7 ".join(f"{value:g}" for value in model.spacingMm))),
        (_("Licence"), escape(model.licence) if model.licence else _("not stated")),
        (_("Training data"), escape(model.trainingData) if model.trainingData else _("not stated")),
        (_("Metrics"), _metrics(model)),
    ]
    if not memory and model.predictedBytes is not None:
        memory = _("about {amount}").format(amount=formatBytes(model.predictedBytes))
    if memory:
        rows.append((_("Memory"), escape(memory)))
    lines = "".join(
        f'<tr><td style="padding-right: 8px; white-space: nowrap"><b>{title}</b></td><td>{value}</td></tr>'
        for title, value in rows
    )
    description = f"<p>{escape(model.description)}</p>" if model.description else ""
    return f"{description}<table cellspacing=0 cellpadding=1>{lines}</table>"


def matchesSearch(model, words: str) -> bool:
    """Whether every word occurs in the model's name, description, channels, labels, licence or training data."""
    channels = " ".join(f"{channel.name} {channel.modality}" for channel in model.channels)
    labels = " ".join(label.name for label in model.labels)
    said = " ".join((model.name, model.description, channels, labels, model.licence, model.trainingData)).casefold()
    return all(word in said for word in words.casefold().split())


def _version(model) -> str:
    if not model.version:
        return _("not stated")
    return _("{version}, fine-tuned").format(version=model.version) if model.parent else model.version


def _withModality(channel) -> str:
    same = not channel.modality or channel.modality.casefold() == channel.name.casefold()
    words = ([] if same else [channel.modality]) + ([_("optional")] if channel.optional else [])
    return escape(f"{channel.name} ({', '.join(words)})" if words else channel.name)


def _labels(model) -> str:
    shown = []
    for label in model.labels:
        square = ""
        if label.colour:
            red, green, blue = label.colour
            square = f'<font color="#{red:02x}{green:02x}{blue:02x}">\u25a0</font>&nbsp;'
        name = _("{label} (left and right)").format(label=label.name) if label.sided else label.name
        shown.append(square + escape(name).replace(" ", "&nbsp;"))
    return ", ".join(firstOf(shown, LABELS_SHOWN))


def _metrics(model) -> str:
    shown = [escape(row) for row in model.metrics]
    if len(shown) > METRICS_SHOWN:
        left = len(shown) - METRICS_SHOWN + 1
        shown[METRICS_SHOWN - 1 :] = [_("and {count} more, in the manifest (tab Models)").format(count=left)]
    return "<br>".join(shown) or _("none measured")
