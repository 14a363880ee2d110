"""Every memory setting of the reversible engine gives the gradients of plain autograd, however finely maps are cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_programs import ODD, PROGRAMS, assert_same_run, bottlenecks, couple, gradients_of, make, score
from torch import nn

from invres import InvresError
from invres.config import MEMORY_SETTINGS, LossWeights
from invres.losses import sums_of_boxes, total_loss
from invres.networkconfig import NETWORKS, NetworkConfig, VAEConfig
from invres.networks import build
from invres.networks.blocks import CouplingFunction, MobileFunction
from invres.reversible import SETTINGS, Couple, Program
from invres.reversible.bottleneck import Bottleneck
from invres.reversible.drift import sample
from invres.reversible.fixed_point import FRACTION_BITS, decode, encode, round_to_grid, shift_by
from invres.reversible.journal import Journal
from invres.reversible.slab_convolution import _way, convolve, convolve_backward

ON_GRID = [name for name in PROGRAMS if "mix" not in name]
CASES = [(name, memory) for name in PROGRAMS for memory in MEMORY_SETTINGS if memory != "lowest" or name in ON_GRID]
STEP = 2.0**-FRACTION_BITS
LIMIT = 2**15 * STEP


@pytest.fixture
def fine(monkeypatch):
    """Settings that cut even tiny maps into slabs of a plane and parts of a channel."""
    for name, setting in SETTINGS.items():
        parts = 1 if name == "low" else 8
        changed = dataclasses.replace(setting, slab_parts=6, slab_minimum=1, gradient_parts=parts)
        monkeypatch.setitem(SETTINGS, name, changed)


def test_the_configuration_names_the_engines_settings():
    assert tuple(SETTINGS) == MEMORY_SETTINGS


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(("name", "memory"), CASES)
def test_gradients_in_slabs_are_those_of_plain_autograd(name, memory, private, fine):
    program, inputs = make(name)
    for module in program.modules():
        if isinstance(module, nn.GroupNorm):
            # On a grid a value may be its channel's mean exactly; without this it would lie on the kink.
            nn.init.normal_(module.bias, std=0.1)
    program.memory = memory
    if memory == "lowest":
        inputs = [round_to_grid(x) for x in inputs]
    wanted = gradients_of(program, inputs, "stored")
    program.private = private
    assert_same_run(gradients_of(program, inputs, "reversible"), wanted)


# Not at `lowest`: an increment on the edge between two grid values may be rounded the other way by another order of
# summing.
@pytest.mark.parametrize(("name", "memory"), [case for case in CASES if case[1] != "lowest"])
def test_gradients_in_single_precision_are_within_rounding(name, memory, fine):
    program, inputs = make(name, torch.float32)
    program.memory = memory
    wanted = gradients_of(program, inputs, "stored")
    found = gradients_of(program, inputs, "reversible")
    for f, w in zip([*found[1], *found[2].values()], [*wanted[1], *wanted[2].values()], strict=True):
        assert (f - w).norm() <= 1e-5 * w.norm()


@pytest.mark.parametrize("convolutions", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_every_kind_of_unit_is_differentiated_rightly(norm, kernel, convolutions, fine):
    config = NetworkConfig(norm=norm, kernel=kernel, convolutions=convolutions, negative_slope=0.2)
    program = Program([couple(16, config)]).double()
    for parameter in program.parameters():  # affine parameters that are not one and zero
        nn.init.normal_(parameter, 0.02, 0.03) if norm == "none" else nn.init.normal_(parameter, 0.5, 0.3)
    inputs = [torch.randn(2, 16, 5, 4, 6, dtype=torch.float64) + 1 for _ in range(2)]
    wanted = gradients_of(program, inputs, "stored")
    for memory in ("low", "lower"):
        program.memory = memory
        assert_same_run(gradients_of(program, inputs, "reversible"), wanted, rtol=1e-8)


def test_the_hand_written_gradient_is_what_runs_unless_somebody_listens():
    function = CouplingFunction(4, NetworkConfig())
    assert [unit.conv for unit in function.units()] == [function[0].conv]
    assert CouplingFunction(4, NetworkConfig(norm="batch")).units() is None
    dropping = CouplingFunction(4, NetworkConfig(dropout=0.5))
    assert dropping.units() is None
    assert dropping.eval().units() is not None
    program, inputs = make("couple")
    calls = []
    program.steps[0].n1[0].register_forward_hook(lambda *_: calls.append(1))
    score(program(inputs)[0]).backward()
    assert calls == [1, 1]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_a_bottleneck_in_parts_is_differentiated_rightly(norm, kernel, fine):
    config = NetworkConfig(norm=norm, kernel=kernel, expansion=4, negative_slope=0.2)
    program = Program([Couple(MobileFunction(8, config), MobileFunction(8, config))]).double()
    for parameter in program.parameters():
        nn.init.normal_(parameter, 0.02, 0.03) if norm == "none" else nn.init.normal_(parameter, 0.5, 0.3)
    frozen = [program.steps[0].n1[0].weight, program.steps[0].n1[-2].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    inputs = [torch.randn(2, 8, 5, 4, 6, dtype=torch.float64) + 1 for _ in range(2)]
    wanted = gradients_of(program, inputs, "stored")
    for memory in ("low", "lower"):
        program.memory = memory
        assert_same_run(gradients_of(program, inputs, "reversible"), wanted, rtol=1e-8)
    assert all(parameter.grad is None for parameter in frozen)


def test_parts_of_a_bottleneck_are_whole_groups_and_cover_all_channels(fine):
    function = MobileFunction(8, NetworkConfig(norm="group", expansion=6))
    bottleneck = function.bottleneck()
    assert function[1].num_channels // function[1].num_groups == 8
    for elements in (1, 10**4, 10**9):
        parts = bottleneck.parts((1, 8, 4, 4, 4), Journal(SETTINGS["low"], largest=elements))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == 48
        assert all(part.start % 8 == 0 for part in parts)
        assert (len(parts) == 1) == (elements == 10**9) and (len(parts) == 6) == (elements == 1)


def test_a_bottleneck_runs_in_parts_unless_it_is_small_or_somebody_listens(fine, monkeypatch):
    calls = []
    apply = Bottleneck.apply
    monkeypatch.setattr(Bottleneck, "apply", lambda *arguments: (calls.append("parts"), apply(*arguments))[1])
    program, inputs = Program([bottlenecks(3)]), [torch.randn(1, 3, *ODD) for _ in range(2)]
    score(program(inputs)[0]).backward()
    assert calls == ["parts"] * 2
    program.steps[0].n1[3].register_forward_hook(lambda *_: calls.append("hook"))
    score(program(inputs)[0]).backward()
    assert calls[2:] == ["hook", "parts", "hook"]
    large = dataclasses.replace(SETTINGS["low"], slab_minimum=10**9)
    monkeypatch.setitem(SETTINGS, "low", large)
    program.memory = "low"
    score(program(inputs)[0]).backward()
    assert calls[5:] == ["hook", "hook"]
    assert MobileFunction(8, NetworkConfig(norm="batch")).bottleneck() is None
    dropping = MobileFunction(8, NetworkConfig(norm="group", dropout=0.5))
    assert dropping.bottleneck() is None
    assert dropping.eval().bottleneck() is not None


def network(name, memory="low", engine="auto", vae=False, dtype=torch.float64):
    torch.manual_seed(0)
    config = NetworkConfig(
        name=name,
        in_channels=2,
        out_channels=3,
        channels=(4, 16, 16),
        blocks=(1, 2, 1),
        decoder_blocks=(1, 1),
        vae=VAEConfig((9, 8, 11), 4) if vae else None,
    )
    return build(config, engine, memory).to(dtype).train()


def network_gradients(net, image, target, boxes, regions=False):
    net.zero_grad(set_to_none=True)
    image = image.clone().requires_grad_()
    torch.manual_seed(1)
    output = net(image, sums_of_boxes(target, regions)) if boxes else net(image)
    losses = total_loss(output, image.detach(), target, regions, LossWeights())
    losses.total.backward()
    return losses.total.detach(), [image.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("memory", "vae"), [*((memory, False) for memory in MEMORY_SETTINGS), ("lower", True)])
def test_a_whole_network_with_its_loss_in_boxes_has_the_gradients_of_plain_autograd(name, memory, vae, fine):
    image = torch.randn(2, 2, 9, 8, 11, dtype=torch.float64)
    target = torch.randint(-1, 3, (2, 9, 8, 11), dtype=torch.int16)
    plain = network(name, memory, "stored", vae)
    wanted = network_gradients(plain, image, target, boxes=False)
    for engine in plain.engines:
        if engine == "memcnn" and memory == "lowest":
            continue
        plain.engine = engine
        for boxes in (True,) if engine == "stored" else (False, True):
            total, found = network_gradients(plain, image, target, boxes)
            torch.testing.assert_close(total, wanted[0])
            for f, w in zip(found, wanted[1], strict=True):
                torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-10 * max(1.0, float(w.abs().max())))


def test_regions_are_summed_in_boxes_too(fine):
    image = torch.randn(1, 2, 9, 8, 11, dtype=torch.float64)
    target = torch.rand(1, 3, 9, 8, 11) > 0.5
    net = network("fully_invres")
    wanted = network_gradients(net, image, target, boxes=False, regions=True)
    found = network_gradients(net, image, target, boxes=True, regions=True)
    for f, w in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(f, w)


# A bottleneck has three convolutions in a row, which are rounded one after the other.
@pytest.mark.parametrize(("name", "worst"), [("fully_invres", 0.1), ("mbconv_unet", 0.2)])
@pytest.mark.parametrize("memory", MEMORY_SETTINGS)
def test_mixed_precision_gradients_are_as_good_as_those_of_stored(memory, name, worst, fine):
    """Both differ from the gradients in single precision by a few per cent, because convolutions are in bfloat16."""
    net = network(name, memory, dtype=torch.float32)

    def gradient(image, target, engine, mixed):
        net.engine = engine
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            output = net(image, sums_of_boxes(target, False))
        total_loss(output, image, target, False, LossWeights()).total.backward()
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    errors = []
    for _ in range(4):
        given = torch.randn(1, 2, 9, 8, 11), torch.randint(0, 3, (1, 9, 8, 11))
        exact = gradient(*given, "stored", False)
        both = (gradient(*given, engine, True) for engine in ("stored", "reversible"))
        errors.append([float((one - exact).norm() / exact.norm()) for one in both])
    stored, found = torch.tensor(errors).mean(dim=0).tolist()
    assert stored < worst and 1e-3 < found < 1.3 * stored


@pytest.mark.parametrize("shape", [(1, 6, 12, 62, 60), (1, 4, 8, 10, 12), (1, 4, 9, 10, 12), (2, 3, 6, 5, 4)])
def test_a_slab_is_convolved_alike_on_every_path(shape):
    """The ways: axes turned, a batch of two halves, plain for an odd number of planes, plain for a batch."""
    planes, padding = torch.randn(shape), (0, 1, 1)
    weight, bias = torch.randn(5, shape[1], 3, 3, 3), torch.randn(5)
    wanted = torch.conv3d(planes.double(), weight.double(), bias.double(), padding=padding)
    torch.testing.assert_close(convolve(planes, weight, bias, padding).double(), wanted, rtol=1e-5, atol=1e-4)
    after = torch.randn(wanted.shape)
    leaves = [t.double().requires_grad_() for t in (planes, weight, bias)]
    torch.conv3d(*leaves, padding=padding).backward(after.double())
    found = convolve_backward(after, planes, weight, padding, [True, True, True])
    for f, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(f.double(), leaf.grad, rtol=1e-4, atol=1e-3 * float(leaf.grad.abs().max()))


def test_the_paths_are_told_apart():
    weight = torch.zeros(5, 6, 3, 3, 3)
    assert _way(torch.zeros(1, 6, 12, 62, 60), weight, (0, 1, 1)) == "turned"
    assert _way(torch.zeros(1, 6, 8, 10, 12), weight, (0, 1, 1)) == "halved"
    assert _way(torch.zeros(1, 6, 64, 64, 8), weight, (0, 1, 1)) == "plain"
    assert _way(torch.zeros(1, 6, 8, 10, 12, dtype=torch.float64), weight, (0, 1, 1)) == "plain"


# --- the fixed-point state ---------------------------------------------------------------------------------------


def test_grid_values_are_restored_bit_by_bit_whatever_is_added():
    state, _ = encode(torch.randn(1000) * 20)
    before = state.clone()
    increment = torch.randn(1000) * 4 * LIMIT  # most of them leave the range
    overflows = shift_by(state, increment, 1)
    assert overflows > 500
    assert not torch.equal(state, before)
    shift_by(state, increment, -1)
    assert torch.equal(state, before)


def test_encoding_rounds_to_the_grid_clamps_and_counts():
    near = LIMIT - 0.1
    values = [0.0, STEP, 0.6 * STEP, -1.5, near, LIMIT, -1.1 * LIMIT, float("nan")]
    encoded, outside = encode(torch.tensor(values))
    assert outside == 3
    found = decode(encoded, torch.float32)
    assert found.tolist() == [0.0, STEP, STEP, -1.5, round(near / STEP) * STEP, LIMIT - STEP, -LIMIT, 0.0]
    assert torch.equal(round_to_grid(found[:5]), found[:5])


@pytest.mark.parametrize("name", ON_GRID)
def test_a_fixed_point_state_is_inverted_without_any_error(name, fine):
    program, inputs = make(name, torch.float32)
    program.memory = "lowest"
    program.watch.due = True
    score(program(inputs)[0]).backward()
    errors = program.reconstruction_errors()
    assert all(error == 0 for error in errors.values())
    assert len(errors) == sum(type(step).__name__ == "Couple" for step in program.steps)


def test_sums_beyond_the_range_are_counted():
    program, inputs = make("couple", torch.float32)
    program.memory = "lowest"
    score(program(inputs)[0]).backward()
    assert int(program.watch.overflows) == 0
    with torch.no_grad():
        program.steps[0].n1[0].conv.bias.fill_(1.5 * LIMIT)
    program(inputs)
    assert int(program.watch.overflows) >= inputs[0].numel()


def test_the_default_network_stays_within_the_range_even_on_noise():
    """Noise has the largest differences between neighbours, and wavelets make differences of differences."""
    net = build(NetworkConfig(), memory="lowest").train()
    loss = net(torch.randn(1, 1, 32, 32, 32)).logits.square().mean()
    loss.backward()
    assert int(net.program.watch.overflows) == 0


def test_what_leaves_the_grid_is_refused_with_the_way_out():
    program, inputs = make("mix")
    with pytest.raises(InvresError, match="Mix leaves it") as caught:
        program.memory = "lowest"
    assert "'lower'" in caught.value.hint
    with pytest.raises(InvresError, match="no memory setting 'least'"):
        program.memory = "least"
    program, inputs = make("couple")
    program.memory = "lowest"
    with pytest.raises(InvresError, match="memcnn engine has no fixed-point state"):
        program(inputs, "memcnn")


# --- drift ---------------------------------------------------------------------------------------------------------


def drifting_program():
    """The last of two blocks adds so much that what it is added to loses its last bits."""
    program = Program([couple(3) for _ in range(2)])
    with torch.no_grad():
        program.steps[1].n2[0].conv.bias.fill_(3e5)
    return program, [torch.randn(1, 3, *ODD) for _ in range(2)]


def test_a_block_that_drifts_is_named_and_keeping_its_input_helps():
    program, inputs = drifting_program()
    wanted = gradients_of(program, inputs, "stored")
    program.watch.due = True
    spoilt = gradients_of(program, inputs, "reversible")
    errors = program.reconstruction_errors()
    assert errors[1] > 1e-3 and errors[0] > 1e-3
    assert program.keep_drifting(1e-3) == [1]
    found = gradients_of(program, inputs, "reversible")
    assert max(program.reconstruction_errors().values()) < 1e-5
    assert program.keep_drifting(1e-3) == []

    exact = torch.cat([g.flatten() for g in wanted[2].values()])

    def error(run):
        return float((torch.cat([g.flatten() for g in run[2].values()]) - exact).norm() / exact.norm())

    assert error(found) < 1e-5 < 1e-3 < error(spoilt)


def test_a_healthy_program_has_hardly_any_drift_and_is_checked_only_when_asked():
    program, inputs = make("squeeze twice", torch.float32)
    score(program(inputs)[0]).backward()
    assert program.reconstruction_errors() == {}
    program.watch.due = True
    score(program(inputs)[0]).backward()
    assert 0 < max(program.reconstruction_errors().values()) < 1e-5
    assert program.keep_drifting(1e-3) == []


@pytest.mark.parametrize("shape", [(1, 1, 2, 3, 4), (2, 8, 40, 50, 60), (1, 512, 3, 3, 3)])
def test_a_sample_is_small_and_spread_over_the_map(shape):
    state = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    found = sample(state)
    assert min(4096, state.numel()) / 8 <= found.numel() <= 4096
    assert found.max() > 0.5 * state.numel()
