"""InvResSegment's training and segmentation backend: invertible 3D networks that train in little memory.

From Python: `invres.load_model("brain-any-contrast").segment("head.nii.gz")` segments, `invres.run` runs any verb.

This package root imports nothing, so that `invres --help` answers at once and every module may use it; what it offers
is imported when it is asked for. Array conventions are stated once, in `invres.volume`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:  # what type checkers and editors follow
    from .api import Model, load_model, run
    from .memoryimages import image_from_array
    from .segmentation import Segmentation

__all__ = [
    "Cancelled",
    "InvresError",
    "Model",
    "OutOfMemory",
    "Segmentation",
    "__version__",
    "image_from_array",
    "load_model",
    "run",
]

__version__ = "0.2.0"

_HOMES = {
    **dict.fromkeys(("Model", "load_model", "run"), "api"),
    "image_from_array": "memoryimages",
    "Segmentation": "segmentation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class InvresError(Exception):
    """A mistake that the person at the keyboard can mend.

    message: one plain sentence: what is wrong, what was allowed, what was given.
    hint: the next step, in the imperative.
    code: a stable word for programs.
    exit_code: what the command line returns (2 bad input, 3 out of memory, 130 cancelled).
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", code: str = "bad_input"):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class OutOfMemory(InvresError):
    """Neither the smallest window nor the CPU had room for the work."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message, hint=hint, code="out_of_memory")


class Cancelled(InvresError):
    """The person, or a signal, asked for a stop; what was saved is complete."""

    exit_code = 130

    def __init__(self, message: str = "Cancelled.", *, hint: str = ""):
        super().__init__(message, hint=hint, code="cancelled")
