"""Data-parallel training: two processes with half the batch each get the gradients of one with all of it.

The processes are this file run as a program: `python test_distributed.py RANK FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import build

RANKS = 2
CHANNELS = {"in_channels": 2, "out_channels": 3, "channels": (4, 16)}
PATCH = (7, 4, 6)
MODES = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
NETWORKS = {
    "fully_invres": NetworkConfig(name="fully_invres", learnable_resampling=True, **CHANNELS),
    "partially_invres": NetworkConfig(name="partially_invres", **CHANNELS),
    # Its branch does not run in evaluation mode: parameters that really are unused.
    "fully_invres with unused branch": NetworkConfig(name="fully_invres", vae=VAEConfig(PATCH, 2, 2), **CHANNELS),
}
CASES = [
    *((name, mode, "reversible") for name in ("fully_invres", "partially_invres") for mode in MODES),
    ("fully_invres with unused branch", "find_unused_parameters", "reversible"),
    ("fully_invres with unused branch", "static_graph", "reversible"),
    ("fully_invres", "plain", "checkpoint"),
]


def make(name, engine):
    torch.manual_seed(0)
    network = build(NETWORKS[name], engine).double()
    return network.eval() if network.vae is not None else network.train()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * RANKS, 2, *PATCH, dtype=torch.float64, generator=generator)


def steps(network, images):
    """The gradients of the last of three backward passes, and of two that add up."""
    for image in images[:3]:
        network.zero_grad(set_to_none=True)
        network(image).logits.sin().mean().backward()
    once = [p.grad.clone() if p.grad is not None else None for p in network.parameters()]
    network(images[3]).logits.sin().mean().backward()
    twice = [p.grad.clone() if p.grad is not None else None for p in network.parameters()]
    return once, twice


def work(rank, folder):
    """One of the processes: saves its gradients of every case."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mine = [batch(step).chunk(RANKS)[rank] for step in range(4)]
    found = {}
    for name, mode, engine in CASES:
        network = torch.nn.parallel.DistributedDataParallel(make(name, engine), **MODES[mode])
        found[f"{name}, {mode}, {engine}"] = steps(network, mine)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process saved."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        for process in started:
            _, words = process.communicate(timeout=300)
            assert process.returncode == 0, words
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "mode", "engine"), CASES)
def test_two_processes_get_the_gradients_of_one_with_the_whole_batch(found, name, mode, engine):
    wanted = steps(make(name, "stored"), [batch(step) for step in range(4)])
    for rank in found:
        for gradients, right in zip(rank[f"{name}, {mode}, {engine}"], wanted, strict=True):
            for gradient, reference in zip(gradients, right, strict=True):
                if reference is None:
                    assert gradient is None or not gradient.any()
                else:
                    assert reference.abs().max() > 0
                    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_the_processes_saw_different_halves():
    """Or the test above would hold without any averaging."""
    halves = [
        steps(make("fully_invres", "stored"), [batch(s).chunk(RANKS)[r] for s in range(4)])[0] for r in range(RANKS)
    ]
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(*halves, strict=True))


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
