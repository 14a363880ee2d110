"""Small reversible programs that together hold every step, and the comparison of two engines on them."""

from __future__ import annotations

import torch
from torch import nn

from invres.networkconfig import NetworkConfig
from invres.networks.blocks import CouplingFunction, MobileFunction
from invres.networks.resampling import Interpolate, Mix, Pool, SqueezeDown, SqueezeUp
from invres.reversible import AddFromBelow, Branch, Couple, Program

PLAIN = NetworkConfig()
STRIDES = [(2, 2, 2), (1, 2, 2), (2, 1, 1), (1, 1, 2), (1, 1, 1)]
ODD, EVEN, HALF = (5, 3, 7), (6, 4, 8), (3, 2, 4)


def function(channels, config=PLAIN):
    return CouplingFunction(channels, config)


def couple(channels, config=PLAIN):
    return Couple(function(channels, config), function(channels, config))


def bottlenecks(channels, norm="group"):
    config = NetworkConfig(norm=norm, expansion=8)
    return Couple(MobileFunction(channels, config), MobileFunction(channels, config))


def uneven_couple():
    return Couple(nn.Conv3d(2, 3, 3, padding=1), nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.Tanh()))


def mix(channels, phases, transpose=False):
    step = Mix(channels, phases, transpose)
    for parameter in step.parameters():
        nn.init.normal_(parameter)
    return step


def shared_couple():
    step = couple(3)
    return [step, couple(3), step]


def tied_couple():
    n = function(3)
    return [Couple(n, n)]


class Same(nn.Module):
    """Hands its inputs on as they are: the worst a branch can do to an engine that works in place."""

    def forward(self, x1, x2):
        return x1, x2


class WithDropout(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.dropout = module, nn.Dropout(0.3)

    def forward(self, x1, x2):
        return [self.dropout(x) for x in self.module(x1, x2)]


def around(stride, *inside, wavelet=False):
    """Steps at a coarser level, between a squeeze of 2 of 3 channels and its way back."""
    return [SqueezeDown(2, stride, wavelet), *inside, SqueezeUp(2, stride, wavelet)]


def pool_and_return(stride):
    return [
        couple(2),
        Branch(Pool(4, 6, stride)),
        couple(3),
        AddFromBelow(Interpolate(6, 4, stride)),
        couple(2),
    ]


# name: (steps, shapes of the stack without the batch axis)
PROGRAMS = {
    "couple": (lambda: [couple(3)], [(3, *ODD)] * 2),
    "couple without norm": (lambda: [couple(2, NetworkConfig(norm="none"))], [(2, *ODD)] * 2),
    "couple of two units, group norm": (
        lambda: [couple(4, NetworkConfig(norm="group", convolutions=2))],
        [(4, *ODD)] * 2,
    ),
    "couple of bottlenecks": (lambda: [bottlenecks(3), couple(3)], [(3, *ODD)] * 2),
    "couple of bottlenecks without norm": (lambda: [bottlenecks(2, "none")], [(2, *ODD)] * 2),
    "uneven couple": (lambda: [uneven_couple()], [(3, *ODD), (2, *ODD)]),
    "one block twice": (shared_couple, [(3, *ODD)] * 2),
    "one function twice": (tied_couple, [(3, *ODD)] * 2),
    "couple above a waiting pair": (lambda: [couple(2)], [(1, 2, 3, 2), (1, 2, 3, 2), (2, *ODD), (2, *ODD)]),
    "branch": (lambda: [Branch(Pool(4, 6, (2, 2, 2)))], [(2, *EVEN)] * 2),
    "branch and couple": (lambda: [Branch(Pool(4, 6, (2, 1, 2))), couple(3)], [(2, *EVEN)] * 2),
    "branch that returns its input": (lambda: [Branch(Same()), couple(2)], [(2, *ODD)] * 2),
    "add from below": (
        lambda: [AddFromBelow(Interpolate(6, 4, (2, 2, 2)))],
        [(2, *EVEN), (2, *EVEN), (3, *HALF), (3, *HALF)],
    ),
    "pool and return": (lambda: pool_and_return((2, 2, 2)), [(2, *EVEN)] * 2),
    "pool and return, flat": (lambda: pool_and_return((1, 2, 2)), [(2, *EVEN)] * 2),
    "squeeze all and return": (
        lambda: [SqueezeDown(3, (2, 2, 2)), couple(24), SqueezeUp(3, (2, 2, 2)), couple(3)],
        [(3, *EVEN)] * 2,
    ),
    "squeeze twice": (
        lambda: [
            couple(3),
            *around((2, 2, 2), couple(16), SqueezeDown(4, (1, 2, 2)), couple(16), SqueezeUp(4, (1, 2, 2))),
        ],
        [(3, 4, 4, 8)] * 2,
    ),
    "wavelets twice": (
        lambda: [
            couple(3),
            *around((2, 2, 2), couple(16), *around((1, 2, 2), couple(8), wavelet=True), wavelet=True),
        ],
        [(3, 4, 4, 8)] * 2,
    ),
    "mix": (lambda: [mix(8, 4)], [(8, *ODD)] * 2),
    "mix upwards": (lambda: [mix(4, 2, True)], [(4, *ODD)] * 2),
    "squeeze and mix": (
        lambda: around((1, 2, 2), mix(8, 4), couple(8), mix(8, 4, True)),
        [(3, *EVEN)] * 2,
    ),
    **{
        f"squeeze {stride}": (
            lambda stride=stride: around(stride, couple(2 * stride[0] * stride[1] * stride[2])),
            [(3, *EVEN)] * 2,
        )
        for stride in STRIDES
    },
    **{
        f"wavelet {stride}": (
            lambda stride=stride: around(stride, couple(2 * stride[0] * stride[1] * stride[2]), wavelet=True),
            [(3, *EVEN)] * 2,
        )
        for stride in STRIDES
    },
}


def make(name, dtype=torch.float64, batch=2, **options):
    """The program and a stack for it."""
    steps, shapes = PROGRAMS[name]
    program = Program(steps(), **options).to(dtype)
    return program, [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


def score(outputs):
    """A scalar that every element of every output has its own share in."""
    total = 0
    for position, output in enumerate(outputs):
        weight = torch.linspace(0.5, 1.5 + position, output.numel(), dtype=torch.float64).reshape(output.shape)
        total = total + (output.double().sin() * weight).mean()
    return total


def gradients_of(program, inputs, engine, tapped=False):
    """(outputs, gradients of the inputs, gradients of the parameters), from one backward."""
    program.zero_grad(set_to_none=True)
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs, tap = program(leaves, engine, tapped=tapped)
    results = [t.detach().clone() for t in (*outputs, *tap)]
    score([*outputs, *tap]).backward()
    parameters = {key: p.grad for key, p in program.named_parameters()}
    return results, [leaf.grad for leaf in leaves], parameters


def assert_same(found, wanted, rtol=1e-9):
    for f, w in zip(found, wanted, strict=True):
        if w is None:  # what the loss does not depend on may also get zeros
            assert f is None or not f.any()
        else:
            torch.testing.assert_close(f, w, rtol=rtol, atol=rtol * max(1e-3, float(w.abs().max())))


def assert_same_run(found, wanted, rtol=1e-9):
    for f, w in zip(found[:2], wanted[:2], strict=True):
        assert_same(f, w, rtol)
    assert found[2].keys() == wanted[2].keys()
    assert_same(list(found[2].values()), list(wanted[2].values()), rtol)
