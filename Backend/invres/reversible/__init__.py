"""The reversible engine and the other memory strategies, behind one switch.

A network is written once, as a `Program`: a list of steps over a stack of state tensors. Every strategy
(`stored`, `checkpoint`, `recursive`, `memcnn`, `reversible`) runs the same steps with the same parameters and gives the
same output and gradients; they differ in what they keep in memory between forward and backward.
"""

from .bottleneck import Bottleneck
from .program import Program
from .readout import Readout
from .roles import role
from .setting import SETTINGS
from .slabs import abridged
from .state import State, same_memory
from .steps import AddFromBelow, Branch, Couple, Step
from .unit import Unit

__all__ = [
    "SETTINGS",
    "AddFromBelow",
    "Bottleneck",
    "Branch",
    "Couple",
    "Program",
    "Readout",
    "State",
    "Step",
    "Unit",
    "abridged",
    "role",
    "same_memory",
]
