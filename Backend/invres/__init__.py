"""InvResSegment's training and segmentation backend: invertible 3D networks that train in little memory.

This package root imports nothing, so that `invres --help` answers at once and every module may use it.
Array conventions are stated once, in `invres.volume`.
"""

__all__ = ["Cancelled", "InvresError", "OutOfMemory", "__version__"]

__version__ = "0.1.0"


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
