"""Who may import whom, read from the syntax tree of every file: downward only, and light where that is promised."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "Backend" / "invres"
MODULE = REPOSITORY / "InvResSegment"

# Lowest first: a row may name only rows above it, so the table cannot hold a cycle. A folder is one row; the files in
# it may import one another without a cycle. The package root (version, errors) is open to all and imports nothing.
# A new file gets a row here.
ALLOWED = {
    "events": "",
    "interruption": "",
    "synthesisconfig": "",
    "enhancementconfig": "",
    "configjson": "",
    "networkconfig": "configjson",
    "config": "configjson enhancementconfig networkconfig synthesisconfig",
    "recipekeys": "config configjson",
    "expectation": "config",
    "sides": "config",
    "mirroring": "config events sides",
    "files": "",
    "provenance": "files",
    "volumestable": "files",
    "faults": "",
    "runfolder": "events faults",
    "probe": "",
    "devices": "",
    "randomness": "",
    "lineage": "files",
    "curves": "events files",
    "metrics": "config",
    "intervals": "",
    "paireddifference": "intervals",
    "losses": "config",
    "augmentation": "config randomness",
    "pieces": "",
    "synthesis": "augmentation config pieces randomness synthesisconfig",
    "reversible": "",
    "networks": "networkconfig reversible",
    "hollow": "",
    "livebytes": "hollow reversible",
    "slidingwindow": "",
    "image_header": "events",
    "nifti_file": "image_header",
    "multiframe": "image_header",
    "dicom_series": "image_header multiframe",
    "volume_io": "dicom_series files image_header nifti_file",
    "outputs": "files",
    "segmentation_file": "config events image_header volume_io",
    "volume": "events image_header segmentation_file volume_io",
    "memoryimages": "events image_header volume",
    "alignment": "volume",
    "dataset_json": "alignment config events volume",
    "layouts": "config dataset_json events segmentation_file volume volume_io",
    "diffusion": "volume",
    "scans": "dataset_json diffusion enhancementconfig events volume",
    "cases": "alignment dataset_json events files layouts runfolder volume",
    "casesplits": "cases",
    "preprocessing": "alignment config events volume",
    "restoration": "config volume",
    "midline": "config events preprocessing sides volume",
    "fingerprints": "volume",
    "prepared": "cases config configjson events files fingerprints preprocessing volume",
    "doctor": "alignment cases config dataset_json events expectation layouts preprocessing sides volume",
    "resultcomparison": "dataset_json events intervals paireddifference",
    "evaluation": "alignment config events intervals metrics preprocessing volume",
    "packagefiles": "events",
    "manifest": "config configjson enhancementconfig expectation mirroring networkconfig sides",
    "modelpackage": (
        "config configjson enhancementconfig events expectation lineage manifest networkconfig networks packagefiles "
        "sides"
    ),
    "joining": "config configjson expectation manifest modelpackage networks",
    "versions": "configjson events lineage modelpackage",
    "transfer": "config manifest networks",
    "labelmatching": "config events transfer",
    "freezing": "networks transfer",
    "muon": "",
    "step": "config losses muon networks reversible",
    "objectives": "config losses networks step",
    "memory": "config hollow livebytes losses networkconfig networks reversible slidingwindow step",
    "iqt_figures": "memory networkconfig networks step",
    "cardplan": "config events memory networkconfig networks",
    "patchsize": "config events networks volume",
    "guard": "events reversible",
    "checkpoint": "events",
    "sampling": "augmentation config events preprocessing randomness synthesis",
    "enhancementscores": "events",
    "interpolation": "networks",
    "enhancementscaling": "enhancementconfig interpolation networks",
    "imagepairs": "config enhancementconfig enhancementscaling enhancementscores events files networks sampling scans",
    "region": "alignment preprocessing volume",
    "pace": "volume",
    "syntheticbatches": "config preprocessing randomness sampling synthesis synthesisconfig",
    "labelmapbatches": "config preprocessing randomness sampling synthesis synthesisconfig",
    "segmentoptions": "config",
    "segmentfiles": "config files manifest outputs",
    "prediction": "config events faults livebytes memory mirroring networks preprocessing segmentoptions slidingwindow",
    "segmentation": (
        "config image_header outputs prediction preprocessing provenance region restoration segmentfiles volume "
        "volume_io"
    ),
    "inference": (
        "alignment config devices events expectation manifest memory midline mirroring modelpackage networks pace "
        "pieces prediction preprocessing provenance region restoration segmentation segmentfiles sides volume"
    ),
    "frames": "config events image_header nifti_file segmentfiles volume volume_io",
    "series": (
        "config devices events frames inference manifest memory midline mirroring modelpackage preprocessing "
        "provenance segmentation segmentfiles segmentoptions sides volume volumestable"
    ),
    "agreement": "config files metrics segmentation segmentation_file volume",
    "locating": (
        "config devices events inference modelpackage networks prediction preprocessing region segmentfiles sides "
        "volume"
    ),
    "cropping": "cases config configjson events files fingerprints inference locating preprocessing region volume",
    "planning": "devices events manifest memory mirroring networks pace prediction region volume",
    "enhancement": (
        "devices diffusion enhancementconfig enhancementscaling enhancementscores events expectation imagepairs "
        "modelpackage networks outputs prediction scans volume"
    ),
    "trainer": (
        "checkpoint config configjson events files guard interruption livebytes losses memory networkconfig networks "
        "objectives sampling step"
    ),
    "validation": ("cases config faults metrics networks pieces prediction preprocessing restoration trainer volume"),
    "labelmaps": (
        "cases config dataset_json events files labelmapbatches metrics networks prediction preprocessing "
        "synthesisconfig validation volume"
    ),
    "trainingrun": "checkpoint config configjson curves events files modelpackage networkconfig runfolder trainer",
    "training": (
        "cardplan cases checkpoint config configjson cropping devices events expectation labelmapbatches labelmaps "
        "manifest memory mirroring modelpackage networks objectives patchsize prepared preprocessing sampling sides "
        "trainer trainingrun validation volume"
    ),
    "enhancementtraining": (
        "checkpoint config configjson devices diffusion enhancementconfig events imagepairs manifest memory "
        "modelpackage networks objectives prediction scans trainer trainingrun volume"
    ),
    "caseinputs": "cases config dataset_json events files segmentfiles",
    "batchrecord": "files volumestable",
    "batch": (
        "alignment batchrecord caseinputs events faults inference modelpackage provenance runfolder segmentoptions"
    ),
    "heldout": (
        "caseinputs cases config configjson cropping events files inference modelpackage prediction trainingrun"
    ),
    "worker": "events interruption",
    "peers": "",
    "operations": "",
    "variants": "cardplan events memory networkconfig networks",
    "depth": "events hollow livebytes networkconfig networks operations reversible",
    "cube": "events faults memory networkconfig",
    "benchmark": "config events hollow losses memory networkconfig networks operations peers step",
    "fcn_table": "events memory networkconfig networks",
    "stopfile": "files trainer",
    "reduction": "checkpoint config configjson networks",
    "casecomparison": (
        "alignment cases config events files fingerprints inference manifest metrics modelpackage networks prediction "
        "transfer volume"
    ),
    "comparison": "casecomparison config configjson events files intervals metrics paireddifference",
    "tuningplan": (
        "cases casesplits config configjson events files freezing manifest mirroring networkconfig networks prepared "
        "preprocessing recipekeys runfolder transfer"
    ),
    "tuningmemory": "devices events manifest memory networks reduction tuningplan",
    "proof": (
        "casecomparison cases comparison config events inference intervals labelmatching modelpackage networks trainer"
    ),
    "parttraining": (
        "cases casesplits checkpoint config curves devices events expectation faults files freezing memory "
        "modelpackage networks objectives preprocessing reduction sampling syntheticbatches trainer "
        "trainingrun transfer tuningplan validation"
    ),
    "tunedmodel": (
        "casecomparison config configjson events expectation files manifest mirroring modelpackage networks sides "
        "transfer tuningplan"
    ),
    "finetuning": (
        "casecomparison cases casesplits checkpoint comparison config configjson cropping devices events files "
        "labelmatching manifest modelpackage parttraining prediction proof runfolder stopfile trainer trainingrun "
        "tunedmodel tuningplan"
    ),
    "overlay": "config files volume",
    "demo": "config devices events inference metrics modelpackage overlay planning prediction synthesis volume",
    "published": "",
    "reproduction": "events",
    "invrestables": "depth memory metrics networkconfig published reproduction",
    "fixedbudget": "events memory networkconfig networks published reproduction",
    "furthertables": "enhancementscores fcn_table iqt_figures published reproduction",
    "console": "config configjson events interruption modelpackage",
    "model_commands": (
        "configjson console events files interruption joining lineage manifest modelpackage outputs provenance versions"
    ),
    "bench_command": "benchmark console cube depth devices events files variants",
    "reproduce_command": (
        "benchmark console devices events fixedbudget furthertables invrestables prediction reproduction"
    ),
    "enhance_command": (
        "config configjson console enhancement enhancementconfig enhancementscores enhancementtraining events files "
        "modelpackage outputs scans trainer trainingrun"
    ),
    "compare_command": "console events files outputs resultcomparison",
    "evaluate_command": "cases console enhance_command evaluation events files heldout outputs trainingrun",
    "segment_command": (
        "batch caseinputs console events expectation frames inference locating mirroring modelpackage outputs pace "
        "segmentfiles segmentoptions series"
    ),
    "rerunrecord": "events files modelpackage provenance segmentoptions",
    "rerun_command": ("agreement console devices events inference locating modelpackage outputs rerunrecord"),
    "plan_command": (
        "cardplan config console devices enhancementconfig events locating memory mirroring networkconfig planning "
        "prediction recipekeys tuningmemory"
    ),
    "commands": (
        "bench_command cases compare_command config configjson console demo devices doctor enhance_command "
        "evaluate_command events finetuning interruption labelmaps manifest model_commands modelpackage "
        "networkconfig plan_command recipekeys reproduce_command rerun_command runfolder segment_command segmentfiles "
        "stopfile trainer training trainingrun tuningplan worker"
    ),
    "cli": "commands config configjson events faults files interruption networkconfig",
    "api": (
        "cli console devices events faults inference interruption locating memoryimages modelpackage segmentoptions"
    ),
    "__main__": "cli",
}
BACKEND_FILES = sorted(PACKAGE.rglob("*.py"))
PANEL_FILES = sorted(MODULE.rglob("*.py"))
SPEAKER = "console.py"
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which only a type checker follows."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from _run_time_nodes(child)


def _parts(path: Path) -> tuple[str, ...]:
    """A file's place in the package: ("networks", "vae"); a folder's own file is ("networks", "__init__")."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def _own_imports(path: Path) -> set[tuple[str, ...]]:
    """Files of the package that this one imports, as parts."""
    folder = _parts(path)[:-1]
    found = set()
    for node in _run_time_nodes(_tree(path)):
        names: list[list[str]] = []
        if isinstance(node, ast.ImportFrom):
            words = node.module.split(".") if node.module else []
            if node.level:
                words = [*folder[: len(folder) - node.level + 1], *words]
            elif words[0] == "invres":
                words = words[1:]
            else:
                continue
            names = [[*words, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "invres"]
        for name in names:
            # `from .a import b`: b is a file, or a name in file a or in folder a.
            for parts in (name, name[:-1], [*name, "__init__"], [*name[:-1], "__init__"]):
                if parts and PACKAGE.joinpath(*parts).with_suffix(".py").is_file():
                    found.add(tuple(parts))
                    break
    return found


def _imported_roots(path: Path) -> set[str]:
    """First words of all absolute imports, wherever in the file they stand."""
    roots = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def test_the_table_goes_downward_only():
    rows = list(ALLOWED)
    for index, (row, below) in enumerate(ALLOWED.items()):
        assert set(below.split()) <= set(rows[:index]), f"{row} may import only rows above it"


@pytest.mark.parametrize("path", BACKEND_FILES, ids=_name)
def test_a_file_imports_only_what_its_row_allows(path):
    parts = _parts(path)
    if parts == ("__init__",):
        assert not _own_imports(path)
        return
    row = parts[0]
    assert row in ALLOWED, f"give {row} a row in ALLOWED"
    imported = {target[0] for target in _own_imports(path)} - {"__init__", row if len(parts) > 1 else ""}
    assert imported <= set(ALLOWED[row].split()), f"{row} must not import {imported - set(ALLOWED[row].split())}"


def test_no_file_imports_itself_by_a_detour():
    edges = {_parts(path): _own_imports(path) for path in BACKEND_FILES}
    done: set[tuple[str, ...]] = set()

    def visit(file: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert file not in trail, " -> ".join(".".join(step) for step in (*trail, file))
        if file not in done:
            for target in edges[file]:
                visit(target, (*trail, file))
            done.add(file)

    for file in edges:
        visit(file, ())


def test_imports_are_read_from_the_syntax_tree_as_meant():
    assert _own_imports(PACKAGE / "networks" / "__init__.py") >= {("networkconfig",), ("networks", "base")}
    assert _own_imports(PACKAGE / "networks" / "base.py") >= {
        *(("__init__",), ("networkconfig",), ("reversible", "__init__"))
    }
    assert _own_imports(PACKAGE / "modelpackage.py") >= {("networks", "__init__"), ("manifest",), ("packagefiles",)}


@pytest.mark.parametrize("path", BACKEND_FILES, ids=_name)
def test_the_backend_knows_nothing_of_slicer(path):
    assert not _imported_roots(path) & {"slicer", "vtk", "vtkmodules", "qt", "ctk", "PySide6", "PyQt5"}


@pytest.mark.parametrize("path", PANEL_FILES, ids=_name)
def test_the_panel_knows_nothing_of_torch_and_the_backend(path):
    assert not _imported_roots(path) & {"torch", "invres", "monai", "torchvision"}


@pytest.mark.parametrize("path", BACKEND_FILES, ids=_name)
def test_only_the_command_line_prints(path):
    prints = [
        node.lineno
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints or path.name == SPEAKER, f"print in lines {prints}"


@pytest.mark.parametrize("path", BACKEND_FILES, ids=_name)
def test_nothing_is_unpickled(path):
    assert not _imported_roots(path) & UNPICKLERS
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert options.get("weights_only") == "True", f"torch.load in line {node.lineno}"
            assert options.get("allow_pickle", "False") == "False", f"allow_pickle in line {node.lineno}"


@pytest.mark.parametrize("module", ["cli", "config", "modelpackage"])
def test_what_must_answer_at_once_imports_no_torch(module):
    if not (PACKAGE / f"{module}.py").is_file():
        pytest.skip(f"invres.{module} is not written yet")
    code = f"import sys, invres.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
