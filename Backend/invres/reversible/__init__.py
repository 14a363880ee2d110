"""The reversible engine and the other memory strategies, behind one switch.

A network is written once, as a `Program`: a list of steps over a stack of state tensors. Every strategy
(`stored`, `checkpoint`, `memcnn`, `reversible`) runs the same steps with the same parameters and gives the
same output and gradients; they differ in what they keep in memory between forward and backward.
"""

from .program import Program
from .state import State
from .steps import AddFromBelow, Branch, Couple, Step

__all__ = ["AddFromBelow", "Branch", "Couple", "Program", "State", "Step"]
