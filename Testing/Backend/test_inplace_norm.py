"""In-place activated norms: torch's norm and leaky ReLU to the gradient, in one map; loud where that would hurt."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from invres import InvresError
from invres.hollow import HollowTensors
from invres.livebytes import LiveBytes
from invres.memory import measure_training, predict_training
from invres.networkconfig import NetworkConfig
from invres.networks import build, inplace_norm
from invres.networks.blocks import make_norm, normed
from invres.networks.inplace_norm import SMALLEST_SCALE, InPlaceBatchNorm, InPlaceGroupNorm
from invres.reversible.recompute import frozen_statistics

KINDS = ("batch", "batch, fixed", "group", "instance")
CHANNELS, SLOPE = 16, 0.01
SIZE = (3, 4, 5)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch):
    """Even tiny maps are worked on in several parts."""
    monkeypatch.setattr(inplace_norm, "PART_ELEMENTS", 1)


def make(kind, channels=CHANNELS, dtype=torch.float64, slope=SLOPE):
    """The in-place norm and torch's own of the same weights, none of which is what it was initialised with."""
    torch.manual_seed(4)
    plain = make_norm(kind.split(",")[0], channels)
    nn.init.normal_(plain.weight)  # of both signs
    nn.init.normal_(plain.bias)
    config = NetworkConfig(name="unet3d", norm=kind.split(",")[0], negative_slope=slope, inplace_norm=True)
    ours, _ = normed(channels, config)
    if "fixed" in kind:
        plain.running_mean.normal_()
        plain.running_var.uniform_(0.5, 2)
    ours.load_state_dict(plain.state_dict())
    modules = [module.to(dtype).train("fixed" not in kind) for module in (ours, plain)]
    return modules[0], nn.Sequential(modules[1], nn.LeakyReLU(slope))


def volume(channels=CHANNELS, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, *SIZE, generator=generator, dtype=torch.float64).mul(2).add(0.5).to(dtype)


def run(module, x, convolution=None):
    """Output, and the gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    first = leaf * 1.5 if convolution is None else convolution(leaf)
    out = module(first)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    parameters = [*module.parameters(), *(convolution.parameters() if convolution is not None else ())]
    found = [leaf.grad, *(p.grad for p in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return out.detach(), found


def assert_same(found, wanted, tolerance):
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).norm() <= tolerance * w.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind):
    module, _ = make(kind, channels=4)

    def function(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x * 1.0,))

    inputs = (volume(4)[..., :1, :2].clone().requires_grad_(), module.weight, module.bias)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_and_running_statistics_are_torchs_own(kind, dtype, tolerance, batch):
    ours, plain = make(kind, dtype=dtype)
    x = volume(batch=batch, dtype=dtype)
    for _ in range(2):
        (found, gradients), (wanted, expected) = run(ours, x), run(plain, x)
        assert_same([found, *gradients], [wanted, *expected], tolerance)
    for ours_buffer, buffer in zip(ours.buffers(), plain[0].buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_input_and_the_one_map_that_is_kept(kind):
    ours, _ = make(kind)
    probe = LiveBytes()
    with probe:
        x = volume().requires_grad_() * 1.5
        before, place = probe.current, x.data_ptr()
        out = ours(x)
        kept = probe.current - before
    assert out is x and out.data_ptr() == place
    assert kept <= 4 * x.shape[0] * CHANNELS * x.element_size(), "statistics"


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_and_gradients_of_any_layout_are_welcome(kind):
    ours, plain = make(kind)
    x = volume()

    def laid(module):
        leaf = x.clone().requires_grad_()
        out = module((leaf * 1.5).contiguous(memory_format=torch.channels_last_3d))
        out.transpose(1, 4).contiguous().square().sum().backward()
        return [out.detach(), leaf.grad]

    assert_same(laid(ours), laid(plain), 1e-12)
    leaf = x.clone().requires_grad_()
    ours(leaf * 1.5).sum().backward()  # an expanded gradient
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_works_on_16_bits_and_is_as_near_to_float32_as_torchs_own(kind, precision):
    """Statistics are taken in float32 all the same: the error is that of rounding the convolution's output, and z."""
    torch.manual_seed(1)
    conv = nn.Conv3d(2, CHANNELS, 3, padding=1)
    ours, plain = make(kind, dtype=torch.float32)
    x = volume(2, dtype=torch.float32)
    exact, gradients = run(plain, x, conv)
    errors = {}
    for name, module in (("ours", ours), ("plain", plain)):
        with torch.autocast("cpu", dtype=precision):
            found, of_found = run(module, x, conv)
        if name == "ours":
            assert found.dtype == precision
        assert all(g.dtype == torch.float32 for g in of_found)
        errors[name] = [
            float((f.float() - w).norm() / w.norm())
            for f, w in zip([found, *of_found], [exact, *gradients], strict=True)
            if w.norm() > 1e-3  # the bias in front of a norm has no gradient but what is rounded
        ]
    rounding = torch.finfo(precision).eps
    assert errors["ours"][0] < rounding
    for ours_error, plain_error in zip(errors["ours"], errors["plain"], strict=True):
        assert ours_error < 1.5 * plain_error + rounding, errors


def test_statistics_of_16_bits_are_not_rounded_to_16_bits():
    """A mean of 100 with a deviation of 1 in bfloat16, whose neighbours are 0.5 apart there."""
    ours, plain = make("instance", dtype=torch.float32)
    x = (torch.randn(1, CHANNELS, 12, 12, 12) + 100).bfloat16()
    torch.testing.assert_close(ours(x.clone()).float(), plain(x.float()), rtol=0.01, atol=0.01)


# --- gamma near zero ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_gamma_is_bounded_below_with_its_sign_and_can_still_leave(kind):
    ours, plain = make(kind, channels=6)
    tiny = [0.0, -0.0, 1e-9, -1e-9, SMALLEST_SCALE / 2, -SMALLEST_SCALE]
    bounded = [SMALLEST_SCALE, -SMALLEST_SCALE] * 3
    with torch.no_grad():
        ours.weight.copy_(torch.tensor(tiny, dtype=torch.float64))
        plain[0].weight.copy_(torch.tensor(bounded, dtype=torch.float64))
        for norm in (ours, plain[0]):
            norm.bias.copy_(torch.tensor([0.3, -0.3, 0.0, 0.5, -2.0, 1.0]))
    (found, gradients), (wanted, expected) = run(ours, volume(6)), run(plain, volume(6))
    assert_same([found, *gradients], [wanted, *expected], 1e-9)
    assert gradients[1].abs().min() > 0


def test_in_single_precision_the_smallest_gamma_still_lets_the_input_be_recovered():
    ours, plain = make("instance", dtype=torch.float32)
    with torch.no_grad():
        for norm in (ours, plain[0]):
            norm.weight.fill_(SMALLEST_SCALE)
            norm.bias.fill_(1.0)  # a thousand times what it is added to
    _, found = run(ours, volume(dtype=torch.float32))
    _, wanted = run(plain, volume(dtype=torch.float32))
    assert_same(found, wanted, 1e-3)


@pytest.mark.parametrize("slope", [0.0, -0.1, float("nan")])
def test_a_slope_without_an_inverse_is_refused(slope):
    for module in (lambda: InPlaceBatchNorm(4, slope), lambda: InPlaceGroupNorm(2, 4, slope)):
        with pytest.raises(InvresError, match="needs a leaky ReLU with a slope above 0"):
            module()


# --- what users expect of any layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_get_no_gradient_and_the_others_the_right_one(kind, frozen):
    ours, plain = make(kind)
    for norm in (ours, plain[0]):
        for name in ("weight", "bias") if frozen == "both" else (frozen,):
            getattr(norm, name).requires_grad_(False)
    (_, found), (_, wanted) = run(ours, volume()), run(plain, volume())
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None)
    assert_same([f for f in found if f is not None], [w for w in wanted if w is not None], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_needs_no_gradient_still_gives_the_parameters_theirs(kind):
    found = []
    for module in make(kind):
        module(volume()).sin().sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_may_be_used_twice_before_backward_and_gradients_add_up(kind):
    found = []
    for module in make(kind):
        leaf = volume().requires_grad_()
        for _ in range(2):
            module(module(leaf * 1.5) * 0.7).sin().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert_same(*found, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_may_be_gone_through_twice_but_not_differentiated_twice(kind):
    ours, _ = make(kind)
    leaf = volume().requires_grad_()
    loss = ours(leaf * 1.5).sin().sum()
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)
    (gradient,) = torch.autograd.grad(ours(leaf * 1.5).sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_changes_neither_the_output_nor_the_gradient_that_it_is_given(kind):
    ours, _ = make(kind)
    out = ours(volume().requires_grad_() * 1.5)
    given = torch.randn_like(out)
    copies = out.detach().clone(), given.clone()
    out.backward(given)
    assert torch.equal(out.detach(), copies[0]) and torch.equal(given, copies[1])


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_it_is_recomputed_by_checkpoint_with_statistics_counted_once(kind):
    ours, plain = make(kind)
    conv = nn.Conv3d(CHANNELS, CHANNELS, 1, bias=False).double()
    results = []
    for module in (plain, ours):
        block = nn.Sequential(conv, module)
        contexts = (torch.enable_grad(), frozen_statistics(block))
        leaf = volume().requires_grad_()
        checkpoint(block, leaf, use_reentrant=False, context_fn=lambda c=contexts: c).sin().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
        conv.zero_grad()
    assert_same(results[1], results[0], 1e-10)
    for ours_buffer, buffer in zip(ours.buffers(), plain[0].buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, buffer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_does_the_same(kind, copied):
    ours, _ = make(kind)
    (found, gradients), (wanted, expected) = run(copied(ours), volume()), run(ours, volume())
    assert_same([found, *gradients], [wanted, *expected], 1e-15)


# --- somebody else needs what would be overwritten -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_an_operator_has_saved_is_an_error_in_backward(kind):
    ours, _ = make(kind)
    for saves_its_output in (torch.sigmoid, torch.exp):
        out = ours(saves_its_output(volume().requires_grad_()))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    leaf = volume().requires_grad_()
    x = leaf * 1.5
    beside = x.square()  # needs x as it was
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (beside + ours(x)).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_is_changed_in_place_afterwards_is_an_error_in_backward(kind):
    ours, _ = make(kind)
    out = ours(volume().requires_grad_() * 1.5)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_leaf_that_wants_a_gradient_and_a_view_are_refused_before_they_are_touched(kind):
    ours, _ = make(kind)
    leaf = volume().requires_grad_()
    whole = torch.cat([volume(), volume()])
    for x, words in (
        (leaf, "a leaf that wants a gradient"),
        (leaf[:1], "a view of another tensor"),
        (whole[2:], "a view of another tensor"),
        (whole[:1].expand(2, -1, -1, -1, -1), "a view of another tensor"),
    ):
        with pytest.raises(InvresError, match=words):
            ours(x)
    assert torch.equal(leaf.detach(), volume()) and torch.equal(whole, torch.cat([volume(), volume()]))


def test_one_value_a_channel_is_no_batch_to_normalise():
    with pytest.raises(InvresError, match="needs two values a channel or more"):
        InPlaceBatchNorm(4, SLOPE)(torch.zeros(1, 4, 1, 1, 1))
    assert InPlaceBatchNorm(4, SLOPE).eval()(torch.zeros(1, 4, 1, 1, 1)).shape == (1, 4, 1, 1, 1)


# --- memory ---------------------------------------------------------------------------------------------------------


def backward_maps(module, dtype=torch.float32, channels=64):
    """Peak of backward in units of one map, by what is there beside the module's own output."""
    with HollowTensors():
        x = torch.zeros(1, channels, 16, 16, 16, dtype=dtype)
        map_bytes = x.numel() * x.element_size()
        leaf = torch.zeros_like(x).requires_grad_()
        probe = LiveBytes()
        probe.watch([leaf, *module.parameters(), *module.buffers()])
        with probe:
            held = probe.current
            out = module(leaf + 1)
            out_held = probe.current - held
            of_out = torch.zeros_like(out)
            probe.reset_peak()
            out.backward(of_out)
            return out_held / map_bytes, (probe.peak - held) / map_bytes


@pytest.mark.parametrize("kind", ["batch", "group", "instance"])
def test_half_of_the_maps_are_kept_and_backward_needs_one_new_one(kind):
    config = NetworkConfig(name="unet3d", norm=kind, inplace_norm=True)
    with HollowTensors():
        ours = normed(64, config)[0]
        plain = nn.Sequential(make_norm(kind, 64), nn.LeakyReLU(SLOPE, inplace=True))
    kept, peak = backward_maps(ours)
    kept_plain, peak_plain = backward_maps(plain)
    assert kept < 1.01 and kept_plain == pytest.approx(2, abs=0.01)
    assert peak < 3.6, "z, its gradient, the input's, and parts"
    assert peak < peak_plain - 0.4


@pytest.mark.parametrize(
    ("name", "norm", "precision"),
    [
        ("unet3d", "group", "fp32"),
        ("unet3d", "instance", "bf16"),
        ("compact_fcn", "batch", "fp32"),
        ("compact_fcn", "batch", "bf16"),
        ("compact_fcn", "group", "fp16"),
    ],
)
def test_what_a_step_takes_is_predicted_and_less(name, norm, precision):
    peaks = []
    for inplace in (False, True):
        config = NetworkConfig(name=name, channels=(8, 16), norm=norm, inplace_norm=inplace)
        predicted, measured = (
            f(config, (16, 12, 16), precision=precision) for f in (predict_training, measure_training)
        )
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
        peaks.append(predicted.peak_bytes)
    assert peaks[1] < 0.85 * peaks[0]


# --- in networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("name", ["compact_fcn", "unet3d", "no_new_net"])
def test_weights_fit_both_forms_of_a_network_which_compute_the_same(name, norm):
    config = NetworkConfig(name=name, channels=(4, 8), norm=norm, dropout=0.1)
    torch.manual_seed(0)
    plain = build(config).double()
    inplace = build(NetworkConfig(name=name, channels=(4, 8), norm=norm, dropout=0.1, inplace_norm=True)).double()
    inplace.load_state_dict(plain.state_dict())
    results = []
    for network in (plain, inplace):
        torch.manual_seed(3)
        output = network(torch.linspace(-1, 1, 2 * 8 * 6 * 8, dtype=torch.float64).sin().view(2, 1, 8, 6, 8)).logits
        output.sin().sum().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters())])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert (found - wanted).norm() <= 1e-8 * max(float(wanted.norm()), 1e-3)
    for first, second in zip(plain.buffers(), inplace.buffers(), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", ["fully_invres", "partially_invres", "mbconv_unet", "autoencoder_unet"])
def test_a_network_whose_norms_read_what_others_need_refuses(name):
    with pytest.raises(InvresError, match=f"{name} cannot normalise in place"):
        build(NetworkConfig(name=name, inplace_norm=True))
