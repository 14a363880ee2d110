"""The reversible engine: outputs, gradients and inverses of every step are those of plain autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_programs import (
    EVEN,
    ODD,
    PROGRAMS,
    STRIDES,
    assert_same,
    assert_same_run,
    couple,
    gradients_of,
    make,
    mix,
    score,
)
from torch import nn

from invres.networkconfig import NetworkConfig
from invres.networks.resampling import Interpolate, Mix, Pool, SqueezeDown, SqueezeUp, squeeze, unsqueeze
from invres.reversible import AddFromBelow, Branch, Couple, Program, Step

WITHOUT_POOLING = [name for name in PROGRAMS if not any(word in name for word in ("pool", "branch", "below"))]


@pytest.mark.parametrize("engine", ["checkpoint", "memcnn", "reversible", "reversible, private"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_step_gives_the_output_and_gradients_of_plain_autograd(name, engine):
    if engine == "memcnn" and name == "uneven couple":
        pytest.skip("memcnn halves a tensor: both halves have one width")
    engine, _, private = engine.partition(", ")
    program, inputs = make(name)
    wanted = gradients_of(program, inputs, "stored")
    program.private = bool(private)
    assert_same_run(gradients_of(program, inputs, engine), wanted)
    for key, gradient in wanted[2].items():
        assert gradient.abs().max() > 0, key
    for gradient in wanted[1]:
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_in_single_precision_are_within_rounding_of_plain_autograd(name):
    program, inputs = make(name, torch.float32)
    wanted = gradients_of(program, inputs, "stored")
    found = gradients_of(program, inputs, "reversible")
    for f, w in zip([*found[1], *found[2].values()], [*wanted[1], *wanted[2].values()], strict=True):
        assert (f - w).norm() <= 1e-5 * w.norm()


def trained_from(program, inputs, engine, first):
    """Gradients of the parameters where those in front of step `first` are frozen and nobody asks for the inputs'."""
    program.zero_grad(set_to_none=True)
    for index, step in enumerate(program.steps):
        step.requires_grad_(index >= first)
    outputs, tap = program([x.clone() for x in inputs], engine, tapped=program.tap is not None)
    score([*outputs, *tap]).backward()
    return {key: p.grad for key, p in program.named_parameters()}


def noted_retreat(notes, step, own, *arguments):
    notes.append(step)
    own(*arguments)


@pytest.mark.parametrize("setting", ["low", "lower"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_inverted_in_front_of_the_first_trained_step(name, setting, monkeypatch):
    program, inputs = make(name)
    program.memory = setting
    trained = [index for index, step in enumerate(program.steps) if any(True for _ in step.parameters())]
    for first in trained:
        wanted = trained_from(program, inputs, "stored", first)
        retreated = []
        for step in {*program.steps}:  # one may stand there twice
            monkeypatch.setattr(step, "retreat", partial(noted_retreat, retreated, step, step.retreat))
        found = trained_from(program, inputs, "reversible", first)
        monkeypatch.undo()
        needed = next(i for i, step in enumerate(program.steps) if any(p.requires_grad for p in step.parameters()))
        assert retreated == [*program.steps][: needed - 1 if needed else None : -1]
        for key, gradient in wanted.items():
            assert (found[key] is None) == (gradient is None), key
            if gradient is not None:
                assert_same([found[key]], [gradient])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_without_gradients_gives_the_output_of_training(name):
    program, inputs = make(name)
    wanted = gradients_of(program, inputs, "stored")[0]
    with torch.no_grad():
        assert_same(program(inputs)[0], wanted)
    with torch.inference_mode():
        assert_same(program(inputs)[0], wanted)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_callers_input_is_never_changed(name):
    program, inputs = make(name)
    before = [x.clone() for x in inputs]
    score(program(inputs)[0]).backward()
    with torch.no_grad():
        program(inputs)
    with torch.inference_mode():
        program(inputs)
    for x, b in zip(inputs, before, strict=True):
        assert torch.equal(x, b)
    outputs, _ = program(inputs)
    with torch.no_grad():  # nor by what the caller does to the output of a training step
        for output in outputs:
            output.add_(1)
    for x, b in zip(inputs, before, strict=True):
        assert torch.equal(x, b)


@pytest.mark.parametrize("name", WITHOUT_POOLING)
def test_the_inverse_restores_the_input(name):
    program, inputs = make(name)
    with torch.no_grad():
        assert_same(program.inverse(program(inputs)[0]), inputs)
        for step in program.steps:  # the step on its own, too, not only what comes out at the end
            if isinstance(step, (Couple, Mix)):
                inputs = [torch.randn(1, c, *ODD, dtype=torch.float64) for c in step_widths(step)]
                assert_same(step.inverse(step(tuple(inputs))), inputs)


def step_widths(step: Step):
    if isinstance(step, Mix):
        return [half.free.shape[0] * half.phases for half in step.halves]
    convs = [next(m for m in n.modules() if isinstance(m, nn.Conv3d)) for n in (step.n2, step.n1)]
    return [conv.in_channels for conv in convs]


@pytest.mark.parametrize("stride", STRIDES)
def test_squeeze_is_a_permutation_and_unsqueeze_its_inverse(stride):
    x = torch.randperm(2 * 3 * 4 * 6 * 8).reshape(2, 3, 4, 6, 8)
    small = squeeze(x, stride)
    phases = stride[0] * stride[1] * stride[2]
    assert small.shape == (2, 3 * phases, 4 // stride[0], 6 // stride[1], 8 // stride[2])
    assert torch.equal(small.flatten().sort().values, torch.arange(x.numel()))
    assert torch.equal(unsqueeze(small, stride), x)
    # The phases of one channel are neighbours: the first is the grid of even voxels.
    assert torch.equal(small[:, 0], x[:, 0, :: stride[0], :: stride[1], :: stride[2]])
    assert torch.equal(small[:, phases], x[:, 1, :: stride[0], :: stride[1], :: stride[2]])


@pytest.mark.parametrize("stride", STRIDES)
def test_squeeze_steps_are_inverses_of_each_other(stride):
    stack = tuple(torch.randn(2, 3, *EVEN) for _ in range(2))
    down, up = SqueezeDown(2, stride), SqueezeUp(2, stride)
    squeezed = down(stack)
    assert [x.shape[1] for x in squeezed[:2]] == [1, 1]
    for restored in (up(squeezed), down.inverse(squeezed)):
        assert all(torch.equal(r, s) for r, s in zip(restored, stack, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(up.inverse(up(squeezed)), squeezed, strict=True))


@pytest.mark.parametrize("stride", STRIDES)
def test_wavelet_steps_are_inverses_of_each_other_and_keep_means(stride):
    stack = tuple(torch.randn(2, 3, *EVEN, dtype=torch.float64) for _ in range(2))
    down, up = SqueezeDown(2, stride, wavelet=True), SqueezeUp(2, stride, wavelet=True)
    squeezed, plain = down(stack), SqueezeDown(2, stride)(stack)
    phases = stride[0] * stride[1] * stride[2]
    for ours, phase in zip(squeezed[2:], plain[2:], strict=True):
        means = phase.unflatten(1, (-1, phases)).mean(dim=2)
        torch.testing.assert_close(ours[:, ::phases], means, msg="the first phase is the mean of the voxels")
        flat = torch.ones_like(stack[0]), torch.ones_like(stack[1])
        assert phases == 1 or not down(flat)[-1].unflatten(1, (-1, phases))[:, :, 1:].any(), "no differences, no signal"
    for restored in (up(squeezed), down.inverse(squeezed)):
        for r, s in zip(restored, stack, strict=True):
            torch.testing.assert_close(r, s)
    for a, b in zip(up.inverse(up(squeezed)), squeezed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("phases", [2, 4, 8])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_learnable_resampling_is_orthogonal_whatever_its_parameters(phases, spread):
    step = mix(2 * phases, phases).double()
    for half in step.halves:
        half.free.data.mul_(spread)
        q = half.matrix()
        assert not torch.allclose(q, torch.eye(phases, dtype=q.dtype), atol=1e-2)
        torch.testing.assert_close(q @ q.mT, torch.eye(phases, dtype=q.dtype).expand_as(q), rtol=0, atol=1e-10)


def test_learnable_resampling_starts_as_the_plain_squeeze():
    x = tuple(torch.randn(1, 8, *ODD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(Mix(8, 4)(x), x, strict=True))


def test_pooling_has_no_inverse_and_says_so():
    program, inputs = make("pool and return")
    with pytest.raises(NotImplementedError, match="AddFromBelow has no inverse"):
        program.inverse(inputs)


class _Fresh(torch.autograd.Function):
    """Runs the program anew for every backward, because gradcheck goes through one graph many times."""

    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run, ctx.tensors = run, tensors
        with torch.no_grad():
            return torch.cat([t.flatten() for t in run(*tensors)])

    @staticmethod
    def backward(ctx, gradient):
        leaves = [t.detach().requires_grad_() for t in ctx.tensors[:2]]
        with torch.enable_grad():
            out = torch.cat([t.flatten() for t in ctx.run(*leaves)])
        return None, *torch.autograd.grad(out, [*leaves, *ctx.tensors[2:]], gradient)


@pytest.mark.parametrize("name", ["invertible", "wavelet", "pooling"])
def test_gradients_agree_with_finite_differences(name):
    smooth = NetworkConfig(negative_slope=0.6, kernel=1)  # few parameters, and no sharp kink to step over
    if name != "pooling":
        wavelet = name == "wavelet"
        mixing = [] if wavelet else [mix(4, 4)]
        inner = SqueezeDown(1, (1, 2, 2), wavelet), *mixing, couple(4, smooth), SqueezeUp(1, (1, 2, 2), wavelet)
        program, width = Program([couple(2, smooth), *inner]), 2
    else:
        inner = Branch(Pool(2, 4, (1, 2, 2))), couple(2, smooth), AddFromBelow(Interpolate(4, 2, (1, 2, 2)))
        program, width = Program([*inner, couple(1, smooth)]), 1
    program.double()
    inputs = [torch.randn(1, width, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(x1, x2, *_):
        return program([x1, x2], "reversible")[0]

    assert torch.autograd.gradcheck(lambda *t: _Fresh.apply(run, *t), (*inputs, *program.parameters()), atol=1e-6)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("engine", ["checkpoint", "memcnn", "reversible"])
@pytest.mark.parametrize("tap", [0, 2, 4])
def test_a_tapped_pair_is_a_further_output_with_gradients(tap, engine, private):
    program, inputs = make("pool and return", tap=tap, private=private)
    wanted = gradients_of(program, inputs, "stored", tapped=True)
    assert len(wanted[0]) == 4
    assert_same_run(gradients_of(program, inputs, engine, tapped=True), wanted)
    assert len(gradients_of(program, inputs, engine)[0]) == 2


def test_a_tapped_pair_alone_gives_gradients():
    program, inputs = make("pool and return", tap=2)

    def gradient(engine):
        program.zero_grad()
        score(program(inputs, engine, tapped=True)[1]).backward()
        return [p.grad for p in program.steps[:3].parameters()]

    assert_same(gradient("reversible"), gradient("stored"))
