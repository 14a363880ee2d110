"""The command line: exit codes, JSON lines, and one plain sentence with the next step for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_datasets import (
    BACKEND,
    GRIDS,
    files_up_to,
    invres,
    leftovers,
    phantom,
    write_dataset,
    write_recipe,
)

from invres import __version__, commands
from invres.checkpoint import load_checkpoint
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan, Recipe
from invres.console import recipes_dir
from invres.memory import predict_enhancement, predict_for, predict_training
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.trainingrun import started_recipe
from invres.volume import Geometry, Volume, read_volume, write_volume

TRAINING_VERBS = ("train", "enhance", "finetune", "evaluate", "compare", "check", "plan", "bench", "reproduce", "demo")
VERBS = ("segment", "rerun", "describe", "models", "devices", "worker", *TRAINING_VERBS)
SCHEME = LabelScheme((Label("upper", (1,), 1), Label("lower", (2,), 2), Label("core", (3,), 3)))


def save(path, channels=("T1", "T2"), **fields):
    config = NetworkConfig(channels=(4, 16), in_channels=len(channels), out_channels=4)
    torch.manual_seed(3)
    network = build(config)
    plan = PreparationPlan(tuple(ChannelPlan(name) for name in channels), (2.5, 1.1, 0.8))
    return save_package(
        path,
        **{
            "name": "Phantom",
            "network": network.config,
            "state_dict": network.state_dict(),
            "plan": plan,
            "scheme": SCHEME,
            "patch": (16, 16, 16),
            **fields,
        },
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a package for two channels, a package for one, and the images of a case."""
    folder = tmp_path_factory.mktemp("place")
    save(folder / "model")
    save(folder / "single", channels=("T1",))
    images, label = phantom(GRIDS[0], 2)
    for name, volume in (("t1", images[0]), ("t2", images[1]), ("label", label)):
        write_volume(folder / f"{name}.nii.gz", volume)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("phantoms"), cases=2, channels=("T1",))


@pytest.fixture
def refused(tmp_path):
    """Runs a command that must fail with one sentence and a next step, and must leave nothing; gives both."""

    def run(*arguments, code=2, output=tmp_path):
        before = [path for path in sorted(output.rglob("*")) if path.name != "lock"]
        told = []
        for flags in ((), ("--json",)):
            outcome = invres(*arguments, *flags)
            assert outcome.code == code, outcome
            assert "Traceback" not in outcome.err
            assert "result" not in [event["event"] for event in outcome.events] if flags else True
            told.append(outcome)
        people, programs = told
        error = programs.events[-1]
        assert error["event"] == "error" and error["code"] not in ("", "internal")
        message, hint = error["message"], error["hint"]
        assert people.out == "" and people.err.splitlines()[-1] == f"Error: {message} {hint}".strip()
        assert message.endswith(".") and "\n" not in message
        assert len(message) < 400
        assert not any(word in message for word in ("None", "NoneType", "object at 0x", "Errno", "dtype"))
        # The lock of a run stays, empty.
        assert [path for path in sorted(output.rglob("*")) if path.name != "lock"] == before and leftovers(output) == []
        return message, hint

    return run


# --- the shape of commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    outcome = invres(verb, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out.startswith(f"usage: invres {verb}") and "--json" in outcome.out
    assert outcome.out.isascii() and "None" not in outcome.out


def test_help_names_every_verb():
    outcome = invres("--help")
    assert outcome.code == 0
    words = [line.split()[0] for line in outcome.out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert sorted(words) == sorted(VERBS)  # the longest has a line of its own
    assert set(commands.__all__) == set(VERBS)


def test_the_version_is_told():
    assert invres("--version").out == f"invres {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("segment", "--modle", "a", "-i", "b", "-o", "c"), "Did you mean '--model'? See `invres segment --help`."),
        (("describe", "x", "--jsn"), "Did you mean '--json'? See `invres describe --help`."),
        (("segment", "-m", "a", "-i", "b", "c", "-o", "d"), "See `invres segment --help`."),
        (("segment", "--mod", "a", "-i", "b"), "See `invres segment --help`."),
    ],
)
def test_a_wrong_option_leads_to_its_verb(arguments, hint):
    error = invres(*arguments, "--json").events[-1]
    assert (error["code"], error["hint"]) == ("usage", hint)


def test_a_person_is_told_what_is_replaced(place, tmp_path):
    output = tmp_path / "out.nii.gz"
    command = ("segment", "-m", place / "single", "-i", place / "t1.nii.gz", "-o", output, "--device", "cpu")
    told = f"{output} was there before and is replaced."
    assert told not in invres(*command).err
    assert told in invres(*command).err
    again = invres(*command, "--json")
    assert again.code == 0 and told not in [event["message"] for event in again.of("note")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "The following arguments are required: VERB."),
        (("sgment",), "invalid choice: 'sgment'"),
        (("segment",), "The following arguments are required: -m/--model."),
        (("segment", "-m", "a", "-i", "b"), "One of the arguments -o/--output --list is required."),
        (("train", "-d", "x", "-o", "y", "--epochs", "many"), "Argument --epochs: invalid int value: 'many'."),
        (("describe", "x", "--colour"), "Unrecognized arguments: --colour."),
        (("segment", "-m", "a", "-i", "b", "-o", "c", "--window", "8", "8"), "expected 3 arguments"),
        (("train", "-d", "x", "-o", "y", "--time", "-5m"), "expected one argument"),
        (("plan", "--engine", "magic"), "invalid choice: 'magic'"),
    ],
)
def test_wrong_usage_is_one_sentence_with_exit_code_2(arguments, told):
    outcome = invres(*arguments)
    assert outcome.code == 2 and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("Error: ") and told in line and "--help`." in line
    as_json = invres(*arguments, "--json")
    assert as_json.code == 2 and as_json.err == ""
    if arguments:
        (event,) = as_json.events
        assert event["code"] == "usage" and told in event["message"]


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["describe", "MODEL", "--json"], ["models", "list"], ["describe", "-"]],
)
def test_what_answers_at_once_imports_nothing_heavy(place, arguments):
    arguments = [str(place / "model") if argument == "MODEL" else argument for argument in arguments]
    code = (
        "import sys\nfrom invres.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as end: code = end.code or 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'monai', 'SimpleITK', 'skimage', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(9 if heavy else code)"
    )
    found = python(code)
    assert found.returncode == (2 if arguments[-1] == "-" else 0), found.stderr


def test_segmenting_imports_nothing_that_takes_seconds_and_that_it_can_do_without(place, tmp_path):
    """What comes in with such packages made a segmentation start in twice the time."""
    arguments = ["segment", "-m", place / "single", "-i", place / "t1.nii.gz", "-o", tmp_path / "o.nii.gz"]
    found = python(
        "import sys\nfrom invres.cli import main\n"
        f"code = main({list(map(str, arguments))!r})\n"
        "spared = 'monai', 'pandas', 'matplotlib', 'memcnn', 'torchvision', 'scipy.optimize', 'scipy.stats'\n"
        "print(*(name for name in spared if name in sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    assert found.returncode == 0 and found.stderr.splitlines()[-1] == "", found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "-m", "MODEL", "-i", "T1=nowhere.nii.gz", "-i", "T2=nowhere.nii.gz", "-o", "o.nrrd"],
        ["segment", "-m", "MODEL", "-i", "T1=T1", "-i", "FLAIR=T1", "-o", "o.nrrd"],
        ["segment", "-m", "MODEL", "-i", "T1=T1", "-i", "T2=T1", "-o", "o.docx"],
        ["segment", "-m", "MODEL", "-i", "T1=T1", "-i", "T2=T1", "-o", "o.nrrd", "--overlap", "1.5"],
        ["train", "-d", "nowhere", "-o", "run"],
        ["train", "-d", "nowhere", "-o", "run", "-r", "hippo"],
        ["finetune", "-m", "MODEL", "-d", "nowhere", "-o", "run"],
        ["plan", "-r", "hippo"],
        ["plan", "--vram", "8"],
    ],
)
def test_a_cheap_mistake_is_told_before_torch_is_imported(place, arguments):
    places = {"MODEL": str(place / "model"), "T1=T1": f"T1={place}/t1.nii.gz", "T2=T1": f"T2={place}/t1.nii.gz"}
    arguments = [places.get(argument, argument).replace("=T1", f"={place}/t1.nii.gz") for argument in arguments]
    code = (
        "import sys\nfrom invres.cli import main\n"
        f"code = main({arguments!r})\nsys.exit(9 if 'torch' in sys.modules else code)"
    )
    found = python(code)
    assert found.returncode == 2, found.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported_waits_for_its_end(place, tmp_path, number):
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\nhere = pathlib.Path(__file__).parent\n(here / 'begun').touch()\n"
        "while not (here / 'sent').exists():\n    time.sleep(0.01)\n"
        "time.sleep(0.2)\n(here / 'ended').touch()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(BACKEND)))}
    inputs = ["-i", f"T1={place}/t1.nii.gz", "-o", str(tmp_path / "o.nrrd")]
    command = [sys.executable, "-m", "invres", "segment", "-m", str(place / "single"), *inputs]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.send_signal(number)
    (tmp_path / "sent").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert (tmp_path / "ended").exists(), "nothing is raised in the middle of the import"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_sigterm_ends_a_segmentation_with_a_word(place, tmp_path):
    code = (
        "import os, signal, sys\nimport invres.commands\n"
        "invres.commands.segment = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or __import__('time').sleep(30)\n"
        "from invres.cli import main\nsys.exit(main(['segment', '-m', 'x', '-i', 'x', '-o', 'x', '--json']))"
    )
    found = python(code)
    assert found.returncode == 130 and "Traceback" not in found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["event"] == "error"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
def test_a_training_goes_on_when_nobody_reads_what_it_says(tmp_path):
    data = write_dataset(tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.json", iterations_per_epoch=1, epochs=2)
    words = ["train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu"]
    command = [sys.executable, "-m", "invres", *words]
    read, write = os.pipe()
    os.close(read)
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(BACKEND)}, stdout=write, stderr=write)
    os.close(write)
    assert (tmp_path / "run" / "model" / "manifest.json").is_file()


def test_a_reader_that_goes_away_makes_no_traceback(place):
    command = [sys.executable, "-m", "invres", "describe", str(place / "model"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert found.returncode == 1 and found.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (KeyboardInterrupt(), 130, "cancelled"),
        (MemoryError(), 3, "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"), 3, "out_of_memory"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 3, "out_of_memory"),
        (RuntimeError("roi size (96, 96, 96)\nSeems to be OOM. Please try smaller"), 3, "out_of_memory"),
        (OSError(28, "No space left on device", "/a/b"), 2, "disk_full"),
        (OSError(28, "No space left on device"), 2, "disk_full"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "bad_input"),
        (OSError(30, "Read-only file system", "/a/b"), 2, "bad_input"),
        (FileExistsError(17, "File exists", "/a/b"), 2, "bad_input"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_the_program(monkeypatch, error, code, name):
    def refuse(*_):
        raise error

    monkeypatch.setattr(commands, "describe", refuse)
    outcome = invres("describe", "x", "--json")
    assert outcome.code == code and outcome.err == ""
    (event,) = outcome.events
    assert event["code"] == name and event["message"].endswith(".") and "Errno" not in event["message"]
    assert name == "cancelled" or event["hint"]
    assert not isinstance(error, PermissionError) or "Change its permissions" in event["hint"]


def test_a_fault_of_the_program_is_exit_code_1_with_its_lines(monkeypatch):
    def fail(*_):
        raise ValueError("inside")

    monkeypatch.setattr(commands, "describe", fail)
    outcome = invres("describe", "x", "--json")
    assert outcome.code == 1 and "Traceback" in outcome.err and "inside" in outcome.err
    (event,) = outcome.events
    assert event["code"] == "internal" and "ValueError: inside" in event["message"] and "report it" in event["hint"]


# --- JSON lines ----------------------------------------------------------------------------------------------------


def test_every_command_that_succeeds_ends_with_one_result(place, data, tmp_path):
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1)
    model, segmentation = tmp_path / "run/model", tmp_path / "predictions/label.nii.gz"
    inputs = ["-i", f"T1={place}/t1.nii.gz"]
    reference = place / "label.nii.gz"
    for arguments in (
        ["check", "-d", data],
        ["plan", "-n", "unet3d", "--patch", 24, 24, 24],
        ["plan", "--vae", "--patch", 32, 32, 32, "--precision", "bf16", "--memory", "lowest"],
        ["train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--time", "30s", "--seed", 5],
        ["describe", model],
        ["models", "export", model, "-o", tmp_path / "m.invres"],
        ["models", "import", tmp_path / "m.invres", "--models-dir", tmp_path / "mine"],
        ["models", "list", "--models-dir", tmp_path / "mine"],
        ["models", "verify", "tiny", "--models-dir", tmp_path / "mine"],
        [
            "segment",
            "-m",
            model,
            *inputs,
            "-o",
            segmentation,
            "--mirror",
            0,
            2,
            "--overlap",
            0.25,
            "--window",
            24,
            24,
            24,
        ],
        ["evaluate", "-p", segmentation, "-r", reference, "-o", tmp_path / "metrics.json", "-d", data],
    ):
        as_json = invres(*arguments, "--json")
        assert as_json.code == 0, as_json
        assert as_json.err == ""
        kinds = [event["event"] for event in as_json.events]
        assert kinds[-1] == "result" and kinds.count("result") == 1 and "error" not in kinds
        if arguments[0] != "train":
            for_people = invres(*arguments)
            assert for_people.code == 0 and for_people.out.strip(), arguments
            assert not for_people.out.startswith("{")
    assert leftovers(tmp_path) == []


def test_a_model_is_described_for_people(tmp_path):
    metrics = {
        "upper": {"Dice": {"mean": 0.91234, "sd": 0.05, "n": 7}},
        "lower": {"Dice": {"mean": 0.8, "sd": None, "n": 1}},
        "core": {"Dice": {"mean": None, "sd": None, "n": 0}},
    }
    save(tmp_path / "model", metrics=metrics, description="For tests.", licence="CC0")
    outcome = invres("describe", tmp_path / "model")
    assert outcome.code == 0, outcome.err
    for line in (
        "Phantom 1.0.0: For tests.",
        "  channels   T1 (MR), T2 (MR)",
        "  labels     upper = 1, lower = 2, core = 3",
        "  spacing    2.5 x 1.1 x 0.8 mm (superior, anterior, right)",
        "  licence    CC0",
        "  Dice       upper: 0.9123 ± 0.0500 (n = 7)",
        "  Dice       lower: 0.8000 (n = 1)",
        "  Dice       core: not known (n = 0)",
    ):
        assert line in outcome.out.splitlines()


def test_the_options_of_the_command_line_override_the_recipe(data, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "NOTHING_LEARNED", 0.99)  # phantoms are learned in a step
    recipe = write_recipe(tmp_path / "r.json", epochs=9, iterations_per_epoch=1)
    arguments = ["-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--validation-count", 1]
    outcome = invres("train", *arguments, "--epochs", 2, "--seed", 11, "--engine", "stored", "--licence", "CC0")
    assert outcome.code == 0, outcome.err
    training = json.loads((tmp_path / "run/run.json").read_text())["recipe"]["training"]
    assert (training["epochs"], training["seed"], training["engine"], training["time_s"]) == (2, 11, "stored", 0)
    assert "Model: " in outcome.out and "in validation" in outcome.out
    use = f"Use it: invres segment --model {tmp_path}/run/model --input T1=FILE --output FILE.seg.nrrd"
    assert use in outcome.out.splitlines()
    described = invres("describe", tmp_path / "run/model").out.splitlines()[0]
    assert described == "tiny 1.0.0: Trained with the recipe tiny on Phantoms (1 case)."
    assert "Warning: The mean Dice in validation is 0." in outcome.err and "too short to learn" in outcome.err


def test_any_value_of_a_recipe_is_set_on_the_command_line_and_stays_when_it_is_resumed(data, tmp_path):
    written = write_recipe(tmp_path / "r.json", epochs=2, iterations_per_epoch=1)
    arguments = ["train", "-d", data, "-r", written, "-o", tmp_path / "run", "--device", "cpu", "--fold", "all"]
    asked = ["--lr", 0.02, "--patience", 7]
    for value in (
        "training.patch=[8, 12, 16]",
        'training={"schedule": "poly", "batch_size": 1}',
        "training.batch_size=3",
        "augmentation.rotation_degrees=[30,20,10]",
        "spacing_mm=[2,1,1]",
        "network.vae.latent=4",
        "description=For = signs.",
    ):
        asked += ["--set", value]
    outcome = invres(*arguments, *asked)
    assert outcome.code == 0, outcome.err
    recipe = started_recipe(tmp_path / "run")
    training, before = recipe.training, Recipe.read(written).training
    assert (training.learning_rate, training.early_stop_epochs, training.schedule) == (0.02, 7, "poly")
    assert (training.patch, training.batch_size, recipe.spacing_mm) == ((8, 12, 16), 3, (2.0, 1.0, 1.0))
    assert recipe.augmentation.rotation_degrees == (30.0, 20.0, 10.0) and recipe.description == "For = signs."
    assert recipe.network.vae is not None and (recipe.network.vae.latent, recipe.network.vae.patch) == (4, (8, 12, 16))
    kept = dataclasses.replace(
        training, patch=before.patch, batch_size=2, learning_rate=0.01, early_stop_epochs=0, schedule="cosine"
    )
    assert kept == before, "what was not asked for is the recipe's"

    same = invres(*arguments, *asked, "--resume", "--epochs", 3, "--json")
    assert same.code == 0 and not same.of("warning"), same.out
    assert load_checkpoint(tmp_path / "run")["iteration"] == 3
    other = invres(
        *(word for word in arguments if word not in ("-r", written)),
        *("--resume", "--lr", 0.5, "--patience", 1, "--set", "training.batch_size=1", "--set", "training.epochs=4"),
        "--json",
    )
    assert other.code == 0, other.out
    (warning,) = [event["message"] for event in other.of("warning")]
    assert warning.startswith("The training goes on as it was started; what is asked otherwise now is left out: ")
    for key in ("training.learning_rate", "training.early_stop_epochs", "training.batch_size"):
        assert key in warning
    assert load_checkpoint(tmp_path / "run")["iteration"] == 4 and "training.epochs" not in warning
    assert started_recipe(tmp_path / "run").training == dataclasses.replace(training, epochs=4)


@pytest.mark.parametrize("verb", [("train",), ("finetune", "-m", "hippocampus-t1")], ids=["train", "finetune"])
def test_one_of_several_processes_is_told_to_start_alone(data, refused, tmp_path, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    message, hint = refused(*verb, "-d", data, "-o", tmp_path / "run")
    assert message == "This is one of 2 processes (WORLD_SIZE), but a training is one process on one device."
    assert "without torchrun" in hint


def test_the_optimizer_of_the_command_line_trains_with_the_decay_that_goes_with_it(data, tmp_path):
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1, optimizer="muon", weight_decay=0.3)
    for name, wanted, decay in (("", "muon", 0.3), ("adam", "adam", 0.0), ("muon", "muon", 0.3)):
        run = tmp_path / f"run {name}"
        asked = ["--optimizer", name] if name else []
        outcome = invres("train", "-d", data, "-r", recipe, "-o", run, "--device", "cpu", "--fold", "all", *asked)
        assert outcome.code == 0, outcome.err
        training = json.loads((run / "run.json").read_text())["recipe"]["training"]
        assert (training["optimizer"], training["weight_decay"]) == (wanted, decay)
        of_parameters = load_checkpoint(run)["optimizer"]["state"].values()
        assert any("exp_avg_sq" not in state for state in of_parameters) == (wanted == "muon")
        manifest = json.loads((run / "model" / "manifest.json").read_text())
        assert manifest["training"]["optimizer"] == wanted


@pytest.mark.parametrize(
    ("asked", "decay"),
    [
        (["--optimizer", "adam"], 0.0),
        (["--set", "training.optimizer=adam"], 0.0),
        (["--set", 'training={"optimizer": "adam"}'], 0.0),
        (["--set", "training.optimizer=muon"], 0.3),
        (["--set", "training.epochs=1"], 0.3),
        (["--set", "training.weight_decay=0.2", "--set", "training.optimizer=adam"], 0.2),
        (["--set", 'training={"optimizer": "adam", "weight_decay": 0.2}'], 0.2),
        (["--optimizer", "adam", "--set", "training.weight_decay=0.2"], 0.2),
        (["--optimizer", "adam", "--set", "training.epochs=1"], 0.0),
    ],
)
def test_an_optimizer_that_is_set_has_the_decay_of_the_option(data, tmp_path, asked, decay):
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1, optimizer="muon", weight_decay=0.3)
    outcome = invres(
        "train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--fold", "all", *asked
    )
    assert outcome.code == 0, outcome.err
    assert started_recipe(tmp_path / "run").training.weight_decay == decay


def test_scores_never_overwrite_what_is_no_earlier_report(tmp_path):
    label = Volume(np.ones((4, 4, 4), np.uint8), Geometry((4, 4, 4), (1, 1, 1), (0, 0, 0), np.eye(3)))
    for kind in ("p", "r"):
        (tmp_path / kind).mkdir()
        write_volume(tmp_path / kind / "a.nii.gz", label)
    before = (tmp_path / "r/a.nii.gz").read_bytes()
    arguments = ["evaluate", "-p", tmp_path / "p", "-r", tmp_path / "r", "-o"]
    refused = invres(*arguments, tmp_path / "r/a.nii.gz")
    assert refused.code == 2 and "holds something else than scores" in refused.err
    assert (tmp_path / "r/a.nii.gz").read_bytes() == before
    for _ in range(2):  # an earlier report gives way
        assert invres(*arguments, tmp_path / "r/metrics.json").code == 0


def test_a_trained_model_has_the_name_that_was_asked_for_also_when_resumed(data, tmp_path):
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1)
    arguments = ["train", "-d", data, "-o", tmp_path / "run", "--device", "cpu", "--fold", "all"]
    assert invres(*arguments, "-r", recipe, "--name", "Mine").code == 0
    assert invres(*arguments, "--resume", "--epochs", 2).code == 0
    assert invres("describe", tmp_path / "run/model").out.startswith("Mine 1.0.0: Trained with the recipe tiny on ")
    outcome = invres(*arguments, "-r", recipe, "--name", " ")
    assert outcome.code == 2 and "name must be printable text that is not empty" in outcome.err


def test_a_resumed_run_keeps_its_time_budget_and_says_so(data, tmp_path):
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1)
    arguments = ["train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--fold", "all"]
    assert invres(*arguments, "--time", "200s").code == 0
    outcome = invres(*arguments, "--resume", "--json")
    assert outcome.code == 0, outcome
    assert any("Of the time budget of 3 min 20 s there are" in event["message"] for event in outcome.of("note"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("45", 45), ("1.5 h", 5400), (" 2M ", 120)]
)
def test_times_are_read_as_people_write_them(text, seconds):
    assert commands._seconds(text) == seconds


# --- mistakes when segmenting --------------------------------------------------------------------------------------


def nifti_with(path, **fields):
    """A NIfTI file of 5 x 6 x 7 zeros with header fields written over."""
    image = sitk.GetImageFromArray(np.zeros((7, 6, 5), np.int16))
    sitk.WriteImage(image, str(path))
    raw = bytearray(path.read_bytes())
    for offset, form, values in fields.values():
        struct.pack_into(form, raw, offset, *values)
    path.write_bytes(raw)
    return path


def make_bad_input(kind, path):
    if kind == "not an image":
        path.write_text("I am a letter.")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        write_volume(path, phantom(GRIDS[0])[0][0])
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "2D":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((7, 6), np.uint8)), str(path))
    elif kind == "4D":
        volumes = [sitk.GetImageFromArray(np.zeros((7, 6, 5), np.int16))] * 3
        sitk.WriteImage(sitk.JoinSeries(volumes), str(path))
    elif kind == "colour":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((7, 6, 5, 3), np.uint8), isVector=True), str(path))
    elif kind == "zero spacing":
        nifti_with(path, pixdim=(80, "<3f", (1.0, 0.0, 1.0)))
    elif kind == "negative spacing":
        nifti_with(path, pixdim=(80, "<3f", (1.0, -2.0, 1.0)))
    elif kind == "huge header":
        nifti_with(path, dim=(40, "<4h", (3, 30000, 30000, 30000)))
    elif kind == "one value":
        write_volume(
            path, Volume(np.full((7, 6, 5), 3.0, np.float32), Geometry((7, 6, 5), (1, 1, 1), (0, 0, 0), np.eye(3)))
        )
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "ending", "told"),
    [
        ("missing", ".nii.gz", "There is no file"),
        ("not an image", ".nii.gz", "is not an image that can be read"),
        ("not an image", ".nrrd", "is not an image that can be read"),
        ("empty", ".nii", "is empty"),
        ("cut short", ".nii.gz", "damaged or cut short"),
        ("cut short", ".nrrd", "damaged or cut short"),
        ("2D", ".nii", "is flat (2D), but a 3D volume is wanted"),
        ("2D", ".png", "is flat (2D), but a 3D volume is wanted"),
        ("4D", ".nii", "takes the channel T1; "),
        ("colour", ".nrrd", "has 3 values per voxel"),
        ("zero spacing", ".nii", "a voxel size of 1 x 0 x 1 mm, but every size must be above 0"),
        ("negative spacing", ".nii", "a voxel size of 1 x -2 x 1 mm, but every size must be above 0"),
        ("huge header", ".nii", "damaged or cut short: its header claims 30000 x 30000 x 30000 voxels"),
        ("one value", ".nii", "There is nothing to segment in the T1 volume"),
        ("folder", "", "has no DICOM images"),
    ],
)
def test_an_input_that_is_no_volume_is_told(place, refused, tmp_path, kind, ending, told):
    path = tmp_path / f"input{ending}"
    make_bad_input(kind, path)
    command = ["segment", "-m", place / "single", "-i", path, "-o", tmp_path / "out.seg.nrrd", "--device", "cpu"]
    message, hint = refused(*command)
    assert told in message
    assert hint
    assert kind != "4D" or "segment this file alone with --frames; else extract one volume" in hint
    if kind not in ("one value",):
        assert path.name in message, "the file is named"


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (["T1=t1"], "The model Phantom takes the 2 channels T1, T2; got T1."),
        (["T1=t1", "FLAIR=t2"], "takes the 2 channels T1, T2; got T1, FLAIR."),
        (["T1=t1", "T1=t2"], "The channel T1 is given twice."),
        (["T1=t1", "T2="], "The path after T2= is empty."),
        (["t1", "t2"], "Two inputs have no channel name."),
        (["t1"], "holds 1 volume."),
    ],
)
def test_wrong_channels_are_told_with_how_to_give_them(place, refused, tmp_path, inputs, told):
    named = [text.replace("=t", f"={place}/t") if "=" in text else f"{place}/{text}" for text in inputs]
    flags = [f"--input={text}" if text.endswith("=") else f"--input={text}.nii.gz" for text in named]
    message, hint = refused("segment", "-m", place / "model", *flags, "-o", tmp_path / "o.nrrd", "--device", "cpu")
    assert told in message and "--input T1=FILE --input T2=FILE" in hint


def test_a_file_name_may_hold_an_equals_sign(place, tmp_path):
    file = tmp_path / "T9=x.nii.gz"
    file.write_bytes((place / "t1.nii.gz").read_bytes())
    for given in (file, f"T1={file}"):
        command = ["segment", "-m", place / "single", "-i", given, "-o", tmp_path / "o.nrrd", "--device", "cpu"]
        assert invres(*command).code == 0


def test_channels_on_different_grids_are_told_with_the_difference(place, refused, tmp_path):
    grid = Geometry((20, 17, 23), (2.5, 1.1, 0.9), GRIDS[0].origin_mm, GRIDS[0].direction)
    write_volume(tmp_path / "t2.nii.gz", phantom(grid)[0][0])
    inputs = ["-i", f"T1={place}/t1.nii.gz", "-i", f"T2={tmp_path}/t2.nii.gz"]
    message, hint = refused("segment", "-m", place / "model", *inputs, "-o", tmp_path / "o.nrrd", "--device", "cpu")
    assert message.startswith("The volumes T1 and T2 of this case lie on different grids")
    assert "spacing 2.5x1.1x0.8 mm against 2.5x1.1x0.9 mm" in message
    assert "Resample T2 to the grid of T1" in hint


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--device", "gpu"], "There is no device 'gpu'; here are auto, cpu"),
        (["--device", "cuda:7"], "torch sees"),
        (["--device", "meta"], "There is no device 'meta'"),
        (["--overlap", "1"], "The overlap must be at least 0 and below 1"),
        (["--overlap", "nan"], "The overlap must be at least 0 and below 1"),
        (["--mirror", "3"], "Mirror axes are 0, 1 and 2"),
        (["--mirror", "1", "1"], "Mirror axes are 0, 1 and 2 (D, H, W), each once"),
        (["--window", "0", "0", "9"], "The window must be three sizes of 1 voxel or more, got [0, 0, 9]."),
        (["--window", "2", "2", "2"], "shrink to a single voxel"),
        (["--output", "o.docx"], "the allowed endings are .nii, .nii.gz, .nrrd, .mha and .seg.nrrd"),
        (["--probabilities", "p.png"], "p.png cannot be written: the allowed endings are"),
        (["--uncertainty", "u.seg.nrrd"], "u.seg.nrrd has the ending of a segmentation, but an image is written"),
    ],
)
def test_wrong_wishes_for_segmenting_are_told(place, refused, tmp_path, flags, told):
    command = [
        "segment",
        "-m",
        place / "single",
        "-i",
        place / "t1.nii.gz",
        "-o",
        tmp_path / "o.nrrd",
        "--device",
        "cpu",
    ]
    message, _ = refused(*command, *flags)
    assert told in message


def test_an_input_is_never_overwritten(place, tmp_path):
    """By its own name, another spelling of it, a link, a map of probabilities, or in a DICOM folder."""
    (tmp_path / "dicom").mkdir()
    scan, link = tmp_path / "x_core.nii.gz", tmp_path / "link.nii.gz"
    scan.write_bytes((place / "t1.nii.gz").read_bytes())
    link.symlink_to(scan)
    before = scan.read_bytes()
    for given, flags, told in (
        (scan, ["-o", scan], "is an input and would be overwritten"),
        (scan, ["-o", tmp_path / "dicom/../x_core.nii.gz"], "is an input and would be overwritten"),
        (scan, ["-o", link], "is an input and would be overwritten"),
        (scan, ["-o", tmp_path / "o.nrrd", "-p", scan], "is an input and would be overwritten"),
        (scan, ["-o", tmp_path / "o.nrrd", "-p", tmp_path / "x"], "x_core.nii.gz is an input"),
        (scan, ["-o", tmp_path / "o.nrrd", "-u", scan], "is an input and would be overwritten"),
        (scan, ["-o", tmp_path / "o.nrrd", "-u", tmp_path / "o.nrrd"], "would be written twice"),
        (scan, ["-o", tmp_path / "y_core.nrrd", "-p", tmp_path / "y.nrrd"], "would be written twice"),
        (tmp_path / "dicom", ["-o", tmp_path / "dicom/o.nrrd"], "would be written into the DICOM folder"),
    ):
        outcome = invres("segment", "-m", place / "single", "-i", f"T1={given}", *flags)
        assert outcome.code == 2 and told in outcome.err and "Choose another" in outcome.err, outcome
        assert scan.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dicom", "link.nii.gz", "x_core.nii.gz"]


def test_probabilities_without_an_ending_are_a_base(place, tmp_path):
    flags = ["-o", tmp_path / "o.nrrd", "-p", tmp_path / "p", "--device", "cpu", "--window", 16, 16, 7]
    outcome = invres("segment", "-m", place / "single", "-i", place / "t1.nii.gz", *flags, "--json")
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in tmp_path.glob("p_*")) == [
        f"p_{name}.nii.gz" for name in ("background", "core", "lower", "upper")
    ]
    (warning,) = [event["message"] for event in outcome.of("warning") if "window" in event["message"]]
    assert warning.startswith("The window of 16x16x7 voxels is far below the 16x16x16")


def test_a_window_far_beyond_the_models_own_is_told(place, tmp_path):
    flags = ["-o", tmp_path / "o.nrrd", "--device", "cpu", "--window", 16, 26, 16]
    outcome = invres("segment", "-m", place / "single", "-i", place / "t1.nii.gz", *flags, "--json")
    assert outcome.code == 0, outcome
    (warning,) = [event["message"] for event in outcome.of("warning") if "window" in event["message"]]
    assert warning.startswith("The window of 16x26x16 voxels is far above the 16x16x16")


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(place, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # root may write everywhere
    output = tmp_path / "below" / "o.seg.nrrd"
    outcome = invres("segment", "-m", place / "single", "-i", place / "t1.nii.gz", "-o", output, "--json")
    assert outcome.code == 2 and [event["event"] for event in outcome.events] == ["error"]
    assert f"you may not write to the folder {tmp_path}" in outcome.events[0]["message"]


def test_the_folder_of_a_training_is_no_model_but_has_one(place, refused, tmp_path, monkeypatch):
    run = tmp_path / "R1"
    run.mkdir()
    (run / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for given in (run, "R1"):
        message, _ = refused("describe", given)
        assert message == "R1 is the folder of a training; it has no model yet."
    save(run / "model")
    for given in (run, "R1"):
        message, _ = refused("describe", given)
        assert message == f"R1 is the folder of a training; its model is {run}/model."


def test_a_full_disk_while_the_segmentation_is_written_is_told(place, tmp_path):
    output = tmp_path / "o.seg.nrrd"
    with files_up_to(300):
        outcome = invres("segment", "-m", place / "single", "-i", place / "t1.nii.gz", "-o", output, "--device", "cpu")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"{output} could not be written" in outcome.err and "Check the free space" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_more_memory_than_there_is_gives_exit_code_3(data, tmp_path):
    # The kernels alone take more than the 128 TiB that a process can address.
    recipe = write_recipe(tmp_path / "r.json", {"channels": [2 * 10**6, 16 * 10**6]})
    outcome = invres("train", "-d", data, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--json")
    assert outcome.code == 3 and outcome.err == ""
    assert outcome.events[-1]["code"] == "out_of_memory" and "smaller patch" in outcome.events[-1]["hint"]


# --- mistakes with models ------------------------------------------------------------------------------------------


def bad_model(kind, path, good):
    if kind == "pickle file":
        path = path.with_suffix(".pth")
        path.write_bytes(pickle.dumps({}))
    elif kind == "pickle in a folder":
        path.mkdir()
        (path / "manifest.json").write_bytes((good / "manifest.json").read_bytes())
        (path / "model.pkl").write_bytes(pickle.dumps({}))
    elif kind in ("path traversal", "pickle in a zip", "pickle as weights"):
        path = path.with_suffix(".invres")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(good / "manifest.json", "manifest.json")
            if kind == "pickle as weights":
                archive.writestr("model.safetensors", pickle.dumps({"a": 1}))
            else:
                archive.write(good / "model.safetensors", "model.safetensors")
                archive.writestr("../evil.txt" if kind == "path traversal" else "model.pt", "evil")
    elif kind == "cut short":
        path.mkdir()
        (path / "manifest.json").write_bytes((good / "manifest.json").read_bytes())
        (path / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-10])
    elif kind == "not a package":
        path.mkdir()
        (path / "readme.txt").write_text("nothing")
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "There is no model package"),
        ("pickle file", "is refused: such a file is a pickle, which could run code"),
        ("pickle in a folder", "is refused: 'model.pkl' is a pickle"),
        ("pickle in a zip", "is refused: its entry 'model.pt' is a pickle"),
        ("pickle as weights", "is refused: its model.safetensors is a pickle"),
        ("path traversal", "is refused: its entry '../evil.txt' leads out of the package"),
        ("cut short", "truncated or damaged"),
        ("not a package", "is no model package: it lacks manifest.json"),
    ],
)
@pytest.mark.parametrize("verb", ["describe", "segment", "import"])
def test_a_model_that_cannot_be_trusted_is_refused(place, refused, tmp_path, verb, kind, told):
    path = bad_model(kind, tmp_path / "bad", place / "single")
    command = {
        "describe": ["describe", path],
        "segment": ["segment", "-m", path, "-i", place / "t1.nii.gz", "-o", tmp_path / "o.nrrd"],
        "import": ["models", "import", path, "--models-dir", tmp_path / "mine"],
    }[verb]
    message, hint = refused(*command)
    assert told in message and hint
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["describe", "Phantm"], "There is no model 'Phantm'"),
        (["models", "verify"], "`invres models verify` needs a model"),
        (["models", "verify", "MODEL", "--name", "z"], "`invres models verify` has no use for it."),
        (["models", "list", "--name", ""], "--name names what `invres models join` makes"),
        (["models", "export", "MODEL"], "needs --output FILE.invres"),
        (["models", "export", "MODEL", "-o", "OUT.zip"], "An exported model ends in .invres"),
        (["models", "import"], "`invres models import` needs a model"),
    ],
)
def test_wrong_wishes_for_models_are_told(place, refused, tmp_path, arguments, told):
    replaced = {"MODEL": place / "model", "OUT.zip": tmp_path / "out.zip"}
    message, _ = refused(*(replaced.get(argument, argument) for argument in arguments))
    assert told in message


# --- mistakes when training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told", "hint"),
    [
        (
            ["-r", "hipocampus"],
            "There is no recipe 'hipocampus'; the recipes are brain-any-contrast, ",
            "Did you mean 'hippocampus-t1'?",
        ),
        (["-r", "missing.json"], "There is no recipe file missing.json", ""),
        (["-r", "UNKNOWN"], "training has the unknown key 'epoch'", "Did you mean 'epochs'?"),
        (["-r", "SYNONYM"], "network has the unknown key 'widths'", "Did you mean 'channels'?"),
        (["-r", "NETWORK"], "There is no network 'unet'; the networks are unet3d, ", "Did you mean 'unet3d'?"),
        (["-n", "unet"], "invalid choice: 'unet'", "Did you mean 'unet3d'? See `invres train --help`."),
        (["-r", "BROKEN"], "is not readable JSON", ""),
        (["-n", "unet3d", "-r", "WIDTHS"], "fixes the widths of fully_invres and cannot serve unet3d", "network"),
        (["-n", "unet3d", "--engine", "reversible"], "unet3d does not run under the engine 'reversible'", ""),
        (["--device", "gpu"], "There is no device 'gpu'", ""),
        (["--time=-5m"], "A time is given as 90s, 30m or 2h, got '-5m'.", ""),
        (["--time", "0"], "A time is given as 90s, 30m or 2h, got '0'.", ""),
        (["--time", "soon"], "A time is given as 90s, 30m or 2h, got 'soon'.", ""),
        (["--epochs", "0"], "training.epochs must be 1 or more, got 0.", ""),
        (["--patience", "-1"], "training.early_stop_epochs must be 0 or more, got -1.", ""),
        (["--lr", "0"], "training.learning_rate must be above 0, got 0.0.", ""),
        (["--set", "patch=[8,8,8]"], "--set: a recipe has no key 'patch'.", "Did you mean 'training.patch'?"),
        (["--set", "training.lr=1"], "has no key 'training.lr'.", "Did you mean 'training.learning_rate'?"),
        (["--set", "trainng.patch=1"], "has no key 'trainng.patch'.", "Did you mean 'training.patch'?"),
        (["--set", "vae.latent=1"], "has no key 'vae.latent'.", "Did you mean 'network.vae.latent'?"),
        (["--set", "training.rotation=1"], "no key 'training.rotation'", "'augmentation.rotation_degrees'?"),
        (["--set", "training.patch.0=8"], "has no key 'training.patch.0'.", "Known keys: name, description, network,"),
        (["--set", 'training={"epoch":3}'], "training has the unknown key 'epoch'", "Did you mean 'epochs'?"),
        (["--set", "training.patch=[8,8]"], "training: patch must have 3 entries, got 2.", ""),
        (["--set", "training.patch=[8,8"], "training: patch must be a list, got '[8,8'.", ""),
        (["--set", "training.epochs=three"], "training: epochs must be a whole number, got 'three'.", ""),
        (["--set", "training.learning_rate=NaN"], "learning_rate must be a number, got 'NaN'.", ""),
        (["--set", "training.learning_rate=1e999"], "learning_rate must be a number, got '1e999'.", ""),
        (["--set", "augmentation.noise_std=-1e999"], "noise_std must be a number, got '-1e999'.", ""),
        (["--lr", "inf"], "training.learning_rate must be a finite number, got inf.", ""),
        (["--lr", "nan"], "training.learning_rate must be above 0, got nan.", ""),
        (["--time", "9" * 400 + "h"], "training.time_s must be a finite number, got inf.", ""),
        (["-r", "INFINITE"], "training.loss.dice must be a finite number, got inf.", ""),
        (
            ["--set", "spacing_mm=[0,1,1]"],
            "spacing_mm must be three sizes of 0.01 mm or more, got [0.0, 1.0, 1.0].",
            "",
        ),
        (["--set", "spacing_mm=[1e-9,1,1]"], "must be three sizes of 0.01 mm or more, got [1e-09, 1.0, 1.0].", ""),
        (["--set", "training.patch"], "--set needs a key and a value, got 'training.patch'.", "training.patch=[96,96"),
        (["--set", "training.epochs=2", "--epochs", "3"], "--epochs and --set both give training.epochs.", "one"),
        (["--set", 'training={"epochs": 2}', "--epochs", "1"], "--epochs and --set both give training.epochs.", "one"),
        (["--set", 'network={"vae": {"latent": 4}}', "--no-vae"], "--vae and --set both give network.vae.", "one"),
        (["--set", "network.vae.latent=4", "--no-vae"], "--vae and --set both give network.vae.", "one"),
        (["--set", "network.vae=null", "--no-vae"], "--vae and --set both give network.vae.", "one"),
        (["--seed", "-1"], "training.seed must be 0 or more, got -1.", ""),
        (["--seed", str(2**40)], "training.seed must be below 2^32", ""),
        (["--fold", "5"], "There is no fold 5; the data set has the folds 0 to 1.", ""),
        (["--fold", "-1"], "There is no fold -1", ""),
        (["--validation-count", "0"], "--validation-count must be at least 1, got 0.", "use --fold all"),
        (["--validation-count", "-2"], "--validation-count must be at least 1, got -2.", "use --fold all"),
        (["--validation-count", "2"], "must be 1 to 1 for 2 labelled cases, got 2", ""),
        (["-d", "NOWHERE"], "There is no data set at", ""),
        (["-d", "RECIPES"], "No data set format was recognised", ""),
    ],
)
def test_wrong_wishes_for_training_are_told(data, refused, tmp_path, flags, told, hint):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "unknown.json").write_text('{"training": {"epoch": 3}}')
    (recipes / "broken.json").write_text("{")
    (recipes / "infinite.json").write_text('{"training": {"loss": {"dice": 1e999}}}')
    (recipes / "synonym.json").write_text('{"network": {"widths": [4, 8]}}')
    (recipes / "network.json").write_text('{"network": {"name": "unet"}}')
    places = {
        "UNKNOWN": recipes / "unknown.json",
        "BROKEN": recipes / "broken.json",
        "INFINITE": recipes / "infinite.json",
        "SYNONYM": recipes / "synonym.json",
        "NETWORK": recipes / "network.json",
        "WIDTHS": write_recipe(recipes / "widths.json"),
        "NOWHERE": tmp_path / "nowhere",
        "RECIPES": recipes,
    }
    flags = [places.get(flag, flag) for flag in flags]
    run = tmp_path / "run"
    run.mkdir()
    message, next_step = refused("train", "-d", data, "-o", run, *flags)
    assert told in message and hint in next_step


def test_folders_that_are_nearly_a_data_set_are_told_what_they_are_for(place, refused, tmp_path):
    for name in ("images", "labels", "maps"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii.gz").write_bytes((place / "t1.nii.gz").read_bytes())
    message, hint = refused("check", "-d", tmp_path / "images")
    assert message == f"{tmp_path / 'images'} is a part of a data set." and hint == f"Give its parent, {tmp_path}."
    _, hint = refused("check", "-d", tmp_path / "maps")
    assert "`invres train --recipe brain-any-contrast`" in hint and "`--recipe iqt`" in hint
    (tmp_path / "labels" / "a.nii.gz").unlink()
    outcome = invres("check", "-d", tmp_path)
    assert outcome.code == 0 and ": 1 case, images and labels folders." in outcome.out
    assert "Labels: none.\n" in outcome.out and "No case has a label. Label maps alone are for" in outcome.err


def test_help_says_what_the_words_and_numbers_mean():
    told = {verb: " ".join(invres(verb, "--help").out.split()) for verb in ("segment", "train", "models")}
    for words in ("(default: the model's", "0 top to bottom, 1 front to back, 2 left to right", "FILE_LABEL.nii.gz"):
        assert words in told["segment"]
    assert "lower and upper end to the right, front, top" in told["segment"]
    for words in ("end after so many", "drawn at random", "of the computation"):
        assert words in told["train"]
    assert "(default: ~/InvResSegment/Models)" in told["models"]


def test_a_file_in_the_place_of_the_run_is_told(data, refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    message, hint = refused("train", "-d", data, "-o", tmp_path / "run")
    assert "run is a file, but training needs a folder" in message and "--output" in hint
    message, _ = refused("train", "-d", data, "-o", tmp_path / "run" / "below")
    assert "cannot be used: not a directory" in message


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("label on another grid", "lies on another grid than its image"),
        ("image of one value", "There is nothing to segment in the T1 volume of the case patient00"),
        ("fractional label", "is no label map: labels are whole numbers"),
        ("missing file", "does not exist"),
        ("one channel too many", "has 2 image files"),
        ("4D image", "has 3 image volumes"),
    ],
)
def test_a_data_set_with_a_mistake_is_told_with_the_case(refused, tmp_path, kind, told):
    folder = write_dataset(tmp_path / "data", cases=2, channels=("T1",))
    image, label = folder / "imagesTr/patient00_0000.nii.gz", folder / "labelsTr/patient00.nii.gz"
    if kind == "label on another grid":
        volume = read_volume(label, kind="labels")
        moved = Geometry(volume.array.shape, (2.5, 1.1, 0.8), (3.0, -7.5, 13.0), volume.geometry.direction)
        write_volume(label, Volume(volume.array, moved))
    elif kind == "image of one value":
        volume = read_volume(image)
        write_volume(image, Volume(np.zeros_like(volume.array), volume.geometry))
    elif kind == "fractional label":
        volume = read_volume(label, kind="labels")
        write_volume(label, Volume(volume.array * 0.5 + 0.1, volume.geometry))
    elif kind == "missing file":
        label.unlink()
    elif kind == "one channel too many":
        description = json.loads((folder / "dataset.json").read_text())
        description["dataset"]["patient00"]["images"] *= 2
        (folder / "dataset.json").write_text(json.dumps(description))
    elif kind == "4D image":
        sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(image))] * 3), str(image))
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1)
    command = ["train", "-d", folder, "-r", recipe, "--device", "cpu"]
    run = tmp_path / "run"
    (run / "prepared").mkdir(parents=True)
    message, hint = refused(*command, "-o", run, output=folder)
    assert told in message and hint
    assert "patient00" in message
    assert not (run / "run.json").exists() and not (run / "checkpoint.pt").exists()
    checked = invres("check", "-d", folder, "--json")
    assert checked.code == 0
    findings = checked.of("result")[0]["findings"]
    assert any(finding["severity"] == "error" and finding["case"] == "patient00" for finding in findings)


def test_label_values_that_the_data_set_does_not_name_are_a_warning(tmp_path):
    folder = write_dataset(tmp_path / "data", cases=2, channels=("T1",))
    for name in ("patient00", "patient01"):
        volume = read_volume(folder / f"labelsTr/{name}.nii.gz", kind="labels")
        volume.array[volume.array == 3] = 77
        write_volume(folder / f"labelsTr/{name}.nii.gz", volume)
    recipe = write_recipe(tmp_path / "r.json", epochs=1, iterations_per_epoch=1)
    outcome = invres("train", "-d", folder, "-r", recipe, "-o", tmp_path / "run", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    warnings = [event["message"] for event in outcome.of("warning")]
    assert len([text for text in warnings if "77" in text and "count as background" in text]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "-r", "iqt", "--vram", "8GB"], "--vram plans networks that segment; espcn_rn enhances images"),
        (["plan", "-r", "brats", "-n", "unet3d"], "The recipe brats trains fully_invres, and --network asks for"),
        (["plan", "--channels", 0], "network.in_channels must be 1 or more"),
        (["plan", "--patch", 0, 64, 64], "--patch must be three sizes of 1 voxel or more"),
        (["plan", "--batch", 0], "--batch must be 1 or more"),
        (["plan", "--vram", "much"], "An amount of memory is given as 8GB or 500MB, got 'much'"),
        (["plan", "--vram", "8"], "--vram needs a unit, as in 8GB"),
        (["train", "-d", "nowhere", "-o", "run", "--vram", "8"], "--vram needs a unit, as in 8GB"),
        (["plan", "--spacing", 0, 1, 1], "--spacing must be three lengths above 0 mm"),
        (["plan", "--memory", "least"], "invalid choice: 'least'"),
        (["plan", "--batch", 2, "--set", "training.batch_size=2"], "--batch and --set both give training.batch_size."),
        (["plan", "--set", "training.patches=[8,8,8]"], "a recipe has no key 'training.patches'"),
        (["plan", "-m", "brain-any-contrast", "--set", "x=1"], "are for training a network, and --model asks for seg"),
        (["plan", "-n", "unet3d", "--engine", "memcnn"], "unet3d does not run under the engine 'memcnn'"),
        (["bench", "memory", "--patch", -1, 8, 8], "--patch must be three sizes of 1 voxel or more"),
        (["finetune", "-m", "x", "-d", "nowhere", "-o", "run", "--validation-count", -2], "least 1, got -2."),
        (["finetune", "-m", "x", "-d", "nowhere", "-o", "run", "--folds", -1], "--folds must be at least 2, got -1."),
        (["plan", "--shape", 9, 9, 9, "--mirror"], "are for segmenting, which needs --model M: --shape, --mirror."),
        (["plan", "--window", 8, 8, 8, "--locate", "x"], "needs --model M: --window, --locate."),
        (["plan", "-m", "x", "--vram", "8GB", "--no-vae"], "--model asks for segmenting: --vram, --vae."),
        (["plan", "-m", "x", "--training", "--patch", 8, 8, 8, "--batch", 0], "sizes: --patch, --batch."),
        (["plan", "-m", "x", "--training", "--shape", 8, 8, 8], "do not count for fine-tuning; the model"),
        (["bench", "time", "--rounds", 0], "--rounds must be 1 or more, got 0."),
        (["train", "-d", "x", "-o", "run", "--name", "a/b"], "has neither / nor \\, got 'a/b'."),
        (["finetune", "-m", "brain-any-contrast", "-d", "x", "-o", "run", "--name", ".."], "cannot be . or .."),
        (["check", "-d", "nowhere"], "There is no data set at nowhere"),
        (["evaluate", "-p", "nowhere", "-r", "nowhere", "-o", "m.json"], "nowhere"),
        (["evaluate", "-p", "nowhere", "-r", "nowhere", "-o", "."], "is a folder, not a file"),
        (["train", "-d", "nowhere", "-o", "run", "--optimizer", "lion"], "invalid choice: 'lion'"),
    ],
)
def test_wrong_wishes_of_the_other_verbs_are_told(refused, arguments, told):
    message, _ = refused(*arguments)
    assert told in message


@pytest.mark.parametrize("recipe", ["iqt", "brain-any-contrast"])
def test_a_recipe_is_planned_as_it_will_be_trained(recipe):
    """What the data will say (channels, classes) is known where they can only be of one kind."""
    outcome = invres("plan", "-r", recipe, "--json")
    assert outcome.code == 0, outcome
    wanted = Recipe.read(recipes_dir() / f"{recipe}.json")
    training, network = wanted.training, wanted.network
    if network.enhances:
        network = dataclasses.replace(network, in_channels=6, out_channels=6)
        predicted = predict_enhancement(network, training.patch, training.batch_size)
    else:
        network = dataclasses.replace(network, out_channels=len(wanted.labels) + 1)
        predicted = predict_for(network, training, training.engine, regions=False)
    assert outcome.events[-1]["peak_bytes"] == predicted.peak_bytes


def test_any_value_of_a_recipe_is_planned_with():
    size, widths = ["training.patch=[16,16,16]", "training.batch_size=2"], "network.channels=[8,16]"
    values = [*size, "network.in_channels=1", "network.out_channels=2", "training.optimizer=muon", widths]
    words = [word for value in values for word in ("--set", value)]
    found = invres("plan", "-n", "unet3d", *words, "--json").events[-1]
    config = NetworkConfig(name="unet3d", in_channels=1, out_channels=2, channels=(8, 16))
    assert found["peak_bytes"] == predict_training(config, (16, 16, 16), 2, optimizer="muon").peak_bytes
    assert found["optimizer"] == "muon"


def test_a_plan_says_what_it_consists_of_and_is_corrected_by_measuring():
    size = ["--patch", 17, 32, 32, "--channels", 1, "--classes", 2]
    asked = ["plan", "-n", "unet3d", *size, "--device", "cpu", "--measure"]
    outcome = invres(*asked, "--json")
    assert outcome.code == 0, outcome
    found = outcome.events[-1]
    assert sum(found["by_role"].values()) == found["peak_bytes"]
    assert found["correction"] == found["measured"]["peak_bytes"] / found["peak_bytes"]
    assert 0.99 < found["correction"] < 1.01
    said = invres(*asked).out
    assert "measured in two steps on cpu: " in said and "has to be multiplied by 1.000" in said
    for words in (
        "parameters",
        "optimizer",
        "image and target",
        "state and its gradient",
        "maps kept",
        "head and loss",
    ):
        assert words in said
