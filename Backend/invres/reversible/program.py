"""A program of steps with a switch for the memory strategy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import InvresError
from .drift import Watch, drifting
from .engine import Run, advance, run_reversible
from .lift import Lift
from .readout import Readout
from .recompute import draws_random_numbers, frozen_statistics
from .setting import SETTINGS
from .steps import Couple, Stack, Step

__all__ = ["Program"]

StackAndTap = tuple[Stack, Stack]


class Program(nn.Module):
    """Runs its steps under one of five strategies, all with equal output and gradients.

    stored      plain autograd: every activation is kept, O(L) memory
    checkpoint  activations are kept at sqrt(L) places and recomputed between them
    recursive   the program is halved again and again, and each half recomputed from its start: O(log L) memory
    memcnn      each coupling wrapped by the MemCNN library
    reversible  our engine: nothing is kept but the final state

    tap: index of the step after which the top pair is also returned (for the VAE branch); None = no tap.
    private: True says that the caller hands over its inputs and lets nobody else keep the final stack, so that both
        may be overwritten; a network with its own stem and head does so.
    memory: how far the reversible engine goes, "low", "lower" or "lowest" (see `setting`). "lowest" also rounds the
        state to its grid under `stored`, `checkpoint` and `recursive`, so that all compute the same function.
    watch: what the engine has found out about drift and overflow in its last runs.
    """

    def __init__(self, steps: Sequence[Step], tap: int | None = None, private: bool = False):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.tap = tap
        self.private = private
        self.memory = "low"
        self.watch = Watch()

    @property
    def memory(self) -> str:
        return self._memory

    @memory.setter
    def memory(self, name: str) -> None:
        if name not in SETTINGS:
            raise InvresError(f"There is no memory setting {name!r}; the settings are {', '.join(SETTINGS)}.")
        for step in self.steps:
            if SETTINGS[name].fixed_point and not step.fits_grid:
                raise InvresError(
                    f"The memory setting {name!r} keeps the state on a grid, and {type(step).__name__} leaves it.",
                    hint="Take memory 'lower', or switch network.learnable_resampling off.",
                )
            step.on_grid = SETTINGS[name].fixed_point  # type: ignore[assignment]
        self._memory = name

    def forward(
        self,
        inputs: Sequence[torch.Tensor],
        engine: str = "reversible",
        tapped: bool = False,
        stem: nn.Conv3d | None = None,
        readout: Readout | None = None,
    ) -> StackAndTap:
        """inputs: the stack to start from, or with `stem` the image, which that convolution turns into two halves.

        Returns (final stack, tapped pair or () unless `tapped`); with `readout` its sums in place of the stack.
        """
        steps: list[Step] = list(self.steps)  # type: ignore[arg-type]
        tap = self.tap if tapped else None
        setting = SETTINGS[self.memory]
        if stem is not None:
            steps.insert(0, Lift(stem, on_grid=setting.fixed_point))
            tap = None if tap is None else tap + 1
        lifted = len(steps) - len(self.steps)
        if engine == "reversible" or (tap is None and not torch.is_grad_enabled()):
            run = Run(tuple(steps), tap, self.private, readout, setting, self.watch, lifted)
            if torch.is_grad_enabled():
                return run_reversible(run, inputs)
            return advance(run, inputs)
        if engine == "memcnn" and setting.fixed_point:
            raise InvresError(
                f"The memcnn engine has no fixed-point state, which the memory setting {self.memory!r} asks for.",
                hint="Take memory 'low', or the engine 'reversible'.",
            )
        found: Stack = ()
        if tap is None:
            stack = _run(engine, steps, tuple(inputs))
        else:
            stack = _run(engine, steps[: tap + 1], tuple(inputs))
            found = stack[-2:]
            stack = _run(engine, steps[tap + 1 :], stack)
        return (stack if readout is None else readout.of(stack[-2:])), found

    def inverse(self, outputs: Sequence[torch.Tensor]) -> Stack:
        """The stack that `forward` was given, recomputed from what it returned."""
        stack = tuple(outputs)
        with torch.no_grad():
            for step in reversed(self.steps):
                stack = step.inverse(stack)  # type: ignore[operator]
        return stack

    def reconstruction_errors(self) -> dict[int, float]:
        """Index of coupling -> relative error of its recomputed input, as last checked (`watch.due`)."""
        return {index: float(error) for index, error in self.watch.errors.items()}

    def keep_drifting(self, limit: float) -> list[int]:
        """Lets couplings whose input was recomputed with a relative error above `limit` keep it from now on.

        Returns the indices of those that are new.
        """
        found = drifting(self.reconstruction_errors(), limit)
        for index in found:
            self.steps[index].keep = True  # type: ignore[assignment]
        return found


def _run(engine: str, steps: list[Step], stack: Stack) -> Stack:
    if torch.is_grad_enabled():
        if engine == "checkpoint":
            size = max(1, math.isqrt(len(steps)))
            return _run_segments([steps[i : i + size] for i in range(0, len(steps), size)], stack, _run_plainly)
        if engine == "recursive":
            return _run_recursive(steps, stack)
        if engine == "memcnn":
            return _run_memcnn(steps, stack)
    return _run_plainly(steps, stack)


def _run_plainly(steps: list[Step], stack: Stack) -> Stack:
    for step in steps:
        stack = step(stack)
    return stack


def _run_segments(segments: list[list[Step]], stack: Stack, inside: Callable[[list[Step], Stack], Stack]) -> Stack:
    """Chen et al., arXiv 1604.06174: the inputs of the segments are kept, the inside of each recomputed in backward."""
    for segment in segments:

        def run(*tensors: torch.Tensor, segment: list[Step] = segment) -> Stack:
            return inside(segment, tensors)

        def contexts(segment: list[Step] = segment):
            return nullcontext(), frozen_statistics(nn.ModuleList(segment))

        stack = checkpoint(run, *stack, use_reentrant=False, context_fn=contexts)
    return stack


def _run_recursive(steps: list[Step], stack: Stack) -> Stack:
    """The same, with each segment cut in two again, down to single steps (section 4.3 of arXiv 1604.06174)."""
    if len(steps) == 1:
        return steps[0](stack)
    half = len(steps) // 2
    return _run_segments([steps[:half], steps[half:]], stack, _run_recursive)


def _run_memcnn(steps: list[Step], stack: Stack) -> Stack:
    """Each coupling through memcnn (van de Leemput et al., JOSS 2019), everything else through plain autograd.

    memcnn frees the storage of the tensor it is given, so each wrapper gets a fresh concatenation that nobody else
    holds. It counts BatchNorm's statistics three times and differentiates dropout wrongly: both are refused.
    """
    # memcnn uses torch's autograd decorators and storages under their old names and warns at each of them.
    warnings.filterwarnings("ignore", module=r"memcnn\.")
    import memcnn

    joined: torch.Tensor | None = None
    for step in steps:
        if not isinstance(step, Couple):
            if joined is not None:
                stack, joined = (*stack[:-2], *joined.chunk(2, dim=1)), None
            stack = step(stack)
            continue
        if draws_random_numbers(step):
            raise InvresError(
                "The memcnn engine gives wrong gradients with dropout.",
                hint="Set network.dropout to 0, or choose the engine 'reversible'.",
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in step.modules()):
            raise InvresError(
                "The memcnn engine updates BatchNorm's statistics three times in each step.",
                hint="Choose instance norm, or the engine 'reversible'.",
            )
        coupling = memcnn.AdditiveCoupling(step.n1, step.n2)
        wrapped = memcnn.InvertibleModuleWrapper(coupling, keep_input=False, keep_input_inverse=False)
        # From coupling to coupling the tensor is handed on as it is: memcnn can free only what it is given itself.
        joined = wrapped(torch.cat(stack[-2:], dim=1) if joined is None else joined)
    return stack if joined is None else (*stack[:-2], *joined.chunk(2, dim=1))
