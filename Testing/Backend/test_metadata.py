"""What the extension says of itself: the same in CMakeLists.txt and both catalogue entries, and true of the tree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import jsonschema
import pytest

import invres

SAID_TWICE = {
    "HOMEPAGE": "homepage",
    "CATEGORY": "category",
    "CONTRIBUTORS": "contributors",
    "DESCRIPTION": "description",
    "ICONURL": "iconurl",
    "SCREENSHOTURLS": "screenshoturls",
    "DEPENDS": "depends",
}
# The parts of Slicer's catalogue entry schema v1.0.1 that an entry can get wrong.
CATALOGUE = {
    "type": "object",
    "required": ["$schema", "category", "scm_url"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"pattern": r"^https://raw\.githubusercontent\.com/Slicer/Slicer/main/Schemas/.*-v1\.0\.1\.json#$"},
        "category": {"type": "string"},
        "scm_url": {"type": "string"},
        "scm_revision": {"type": "string"},
        "scm_type": {"enum": ["git", "local"]},
        "build_dependencies": {"type": "array", "items": {"type": "string"}},
        "build_subdirectory": {"type": "string"},
        "enabled": {"type": "boolean"},
        "tier": {"enum": [1, 3, 5]},
    },
}
# Stands for Slicer's package: the macros record what they are given, and stop for files that do not exist.
SLICER = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/Use.cmake)
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_CURRENT_LIST_DIR}/Empty.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_CURRENT_LIST_DIR}/Empty.cmake)
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer/qt-scripted-modules)
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer/qt-scripted-modules)
"""
USE = """
include(CTest)
function(_record SCRIPTS RESOURCES)
  foreach(file ${SCRIPTS} ${RESOURCES})
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "no file ${file}")
    endif()
    file(RELATIVE_PATH shipped ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/${file})
    file(APPEND ${CMAKE_BINARY_DIR}/shipped.txt "${shipped}\\n")
  endforeach()
endfunction()
function(_ship SCRIPTS RESOURCES)
  _record("${SCRIPTS}" "${RESOURCES}")
  foreach(file ${SCRIPTS} ${RESOURCES})
    file(APPEND ${CMAKE_BINARY_DIR}/destinations.txt "${file}\\n")
  endforeach()
endfunction()
macro(ctkMacroCompilePythonScript)
  cmake_parse_arguments(MY "NO_INSTALL_SUBDIR" "TARGET_NAME;DESTINATION_DIR;INSTALL_DIR" "SCRIPTS;RESOURCES" ${ARGN})
  _ship("${MY_SCRIPTS}" "${MY_RESOURCES}")
endmacro()
macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MY "WITH_GENERIC_TESTS;WITH_SUBDIR" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  _ship("${MY_SCRIPTS}" "${MY_RESOURCES}")
endmacro()
macro(slicer_add_python_unittest)
  cmake_parse_arguments(MY "" "SCRIPT;TESTNAME_PREFIX" "SLICER_ARGS" ${ARGN})
  _record("${MY_SCRIPT}" "")
  get_filename_component(test_name ${MY_SCRIPT} NAME_WE)
  add_test(NAME py_${test_name} COMMAND ${CMAKE_COMMAND} -E echo "OK (skipped=1)")
endmacro()
"""


@pytest.fixture(scope="module")
def cmake(repository) -> dict[str, str]:
    text = (repository / "CMakeLists.txt").read_text(encoding="utf-8")
    return dict(re.findall(r'^set\(EXTENSION_(\w+) "([^"]*)"\)', text, re.MULTILINE))


@pytest.fixture(scope="module")
def s4ext(repository) -> dict[str, str]:
    lines = (repository / "InvResSegment.s4ext").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def catalogue(repository) -> dict:
    return json.loads((repository / "InvResSegment.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", SAID_TWICE)
def test_the_old_catalogue_entry_says_what_cmake_says(cmake, s4ext, key):
    assert s4ext[SAID_TWICE[key]] == cmake[key]


def test_the_current_catalogue_entry_says_what_cmake_says(cmake, s4ext, catalogue):
    jsonschema.validate(catalogue, CATALOGUE)
    assert catalogue["build_dependencies"] == cmake["DEPENDS"].split()
    assert catalogue["category"] == cmake["CATEGORY"] == "Segmentation"
    assert catalogue["scm_url"] == s4ext["scmurl"] == cmake["HOMEPAGE"] + ".git"
    assert catalogue["scm_revision"] == s4ext["scmrevision"]
    assert catalogue["build_subdirectory"] == s4ext["build_subdirectory"]
    assert str(catalogue["tier"]) == s4ext["tier"]
    assert s4ext["scm"] == "git"


def _in_tree(url: str, homepage: str) -> str:
    """The path in this repository that a raw URL names."""
    start = homepage.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    assert url.startswith(start)
    return url.removeprefix(start)


def test_the_icon_is_in_the_tree_with_the_size_that_slicer_asks_for(repository, cmake):
    data = (repository / _in_tree(cmake["ICONURL"], cmake["HOMEPAGE"])).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (128, 128)
    assert data[25] in (4, 6), "no transparency"


def test_the_screenshots_are_in_the_tree(repository, cmake):
    paths = [_in_tree(url, cmake["HOMEPAGE"]) for url in cmake["SCREENSHOTURLS"].split()]
    assert paths and all(path.startswith("Resources/Screenshots/") for path in paths)
    if not list((repository / "Resources" / "Screenshots").glob("*.png")):
        pytest.skip("no screenshot has been taken yet")
    assert all((repository / path).is_file() for path in paths)


def test_the_python_package_says_what_cmake_says(repository, cmake):
    text = (repository / "Backend" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'Homepage = "{cmake["HOMEPAGE"]}"' in text
    assert f'name = "{cmake["CONTRIBUTORS"]}"' in text
    assert 'version = { attr = "invres.__version__" }' in text and re.fullmatch(r"\d+\.\d+\.\d+", invres.__version__)
    licence = (repository / "LICENSE.txt").read_text(encoding="utf-8")
    assert 'license = "Apache-2.0"' in text and "Apache License" in licence and "APPENDIX" in licence


def test_the_first_screenshot_is_of_the_panel(cmake):
    assert cmake["SCREENSHOTURLS"].split()[0].endswith("/panel_result.png")


@pytest.fixture(scope="module")
def configured(repository, tmp_path_factory):
    """The source and build folders of the extension, configured with a stand-in for Slicer's package."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs cmake and a compiler")
    tmp_path = tmp_path_factory.mktemp("cmake")
    # A copy under a name with a space, because such folders break unquoted paths. Python's own leftovers stay out.
    source = tmp_path / "a source"
    for part in ("Backend", "InvResSegment", "Resources", "Testing"):
        shutil.copytree(repository / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("CMakeLists.txt", "LICENSE.txt", "NOTICE"):
        shutil.copy(repository / file, source)
    slicer = tmp_path / "slicer"
    slicer.mkdir()
    for name, text in (("SlicerConfig.cmake", SLICER), ("Use.cmake", USE), ("Empty.cmake", "")):
        (slicer / name).write_text(text)
    build = tmp_path / "build"
    done = subprocess.run(
        ["cmake", "-S", source, "-B", build, f"-DSlicer_DIR={slicer}", "-Werror=dev"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return source, build


def test_cmake_configures_and_ships_every_file_of_the_backend(configured):
    source, build = configured
    shipped = set((build / "shipped.txt").read_text().splitlines())
    wanted = {
        path.relative_to(source).as_posix()
        for folder in ("Backend/invres", "Resources")
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".json", ".safetensors", ".invres", ".png", ".txt")
    }
    wanted = {path for path in wanted if not path.startswith(("Resources/Screenshots/", "Resources/Icons/"))}
    assert wanted | {"Backend/pyproject.toml"} <= shipped
    assert not {path for path in shipped if "Screenshots" in path or "__pycache__" in path}


def test_the_licences_go_with_the_package(configured, tmp_path):
    _source, build = configured
    command = ["cmake", "--install", build, "--prefix", tmp_path, "--component", "Runtime"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("LICENSE.txt", "NOTICE"):
        assert len(list(tmp_path.rglob(f"Backend/{name}"))) == 1


def test_no_file_is_shipped_to_a_place_twice(configured):
    """The backend and the module land in the same folder; Ninja refuses two rules for one file."""
    _source, build = configured
    places = (build / "destinations.txt").read_text().splitlines()
    assert len(places) > 100
    assert sorted({place for place in places if places.count(place) > 1}) == []


def test_a_skipped_self_test_is_no_passed_one(configured):
    """The stand-in's tests say what unittest says of a test that was skipped."""
    _source, build = configured
    done = subprocess.run(
        ["ctest", "--no-tests=error", "-R", "^py_InvResSegment$"], cwd=build, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "Skipped" in done.stdout and "Passed" not in done.stdout
