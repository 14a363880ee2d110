"""Several models joined into one package that averages them, such as the folds of a cross-validation."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from . import InvresError
from .config import ChannelPlan
from .configjson import to_dict
from .expectation import Expectation
from .manifest import Manifest
from .modelpackage import ModelPackage, save_package
from .networks import ANY, INTENSITIES, build_predictor

__all__ = ["join_packages"]

FIGURES = "The figures are those of its members, each on the cases that it was not trained on."


def join_packages(packages: Sequence[ModelPackage], path: str | os.PathLike[str], name: str) -> ModelPackage:
    """Writes a package that averages the logits of these, as `networks.ensemble` does; a joined one counts as all that
    are in it.

    They must have one network, spacing, window and set of labels. CT may be clipped and scaled differently, as the
    training cases of each fold were: each member gets its own intensities.
    Figures are pooled over the cases of all (mean, sd and n), where the members are known to have learned from
    different cases, as the folds of a cross-validation have; else there are none. Raises InvresError for fewer than two
    models, one given twice, and where they differ.
    """
    if len(packages) < 2:
        raise InvresError("Joining takes two models or more.", hint="Name all that are to be averaged.")
    manifests = [package.manifest for package in packages]
    first = manifests[0]
    for package in packages[1:]:
        if different := _difference(first, package.manifest):
            raise InvresError(
                f"{packages[0].path.name} and {package.path.name} cannot be joined: they differ in {different}.",
                hint="Join models of one recipe and one data set, trained with a spacing_mm in the recipe.",
            )
    members = sum(manifest.members for manifest in manifests)
    channels = tuple(_shared(plans) for plans in zip(*(manifest.plan.channels for manifest in manifests), strict=True))
    state = build_predictor(first.network, members).state_dict()
    place = 0
    for package in packages:
        place = _put(state, place, package, channels)
    if len({_digest(state, member) for member in range(members)}) < members:
        raise InvresError("One of the models is given twice.", hint="Name each once.")
    learned = {manifest.trained_on for manifest in manifests}
    folds = len(learned) == len(manifests) and () not in learned
    figures = _pooled([manifest.metrics for manifest in manifests]) if folds else {}
    said = [first.description, f"Average of {members} networks."]
    if figures and FIGURES not in first.description:
        said.append(FIGURES)
    return save_package(
        path,
        name=name,
        network=dataclasses.replace(first.network, vae=None),
        state_dict=state,
        plan=dataclasses.replace(first.plan, channels=channels),
        scheme=first.scheme,
        patch=first.patch,
        description=" ".join(filter(None, said)),
        training=_summary(manifests),
        metrics=figures,
        expected=_expected([manifest.expected for manifest in manifests]),
        sides=first.sides,
        one_piece=first.one_piece,
        mirror_axes=first.mirror_axes,
        members=members,
        trained_on=[image for manifest in manifests for image in manifest.trained_on],
        licence=first.licence,
        intended_use=first.intended_use,
    )


def _difference(first: Manifest, other: Manifest) -> str:
    """The first thing that keeps two models from being averaged, by its key in the manifest; "" where there is none."""
    one, two = (to_dict(manifest) for manifest in (first, other))
    for values in (one, two):
        values["network"]["vae"] = None
        for channel in values["plan"]["channels"]:
            del channel["clip"], channel["mean"], channel["std"]
    for key in ("network", "plan"):
        for inner, value in one[key].items():
            if value != two[key][inner]:
                return f"{key}.{inner}"
    same = ("scheme", "patch", "sides", "one_piece", "mirror_axes", "enhancement", "licence", "intended_use")
    return next((key for key in same if one[key] != two[key]), "")


def _shared(plans: Sequence[ChannelPlan]) -> ChannelPlan:
    """How a channel is prepared for all: clipped no more than any of them wants, and scaled as the first one."""
    clips = [plan.clip for plan in plans if plan.clip is not None]
    clip = (min(low for low, _ in clips), max(high for _, high in clips)) if len(clips) == len(plans) else None
    return dataclasses.replace(plans[0], clip=clip)


def _put(state: dict[str, torch.Tensor], place: int, package: ModelPackage, channels: Sequence[ChannelPlan]) -> int:
    """The weights of a model into those of the joined one, from member `place` on; returns the next free place."""
    manifest, weights = package.manifest, package.load_weights(as_stored=True)
    for member in range(manifest.members):
        prefix = f"members.{member}." if manifest.members > 1 else ""
        for key, tensor in weights.items():
            if key.startswith(prefix) and not key.startswith("vae.") and (prefix or key not in INTENSITIES):
                state[f"members.{place}.{key.removeprefix(prefix)}"] = tensor
        for number, (shared, own) in enumerate(zip(channels, manifest.plan.channels, strict=True)):
            within = [weights[name][member, number].item() for name in INTENSITIES] if prefix else [-ANY, ANY, 1.0, 0.0]
            found = _in_shared(within, shared, own)
            for name, value in zip(INTENSITIES, found, strict=True):
                state[name][place, number] = value
        place += 1
    return place


def _in_shared(within: Sequence[float], shared: ChannelPlan, own: ChannelPlan) -> tuple[float, float, float, float]:
    """low, high, factor and offset of a member, which are counted in its model's own intensities, in the shared ones.

    Model and shared plan scale x to (x - mean) / std, so that own = (shared * shared.std + shared.mean - own.mean) /
    own.std. The model's own clip joins the member's.
    """
    low, high, factor, offset = within
    if own.clip is not None:
        low, high = (max(low, (own.clip[0] - own.mean) / own.std), min(high, (own.clip[1] - own.mean) / own.std))
    gain, shift = shared.std / own.std, (shared.mean - own.mean) / own.std
    if abs(low) < ANY:
        low = (low - shift) / gain
    if abs(high) < ANY:
        high = (high - shift) / gain
    return low, high, gain * factor, shift * factor + offset


def _digest(state: Mapping[str, torch.Tensor], member: int) -> str:
    """Of the weights of a member."""
    digest, prefix = hashlib.sha256(), f"members.{member}."
    for key in sorted(key for key in state if key.startswith(prefix)):
        digest.update(np.ascontiguousarray(state[key].float().numpy()).data)
    return digest.hexdigest()


def _pooled(metrics: Sequence[dict]) -> dict[str, Any]:
    """Mean, sd and n of each figure over the patients of all members; those that every member has."""
    found: dict[str, Any] = {}
    for label, of_label in metrics[0].items():
        for metric in of_label:
            each = [other.get(label, {}).get(metric) for other in metrics]
            if all(one and one.get("n") and one.get("mean") is not None for one in each):
                found.setdefault(label, {})[metric] = _pool([one for one in each if one])
    return found


def _pool(each: Sequence[dict]) -> dict[str, Any]:
    # Of how many values a mean and sd are: n, the number of cases, where a manifest does not know patients.
    counts = [one.get("n_patients") or one["n"] for one in each]
    count, cases = sum(counts), sum(one["n"] for one in each)
    mean = sum(n * one["mean"] for n, one in zip(counts, each, strict=True)) / count
    squares = sum(
        (n - 1) * (one.get("sd") or 0.0) ** 2 + n * (one["mean"] - mean) ** 2
        for n, one in zip(counts, each, strict=True)
    )
    sd = math.sqrt(squares / (count - 1)) if count > 1 else None
    return {"mean": mean, "sd": sd, "n": cases} | ({} if count == cases else {"n_patients": count})


def _expected(each: Sequence[Expectation]) -> Expectation:
    """The widest ranges and the least confidence; only of what every member knows."""
    names = set.intersection(*(set(one.volumes_ml) for one in each))
    ranges = {
        name: (min(one.volumes_ml[name][0] for one in each), max(one.volumes_ml[name][1] for one in each))
        for name in each[0].volumes_ml
        if name in names
    }
    return Expectation(ranges, min(one.confidence for one in each))


def _summary(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Of the first, with the steps and the time of all; training_cases: of the member that had most."""
    each = [manifest.training for manifest in manifests]
    return dataclasses.asdict(each[0]) | {
        "iterations": sum(one.iterations for one in each),
        "seconds": sum(one.seconds for one in each),
        "training_cases": max(one.training_cases for one in each),
        "validation_cases": sum(one.validation_cases for one in each),
    }
