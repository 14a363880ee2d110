"""What users expect of any layer, tried on reversible engines side by side: ours, MemCNN, RevTorch where installed.

    PYTHONPATH=Backend python Testing/Benchmarks/conformance.py

prints a table of who passes what. Every row is a failure that some library's users have reported. The test
`Testing/Backend/test_conformance_table.py` holds our column to "passes" throughout.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, SIZE = 3, (4, 3, 5)
TOLERANCE = 1e-5  # relative; inputs are float64, but memcnn computes in float32 whatever it is given
Maker = Callable[[nn.Module, nn.Module], nn.Module]


def function(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.Tanh(), *extra)


class Plain(nn.Module):
    """The coupling written out, by plain autograd: what the engines are compared with."""

    def __init__(self, n1: nn.Module, n2: nn.Module):
        super().__init__()
        self.n1, self.n2 = n1, n2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.n1(x2)
        return torch.cat([y1, x2 + self.n2(y1)], dim=1)


class Ours(nn.Module):
    """One coupling under our engine, in the same form."""

    def __init__(self, n1: nn.Module, n2: nn.Module):
        super().__init__()
        from invres.reversible import Couple, Program

        self.program = Program([Couple(n1, n2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.program(x.chunk(2, dim=1))[0], dim=1)


def _memcnn(n1: nn.Module, n2: nn.Module) -> nn.Module:
    import memcnn

    return memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(n1, n2), keep_input=False, keep_input_inverse=False)


def _revtorch(n1: nn.Module, n2: nn.Module) -> nn.Module:
    import revtorch

    return revtorch.ReversibleSequence(nn.ModuleList([revtorch.ReversibleBlock(n1, n2)]))


ENGINES: dict[str, Maker] = {"invres": Ours, "memcnn": _memcnn, "revtorch": _revtorch}


def fresh(requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 2 * WIDTH, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_(
        requires_grad
    )


def same(found: object, wanted: object, tolerance: float = TOLERANCE) -> None:
    for f, w in zip(found, wanted, strict=True):  # type: ignore[call-overload]
        assert f is not None, "a gradient is missing"
        assert (f - w).norm() <= tolerance * w.norm(), f"off by {float((f - w).norm() / w.norm()):.1e}"


def compare(
    make: Maker,
    use: Callable[[nn.Module, list[nn.Parameter]], list[torch.Tensor | None]],
    functions: Callable[[], nn.Module] = function,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float64,
) -> None:
    """use(block) must give what it gives on the plain block with the same parameters and random numbers."""
    results = []
    for maker in (make, Plain):
        torch.manual_seed(0)
        n1, n2 = functions(), functions()
        block = maker(n1, n2).to(dtype).train()
        torch.manual_seed(7)
        # Engines register N1 and N2 in one order or the other.
        results.append(use(block, [*n1.parameters(), *n2.parameters()]))
    same(*results, tolerance)


def gradients(parameters: list[nn.Parameter], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor | None]:
    y.sin().sum().backward()
    return [x.grad, *(p.grad for p in parameters)]


# --- the rows ------------------------------------------------------------------------------------------------------


def plain_use(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, block(x * 1.0))

    compare(make, use)


def input_used_again(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        skip = x * 1.5
        return gradients(parameters, x, block(skip) * skip)

    compare(make, use)


def input_kept_without_gradients(make: Maker) -> None:
    block, x = make(function(), function()).double(), fresh(False)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert x.untyped_storage().nbytes() and torch.equal(x, before), "the caller's input is gone"


def input_kept_in_training(make: Maker) -> None:
    block, x = make(function(), function()).double(), fresh(False)
    before = x.clone()
    block(x).sum().backward()
    assert x.untyped_storage().nbytes() and torch.equal(x, before), "the caller's input is gone"


def input_without_gradient(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        block(fresh(False)).sin().sum().backward()
        return [p.grad for p in parameters]

    compare(make, use)


def activation_before(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, block(torch.relu(x * 2.0)))

    compare(make, use)


def dropout(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, block(x * 1.0))

    compare(make, use, lambda: function(nn.Dropout(0.4)))


def batch_norm_once(make: Maker) -> None:
    n1 = function(nn.BatchNorm3d(WIDTH))
    block = make(n1, function()).double().train()
    x = fresh()
    block(x * 1.0).sum().backward()
    counted = [int(m.num_batches_tracked) for m in block.modules() if isinstance(m, nn.BatchNorm3d)]
    assert counted == [1], f"counted {counted} times"


def bfloat16_autocast(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x * 1.0)
        return gradients(parameters, x, y)

    compare(make, use, tolerance=0.02, dtype=torch.float32)


def autocast_saves_memory(make: Maker) -> None:
    """Convolutions inside the block run in bfloat16, in the recomputation as well."""
    seen = []
    block = make(function(), function())
    for module in block.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(fresh(dtype=torch.float32) * 1.0)
    y.float().sum().backward()
    assert set(seen) == {torch.bfloat16}, f"ran in {sorted({str(d)[6:] for d in seen})}"


def accumulation(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        block(x * 1.0).sin().sum().backward()
        return gradients(parameters, x, block(x * 0.5))

    compare(make, use)


def frozen_parameters(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        for parameter in parameters[:2]:
            parameter.requires_grad_(False)
        x = fresh()
        return [g for g in gradients(parameters, x, block(x * 1.0)) if g is not None]

    compare(make, use)


def autograd_grad(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return list(torch.autograd.grad(block(x * 1.0).sin().sum(), [x, *parameters]))

    compare(make, use)


def one_block_twice(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, block(block(x * 1.0)))

    compare(make, use)


def empty_batch(make: Maker) -> None:
    block = make(function(), function()).double()
    x = torch.zeros(0, 2 * WIDTH, *SIZE, dtype=torch.float64, requires_grad=True)
    y = block(x * 1.0)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())


def compiled_functions(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, block(x * 1.0))

    compare(make, use, lambda: torch.compile(function(), backend="aot_eager"))  # type: ignore[arg-type,return-value]


def copies(make: Maker) -> None:
    block, x = make(function(), function()).double(), fresh()
    wanted = gradients(list(block.parameters()), x, block(x * 1.0))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin.zero_grad()
        x = fresh()
        same(gradients(list(twin.parameters()), x, twin(x * 1.0)), wanted)


def inner_hooks(make: Maker) -> None:
    """A forward hook on an inner function takes part, once forward and once in the recomputation."""

    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        first = next(m for m in block.modules() if isinstance(m, nn.Conv3d) and m.weight is parameters[0])
        first.register_forward_hook(lambda _m, _i, output: output * 3)
        x = fresh()
        return gradients(parameters, x, block(x * 1.0))

    compare(make, use)


def inside_checkpoint(make: Maker) -> None:
    def use(block: nn.Module, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        x = fresh()
        return gradients(parameters, x, checkpoint(lambda t: block(t * 1.0), x, use_reentrant=False))

    compare(make, use)


def evaluated_once_in_backward(make: Maker) -> None:
    calls: list[int] = []
    n1 = function()
    n1[0].register_forward_hook(lambda *_: calls.append(1))
    block, x = make(n1, function()).double(), fresh()
    block(x * 1.0).sum().backward()
    assert len(calls) == 2, f"evaluated {len(calls)} times in a step"


def _distributed(mode: str) -> Callable[[Maker], None]:
    def row(make: Maker) -> None:
        name = next(key for key, value in ENGINES.items() if value is make)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).resolve()), "--rank"]
            ranks = [
                subprocess.Popen(
                    [*command, str(rank), name, mode, folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                for rank in range(2)
            ]
            ends = [(process.communicate(timeout=120)[1], process.returncode) for process in ranks]
            for text, code in ends:
                assert code == 0, (text.decode(errors="replace").strip().splitlines() or ["died"])[-1][:60]

    return row


def run_rank(rank: int, name: str, mode: str, folder: str) -> None:
    """One of two processes with half a batch each; the averaged gradient must be the whole batch's."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    options = {} if mode == "plain" else {mode: True}
    x = torch.randn(2, 2 * WIDTH, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    plain = Plain(function(), function()).double()
    plain(x).sin().mean().backward()
    torch.manual_seed(0)
    n1, n2 = function(), function()
    block = nn.parallel.DistributedDataParallel(ENGINES[name](n1, n2).double(), **options)
    for _ in range(2):
        block.zero_grad()
        block(x[rank : rank + 1] * 1.0).sin().mean().backward()
    same([p.grad for p in (*n1.parameters(), *n2.parameters())], [p.grad for p in plain.parameters()])
    torch.distributed.destroy_process_group()


ROWS: dict[str, Callable[[Maker], None]] = {
    "gradients of plain autograd": plain_use,
    "input used again afterwards (skip)": input_used_again,
    "caller's input kept under no_grad": input_kept_without_gradients,
    "caller's input kept in training": input_kept_in_training,
    "input that needs no gradient": input_without_gradient,
    "activation right before the block": activation_before,
    "dropout": dropout,
    "BatchNorm counted once": batch_norm_once,
    "bfloat16 autocast": bfloat16_autocast,
    "bfloat16 also inside and recomputed": autocast_saves_memory,
    "gradient accumulation": accumulation,
    "frozen parameters": frozen_parameters,
    "autograd.grad": autograd_grad,
    "one block twice": one_block_twice,
    "empty batch": empty_batch,
    "torch.compile of inner functions": compiled_functions,
    "deepcopy and pickle": copies,
    "hooks on inner functions": inner_hooks,
    "inside torch.utils.checkpoint": inside_checkpoint,
    "inner functions evaluated once in backward": evaluated_once_in_backward,
    "DDP, 2 ranks": _distributed("plain"),
    "DDP, find_unused_parameters": _distributed("find_unused_parameters"),
    "DDP, static_graph": _distributed("static_graph"),
}


def outcome(row: str, engine: str) -> str:
    """ "passes", "fails: why", or "crashes" where the whole process dies; each in its own process for that reason."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", row, engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = [line for line in process.stdout.splitlines() if line.startswith("outcome: ")]
    return lines[-1].removeprefix("outcome: ") if lines else f"crashes (exit code {process.returncode})"


def tried(row: str, engine: str) -> str:
    """The outcome within this process."""
    warnings.simplefilter("ignore")
    try:
        ROWS[row](ENGINES[engine])
    except Exception as error:
        words = " ".join(str(error).split())
        return (
            f"fails: {words[:70]}"
            if isinstance(error, AssertionError)
            else f"fails: {type(error).__name__}: {words[:60]}"
        )
    return "passes"


def installed(engine: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            __import__(engine)
    except ImportError:
        return False
    return True


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        run_rank(int(sys.argv[2]), *sys.argv[3:6])
        return
    if sys.argv[1:2] == ["--row"]:
        print("outcome: " + tried(sys.argv[2], sys.argv[3]))
        return
    engines = [engine for engine in ENGINES if installed(engine)]
    print("| | " + " | ".join(engines) + " |")
    print("|---" * (len(engines) + 1) + "|")
    results = {}
    for row in ROWS:
        results[row] = {engine: outcome(row, engine) for engine in engines}
        print(f"| {row} | " + " | ".join(results[row].values()) + " |", flush=True)
    counts = [sum(found[engine] == "passes" for found in results.values()) for engine in engines]
    print("| passed | " + " | ".join(f"{count} of {len(ROWS)}" for count in counts) + " |")


if __name__ == "__main__":
    main()
