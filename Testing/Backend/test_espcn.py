"""The networks of image quality transfer: published layers, one output and gradient under every engine, flat memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from invres import InvresError
from invres.events import Recorder
from invres.guard import FIRST_CHECK, DriftGuard
from invres.iqt_figures import PUBLISHED, figure_6, map_bytes
from invres.memory import measure_enhancement, predict_enhancement
from invres.networkconfig import ENHANCEMENT_NETWORKS, NetworkConfig, VAEConfig
from invres.networks import BORDER, build, build_any, build_enhancer, shuffle, unshuffle
from invres.reversible import Program

PATCH = (9, 7, 8)
CASES = {
    "tensors": NetworkConfig(name="espcn_rn", in_channels=6, out_channels=6, channels=(8, 12), blocks=(2,)),
    "scalar": NetworkConfig(name="espcn_rn", channels=(8, 12), out_channels=1, blocks=(3,)),
    "other stacks, group norm, flat": NetworkConfig(
        name="espcn_rn",
        in_channels=2,
        out_channels=1,
        channels=(8, 10),
        blocks=(0, 1, 2),
        norm="group",
        strides=((1, 2, 2),),
    ),
}
PAIRS = [(case, engine) for case in CASES for engine in ("checkpoint", "recursive", "reversible")]


def make(config, engine="stored"):
    torch.manual_seed(1)
    network = build_enhancer(config, engine).double().train()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero at the start, where a mistake could hide
            nn.init.normal_(parameter, std=0.3)
    return network


def image_for(config, batch=3):
    return torch.randn(
        batch, config.in_channels, *PATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


def run(network, image, engine):
    """Output, gradients by name (the image's among them) and buffers after one pass of a copy."""
    network = copy.deepcopy(network)
    network.engine = engine
    leaf = image.clone().requires_grad_()
    output = network(leaf)
    (output.sin() * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    gradients = {"image": leaf.grad, **{name: p.grad for name, p in network.named_parameters()}}
    return output.detach(), gradients, dict(network.named_buffers())


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_every_engine_gives_the_prediction_and_gradients_of_naive_execution(case, engine):
    network, image = make(CASES[case]), image_for(CASES[case])
    wanted, found = run(network, image, "stored"), run(network, image, engine)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    largest = max(float(g.norm()) for g in wanted[1].values())
    for name, gradient in wanted[1].items():
        # A bias in front of batch norm has the gradient 0, which rounding makes some 1e-16 of the others.
        assert (found[1][name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-13 * largest, name
    assert all(float(wanted[1][name].norm()) > 0 for name in ("image", "layers.0.weight", "layers.2.bias"))


@pytest.mark.parametrize(("case", "engine"), [pair for pair in PAIRS if "group" not in pair[0]])
def test_batch_norm_statistics_are_counted_once(case, engine):
    network, image = make(CASES[case]), image_for(CASES[case])
    wanted, found = run(network, image, "stored")[2], run(network, image, engine)[2]
    assert wanted.keys() == found.keys() and wanted
    for name, buffer in wanted.items():
        torch.testing.assert_close(found[name], buffer, rtol=1e-10, atol=1e-10)
        assert not name.endswith("num_batches_tracked") or buffer == 1


@pytest.mark.parametrize("case", CASES)
def test_predicting_leaves_the_input_alone_and_is_the_same_under_every_engine(case):
    network = make(CASES[case]).eval()
    image = image_for(CASES[case], batch=1)
    before, found = image.clone(), []
    with torch.no_grad():
        for engine in network.engines:
            network.engine = engine
            found.append(network(image))
    assert torch.equal(image, before)
    for output in found[1:]:
        torch.testing.assert_close(output, found[0], rtol=1e-12, atol=1e-12)


def test_espcn_has_the_published_layers():
    network = build_enhancer(NetworkConfig(name="espcn", in_channels=6, out_channels=6))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.padding[0]) for m in layers] == [
        (6, 50, 3, 0),
        (50, 100, 1, 0),
        (100, 48, 3, 0),
    ]
    assert network.engines == ("stored",)
    output = network(torch.zeros(2, 6, 11, 11, 11))
    assert output.shape == (2, 48, 7, 7, 7) and shuffle(output, (2, 2, 2)).shape == (2, 6, 14, 14, 14)


BLOCK = (torch.nn.BatchNorm3d, torch.nn.LeakyReLU, torch.nn.Conv3d)


def test_espcn_rn4_has_four_blocks_of_constant_width_in_front_of_each_layer():
    network = build_enhancer(NetworkConfig(name="espcn_rn", in_channels=6, out_channels=6))
    assert network.engine == "reversible" and network.config.blocks == (4, 4, 4)
    stacks = [module for module in network.modules() if isinstance(module, Program)]
    for stack, width in zip(stacks, (6, 50, 100), strict=True):
        assert len(stack.steps) == 4
        for function in (stack.steps[0].n1, stack.steps[3].n2):
            kinds = [m for m in function.modules() if not list(m.children())]
            assert all(isinstance(m, kind) for m, kind in zip(kinds, [*BLOCK] * 3, strict=True))
            assert [m.negative_slope for m in kinds[1::3]] == [0.0] * 3
            shapes = [(m.in_channels, m.out_channels, m.kernel_size[0], m.padding[0]) for m in kinds[2::3]]
            assert shapes == [(width // 2, width // 2, *pair) for pair in ((1, 0), (3, 1), (1, 0))]


def test_without_blocks_the_elongated_network_is_espcn():
    plain, bare = (
        build_enhancer(NetworkConfig(name=name, in_channels=6, out_channels=6, blocks=(0,))).double()
        for name in ENHANCEMENT_NETWORKS
    )
    bare.load_state_dict(plain.state_dict())
    image = image_for(plain.config)
    assert torch.equal(plain(image), bare(image))


def test_a_scalar_image_has_no_stack_in_front_of_the_first_layer():
    assert build_enhancer(NetworkConfig(name="espcn_rn", out_channels=1, blocks=(2,))).config.blocks == (0, 2, 2)
    with pytest.raises(InvresError, match="need an even number of channels, got 1"):
        build_enhancer(NetworkConfig(name="espcn_rn", out_channels=1, blocks=(2, 2, 2)))


def test_shuffling_is_a_permutation_whose_inverse_makes_targets():
    values = torch.arange(2 * 3 * 4 * 6 * 8.0).reshape(2, 3, 4, 6, 8)
    target = unshuffle(values, (2, 2, 2))
    assert target.shape == (2, 24, 2, 3, 4) and torch.equal(shuffle(target, (2, 2, 2)), values)
    # The eight voxels of a block are neighbouring channels.
    assert torch.equal(target[0, :8, 0, 0, 0], values[0, 0, :2, :2, :2].flatten())


def test_the_output_lacks_the_border_of_two_convolutions():
    network = make(CASES["tensors"])
    assert network(image_for(network.config)).shape[2:] == tuple(size - 2 * BORDER for size in PATCH)
    with pytest.raises(InvresError, match="needs patches of 5 voxels or more"):
        network(torch.zeros(1, 6, 4, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("espcn", {"blocks": (2,)}, "espcn has no blocks"),
        ("espcn_rn", {"blocks": (1, 2)}, "one number, or three of 0 or more"),
        ("espcn_rn", {"channels": (8,)}, "are two widths of 1 or more"),
        ("espcn_rn", {"channels": (7, 8)}, "need an even number of channels, got 7"),
        ("espcn", {"strides": ((1, 1, 1),)}, "the upsampling of each axis"),
        ("espcn", {"strides": ((2, 2, 2), (2, 2, 2))}, "the upsampling of each axis"),
        ("espcn", {"vae": VAEConfig()}, "neither VAE branch"),
        ("espcn", {"kernel": 5}, "kernels of 3 voxels"),
    ],
)
def test_what_the_architecture_does_not_have_is_refused(name, changes, words):
    with pytest.raises(InvresError, match=words):
        build_enhancer(NetworkConfig(name=name, in_channels=2, **changes))


def test_the_two_kinds_of_networks_are_not_mixed_up():
    with pytest.raises(InvresError, match="espcn enhances images; it does not segment them"):
        build(NetworkConfig(name="espcn"))
    with pytest.raises(InvresError, match="unet3d segments images; it does not enhance them"):
        build_enhancer(NetworkConfig(name="unet3d"))
    for name in (*ENHANCEMENT_NETWORKS, "fully_invres"):
        assert build_any(NetworkConfig(name=name)).config.name == name
    with pytest.raises(InvresError, match="espcn does not run under the engine 'reversible'"):
        build_enhancer(NetworkConfig(name="espcn"), "reversible")


def test_the_complete_configuration_is_kept_and_describes_the_same_network():
    config = build_enhancer(CASES["scalar"]).config
    assert build_enhancer(config).config == config


def test_drift_is_looked_for_in_every_stack():
    network, report = make(CASES["tensors"], "reversible"), Recorder()
    guard = DriftGuard(network, report)
    guard.before(FIRST_CHECK)
    network(image_for(network.config)).sum().backward()
    guard.after()
    events = [event for event in report.events if event["event"] == "drift"]
    assert len(events) == 3 and all(0 < event["worst"] < 1e-9 for event in events)
    assert [event["block"] // 2 for event in events] == [0, 1, 2], "blocks are numbered through the network"


# Memory -------------------------------------------------------------------------------------------------------------


def tensor_network(blocks):
    return NetworkConfig(name="espcn_rn", in_channels=6, out_channels=6, channels=(16, 24), blocks=(blocks,))


def test_the_memory_of_maps_does_not_grow_with_the_number_of_blocks():
    """Of the published network. Far deeper ones peak where fewer maps and more gradients of parameters are alive."""
    published = (NetworkConfig(name="espcn_rn", in_channels=6, out_channels=6, blocks=(blocks,)) for blocks in (1, 3))
    shallow, deep = (map_bytes(predict_enhancement(config, (11, 11, 11), 12, "reversible")) for config in published)
    assert deep == pytest.approx(shallow, rel=0.02)
    naive = [map_bytes(predict_enhancement(tensor_network(blocks), (11, 11, 11), 12, "stored")) for blocks in (1, 3)]
    assert naive[1] > 2 * naive[0]


@pytest.mark.parametrize("engine", ["stored", "reversible"])
def test_predicted_memory_is_what_a_step_takes(engine):
    predicted, measured = (
        function(tensor_network(2), (9, 9, 9), 2, engine) for function in (predict_enhancement, measure_enhancement)
    )
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_figure_6_stands_beside_its_published_rows():
    rows = figure_6()
    assert [(row.model, row.published_memory_mb, row.published_seconds) for row in rows] == [
        tuple(p) for p in PUBLISHED
    ]
    espcn, elongated, naive = (row.bytes for row in rows)
    assert espcn < elongated < naive / 2, "the paper's low-memory execution more than halves the memory"
    assert all(row.seconds is None for row in rows)
