"""The command line: `invres VERB ...`. Reads arguments, calls the verb, turns its outcome into an exit code.

Exit codes: 0 done, 2 bad input or usage, 3 out of memory, 130 cancelled, 1 internal error.
Nothing here imports torch, so that help, `describe` and `models list` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import InvresError, __version__
from .config import ENGINES, MEMORY_SETTINGS, OPTIMIZERS
from .configjson import nearest
from .events import JsonReporter, Reporter, TerminalReporter
from .faults import fault_of
from .files import SEGMENTATION, WRITABLE_ENDINGS
from .interruption import terminable
from .networkconfig import ENHANCEMENT_NETWORKS, NETWORKS

__all__ = ["main", "perform"]

_MEMORY = (
    "how far the reversible engine goes: low (little memory at hardly any cost in time), lower (fewer channels at a "
    "time; with bf16 or fp16 also 16-bit gradients), lowest (also a 16-bit state)"
)

ENDINGS = (SEGMENTATION, *WRITABLE_ENDINGS)

PRECISIONS = ("fp32", "bf16", "fp16")

_OPTIMIZER = "muon needs fewer steps than adam, and keeps half the state that adam keeps beside the weights"

_MIRROR = (
    "average predictions mirrored along these axes: 0 top to bottom, 1 front to back, 2 left to right; without an axis "
    "none, which takes less time (default: as the model wants it)"
)

_ALIGN = (
    "resample channels on other grids linearly to that of the first, by what the headers say: nothing is registered"
)

_DROPOUT = "blank each channel so often in training, as 0.25, so that the model can do without some of them"


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage like any other bad input: one sentence, and JSON where JSON was asked for."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Before Python 3.14 argparse takes -1.5e-05 for an option's name.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it. What is unknown to a verb is told by the verb, whose options it may have meant."""
        self._given = list(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _nearest_option(self) -> str:
        """A question for the option that a misspelt one may have meant; "" where none is misspelt, or none is near."""
        names = [text.partition("=")[0] for text in self._given if text.startswith("--")]
        known = [text for text in self._option_string_actions if text.startswith("--")]
        unknown = [name for name in names if not any(text.startswith(name) for text in known)]
        return next((question for name in unknown if (question := nearest(name, known))), "")

    def error(self, message: str) -> NoReturn:
        hint = f"See `{self.prog} --help`."
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = f"{nearest(found[1], re.findall(r'[^, ]+', found[2].replace(chr(39), '')))} {hint}".strip()
        elif message.startswith(("unrecognized arguments", "the following arguments are required")):
            hint = f"{self._nearest_option()} {hint}".strip()
        raise InvresError(f"{message[:1].upper()}{message[1:]}.", hint=hint, code="usage")


def main(arguments: Sequence[str] | None = None, report: Reporter | None = None) -> int:
    """Runs one command and returns its exit code. report: who is told (None: by `--json`, a program or a person)."""
    # Torch's threads wait for one another by spinning. Where another program uses a core as well, that makes training
    # on a CPU several times slower; sleeping costs next to nothing. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if report is None:
        report = JsonReporter() if "--json" in arguments else TerminalReporter()
    try:
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        perform(arguments, report)
        return 0
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        fault = fault_of(error)
        if fault.code == "internal":
            traceback.print_exc()
        report.error(fault.code, fault.message, fault.hint)
        return fault.exit_code


def perform(arguments: Sequence[str], report: Reporter) -> None:
    """Runs one command; what goes wrong is raised. Raises SystemExit after --help and --version."""
    options = _parser().parse_args(arguments)
    options.run(options, report)


def _verb(name: str) -> Callable[[argparse.Namespace, Reporter], None]:
    """The function `name` of the commands module, imported when it is called."""

    def run(options: argparse.Namespace, report: Reporter) -> None:
        from . import commands

        # The worker ends as its requests do.
        with contextlib.nullcontext() if name == "worker" else terminable():
            getattr(commands, name)(options, report)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="invres", description="Segments and trains on 3D medical images in little memory.")
    parser.add_argument("--version", action="version", version=f"invres {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(verb: str, text: str, run: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("--json", action="store_true", help="write events and the result as JSON lines on stdout")
        one.set_defaults(run=_verb(run))
        return one

    one = add("segment", "Segments a volume, or all cases of a folder, with a model.", "segment")
    one.add_argument("-m", "--model", required=True, help="name of a model, or path of a package")
    one.add_argument(
        "-i",
        "--input",
        action="append",
        metavar="[CHANNEL=]FILE",
        help="image file or DICOM folder, once for each channel (T1=a.nii.gz); or one 4D file with all; with --data: "
        "what the data call the model's CHANNEL, where that is not its name (MR=FLAIR)",
    )
    one.add_argument(
        "-d",
        "--data",
        type=Path,
        help="instead: all cases of a data set, or of a folder of scans; goes on where it was ended",
    )
    one.add_argument(
        "--frames",
        action="store_true",
        help="a 4D file (x, y, z, time) is a series, such as cine MR: segment each of its frames into one 4D label map",
    )
    one.add_argument(
        "--volumes", type=Path, metavar="FILE.csv", help="with --frames: a table of the volumes in mL by frame"
    )
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "-o", "--output", type=Path, help=".seg.nrrd, .nii.gz, .nii, .nrrd or .mha; with --data a folder"
    )
    where.add_argument(
        "--list", action="store_true", help="instead: only say which cases --data has, and which files each is made of"
    )
    _align(one)
    one.add_argument("--ending", choices=ENDINGS, help="of the files in the folder, with --data (default .nii.gz)")
    one.add_argument("-p", "--probabilities", type=Path, metavar="FILE", help="writes FILE_LABEL.nii.gz for each label")
    one.add_argument(
        "-u",
        "--uncertainty",
        type=Path,
        metavar="FILE",
        help="writes a map of how likely each label is to be wrong: 1 minus its probability",
    )
    one.add_argument(
        "--provenance",
        type=Path,
        metavar="FILE.json",
        help="also write model, inputs, settings and versions there; a .seg.nrrd holds them anyway",
    )
    one.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows (default 0.5)")
    _mirror(one, "")
    _window(one, "voxels (default: the model's, see `invres describe`)")
    one.add_argument(
        "--roi",
        type=float,
        nargs=6,
        metavar=("R0", "R1", "A0", "A1", "S0", "S1"),
        help="segment only this box: its lower and upper end to the right, front, top, in mm (RAS)",
    )
    one.add_argument(
        "--locate",
        metavar="MODEL",
        help="for a model that was trained on crops: the model that finds their place in a whole image",
    )
    one.add_argument(
        "--no-sides",
        dest="sides",
        action="store_false",
        help="leave left and right of a structure in one label, as the network has them",
    )
    one.add_argument(
        "--keep-pieces",
        dest="one_piece",
        action="store_false",
        help="keep small pieces that hang loose, which a model of one connected structure leaves out",
    )
    _device(one)

    one = add(
        "rerun",
        "Makes segmentations again, exactly as their record says, and compares them with the stored ones.",
        "rerun",
    )
    one.add_argument(
        "record",
        type=Path,
        metavar="FILE",
        help="a .seg.nrrd, a .json that --provenance wrote, or the segmentations.json of segment --data",
    )
    one.add_argument(
        "-i",
        "--input",
        type=Path,
        action="append",
        metavar="PLACE",
        help="file, or folder to look in with all folders below it, for the inputs, which are known by their content "
        "whatever they are called now; may be repeated (default: the folder of FILE alone)",
    )
    one.add_argument("-m", "--model", help="name or path, where the model of the record is not installed")
    one.add_argument("--locate", metavar="MODEL", help="the same for the model that found the place")
    one.add_argument(
        "-o", "--output", type=Path, help="also write it: .seg.nrrd, .nii.gz, .nii, .nrrd or .mha; of cases a folder"
    )
    one.add_argument(
        "--case", nargs="+", action="extend", default=[], metavar="NAME", help="of a segmentations.json (default: all)"
    )
    one.add_argument("--device", help="auto, cpu or cuda:0 (default: of the kind of the record)")

    one = add("enhance", "Gives a scan at finer voxels, with a model of image quality transfer.", "enhance")
    one.add_argument("-m", "--model", required=True, help="name of a model, or path of a package")
    one.add_argument(
        "-i", "--input", required=True, type=Path, help="one volume; or a diffusion scan, or six tensor components"
    )
    one.add_argument("-o", "--output", required=True, type=Path, help=".nii.gz, .nii, .nrrd or .mha")
    one.add_argument("--bval", type=Path, help="b-values of a diffusion scan (default: the file beside it)")
    one.add_argument("--bvec", type=Path, help="its directions, as FSL writes them (default: the file beside it)")
    one.add_argument("--mask", type=Path, help="where the brain is (default: the file ..._mask beside it, or found)")
    one.add_argument(
        "--reference", type=Path, metavar="FILE", help="true image on the output's grid: also print the errors"
    )
    one.add_argument("--overlap", type=int, default=0, metavar="VOXELS", help="of neighbouring patches (default 0)")
    _device(one)

    one = add("train", "Trains a network on a data set.", "train")
    one.add_argument(
        "-d", "--data", required=True, type=Path, help="dataset.json or folder; to enhance: folder or list of scans"
    )
    one.add_argument("-r", "--recipe", help="name or JSON file (default: default; with --resume that of the run)")
    one.add_argument("-o", "--output", required=True, type=Path, help="folder of this run")
    one.add_argument("--resume", action="store_true", help="go on with the run in --output, or start it")
    one.add_argument("-n", "--network", choices=NETWORKS + ENHANCEMENT_NETWORKS, help="instead of the recipe's")
    one.add_argument("-t", "--time", metavar="30m", help="time budget: 90s, 30m, 2h")
    one.add_argument("--epochs", type=int, help="end after so many (default: the recipe's)")
    one.add_argument(
        "--patience",
        type=int,
        metavar="EPOCHS",
        help="end after so many without a better score of the held-out cases, 0 = never (default: the recipe's)",
    )
    one.add_argument("--lr", type=float, help="learning rate (default: the recipe's)")
    one.add_argument("--seed", type=int, help="of all that is drawn at random (default: the recipe's)")
    one.add_argument("--engine", choices=ENGINES, help="memory strategy (default: the recipe's)")
    one.add_argument("--precision", choices=PRECISIONS, help="of the computation (default: the recipe's)")
    one.add_argument("--memory", choices=MEMORY_SETTINGS, help=_MEMORY)
    one.add_argument("--optimizer", choices=OPTIMIZERS, help=f"{_OPTIMIZER} (default: the recipe's)")
    _align(one, f"{_ALIGN}; with --resume as the run was started")
    one.add_argument("--channel-dropout", type=float, metavar="P", help=_DROPOUT)
    one.add_argument(
        "--vae", action=argparse.BooleanOptionalAction, help="with the VAE branch (default: as the recipe has it)"
    )
    _set(one)
    one.add_argument("--vram", metavar="8GB", help="choose memory setting and patch so that training fits a card")
    one.add_argument(
        "--fold",
        type=_fold,
        help="validated on, of 5 or of splits_final.json (default: 0); all: train on every case",
    )
    one.add_argument("--validation-count", type=int, help="validate on this many cases instead of a fold")
    one.add_argument("--name", default="", help="of the trained model (default: the recipe's)")
    one.add_argument("--licence", default="", help="licence of the trained model, written into the package")
    one.add_argument("--source", default="", help="where the data come from, in words, written into the package")
    _device(one)

    _finetune(add("finetune", "Fine-tunes a model on your own cases and proves what it brought.", "finetune"))

    one = add(
        "evaluate",
        "Scores segmentations against references, trainings on what they held out, or a model that enhances on scans.",
        "evaluate",
    )
    one.add_argument("-p", "--predictions", type=Path, help="folder or file")
    one.add_argument("-r", "--references", type=Path, help="folder or file")
    one.add_argument(
        "--run",
        dest="trained",
        type=Path,
        metavar="RUN",
        nargs="+",
        action="extend",
        help="instead: segment and score what this training held out; several are the folds of one cross-validation, "
        "whose cases are scored together",
    )
    one.add_argument(
        "-m", "--model", help="instead: a model that enhances: reduce the scans of --data, enhance, compare"
    )
    one.add_argument("-o", "--output", required=True, type=Path, help="metrics.json to write")
    one.add_argument(
        "-d",
        "--data",
        type=Path,
        help="data set whose label names, regions and patients to use; with --run: where that of the training is now "
        "(default: where it was); with --model: scans",
    )
    one.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help="of the surface Dice (default 1 mm)")
    _device(one)

    one = add("compare", "Compares two results of `invres evaluate` on the same cases, case by case.", "compare")
    one.add_argument("a", type=Path, metavar="A.json", help="what `invres evaluate` wrote for one model")
    one.add_argument("b", type=Path, metavar="B.json", help="and for the other; differences are B minus A")
    one.add_argument("-o", "--output", type=Path, help="JSON file to write")

    one = add("check", "Examines a data set and says what will be done about each finding.", "check")
    one.add_argument("-d", "--data", required=True, type=Path, help="dataset.json or folder")
    _align(one, "say what will be done with --align")

    one = add("plan", "Predicts the memory of training, or with --model that of segmenting; needs no GPU.", "plan")
    one.add_argument("-m", "--model", help="segmenting with this model: its name, or path of a package")
    one.add_argument("--training", action="store_true", help="with --model: fine-tuning it instead of segmenting")
    one.add_argument("--shape", type=int, nargs=3, metavar=("D", "H", "W"), help="segmenting: voxels of the volume")
    one.add_argument("--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="mm of the voxels")
    one.add_argument("--roi-shape", type=int, nargs=3, metavar=("D", "H", "W"), help="segmenting: voxels of the region")
    _mirror(one, "segmenting: ")
    _window(one, "segmenting: in voxels (default the model's)")
    one.add_argument("--locate", metavar="MODEL", help="segmenting: this model finds the place first")
    _device(one)
    one.add_argument("-r", "--recipe", help="training by this recipe (name or JSON file), but for what is given here")
    _set(one)
    one.add_argument("-n", "--network", choices=NETWORKS + ENHANCEMENT_NETWORKS, help="training it (fully_invres)")
    one.add_argument("--engine", choices=ENGINES, help="(auto)")
    one.add_argument("--precision", choices=PRECISIONS, help="(fp32)")
    one.add_argument("--memory", choices=MEMORY_SETTINGS, help=f"(low) {_MEMORY}")
    one.add_argument("--optimizer", choices=OPTIMIZERS, help=f"(adam) {_OPTIMIZER}")
    one.add_argument(
        "--vae", action=argparse.BooleanOptionalAction, help="with the VAE branch (a model: default as it has it)"
    )
    _size(one, 128)
    one.set_defaults(patch=None, channels=None, classes=None)
    one.add_argument("--batch", type=int, help="(1)")
    one.add_argument("--vram", metavar="8GB", help="also say what fits into that much GPU memory")
    one.add_argument(
        "--measure", action="store_true", help="also run two steps on --device and correct the prediction by them"
    )

    one = add("describe", "Shows what a model needs and gives, or how a .seg.nrrd was made.", "describe")
    one.add_argument("model", help="name of a model, path of a package, or a .seg.nrrd that `segment` wrote")

    one = add(
        "models",
        "Lists, verifies, imports, exports, deletes or joins model packages, and goes through their versions.",
        "models",
    )
    actions = ("list", "verify", "import", "export", "delete", "join", "history", "diff", "rollback")
    one.add_argument("action", choices=actions)
    one.add_argument("model", nargs="?", help="name, id or path (not for list)")
    one.add_argument(
        "others",
        nargs="*",
        metavar="other",
        help="diff: the newer model (default: what `model` was tuned from is the older); join: the further ones",
    )
    one.add_argument("-o", "--output", type=Path, help="export: the .invres file to write; join: that or a folder")
    one.add_argument("--name", help="join: of the new model (default: that of the first)")
    one.add_argument("--models-dir", type=Path, help="folder of your own models (default: ~/InvResSegment/Models)")

    add("devices", "Lists the devices that can be computed on, with their memory.", "devices")

    one = add("worker", "Answers requests, one JSON object a line on stdin, until stdin ends.", "worker")
    one.set_defaults(run_command=main)

    one = add(
        "bench",
        "Measures memory, variants, time, gradients and depth of all networks and engines, and of installed peers.",
        "bench",
    )
    one.add_argument("what", choices=("memory", "variants", "time", "gradients", "depth", "all"))
    one.add_argument("--measure", action="store_true", help="memory: run the steps instead of predicting")
    one.add_argument("--rounds", type=int, default=5, help="time: counted rounds (default 5)")
    one.add_argument("-o", "--output", type=Path, help="folder for JSON, Markdown and the picture of depth")
    _size(one, 64)
    _device(one, default="cpu")

    one = add("reproduce", "Prints a table of a paper beside our own figures.", "reproduce")
    one.add_argument("table", nargs="?", metavar="TABLE", help="name of the table (none: the list)")
    one.add_argument("--list", action="store_true", help="say which tables there are")
    one.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="what `invres evaluate` wrote for a network, for the columns of accuracy; once for each",
    )
    one.add_argument("--vram", metavar="8GB", help="mbconv-claims: what a card of so much memory holds")
    _device(one, default=None)

    one = add(
        "demo", "Segments the real ICBM152 T1 volume with the bundled brain model, and scores the result.", "demo"
    )
    one.add_argument("-m", "--model", default="brain-any-contrast", help="another brain model (default %(default)s)")
    one.add_argument("-o", "--output", type=Path, default=Path("out/demo"), help="folder (default %(default)s)")
    _device(one)
    return parser


def _finetune(one: argparse.ArgumentParser) -> None:
    one.add_argument("-m", "--model", required=True, help="name of the model to begin with, or path of a package")
    one.add_argument("-d", "--data", required=True, type=Path, help="dataset.json or folder, from 1 case up")
    _align(one, f"{_ALIGN} (default: as for the model; with --resume as the run was started)")
    one.add_argument("-o", "--output", required=True, type=Path, help="folder of this run")
    one.add_argument("--resume", action="store_true", help="go on with the run in --output, or start it")
    one.add_argument("-t", "--time", metavar="30m", help="time budget of all trainings together: 90s, 30m, 2h")
    one.add_argument("--epochs", type=int, help="of each training (default: the recipe's, or 40 of 25 steps)")
    one.add_argument(
        "--patience",
        type=int,
        metavar="EPOCHS",
        help="end after so many without a better Dice (default 20, 0 = never), where some cases choose the best epoch: "
        "in a run of a single training, on more than 5 patients",
    )
    one.add_argument("--lr", type=float, help="learning rate (default: the recipe's, or 0.0001, with new labels 0.001)")
    one.add_argument("--freeze", choices=("none", "encoder", "all-but-head"), default="none", help="keep these weights")
    one.add_argument(
        "--vae", action=argparse.BooleanOptionalAction, help="the VAE branch (default: as the model has it)"
    )
    one.add_argument(
        "--synthetic", type=float, default=0.0, metavar="FRACTION", help="of the batches, made from your label maps"
    )
    one.add_argument("--channel-dropout", type=float, metavar="P", help=f"{_DROPOUT} (default: as the model was)")
    one.add_argument(
        "--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="mm (default: what the model was trained at)"
    )
    one.add_argument(
        "--normalisation", choices=("base", "data"), default="base", help="of CT: the model's, or anew from the data"
    )
    one.add_argument("-r", "--recipe", help="take training and augmentation from this recipe: name or JSON file")
    _set(one, "any value of training and augmentation", "'training.patch=[64,64,64]', augmentation.noise_std=0.1")
    one.add_argument("--seed", type=int, help="of all that is drawn at random (default 0)")
    one.add_argument("--engine", choices=ENGINES, help="memory strategy (default auto)")
    one.add_argument("--precision", choices=PRECISIONS, help="of the computation (default fp32)")
    one.add_argument("--memory", choices=MEMORY_SETTINGS, help=_MEMORY)
    one.add_argument("--optimizer", choices=OPTIMIZERS, help=f"{_OPTIMIZER} (default: the recipe's, or adam)")
    one.add_argument("--folds", type=int, help="hold each patient out once, in this many groups")
    one.add_argument("--validation-count", type=int, help="hold this many cases out of a single training")
    one.add_argument("--new-labels", action="store_true", help="the cases may have no label of the model's")
    one.add_argument("--check-base", type=Path, metavar="DATA", help="also see what is forgotten of these cases")
    one.add_argument("--promote", action="store_true", help="take the tuned model whatever the proof says")
    one.add_argument("--name", default="", help="of the tuned model (default: the model's)")
    one.add_argument("--licence", default="", help="of the tuned model (default: the model's)")
    _device(one)


def _fold(text: str) -> int | str:
    """The number of a fold, or "all"."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold nor all") from None


def _device(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    without = f"default {default}" if default else "default: nothing is measured, memory is predicted"
    parser.add_argument("--device", default=default, help=f"auto, cpu or cuda:0 ({without})")


def _mirror(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument("--mirror", type=int, nargs="*", metavar="AXIS", help=when + _MIRROR)


def _align(parser: argparse.ArgumentParser, text: str = _ALIGN) -> None:
    parser.add_argument("--align", action="store_true", help=text)


def _window(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--window", type=int, nargs=3, default=[0, 0, 0], metavar=("D", "H", "W"), help=text)


def _set(
    one: argparse.ArgumentParser,
    what: str = "any value of the recipe",
    examples: str = "'training.patch=[96,96,96]', 'spacing_mm=[1,1,1]', training.schedule=poly",
) -> None:
    text = f"{what}, by its dotted key, as JSON or a word: {examples}; once for each"
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def _size(parser: argparse.ArgumentParser, side: int) -> None:
    parser.add_argument("--channels", type=int, default=4, help="input channels (default 4)")
    parser.add_argument("--classes", type=int, default=4, help="output channels (default 4)")
    parser.add_argument(
        "--patch", type=int, nargs=3, default=[side] * 3, metavar=("D", "H", "W"), help=f"voxels (default {side} each)"
    )


if __name__ == "__main__":
    sys.exit(main())
