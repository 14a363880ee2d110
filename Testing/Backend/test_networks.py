"""The networks: one output and one gradient under every engine, shapes, sizes, the VAE branch, plain refusals."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from invres import InvresError
from invres.memory import predict_training
from invres.networkconfig import NETWORKS, NetworkConfig, VAEConfig
from invres.networks import build, with_patch

INVERTIBLE = ("partially_invres", "fully_invres", "mbconv_unet")
ODD = (13, 9, 16)


def config_of(name, **changes):
    values = {"in_channels": 2, "out_channels": 3, "channels": (4, 16, 32), **changes}
    return NetworkConfig(name=name, **values)


# name: configuration; together they have every option that changes what a network computes
CASES = {
    "unet3d": config_of("unet3d"),
    "unet3d, batch norm, flat": config_of("unet3d", norm="batch", strides=((1, 2, 2), (2, 2, 2))),
    "partially": config_of("partially_invres"),
    "partially, group norm, two units": config_of("partially_invres", norm="group", convolutions=2, in_channels=4),
    "partially, deep, flat": config_of(
        "partially_invres", blocks=(2, 0, 3), decoder_blocks=(1, 2), strides=((1, 2, 2), (2, 2, 1)), in_channels=1
    ),
    "fully": config_of("fully_invres"),
    "fully, no norm": config_of("fully_invres", norm="none", in_channels=3),
    "fully, all channels go down": config_of("fully_invres", channels=(4, 32)),
    "fully, shuffled": config_of("fully_invres", resampling="shuffle"),
    "fully, learnable": config_of("fully_invres", learnable_resampling=True, out_channels=1),
    "fully, flat, deep": config_of(
        "fully_invres", channels=(4, 8, 16), strides=((1, 2, 2), (2, 1, 2)), blocks=(2, 1, 2), decoder_blocks=(0, 2)
    ),
    "mbconv": config_of("mbconv_unet", expansion=3),
    "mbconv, flat, instance norm": config_of(
        "mbconv_unet", strides=((1, 2, 2), (2, 1, 2)), blocks=(2, 1, 1), norm="instance", in_channels=1, expansion=2
    ),
    "no new net": config_of("no_new_net"),
    "autoencoder": config_of("autoencoder_unet", blocks=(1, 2, 1)),
    "autoencoder, flat, no norm": config_of("autoencoder_unet", strides=((1, 2, 2), (2, 2, 1)), norm="none"),
    "unet3d, in place": config_of("unet3d", inplace_norm=True),
    "compact, batch norm": config_of("compact_fcn"),
    "compact, batch norm, in place": config_of("compact_fcn", inplace_norm=True, in_channels=1),
    "compact, plain, group norm": config_of("compact_fcn", block="plain", norm="group"),
    "compact, bottleneck, instance norm, in place": config_of(
        "compact_fcn", block="bottleneck", norm="instance", inplace_norm=True, bottleneck_ratio=2
    ),
    "compact, separable, flat, group norm, in place": config_of(
        "compact_fcn", block="separable", strides=((1, 2, 2), (2, 2, 1)), norm="group", inplace_norm=True
    ),
}
PAIRS = [(case, engine) for case in CASES for engine in ("checkpoint", "memcnn", "reversible")]
PAIRS = [(case, engine) for case, engine in PAIRS if engine in build(CASES[case]).engines]


def make(config, engine="stored", dtype=torch.float64):
    torch.manual_seed(1)
    network = build(config, engine).to(dtype)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "free")):  # zero at the start, where a mistake could hide
            nn.init.normal_(parameter, std=0.3)
    return network


def image_for(config, size=ODD, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, config.in_channels, *size, dtype=dtype, generator=generator)


def score(output):
    total = 0
    for tensor in output:
        if tensor is not None:
            weight = torch.linspace(0.5, 1.5, tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            total = total + (tensor.double().sin() * weight).mean()
    return total


def gradients_of(network, image, engine):
    """(logits, {name: gradient}) with the image's own gradient among them."""
    network.engine = engine
    network.zero_grad(set_to_none=True)
    leaf = image.clone().requires_grad_()
    torch.manual_seed(3)  # the VAE branch draws a sample
    output = network(leaf)
    score(output).backward()
    return output.logits.detach(), {"image": leaf.grad, **{key: p.grad for key, p in network.named_parameters()}}


def assert_same_run(found, wanted, rtol=1e-9):
    torch.testing.assert_close(found[0], wanted[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert (found[1][key] - gradient).norm() <= rtol * max(gradient.norm(), 1e-6), key


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_every_engine_gives_the_output_and_gradients_of_plain_autograd(case, engine):
    network = make(CASES[case])
    if "batch" in case:
        network.eval()  # or the running statistics would move between the two runs
    image = image_for(CASES[case])
    if engine == "memcnn" and CASES[case].norm == "batch":
        pytest.skip("memcnn refuses batch norm")
    wanted = gradients_of(network, image, "stored")
    assert_same_run(gradients_of(network, image, engine), wanted)
    for key, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_gradients_in_single_precision_agree_too(case, engine):
    """Without the kink of the leaky ReLU: at it the last digit of a value decides, and that differs between CPUs."""
    config = dataclasses.replace(CASES[case], negative_slope=1.0)
    network = make(config, dtype=torch.float32)
    image = image_for(config, dtype=torch.float32)
    (logits, wanted), (found_logits, found) = (gradients_of(network, image, e) for e in ("stored", engine))
    torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-5)
    difference = sum((found[key] - wanted[key]).square().sum() for key in wanted) ** 0.5
    assert difference <= 1e-5 * sum(g.square().sum() for g in wanted.values()) ** 0.5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(8, 8, 8), ODD, (5, 17, 6)])
def test_the_output_has_the_inputs_size_and_is_the_same_without_gradients(case, size):
    config = CASES[case]
    network = make(config, "auto").eval()
    image = image_for(config, size)
    before = image.clone()
    logits = network(image).logits
    assert logits.shape == (2, config.out_channels, *size)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(network(image).logits, logits, rtol=1e-10, atol=1e-10)
    assert torch.equal(image, before)


@pytest.mark.parametrize("case", CASES)
def test_padding_repeats_the_border_and_is_cut_off_again(case):
    """An odd input gives what the input does that was padded by hand."""
    network = make(CASES[case], "auto").eval()
    size = [2 * d + missing for d, missing in zip(network.divisor, (-1, 0, -1), strict=True)]
    image = image_for(CASES[case], size)
    padded = nn.functional.pad(image, (0, 1, 0, 0, 0, 1), mode="replicate")
    assert tuple(padded.shape[2:]) == tuple(2 * d for d in network.divisor)
    cut = network(padded).logits[:, :, : size[0], : size[1], : size[2]]
    torch.testing.assert_close(network(image).logits, cut, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if "batch" not in case])
def test_samples_of_a_batch_do_not_touch_each_other(case):
    network = make(CASES[case], "auto")
    image = image_for(CASES[case], batch=3)
    alone = torch.cat([network(image[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(network(image).logits, alone)


@pytest.mark.parametrize("name", INVERTIBLE)
@pytest.mark.parametrize("learnable", [False, True])
def test_the_networks_own_program_may_overwrite_and_still_gives_the_same(name, learnable):
    if learnable and name != "fully_invres":
        pytest.skip(f"{name} has no learnable resampling")
    network = make(config_of(name, learnable_resampling=learnable), "reversible")
    image = image_for(network.config)
    assert network.program.private
    found = gradients_of(network, image, "reversible")
    network.program.private = False
    assert_same_run(found, gradients_of(network, image, "reversible"))


def test_the_whole_fully_invres_program_is_inverted():
    network = make(config_of("fully_invres", learnable_resampling=True, channels=(4, 16, 32)))
    halves = [torch.randn(2, 2, 8, 12, 4, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        outputs, _ = network.program(tuple(h.clone() for h in halves))
        assert all((o - h).abs().max() > 0.1 for o, h in zip(outputs, halves, strict=True))
        for restored, half in zip(network.program.inverse(outputs), halves, strict=True):
            torch.testing.assert_close(restored, half, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_is_updated_once_a_step_in_every_network(name, engine):
    if engine not in build(config_of(name)).engines:
        pytest.skip(f"{name} has no inverse")
    config = config_of(name, norm="batch")
    image = image_for(config)
    buffers = []
    for strategy in ("stored", engine):
        network = make(config).train()
        gradients_of(network, image, strategy)
        buffers.append(dict(network.named_buffers()))
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    for key, buffer in buffers[0].items():
        torch.testing.assert_close(buffers[1][key], buffer, rtol=1e-12, atol=1e-12)
        assert not key.endswith("num_batches_tracked") or buffer == 1


@pytest.mark.parametrize("engine", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", INVERTIBLE)
def test_dropout_is_repeated_in_backward(name, engine):
    network = make(config_of(name, dropout=0.3, convolutions=2, norm="group")).train()
    image = image_for(network.config)
    wanted, first_state = gradients_of(network, image, "stored"), torch.get_rng_state()
    assert_same_run(gradients_of(network, image, engine), wanted)
    assert torch.equal(torch.get_rng_state(), first_state)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_under_bfloat16_autocast_gradients_are_those_of_stored(name):
    """Within 5 % of the whole gradient's norm: single bfloat16 roundings may flip in the recomputation."""
    network = make(config_of(name), dtype=torch.float32)
    image = image_for(network.config, dtype=torch.float32)
    found, types = {}, set()
    network.program.register_forward_pre_hook(lambda _, args: types.update(half.dtype for half in args[0]))
    for engine in ("stored", "reversible"):
        network.engine = engine
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = score(network(image))
        loss.backward()
        found[engine] = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert types == {torch.float32}, "a state in bfloat16 cannot be inverted"
    assert (found["reversible"] - found["stored"]).norm() <= 0.05 * found["stored"].norm()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copied_network_gives_the_same_output_and_learns_on_its_own(name, copied):
    network = make(config_of(name), "auto")
    image = image_for(network.config)
    wanted = gradients_of(network, image, "auto")
    twin = copied(network)
    assert_same_run(gradients_of(twin, image, "auto"), wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_same_run(gradients_of(network, image, "auto"), wanted)


@pytest.mark.parametrize("case", CASES)
def test_weights_go_through_a_file_unchanged(case, tmp_path):
    network = make(CASES[case], "auto").eval()
    image = image_for(CASES[case])
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(99)
    other = build(network.config).double().eval()
    assert not torch.allclose(other(image).logits, network(image).logits)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(image).logits, network(image).logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_set_of_weights_fits_every_engine(name):
    keys = {engine: list(build(config_of(name), engine).state_dict()) for engine in build(config_of(name)).engines}
    assert all(found == keys["stored"] for found in keys.values())


@pytest.mark.parametrize("name", INVERTIBLE)
def test_by_default_the_networks_have_about_the_baselines_parameter_count(name):
    with torch.device("meta"):
        count, baseline = (sum(p.numel() for p in build(NetworkConfig(name=n)).parameters()) for n in (name, "unet3d"))
    assert 0.75 * baseline <= count <= 1.25 * baseline, f"{count:,} against {baseline:,}"


def test_the_autoencoder_unet_is_about_as_large_as_monais():
    nets = pytest.importorskip("monai.networks.nets")
    ours = build(NetworkConfig(name="autoencoder_unet", in_channels=4, out_channels=3))
    theirs = nets.SegResNet(spatial_dims=3, init_filters=32, in_channels=4, out_channels=3)
    count, wanted = (sum(p.numel() for p in network.parameters()) for network in (ours, theirs))
    assert count == pytest.approx(wanted, rel=0.001)


def test_no_new_net_has_the_published_widths_and_goes_up_with_fewer_maps():
    network = build(NetworkConfig(name="no_new_net", in_channels=4, out_channels=3))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert [c.out_channels for c in convolutions[:10]] == [30, 30, 60, 60, 120, 120, 240, 240, 480, 240]
    up = [m for m in network.decoder[3].modules() if isinstance(m, nn.Conv3d)]
    assert [(c.in_channels, c.out_channels) for c in up] == [(480, 240), (240, 120)]


def test_inverted_bottlenecks_are_wide_depthwise_and_linear_at_their_end():
    network = build(NetworkConfig(name="mbconv_unet", channels=(8, 16), expansion=5))
    narrow, deep, last = (m for m in network.program.steps[0].n1 if isinstance(m, nn.Conv3d))
    assert (narrow.out_channels, deep.groups, deep.kernel_size, last.out_channels) == (20, 20, (3, 3, 3), 4)
    assert isinstance(network.program.steps[0].n1[-1], nn.GroupNorm)


@pytest.mark.parametrize(
    ("block", "kinds"),
    [
        ("plain", ["3x3x3", "3x3x3"]),
        ("bottleneck", ["1x1x1", "3x3x3", "1x1x1"]),
        ("separable", ["depthwise", "1x1x1", "depthwise", "1x1x1"]),
        ("ccblock", ["1x1x1", "depthwise", "1x1x1", "1x1x1"]),
    ],
)
def test_compact_blocks_are_made_of_the_convolutions_that_their_names_say(block, kinds):
    network = build(NetworkConfig(name="compact_fcn", block=block))
    convolutions = [m for m in network.decoder[1].modules() if isinstance(m, nn.Conv3d)]
    found = ["1x1x1" if c.kernel_size == (1, 1, 1) else "3x3x3" if c.groups == 1 else "depthwise" for c in convolutions]
    assert found == kinds
    assert all(c.groups in (1, c.in_channels) for c in convolutions)
    assert (convolutions[0].in_channels, convolutions[-1].out_channels) == (160, 80)
    if block in ("bottleneck", "ccblock"):
        assert {c.out_channels for c in convolutions[:-1]} == {160 // 3}
    assert isinstance(network.up[0][0], nn.ConvTranspose3d) and isinstance(network.up[0][1], nn.BatchNorm3d)


def test_the_complete_configuration_is_kept_with_the_network():
    config = build(NetworkConfig(levels=3)).config
    assert config.channels == (12, 64, 128)
    assert (config.blocks, config.decoder_blocks) == ((1, 1, 2), (1, 1))
    assert config.strides == ((2, 2, 2), (2, 2, 2))
    assert build(config).config == config


# User mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("unet3d", {"blocks": (1, 1)}, "network.blocks has 2 entries, but 3 levels .* need 3"),
        ("fully_invres", {"decoder_blocks": (1, 1, 1)}, "network.decoder_blocks has 3 entries, .* need 2"),
        ("partially_invres", {"strides": ((2, 2, 2),)}, "network.strides has 1 entries, .* need 2"),
        ("fully_invres", {"strides": ((2, 2, 3), (2, 2, 2))}, "network.strides may hold only 1 and 2"),
        ("unet3d", {"strides": ((0, 2, 2), (2, 2, 2))}, "network.strides may hold only 1 and 2"),
        ("unet3d", {"channels": (4,)}, r"network.channels needs two levels or more, got \[4\]"),
        (
            "unet3d",
            {"channels": (4, 0)},
            "must be 1 or more each, blocks and decoder_blocks 0",
        ),
        ("unet3d", {"channels": (), "levels": 6}, "network.levels is 6, but unet3d has 5"),
        ("unet3d", {"levels": 1}, "network.levels must be 2 or more"),
        (
            "partially_invres",
            {"blocks": (1, -1, 1)},
            "must be 1 or more each, blocks and decoder_blocks 0",
        ),
        ("partially_invres", {"channels": (4, 9)}, r"network.channels must be even.*got \[4, 9\]"),
        ("partially_invres", {"learnable_resampling": True}, "belongs to fully_invres"),
        ("fully_invres", {"channels": (4, 24)}, "level 1 has 24 channels, but must have a multiple of 16"),
        ("fully_invres", {"channels": (4, 48)}, "at most 8 times the 4 of level 0"),
        ("fully_invres", {"channels": (5, 16)}, "level 1 has 16 channels"),
        ("fully_invres", {"vae": VAEConfig()}, "network.vae.patch is missing"),
        ("fully_invres", {"in_channels": 0}, "network.in_channels must be 1 or more, got 0"),
        ("fully_invres", {"kernel": 2}, "network.kernel must be odd, got 2"),
        ("segresnet", {}, "There is no network 'segresnet'; the networks are unet3d"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(name, changes, words):
    with pytest.raises(InvresError, match=words):
        build(config_of(name, **changes))


@pytest.mark.parametrize("engine", ["reversible", "memcnn"])
def test_unet3d_refuses_engines_that_need_an_inverse(engine):
    with pytest.raises(InvresError, match=f"unet3d does not run under the engine '{engine}'; its engines are stored"):
        build(config_of("unet3d"), engine)


def test_an_unknown_engine_is_refused_also_later_on():
    network = build(config_of("fully_invres"))
    assert network.engine == "reversible"
    with pytest.raises(InvresError, match="does not run under the engine 'magic'"):
        network.engine = "magic"
    assert network.engine == "reversible"


@pytest.mark.parametrize("name", INVERTIBLE)
def test_memcnn_says_why_it_does_not_train_dropout_or_batch_norm(name):
    for changes, words in (({"dropout": 0.1}, "dropout"), ({"norm": "batch"}, "BatchNorm")):
        network = build(config_of(name, **changes), "memcnn")
        with pytest.raises(InvresError, match=words):
            network(image_for(network.config, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8, 8), (2, 8, 8, 8), (1, 2, 8, 8)])
def test_an_input_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(InvresError, match=r"The network takes \(N, 2, D, H, W\), got"):
        build(config_of("fully_invres"))(torch.zeros(shape))


def test_a_single_voxel_is_no_batch_to_normalise_while_training():
    network = build(config_of("compact_fcn")).train()
    with pytest.raises(InvresError, match="where batch norm needs two or more"):
        network(torch.zeros(1, 2, 4, 4, 4))
    assert network(torch.zeros(2, 2, 4, 4, 4)).logits.shape == (2, 3, 4, 4, 4)
    assert network.eval()(torch.zeros(1, 2, 4, 4, 4)).logits.shape == (1, 3, 4, 4, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_input_that_shrinks_to_one_voxel_is_refused_in_plain_words(name):
    network = build(config_of(name, norm="instance"))
    for batch in (1, 2):
        with pytest.raises(InvresError, match="Windows of 4x3x4 voxels shrink to a single voxel"):
            network(torch.zeros(batch, 2, 4, 3, 4))
    assert network(torch.zeros(1, 2, 4, 3, 5)).logits.shape == (1, 3, 4, 3, 5)


# The VAE branch -----------------------------------------------------------------------------------------------------


def with_vae(name, patch=ODD, **changes):
    return with_patch(config_of(name, vae=VAEConfig(latent=5, reduced_channels=3), **changes), patch)


@pytest.mark.parametrize("strides", [(), ((1, 2, 2), (2, 2, 1))])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_vae_branch_reconstructs_the_input_while_training_only(name, strides):
    config = with_vae(name, strides=strides)
    network = make(config, "auto", torch.float32).train()
    image = image_for(config, dtype=torch.float32)
    output = network(image)
    assert output.logits.shape == (2, 3, *ODD)
    assert output.reconstruction.shape == image.shape
    assert output.mean.shape == output.log_variance.shape == (2, 5)
    network.eval()
    assert network(image)[1:] == (None, None, None, None)
    assert network(image_for(config, (8, 8, 11), dtype=torch.float32)).logits.shape == (2, 3, 8, 8, 11)


@pytest.mark.parametrize("engine", ["checkpoint", "memcnn", "reversible"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_vae_branch_gives_every_engine_the_same_gradients(name, engine):
    network = make(with_vae(name)).train()
    if engine not in network.engines:
        pytest.skip("unet3d has no inverse")
    image = image_for(network.config)
    wanted = gradients_of(network, image, "stored")
    assert_same_run(gradients_of(network, image, engine), wanted)
    for key, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, key


def test_the_vae_branch_draws_a_new_sample_each_time_and_its_spread_is_the_variance():
    network = make(with_vae("fully_invres"), "auto").train()
    image = image_for(network.config)
    first, second = network(image), network(image)
    assert torch.equal(first.mean, second.mean)
    assert not torch.allclose(first.reconstruction, second.reconstruction)
    with torch.no_grad():  # a variance of e^-20 leaves the mean itself
        network.vae.encode.weight[5:] = 0
        network.vae.encode.bias[5:] = -30
    first, second = network(image), network(image)
    torch.testing.assert_close(first.reconstruction, second.reconstruction, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 9, 16), (13, 9, 15)])
def test_a_patch_that_the_vae_branch_was_not_built_for_is_refused(size):
    network = make(with_vae("fully_invres"), "auto").train()
    with pytest.raises(InvresError, match=r"VAE branch was built for patches of \[13, 9, 16\] voxels"):
        network(image_for(network.config, size))


def test_with_patch_leaves_a_network_without_a_vae_branch_alone():
    config = config_of("fully_invres")
    assert with_patch(config, (8, 8, 8)) is config
    assert with_patch(config_of("fully_invres", vae=VAEConfig()), (8, 9, 10)).vae.patch == (8, 9, 10)


@pytest.mark.parametrize(("size", "quantity"), [(64, "activation_bytes"), (96, "peak_bytes")])
def test_the_vae_branch_adds_five_percent_at_most(size, quantity):
    """At 64 voxels to the activations; to the whole peak only above, since its dense layers' weights cost 9 MiB."""
    without, with_branch = (
        predict_training(NetworkConfig(name="fully_invres", in_channels=4, out_channels=4, vae=vae), (size,) * 3)
        for vae in (None, VAEConfig())
    )
    assert getattr(without, quantity) < getattr(with_branch, quantity) <= 1.05 * getattr(without, quantity)
