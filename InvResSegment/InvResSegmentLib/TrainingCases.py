"""The cases that a model is fine-tuned on: images with a segmentation in the scene, and cases that lie on disk."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import slicer

from .CaseFiles import CaseFiles
from .LabelMapping import plainName

__all__ = [
    "LEFT_OUT",
    "MISSING_CHANNEL",
    "MISSING_LABEL",
    "TRAINING",
    "VALIDATION",
    "CaseRow",
    "DataSetOnDisk",
    "Finding",
    "TrainingCases",
    "dataSetOf",
]

TRAINING, VALIDATION, LEFT_OUT = "training", "validation", "left out"
ROLES = (TRAINING, VALIDATION, LEFT_OUT)
PARAMETER = "trainingCases"
MISSING_CHANNEL = "missing_channel"
MISSING_LABEL = "missing_label_value"
"""What the data doctor calls an image, and a label, that a case lacks and that others have."""
_WORST_FIRST = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something about a case, in a sentence. severity: "error" (it cannot be learned from), "warning" or "note".

    code: what the data doctor calls it, "" where the panel found it.
    """

    severity: str
    sentence: str
    code: str = ""


@dataclass(frozen=True)
class DataSetOnDisk:
    """A data set that cases were taken from. labels: name, values, output_value. folds: of its split, 0 without."""

    path: str
    name: str
    channels: tuple[str, ...]
    labels: tuple[dict[str, Any], ...]
    count: int
    regions: bool = False
    ignoreValue: int | None = None
    channelsInOneFile: bool = False
    folds: int = 0

    @property
    def severalInOneFile(self) -> bool:
        """Whether a case is one file of several channels, which cannot be put into another order."""
        return self.channelsInOneFile and len(self.channels) > 1


@dataclass(eq=False)
class CaseRow:
    """One case. code: what its files are called, so that no name of a person gets there. key: never changes.

    In the scene: channels (name -> volume) and segmentation. Of a data set: dataSet (its path) and files (images,
    label, patient). Of files that no data set describes: stored. findings: of the data doctor; examined: the state of
    the case that they are about, None before.
    """

    key: str
    name: str
    code: str
    role: str = TRAINING
    channels: dict[str, slicer.vtkMRMLScalarVolumeNode] = field(default_factory=dict)
    segmentation: slicer.vtkMRMLSegmentationNode | None = None
    dataSet: str = ""
    files: dict[str, Any] = field(default_factory=dict)
    stored: CaseFiles | None = None
    findings: list[Finding] = field(default_factory=list)
    examined: Any = None

    @property
    def ofDataSet(self) -> bool:
        """Whether the case is one of a data set on disk."""
        return bool(self.dataSet)

    @property
    def inScene(self) -> bool:
        """Whether the case is made of nodes of the scene, and not of files."""
        return self.stored is None and not self.dataSet

    @property
    def used(self) -> bool:
        """Whether the case takes part."""
        return self.role != LEFT_OUT


class TrainingCases:
    """The list of one scene; it is kept in the scene's parameter node, and saved with it.

    What lies on disk outlives the scene: it stays on the list until a scene with a list of its own is there.
    changed: functions to be called after every change. choices: segment name -> label, as decided by a person.
    """

    def __init__(self) -> None:
        self.rows: list[CaseRow] = []
        self.dataSets: dict[str, DataSetOnDisk] = {}
        self.choices: dict[str, str] = {}
        self.changed: list[Callable[[], None]] = []
        self._node = None
        self._left: tuple = ([], {}, {})  # of the scene before: rows, data sets, choices

    # ---------------------------------------------------------------- the list

    @property
    def used(self) -> list[CaseRow]:
        """The cases that take part, in their order."""
        return [row for row in self.rows if row.used]

    def add(self, name: str, channels: dict, segmentationNode) -> CaseRow:
        """A case of the scene; one with this segmentation that is there already gets these images instead."""
        row = next((row for row in self.rows if row.segmentation is segmentationNode), None)
        if row is None:
            row = CaseRow(uuid.uuid4().hex, name, self._freeCode(), segmentation=segmentationNode)
            self.rows.append(row)
        row.channels = {channel: node for channel, node in channels.items() if node is not None}
        row.findings, row.examined = [], None
        self._onChanged()
        return row

    def addFiles(self, name: str, stored: CaseFiles) -> CaseRow:
        """A case of files; one with these images that is there already gets this label instead."""
        row = self.ofFiles(stored)
        if row is None:
            row = CaseRow(uuid.uuid4().hex, name, self._freeCode())
            self.rows.append(row)
        row.stored, row.findings, row.examined = stored, [], None
        self._onChanged()
        return row

    def ofFiles(self, stored: CaseFiles) -> CaseRow | None:
        """The case with these images, if it is on the list."""
        return next((row for row in self.rows if row.stored and row.stored.paths == stored.paths), None)

    def addDataSet(self, dataSet: DataSetOnDisk, cases: list[dict[str, Any]]) -> list[CaseRow]:
        """The labelled cases of a data set (name, images, label, patient; role where its split says it), in its order.

        Cases of the same data set that are there already are replaced.
        """
        self.rows = [row for row in self.rows if row.dataSet != dataSet.path]
        self.dataSets[dataSet.path] = dataSet
        added = []
        for case in cases:
            files = {key: case[key] for key in ("images", "label", "patient")} | {"splitRole": case.get("role")}
            row = CaseRow(uuid.uuid4().hex, case["name"], self._freeCode(case["name"]), case.get("role") or TRAINING)
            row.dataSet, row.files = dataSet.path, files
            self.rows.append(row)
            added.append(row)
        self._onChanged()
        return added

    def remove(self, rows: list[CaseRow]) -> None:
        """Take cases off the list; nodes and files stay."""
        self.rows = [row for row in self.rows if row not in rows]
        self.dataSets = {
            path: each for path, each in self.dataSets.items() if any(r.dataSet == path for r in self.rows)
        }
        self._onChanged()

    def setRole(self, row: CaseRow, role: str) -> None:
        """TRAINING, VALIDATION or LEFT_OUT."""
        if role not in ROLES:
            raise ValueError(role)
        if role != row.role:
            row.role = role
            self._onChanged()

    def setChannels(self, row: CaseRow, channels: dict) -> None:
        """Other images for a case of the scene."""
        if channels != row.channels:
            row.channels, row.findings, row.examined = dict(channels), [], None
            self._onChanged()

    def choose(self, choices: dict[str, str]) -> None:
        """What segments stand for: segment name -> label, or another choice of `LabelMapping`."""
        said = {plainName(name) for name in choices}
        self.choices = {**{n: c for n, c in self.choices.items() if plainName(n) not in said}, **choices}
        self._onChanged()

    def nodeRemoved(self, node) -> None:
        """To be called when a node leaves the scene."""
        touched = False
        for row in self.rows:
            channels = {name: volume for name, volume in row.channels.items() if volume is not node}
            if len(channels) < len(row.channels) or (row.segmentation is not None and row.segmentation is node):
                row.channels, row.findings, row.examined, touched = channels, [], None, True
                row.segmentation = None if row.segmentation is node else row.segmentation
        if touched:
            self._onChanged()

    @staticmethod
    def worst(findings: list[Finding]) -> str:
        """The severity of the worst of them; "" where there are none."""
        return min((finding.severity for finding in findings), key=_WORST_FIRST.index, default="")

    # ---------------------------------------------------------------- the scene

    def setNode(self, parameterNode) -> None:
        """Take the list of a scene from its parameter node (a vtkMRMLScriptedModuleNode); None: there is no scene."""
        before = {row.key: row for row in self.rows}
        if self._node is not None:
            self._left = [row for row in self.rows if not row.inScene], self.dataSets, self.choices
        self._node = parameterNode
        self.rows, self.dataSets, self.choices = [], {}, {}
        if parameterNode is not None and parameterNode.GetParameter(PARAMETER):
            self._load()
        elif parameterNode is not None and self._left[0]:
            self.rows, self.dataSets, self.choices = self._left
            self._save()
        # The module is entered again and again; what the doctor said of a case stays.
        self.rows = [_same(before.get(row.key), row) for row in self.rows]
        self.tell()

    def _onChanged(self) -> None:
        self._save()
        self.tell()

    def tell(self) -> None:
        """Call everybody in `changed`: something about the cases is new."""
        for function in list(self.changed):
            function()

    def _save(self) -> None:
        node = self._node
        if node is None:
            return
        wasModified = node.StartModify()
        roles = [node.GetNthNodeReferenceRole(index) for index in range(node.GetNumberOfNodeReferenceRoles())]
        for role in roles:
            if role.startswith(PARAMETER + "_"):
                node.RemoveNodeReferenceIDs(role)
        entries = []
        for row in self.rows:
            entry = {"key": row.key, "name": row.name, "code": row.code, "role": row.role}
            if row.ofDataSet:
                entry |= {"dataSet": row.dataSet, "files": row.files}
            elif row.stored is not None:
                entry["stored"] = asdict(row.stored)
            else:
                entry["channels"] = list(row.channels)
                references = [row.segmentation, *row.channels.values()]
                for index, referenced in enumerate(references):
                    if referenced is not None and referenced.GetScene() is not None:
                        node.SetNodeReferenceID(_role(row.key, index), referenced.GetID())
            entries.append(entry)
        content = {
            "rows": entries,
            "dataSets": [asdict(each) for each in self.dataSets.values()],
            "choices": self.choices,
        }
        node.SetParameter(PARAMETER, json.dumps(content))
        node.EndModify(wasModified)

    def _load(self) -> None:
        try:
            content = json.loads(self._node.GetParameter(PARAMETER) or "{}")
            rows, sets = content.get("rows") or [], content.get("dataSets") or []
            self.choices = dict(content.get("choices") or {})
            for each in sets:
                fields = {**each, "channels": tuple(each["channels"]), "labels": tuple(each["labels"])}
                self.dataSets[each["path"]] = DataSetOnDisk(**fields)
            self.rows = [self._loaded(entry) for entry in rows]
        except (AttributeError, KeyError, TypeError, ValueError):  # written by a version with another form
            self.rows, self.dataSets, self.choices = [], {}, {}

    def _loaded(self, entry: dict[str, Any]) -> CaseRow:
        row = CaseRow(entry["key"], entry["name"], entry["code"], entry["role"])
        if "dataSet" in entry:
            row.dataSet, row.files = entry["dataSet"], entry["files"]
            return row
        if "stored" in entry:
            row.stored = CaseFiles.fromJson(entry["stored"])
            return row
        row.segmentation = self._node.GetNodeReference(_role(row.key, 0))
        found = {name: self._node.GetNodeReference(_role(row.key, i + 1)) for i, name in enumerate(entry["channels"])}
        row.channels = {name: volume for name, volume in found.items() if volume is not None}
        return row

    def _freeCode(self, wanted: str = "") -> str:
        taken = {row.code for row in self.rows}
        if wanted and wanted not in taken:
            return wanted
        numbers = [int(match[1]) for code in taken if (match := re.fullmatch(r"case(\d+)", code))]
        return f"case{max(numbers, default=0) + 1:02d}"


def dataSetOf(path: str, result: dict[str, Any]) -> tuple[DataSetOnDisk, list[dict[str, Any]]]:
    """A data set and its labelled cases from the result of the backend's `check`; with roles where one split says them.

    Raises KeyError or TypeError for what is no such result.
    """
    contents = result["contents"]
    cases = [case for case in contents["cases"] if case["label"]]
    lacking = {found.get("case") for found in result.get("findings") or [] if found.get("code") == MISSING_CHANNEL}
    for case in cases:
        if case["name"] in lacking:  # named or not, these images are not there
            case["images"] = [image if image and Path(image).exists() else None for image in case["images"]]
    if len(contents["splits"]) == 1:
        (split,) = contents["splits"]
        for case in cases:
            sides = {"train": TRAINING, "val": VALIDATION}
            case["role"] = next((role for side, role in sides.items() if case["name"] in split[side]), LEFT_OUT)
    dataSet = DataSetOnDisk(
        path=path,
        name=str(result.get("dataset") or Path(path).name),
        channels=tuple(channel["name"] for channel in contents["channels"]),
        labels=tuple(contents["labels"]),
        count=len(cases),
        regions=bool(contents["regions"]),
        ignoreValue=contents["ignore_value"],
        channelsInOneFile=bool(contents["channels_in_one_file"]),
        folds=len(contents["splits"]),
    )
    return dataSet, cases


def _same(old: CaseRow | None, new: CaseRow) -> CaseRow:
    """The case as it was known already, where it is the same."""
    if old is None or old.segmentation is not new.segmentation or old.channels != new.channels:
        return new
    if old.stored != new.stored:
        return new
    old.name, old.role, old.dataSet, old.files = new.name, new.role, new.dataSet, new.files
    return old


def _role(key: str, index: int) -> str:
    """Of a node reference: 0 is the segmentation, the images follow."""
    return f"{PARAMETER}_{key}_{index}"
