"""Time of invres' augmentation for one patch: beside MONAI's dictionary transforms, and as a part of a training step.

Both get the same patch, probabilities and ranges and take turns in one run. "default": the configuration's own
probabilities; "everything": every switch at probability 1; "spatial": rotation, scale and elastic displacement
only, at probability 1.
MONAI's chain is lazy (pending affine, flips and crop are resampled once); its elastic transform cannot be lazy.

    PYTHONPATH=Backend python Testing/Benchmarks/augmentation.py --patch 64 --repeats 15
    PYTHONPATH=Backend python Testing/Benchmarks/augmentation.py --patch 64 --repeats 15 --step

Run by hand; prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
import warnings

import monai
import torch
from monai import transforms as mt

from invres.augmentation import augment, input_patch
from invres.config import AugmentationConfig, TrainingConfig
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.step import make_optimizer, training_step

INTENSITY = ("gamma", "noise", "bias_field", "brightness", "low_resolution")


def configurations() -> dict[str, AugmentationConfig]:
    default = AugmentationConfig(flip_axes=(0, 1, 2))
    everything = {f"{name}_probability": 1.0 for name in ("spatial", "elastic", *INTENSITY)}
    spatial = {**everything, **{f"{name}_probability": 0.0 for name in INTENSITY}}
    return {
        "default": default,
        "everything": dataclasses.replace(default, **everything),
        "spatial": dataclasses.replace(default, **spatial, flip_axes=()),
    }


def monai_chain(config: AugmentationConfig, patch: tuple[int, int, int], channels: int) -> mt.Compose:
    """The nearest equivalent in MONAI; transforms of probability 0 are left out."""
    both, modes = ["image", "label"], ("bilinear", "nearest")
    angles = [math.radians(limit) for limit in config.rotation_degrees]
    scales = [(config.scale[0] - 1, config.scale[1] - 1)] * 3
    bandwidth = max(patch) / (config.elastic_grid - 1) / 2
    elastic = mt.Rand3DElasticd(
        both,
        sigma_range=(bandwidth, bandwidth),
        magnitude_range=(config.elastic_voxels * 50, config.elastic_voxels * 100),
        prob=config.elastic_probability,
        mode=modes,
        padding_mode="border",
    )
    affine = mt.RandAffined(
        both,
        prob=config.spatial_probability,
        rotate_range=angles,
        scale_range=scales,
        mode=modes,
        padding_mode="border",
    )
    chain = [
        affine,
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in config.flip_axes),
        mt.CenterSpatialCropd(both, roi_size=patch),
        elastic,
    ]
    intensity = {
        "gamma": mt.RandAdjustContrastd("image", config.gamma_probability, config.gamma, retain_stats=True),
        "brightness": mt.RandScaleIntensityd(
            "image", factors=config.brightness[1] - 1, prob=config.brightness_probability, channel_wise=channels > 1
        ),
        "bias_field": mt.RandBiasFieldd(
            "image", degree=3, coeff_range=(0.0, config.bias_field), prob=config.bias_field_probability
        ),
        "noise": mt.RandGaussianNoised("image", prob=config.noise_probability, std=config.noise_std),
        "low_resolution": mt.RandSimulateLowResolutiond(
            "image",
            prob=config.low_resolution_probability,
            zoom_range=(1 / config.low_resolution[1], 1 / config.low_resolution[0]),
        ),
    }
    chain += [transform for name, transform in intensity.items() if getattr(config, f"{name}_probability") > 0]
    return mt.Compose(chain, lazy=True)


def measure(patch: tuple[int, int, int], channels: int, config: AugmentationConfig, repeats: int, device: str) -> dict:
    """Seconds for one patch, the two chains taking turns, after one unmeasured turn of each."""
    size = input_patch(config, patch)
    image = torch.randn(1, channels, *size, device=device)
    label = torch.randint(0, 4, (1, 1, *size), device=device, dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    chain = monai_chain(config, patch, channels)
    chain.set_random_state(0)
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def ours() -> None:
        augment(image, label, config, generator, patch)

    def theirs() -> None:
        result = chain({"image": image[0], "label": label[0]})
        if tuple(result["image"].shape[1:]) != patch:
            raise RuntimeError(f"MONAI's chain gave {tuple(result['image'].shape)}")

    seconds: dict[str, list[float]] = {"invres": [], "monai": []}
    for turn in range(repeats + 1):
        for name, run in (("invres", ours), ("monai", theirs)):
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    mean = {name: statistics.fmean(times) for name, times in seconds.items()}
    return {
        "input_patch": list(size),
        "median_ms": {name: round(1e3 * value, 2) for name, value in median.items()},
        "mean_ms": {name: round(1e3 * value, 2) for name, value in mean.items()},
        "ratio_of_medians": round(median["monai"] / median["invres"], 2),
        "ratio_of_means": round(mean["monai"] / mean["invres"], 2),
    }


def measure_step(patch: tuple[int, int, int], channels: int, repeats: int, device: str) -> dict:
    """Seconds of a whole training step of the default Fully-InvRes with and without augmentation, taking turns."""
    torch.manual_seed(0)
    network = build(NetworkConfig(in_channels=channels, out_channels=4)).to(device)
    config = TrainingConfig(patch=patch)
    optimizer = make_optimizer(network, config.learning_rate, config.weight_decay)
    augmentation = configurations()["default"]
    size = input_patch(augmentation, patch)
    wide = torch.randn(1, channels, *size, device=device), torch.randint(0, 4, (1, 1, *size), device=device)
    generator = torch.Generator().manual_seed(0)
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def step(augmented: bool) -> None:
        if augmented:
            image, label = augment(wide[0], wide[1].to(torch.int16), augmentation, generator, patch)
        else:
            image, label = (part[..., : patch[0], : patch[1], : patch[2]].contiguous() for part in wide)
        assert label is not None
        training_step(network, optimizer, image, label[:, 0].long(), False, config.loss)

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats + 1):
        for augmented, times in seconds.items():
            synchronise()
            start = time.perf_counter()
            step(augmented)
            synchronise()
            if turn:
                times.append(time.perf_counter() - start)
    plain, full = (statistics.median(seconds[key]) for key in (False, True))
    return {"without_ms": round(1e3 * plain, 1), "with_ms": round(1e3 * full, 1), "ratio": round(full / plain, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=64, help="edge of the cubic patch in voxels")
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", action="store_true", help="a whole training step with and without augmentation")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    patch = (arguments.patch,) * 3
    if arguments.step:
        steps = {
            f"{channels} channel(s)": measure_step(patch, channels, arguments.repeats, arguments.device)
            for channels in arguments.channels
        }
        print(json.dumps({"about": {"torch": torch.__version__, **vars(arguments)}, "results": steps}, indent=1))
        return
    results = {
        f"{name}, {channels} channel(s)": measure(patch, channels, config, arguments.repeats, arguments.device)
        for name, config in configurations().items()
        for channels in arguments.channels
    }
    about = {"torch": torch.__version__, "monai": monai.__version__, **vars(arguments)}
    print(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
