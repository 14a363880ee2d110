"""Models that are trained in seconds to find bright balls, and volumes with such balls in any place and direction."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import vtk
from scipy.spatial.transform import Rotation
from vtk.util.numpy_support import numpy_to_vtk

from invres.config import ChannelPlan, CropPlan, Label, LabelScheme, PreparationPlan
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.sides import Side

BRAIN = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^12738006^Brain~^^~Anatomic codes - DICOM master list~^^~^^"
)
ONE = LabelScheme((Label("ball", (3,), 3, (250, 20, 40), BRAIN),))
TWO = LabelScheme((Label("Ödem", (1,), 1, (90, 190, 90), BRAIN), Label("core", (4,), 4, (245, 190, 50), BRAIN)))


def trained_package(path, channels, scheme, iterations=45):
    """With one channel bright is the label; with two, bright in the last is the first label, in both the second."""
    torch.manual_seed(0)
    config = NetworkConfig(name="unet3d", channels=(8, 12), in_channels=len(channels), out_channels=scheme.out_channels)
    network = build(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = np.random.default_rng(0)
    for _ in range(iterations):
        images, labels = zip(*(example(generator, (16, 16, 16), len(channels)) for _ in range(2)), strict=True)
        images = np.stack([(image - image.mean()) / image.std() for image in map(np.asarray, images)])
        logits = network(torch.from_numpy(images.astype(np.float32))).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.stack(labels).astype(np.int64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plan = PreparationPlan(tuple(ChannelPlan(name, "MR") for name in channels), (1.0, 1.0, 1.0), crop_to_nonzero=False)
    return save_package(
        path,
        name="balls",
        network=network.config,
        state_dict=network.state_dict(),
        plan=plan,
        scheme=scheme,
        patch=(16, 16, 16),
        licence="CC0-1.0",
    )


def of_crops(package, path):
    """The same network as if it had been trained on crops around the ball."""
    crop = CropPlan(("ball",), (3.0, 3.0, 3.0), (14.0, 14.0, 14.0))
    return remade(package, path, "crops", plan=replace(package.manifest.plan, crop=crop))


def with_sides(package, path):
    """The same network, whose ball has a left (3) and a right side (5)."""
    return remade(package, path, "sided", sides=[Side("ball", 3, 5)])


def remade(package, path, name, **changes):
    """The same network in a package of its own. changes: of what `save_package` takes."""
    known = package.manifest
    same = {"network": known.network, "plan": known.plan, "scheme": known.scheme, "patch": known.patch}
    return save_package(path, name=name, state_dict=package.load_weights(), **{**same, **changes})


def example(generator, shape, channels):
    """Images (C, D, H, W) and classes (D, H, W) of one ball, or two that touch where there are two channels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    middle = generator.uniform(0.3, 0.7, 3) * shape
    classes = np.zeros(shape, np.uint8)
    classes[np.linalg.norm(grid - middle, axis=-1) < generator.uniform(4, 6)] = 1
    if channels == 2:
        classes[np.linalg.norm(grid - middle, axis=-1) < 3] = 2
    noise = generator.normal(100, 8, (channels, *shape))
    noise[-1][classes > 0] += 200
    if channels == 2:
        noise[0][classes == 2] += 200
    return noise, classes


def model_info(package):
    """What the panel knows of a package."""
    manifest = package.manifest
    sides = {side.label: (side.left_value, side.right_value) for side in manifest.sides}
    return SimpleNamespace(
        name=package.name,
        path=str(package.path),
        sha256=manifest.sha256,
        channels=tuple(
            SimpleNamespace(name=c.name, modality=c.modality, optional=c.optional) for c in manifest.plan.channels
        ),
        labels=tuple(
            SimpleNamespace(
                name=one.name,
                value=one.output_value,
                colour=one.colour,
                terminology=one.terminology,
                sides=sides.get(one.name, ()),
                sided=one.name in sides,
                parts=one.values if manifest.scheme.regions else (),
            )
            for one in manifest.scheme.labels
        ),
        cropAround=() if manifest.plan.crop is None else manifest.plan.crop.around,
        largestMm=None if manifest.plan.crop is None else manifest.plan.crop.largest_mm,
        mirrored=2 ** len(manifest.mirror_axes),
        onePiece=manifest.one_piece,
        leastConfidence=manifest.expected.confidence,
    )


def rotation(degrees, axis=(1.0, 2.0, 3.0)):
    return Rotation.from_rotvec(np.radians(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()


def matrix(directions=None, spacing=(1.0, 1.0, 1.0), origin=(-10.0, 20.0, 5.0)):
    """4x4 (i, j, k, 1) -> RAS."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if directions is None else directions) * spacing
    affine[:3, 3] = origin
    return affine


MATRICES = {
    "straight": matrix(),
    "LPS": matrix(np.diag([-1.0, -1.0, 1.0])),
    "mirrored": matrix(np.diag([-1.0, 1.0, 1.0]), (1.0, 0.8, 1.3)),
    "sagittal": matrix(np.eye(3)[:, [2, 0, 1]] * [1, -1, -1], (0.9, 0.9, 1.2)),
    "oblique": matrix(rotation(28), (0.9, 1.1, 1.0)),
}


def add_volume(scene, array, affine=None, name="volume", kind="vtkMRMLScalarVolumeNode"):
    """A volume node with these voxels (K, J, I)."""
    node = scene.AddNewNodeByClass(kind, name)
    image = vtk.vtkImageData()
    image.SetDimensions(*array.shape[2::-1])
    flat = np.ascontiguousarray(array).reshape(array.shape[0] * array.shape[1] * array.shape[2], -1)
    image.GetPointData().SetScalars(numpy_to_vtk(flat, deep=True))
    node.SetAndObserveImageData(image)
    affine = matrix() if affine is None else affine
    vtk_matrix = vtk.vtkMatrix4x4()
    vtk_matrix.DeepCopy(affine.ravel().tolist())
    node.SetIJKToRASMatrix(vtk_matrix)
    return node


def add_transform(scene, affine, name="moved"):
    """A linear transform node with this 4x4 to its parent."""
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    vtk_matrix = vtk.vtkMatrix4x4()
    vtk_matrix.DeepCopy(affine.ravel().tolist())
    node.SetMatrixTransformToParent(vtk_matrix)
    return node


def dice(first, second):
    return 2 * np.count_nonzero(first & second) / max(1, np.count_nonzero(first) + np.count_nonzero(second))
