"""The choice of what computes: automatic, a graphics card with its free memory, or the CPU."""

from collections.abc import Callable

from slicer.i18n import tr as _

from . import Settings
from .Text import formatBytes

__all__ = ["DeviceChooser"]

AUTOMATIC = "auto"


class DeviceChooser:
    """The combo box of devices; the choice is remembered for this computer."""

    def __init__(self, box, onChanged: Callable[[], None]) -> None:
        self._box = box
        self._onChanged = onChanged
        self._names: list[str] = []
        self._filling = False
        box.connect("currentIndexChanged(int)", self._onIndex)
        self.setDevices([], "")

    @property
    def name(self) -> str:
        """The device as the backend's `--device` takes it."""
        index = self._box.currentIndex
        return self._names[index] if 0 <= index < len(self._names) else AUTOMATIC

    def setDevices(self, devices: list[dict], automatic: str) -> None:
        """Show what the backend's `devices` verb listed: name, title, free_bytes; automatic: what "auto" takes."""
        titles = {device["name"]: _title(device) for device in devices}
        text = _("Automatic")
        if automatic in titles:
            text = _("Automatic ({device})").format(device=titles[automatic])
        entries = [(AUTOMATIC, text)]
        for device in devices:
            text = titles[device["name"]]
            if device.get("free_bytes") is not None:
                text = _("{device}, {amount} free").format(device=text, amount=formatBytes(device["free_bytes"]))
            entries.append((device["name"], text))
        if "cpu" not in titles:
            entries.append(("cpu", _("CPU")))
        self._filling = True
        self._box.clear()
        for _name, text in entries:
            self._box.addItem(text)
        self._names = [name for name, _text in entries]
        wanted = Settings.device()
        if devices and wanted not in self._names:
            # It is gone: what the box says must be what every tab computes on.
            wanted = AUTOMATIC
            Settings.setDevice(wanted)
        self._box.currentIndex = self._names.index(wanted) if wanted in self._names else 0
        self._filling = False

    def _onIndex(self, _index: int) -> None:
        if not self._filling:
            Settings.setDevice(self.name)
            self._onChanged()


def _title(device: dict) -> str:
    """What a person reads; a card with its number, as two of a kind have the same name."""
    title = device.get("title") or device["name"]
    kind, _separator, index = device["name"].partition(":")
    return _("GPU {index}: {title}").format(index=index, title=title) if kind == "cuda" and index else title
