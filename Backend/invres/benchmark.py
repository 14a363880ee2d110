"""`invres bench`: memory, time and gradients of every network and engine, side by side in one run."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .config import LossWeights
from .events import SILENT, Reporter, format_bytes
from .hollow import run_without_values, without_values
from .losses import segmentation_loss
from .memory import TrainingMemory, measure_step, measure_training, predict_training
from .networkconfig import NETWORKS, NetworkConfig
from .networks import SegmentationNetwork, build
from .operations import Operations
from .peers import PEERS, Peer, build_peer
from .step import make_optimizer, training_step

__all__ = ["ENGINE_TABLE", "bench_gradients", "bench_memory", "bench_time", "describe_machine", "table"]

Triple = tuple[int, int, int]
ENGINE_TABLE = {
    "unet3d": ("stored", "checkpoint"),
    "partially_invres": ("stored", "checkpoint", "recursive", "memcnn", "reversible"),
    "fully_invres": ("stored", "checkpoint", "recursive", "memcnn", "reversible"),
    "mbconv_unet": ("stored", "checkpoint", "recursive", "memcnn", "reversible"),
    "no_new_net": ("stored", "checkpoint"),
    "autoencoder_unet": ("stored", "checkpoint"),
    "compact_fcn": ("stored", "checkpoint"),
}
# Further rows of the invertible networks under our engine: (memory setting, precision).
FURTHER_SETTINGS = (("lower", "fp32"), ("low", "bf16"), ("lower", "bf16"), ("lowest", "bf16"))
TIMED_SETTINGS = ("lower", "lowest")
FLOPS_PATCH = (64, 64, 64)  # the ratio hardly depends on the size, the time to count does


def describe_machine(device: str) -> str:
    """The kind of machine that figures were taken on, in words."""
    if device.startswith("cuda"):
        tf32 = "with" if torch.backends.cudnn.allow_tf32 else "without"
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, fp32 {tf32} TF32 convolutions"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _rows_of(name: str) -> list[tuple[str, str, str]]:
    """(engine, memory setting, precision) of every row of a network."""
    rows = [(engine, "low", "fp32") for engine in ENGINE_TABLE[name]]
    return rows + ([("reversible", *pair) for pair in FURTHER_SETTINGS] if "reversible" in ENGINE_TABLE[name] else [])


def bench_memory(
    patch: Triple, channels: int, classes: int, device: str = "cpu", measure: bool = False, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """Peak live tensor bytes of a training step, ratios to `unet3d` under `stored` in the same run; peers at the end.

    measure False predicts on hollow tensors (any size, nothing allocated); True runs the step, as on a CUDA device,
    where the peaks of the allocator stand beside it. flops_ratio: floating-point operations of a step relative to
    `stored` of the same network. A row that fails has an `error` and no figures.
    """
    rows: list[dict[str, Any]] = []
    real = measure or device.startswith("cuda")
    todo = [(name, *row) for name in NETWORKS for row in _rows_of(name)]
    total = len(todo) + len(PEERS)
    stored_flops: dict[str, int] = {}
    for done, (name, engine, memory, precision) in enumerate(todo):
        report.progress("bench.memory", done, total)
        config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        row = {"network": name, "engine": engine, "memory": memory, "precision": precision}

        def figures(config: NetworkConfig = config, row: dict[str, Any] = row) -> dict[str, Any]:
            options = {"engine": row["engine"], "memory": row["memory"], "precision": row["precision"]}
            # Before the step, which may fail: every ratio is to `stored`.
            flops = count_flops(config, FLOPS_PATCH, row["engine"], row["memory"])
            base = stored_flops.setdefault(config.name, flops)
            if real:
                found = measure_training(config, patch, device=device, **options)
            else:
                found = predict_training(config, patch, **options)
            return {**dataclasses.asdict(found), "flops_ratio": flops / base}

        rows.append({**row, **_tried(figures)})
    for done, name in enumerate(PEERS):
        report.progress("bench.memory", len(todo) + done, total)

        def peer_figures(name: str = name) -> dict[str, Any] | None:
            found = _peer_memory(name, patch, channels, classes, device, real)
            return None if found is None else dataclasses.asdict(found)

        if (values := _tried(peer_figures)) is not None:
            rows.append({"network": name, "engine": "its own", "memory": "", "precision": "fp32", **values})
    base = rows[0]
    for row in rows:
        if "peak_bytes" in row and "peak_bytes" in base:
            row["ratio"] = row["peak_bytes"] / base["peak_bytes"]
            row["activation_ratio"] = row["activation_bytes"] / base["activation_bytes"]
    report.progress("bench.memory", total, total)
    return rows


def _tried(figures: Callable[[], dict[str, Any] | None]) -> Any:
    """figures(), or the error in words: one network that fails must not cost the figures of the others."""
    try:
        return figures()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _peer_memory(
    name: str, patch: Triple, channels: int, classes: int, device: str, real: bool
) -> TrainingMemory | None:
    def figures() -> TrainingMemory | None:
        with torch.device(device):
            network = build_peer(name, channels, classes, patch)
            if network is None:
                return None
            image = torch.zeros(1, channels, *patch)
            target = torch.zeros(1, *patch, dtype=torch.int16)
            return measure_step(network.train(), image, target, lambda o: _peer_step(network, o, image, target))

    return figures() if real else run_without_values(figures)


def _peer_step(network: Peer, optimizer: torch.optim.Optimizer, image: torch.Tensor, target: torch.Tensor) -> None:
    """A training step of a peer's network with our loss."""
    optimizer.zero_grad(set_to_none=True)
    logits, further = network(image)
    loss = segmentation_loss(logits, target, False, LossWeights()).total
    del logits
    (loss if further is None else loss + 0.1 * further).backward()
    optimizer.step()


def count_flops(config: NetworkConfig, patch: Triple, engine: str, memory: str) -> int:
    """Floating-point operations of a training step, counted on hollow tensors."""
    with without_values(), Operations() as counter:
        network = build(config, engine, memory).train()
        image = torch.zeros(1, config.in_channels, *patch)
        target = torch.zeros(1, *patch, dtype=torch.int16)
        training_step(network, make_optimizer(network), image, target, False, LossWeights(), check_finite=False)
    return counter.total


def bench_time(
    patch: Triple, channels: int, classes: int, device: str = "cpu", rounds: int = 5, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """Median seconds of a training step; engines of one network take turns, so that a drifting machine hits all alike.

    ratio: to `stored` of the same network in the same precision; ratio_to_memcnn: to memcnn's; ratio_to_unet3d: to the
    baseline under `stored`, both in float32. Installed peers come last. On a CUDA device ours also under bf16.
    """
    rows: list[dict[str, Any]] = []
    precisions = ("fp32", "bf16") if device.startswith("cuda") else ("fp32",)
    for name in NETWORKS:

        def figures(name: str = name) -> dict[str, Any]:
            return {"rows": _time_rows(name, patch, channels, classes, device, rounds, precisions, report)}

        found = _tried(figures)
        rows += found.get("rows", [{"network": name, **found}])
    base = next((row["seconds"] for row in rows if row["network"] == "unet3d" and "seconds" in row), None)
    for name in PEERS:

        def peer_figures(name: str = name) -> dict[str, Any] | None:
            seconds = _peer_seconds(name, patch, channels, classes, device, rounds, report)
            return None if seconds is None else {"seconds": seconds}

        if (values := _tried(peer_figures)) is not None:
            rows.append({"network": name, "engine": "its own", "memory": "", "precision": "fp32", **values})
    for row in rows:
        if base and row.get("precision") == "fp32" and "seconds" in row:
            row["ratio_to_unet3d"] = row["seconds"] / base
    return rows


def _peer_seconds(
    name: str, patch: Triple, channels: int, classes: int, device: str, rounds: int, report: Reporter
) -> float | None:
    """Median seconds of a training step of a peer's network; None where its library is not installed."""
    torch.manual_seed(0)
    network = build_peer(name, channels, classes, patch)
    if network is None:
        return None
    network = network.to(device).train()
    optimizer = make_optimizer(network)
    image = torch.randn(1, channels, *patch, device=device)
    target = torch.randint(0, classes, (1, *patch), device=device).to(torch.int16)
    seconds = []
    for turn in range(rounds + 1):
        report.progress(f"bench.time {name}", turn, rounds + 1)
        start = _now(device)
        _peer_step(network, optimizer, image, target)
        seconds.append(_now(device) - start)
    report.progress(f"bench.time {name}", rounds + 1, rounds + 1)
    return statistics.median(seconds[1:])


def _time_rows(
    name: str,
    patch: Triple,
    channels: int,
    classes: int,
    device: str,
    rounds: int,
    precisions: Sequence[str],
    report: Reporter,
) -> list[dict[str, Any]]:
    config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
    torch.manual_seed(0)
    network = build(config).to(device).train()
    optimizer = make_optimizer(network)
    image = torch.randn(1, channels, *patch, device=device)
    target = torch.randint(0, classes, (1, *patch), device=device).to(torch.int16)
    runs = [(engine, "low", precision) for precision in precisions for engine in ENGINE_TABLE[name]]
    if "reversible" in ENGINE_TABLE[name]:
        runs += [("reversible", memory, precision) for memory in TIMED_SETTINGS for precision in precisions]
    seconds: dict[tuple[str, str, str], list[float]] = {run: [] for run in runs}
    failed: dict[tuple[str, str, str], str] = {}
    for turn in range(rounds + 1):
        report.progress(f"bench.time {name}", turn, rounds + 1)
        for run, known in seconds.items():
            if run in failed:
                continue
            network.engine, network.memory, precision = run

            def step(precision: str = precision) -> dict[str, float]:
                start = _now(device)
                training_step(network, optimizer, image, target, False, LossWeights(), precision)
                return {"seconds": _now(device) - start}

            found = _tried(step)  # one engine that fails, for want of memory or of memcnn, must not cost the others
            if "error" in found:
                failed[run] = found["error"]
            else:
                known.append(found["seconds"])
    report.progress(f"bench.time {name}", rounds + 1, rounds + 1)
    # The first warms up.
    medians = {run: statistics.median(known[1:]) for run, known in seconds.items() if run not in failed}
    rows = []
    for run in runs:
        engine, memory, precision = run
        row: dict[str, Any] = {"network": name, "engine": engine, "memory": memory, "precision": precision}
        if run in failed:
            rows.append({**row, "error": failed[run]})
            continue
        row["seconds"] = medians[run]
        for key, of in (("ratio", "stored"), ("ratio_to_memcnn", "memcnn")):
            if (other := medians.get((of, "low", precision))) is not None:
                row[key] = medians[run] / other
        rows.append(row)
    return rows


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bench_gradients(
    patch: Triple, channels: int, classes: int, draws: int = 12, report: Reporter = SILENT
) -> list[dict[str, Any]]:
    """The difference of all gradients (input and parameters) to `stored`, relative to their norm, for each engine.

    An error is the largest of any single tensor; relative_error is the largest and median_error the median of `draws`
    random networks and images for the rows in float32 of `stored` and `reversible` at `low`; other rows have the first
    draw alone. float64 and float32 of the same function; "lowest" is compared with `stored` on the same grid.
    error_to_float64, in the rows of float32, is the median error to `stored` in float64.
    image "last digit": plain autograd on an image whose every voxel is the next number of float32, up or down. At the
    kink of the leaky ReLU the gradient depends on that digit, so it says how near two ways of summing can come.
    activation "linear" takes the kink out.
    """
    names = [name for name in NETWORKS if "reversible" in ENGINE_TABLE[name]]
    found: dict[tuple[str, str, str, str, str, str], list[tuple[float, float | None]]] = {}
    todo = [(name, activation, draw) for name in names for activation in ("", "linear") for draw in range(draws)]
    for done, (name, activation, draw) in enumerate(todo):
        report.progress("bench.gradients", done, len(todo))
        config = NetworkConfig(name=name, in_channels=channels, out_channels=classes)
        if activation:
            config = dataclasses.replace(config, negative_slope=1.0)
        torch.manual_seed(draw)
        network, plain = build(config), torch.randn(1, channels, *patch)
        _off_the_kink(network)
        exact: list[torch.Tensor] = []
        for dtype in (torch.float64, torch.float32):
            wanted: dict[bool, list[torch.Tensor]] = {}
            for engine, memory, image in _gradient_runs(name, dtype, all_engines=not activation and draw == 0):
                if engine == "memcnn" and not _has_memcnn():
                    continue
                network.engine, network.memory = engine, memory
                gradients = _gradients_of(network.to(dtype), (_last_digit(plain) if image else plain).to(dtype))
                exact = exact or gradients
                error = _largest_error(gradients, wanted.setdefault(memory == "lowest", gradients))
                own = _largest_error(gradients, exact) if dtype == torch.float32 else None
                key = (name, engine, memory, str(dtype)[6:], activation, image)
                found.setdefault(key, []).append((error, own))
    report.progress("bench.gradients", len(todo), len(todo))
    rows = []
    for (name, engine, memory, kind, activation, image), errors in found.items():
        row: dict[str, Any] = {"network": name, "engine": engine, "memory": memory, "dtype": kind}
        row |= {"activation": activation, "image": image, "relative_error": max(error for error, _ in errors)}
        if kind == "float32":
            row["median_error"] = statistics.median(error for error, _ in errors)
            row["error_to_float64"] = statistics.median(own for _, own in errors if own is not None)
        rows.append(row)
    return rows


def _has_memcnn() -> bool:
    return importlib.util.find_spec("memcnn") is not None


def _gradient_runs(name: str, dtype: torch.dtype, all_engines: bool) -> list[tuple[str, str, str]]:
    """(engine, memory setting, image) to compare; `stored` comes first."""
    runs = [("stored", "low", ""), ("reversible", "low", "")]
    if all_engines:
        runs = [(engine, "low", "") for engine in ENGINE_TABLE[name]] + [("reversible", "lower", "")]
    if dtype == torch.float32:
        return [*runs, ("stored", "low", "last digit")]
    # In float32 a value on the edge between two grid points may go either way in the two orders of summing.
    return runs + ([("stored", "lowest", ""), ("reversible", "lowest", "")] if all_engines else [])


def _off_the_kink(network: SegmentationNetwork) -> None:
    """Gives the norms small random biases.

    New ones have none, and on a grid a value of a small map may be exactly its mean: it then lies on the kink of the
    leaky ReLU, where two ways of summing may take either side.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.bias, std=0.1)


def _last_digit(image: torch.Tensor) -> torch.Tensor:
    """The image with every voxel moved to the next number of its type, up or down in turn."""
    towards = torch.full_like(image, torch.inf)
    towards.view(-1)[::2] = -torch.inf
    return torch.nextafter(image, towards)


def _gradients_of(network: SegmentationNetwork, image: torch.Tensor) -> list[torch.Tensor]:
    """Of the input and every parameter, for a made-up loss."""
    image = image.clone().requires_grad_()
    network.zero_grad(set_to_none=True)
    logits = network(image).logits
    assert logits is not None
    logits.square().mean().backward()  # memcnn refuses torch.autograd.grad
    return [t.grad for t in (image, *network.parameters()) if t.grad is not None]


def _largest_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float((f.double() - w.double()).norm() / w.double().norm().clamp(min=1e-12)) for f, w in pairs)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as an aligned Markdown table; bytes are written in binary units."""
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.endswith("bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.1e}" if "error" in column else f"{value:.3f}"
    return str(value)
