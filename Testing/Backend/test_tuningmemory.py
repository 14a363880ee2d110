"""What fine-tuning will need is what its first step takes; what would be given up for want of memory is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_datasets import invres

from invres import InvresError, tuningmemory
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.devices import DeviceInfo
from invres.memory import measure_training
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import build, with_patch
from invres.tuningmemory import plan_tuning_memory
from invres.tuningplan import DEFAULTS

CPU, CARD = torch.device("cpu"), torch.device("cuda")
SCHEME = LabelScheme((Label("a", (1,), 1), Label("b", (2,), 2)))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    network = build(NetworkConfig("fully_invres", 2, SCHEME.out_channels, channels=(4, 16)))
    return save_package(
        tmp_path_factory.mktemp("models") / "planned",
        name="planned",
        network=network.config,
        state_dict=network.state_dict(),
        plan=PreparationPlan((ChannelPlan("T1"), ChannelPlan("T2")), (1.0, 1.0, 1.0)),
        scheme=SCHEME,
        patch=(32, 32, 32),
    )


@pytest.fixture
def device(monkeypatch):
    """Sets the free bytes of every device."""

    def free(count):
        info = DeviceInfo("cuda:0", "A card", count, 2**34)
        monkeypatch.setattr(tuningmemory, "device_info", lambda device: info)

    return free


def test_the_plan_is_what_a_step_takes(package):
    found = plan_tuning_memory(package.manifest, CPU, {})
    network = with_patch(package.manifest.network, package.manifest.patch)
    measured = measure_training(network, package.manifest.patch, DEFAULTS.batch_size)
    assert found.predicted_bytes == pytest.approx(measured.peak_bytes, rel=0.1)
    assert (found.patch, found.batch_size, found.engine) == ((32, 32, 32), DEFAULTS.batch_size, "reversible")
    assert found.fits and "32x32x32" in found.sentence


def test_the_branch_counts_where_it_is_wanted(package):
    plain = plan_tuning_memory(package.manifest, CPU, {"memory": "lower"})
    assert plain.memory == "lower"
    network = dataclasses.replace(package.manifest.network, vae=VAEConfig())
    branch = dataclasses.replace(package.manifest, network=network)
    without = plan_tuning_memory(branch, CPU, {"memory": "lower"}, vae=False)
    assert without.predicted_bytes == plain.predicted_bytes
    for manifest, vae in ((branch, None), (package.manifest, True)):
        assert plan_tuning_memory(manifest, CPU, {}, vae).predicted_bytes > plain.predicted_bytes


def test_on_a_card_it_says_what_would_be_given_up(package, device):
    device(2**34)
    whole = plan_tuning_memory(package.manifest, CARD, {})
    assert whole.fits and not whole.reductions
    device(whole.predicted_bytes)  # of which a part is left to others
    found = plan_tuning_memory(package.manifest, CARD, {})
    assert not found.fits and found.predicted_bytes <= found.free_bytes
    assert found.batch_size < whole.batch_size and "lower" in found.reductions[0]
    assert all(words in found.sentence for words in found.reductions)


def test_the_cpu_begins_as_asked_and_says_that_there_is_too_little(package, device):
    device(1000)
    found = plan_tuning_memory(package.manifest, CPU, {})
    assert not found.fits and not found.reductions and "more than there is" in found.sentence


def test_the_command_line_plans_a_fine_tuning(package):
    outcome = invres("plan", "--training", "--model", package.path, "--memory", "lower", "--device", "cpu", "--json")
    (result,) = outcome.of("result")
    assert result["memory"] == "lower" and result["device"] == "cpu" and result["predicted_bytes"] > 0
    with pytest.raises(InvresError):
        plan_tuning_memory(package.manifest, CPU, {"memory": "none"})
    assert invres("plan", "--training", "--json").code == 2
