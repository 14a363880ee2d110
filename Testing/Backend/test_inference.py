"""Segmenting: exactly the network's answer, on the input's own grid, within the memory there is."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from grids import GRIDS, REGIONS
from monai.inferers.utils import sliding_window_inference
from tiny_datasets import GRIDS as PHANTOM_GRIDS
from tiny_datasets import files_up_to, leftovers, phantom

from invres import InvresError, OutOfMemory
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.devices import choose_device
from invres.events import Recorder
from invres.inference import load_network, segment, segment_volumes
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.networks import NetworkOutput, build
from invres.planning import plan_segmentation
from invres.prediction import SegmentOptions, predict_probabilities
from invres.slidingwindow import sliding_window
from invres.volume import Geometry, Volume, read_volume, write_volume

SCHEME = LabelScheme((Label("a", (10,), 10), Label("b", (150,), 150), Label("c", (250,), 250)))
NONE = (0, 0, 0)


class Known(torch.nn.Module):
    """A network that knows the answer: intensity 100 k is class k, or for regions, every region from k up."""

    def __init__(self, classes, regions=False, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.classes, self.regions = classes, regions
        self.windows = []

    def forward(self, x):
        self.windows += [tuple(x.shape[2:])] * len(x)
        centres = 100.0 * torch.arange(self.classes, device=x.device).reshape(1, -1, 1, 1, 1)
        if self.regions:
            return NetworkOutput(self.scale * (x[:, :1] - centres - 50) / 20)
        return NetworkOutput(-self.scale * (x[:, :1] - centres).abs() / 20)


class TooLarge(Known):
    """Has no memory for windows with more voxels than `most`."""

    def __init__(self, classes, most, error):
        super().__init__(classes)
        self.most, self.error = most, error

    def forward(self, x):
        if x[0, 0].numel() > self.most:
            self.windows.append(tuple(x.shape[2:]))
            raise self.error
        return super().forward(x)


def package_of(path, scheme=SCHEME, channels=("CT",), spacing_mm=(1.0, 1.0, 1.0), patch=(8, 9, 7), **network):
    """A package whose preparation leaves intensities as they are (CT without a clip)."""
    config = NetworkConfig(
        **{"channels": (4, 16), **network}, in_channels=len(channels), out_channels=scheme.out_channels
    )
    plan = PreparationPlan(tuple(ChannelPlan(name, "CT") for name in channels), spacing_mm, crop_to_nonzero=False)
    net = build(config)
    return save_package(
        path, name="known", network=net.config, state_dict=net.state_dict(), plan=plan, scheme=scheme, patch=patch
    )


def steps_volume(grid, classes=4, seed=0):
    """Intensities 0, 100, 200, ... at random, and the classes."""
    number = np.random.default_rng(seed).integers(0, classes, grid.shape)
    return Volume((100.0 * number).astype(np.float32), grid), number


# --- the sliding window --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [(), (0,), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("window", [(8, 8, 8), (16, 7, 9), (64, 64, 64), (5, 64, 3), (20, 17, 23)])
def test_a_function_of_the_voxel_is_returned_exactly(window, mirror):
    image = torch.rand(1, 20, 17, 23) * 300
    for overlap, regions in ((0.0, False), (0.5, True), (0.75, False)):
        network = Known(4, regions)
        options = SegmentOptions(overlap=overlap, mirror_axes=mirror)
        found = predict_probabilities(network, image, window, regions, options)
        logits = network(image[None]).logits[0]
        wanted = logits.sigmoid() if regions else logits.softmax(dim=0)
        assert found.shape == (4, 20, 17, 23) and found.dtype == torch.float32
        assert torch.allclose(found, wanted, atol=2e-6)


class Cumulative(torch.nn.Module):
    """Depends on the direction of every axis, so that a wrong flip shows."""

    def forward(self, x):
        total = x.cumsum(2) + 2 * x.cumsum(3) + 3 * x.cumsum(4)
        return NetworkOutput(torch.cat([total, -total], dim=1) / 50)


@pytest.mark.parametrize("mirror", [(), (0,), (1,), (2,), (0, 2), (2, 1, 0)])
def test_mirrored_predictions_are_turned_back_and_averaged(mirror):
    image = torch.randn(1, 5, 6, 7)
    found = predict_probabilities(Cumulative(), image, (5, 6, 7), False, SegmentOptions(mirror_axes=mirror))
    axes = [axis + 1 for axis in mirror]
    flips = [some for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]
    logits = [Cumulative()(image.flip(flip)[None]).logits[0].flip(flip) for flip in flips]
    assert torch.allclose(found, torch.stack(logits).mean(dim=0).softmax(dim=0), atol=1e-6)


class Numbered(torch.nn.Module):
    """Returns how many windows it has seen before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        numbers = torch.arange(self.count, self.count + len(x), dtype=x.dtype)
        self.count += len(x)
        return NetworkOutput(numbers.reshape(-1, 1, 1, 1, 1) + torch.zeros_like(x))


def test_windows_are_joined_with_weights_that_fall_from_their_middle():
    found = predict_probabilities(Numbered(), torch.zeros(1, 8, 8, 12), (8, 8, 8), True, SegmentOptions(overlap=0.5))
    seam = torch.logit(found[0, 4, 4])
    assert torch.allclose(seam[:4], torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(seam[8:], torch.tensor(1.0), atol=1e-5)
    # Gaussian of 8 / 8 = 1 voxel around 3.5: at voxel 5 the windows' middles are 1.5 and 2.5 voxels away.
    near, far = np.exp(-(1.5**2) / 2), np.exp(-(2.5**2) / 2)
    assert float(seam[5]) == pytest.approx(far / (near + far), abs=1e-3)
    assert torch.allclose(seam[4:8] + seam[4:8].flip(0), torch.tensor(1.0), atol=1e-5)


class Surroundings(torch.nn.Module):
    """What it says of a voxel depends on the whole window, so that windows disagree where they overlap."""

    def forward(self, x):
        inside = x - x.mean(dim=(2, 3, 4), keepdim=True)
        return NetworkOutput(torch.cat([inside, inside.cumsum(3) / 9, -inside], dim=1))


@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("window", [(8, 8, 8), (16, 7, 9), (64, 9, 64), (20, 17, 23), (21, 18, 26)])
def test_windows_are_joined_as_monai_joins_them(window, overlap):
    """With the weights given, as MONAI's own are bounded below, at a thousandth."""
    bells = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in window]
    weights = bells[0][:, None, None] * bells[1][:, None] * bells[2]
    image = torch.randn(1, 20, 17, 23, generator=torch.Generator().manual_seed(0))
    found = sliding_window(lambda tiles: Surroundings()(tiles).logits, image, window, overlap, 2, "cpu")
    wanted = sliding_window_inference(
        image[None],
        window,
        2,
        lambda tiles: Surroundings()(tiles).logits,
        overlap=overlap,
        mode="gaussian",
        padding_mode="replicate",
        roi_weight_map=weights,
    )
    assert torch.allclose(found, wanted[0], atol=2e-5)


@pytest.mark.parametrize("window", [(8, 8, 8), (7, 17, 30), (32, 32, 32)])
def test_progress_counts_every_window_and_mirrored_one(window):
    report, network = Recorder(), Known(2)
    options = SegmentOptions(overlap=0.3, mirror_axes=(0, 2))
    predict_probabilities(network, torch.zeros(1, 20, 17, 23), window, False, options, report=report)
    events = [(event["done"], event["total"]) for event in report.events]
    assert events[0] == (0, len(network.windows)) and events[-1] == (len(network.windows),) * 2
    done = [done for done, _ in events]
    assert done == sorted(done) and all(count % 4 == 0 for count in done)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"overlap": overlap} for overlap in (1.0, -0.1, float("nan"))),
        *({"mirror_axes": axes} for axes in ((3,), (-1,), (0, 0))),
        *({"window": window} for window in ((0, 0, 8), (-8, 8, 8))),
    ],
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvresError, match=r"must be|Mirror axes"):
        SegmentOptions(**wrong)


# --- the way to the input's own grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [*GRIDS.values(), *PHANTOM_GRIDS], ids=[*GRIDS, "p0", "p1", "p2"])
def test_the_segmentation_lies_on_the_inputs_grid_with_the_files_values(tmp_path, grid):
    volume, number = steps_volume(grid)
    package = package_of(tmp_path / "model", spacing_mm=grid.canonical().spacing_mm)
    labels, probabilities, prepared = segment_volumes(package, Known(4, scale=100.0), [volume])
    assert labels.geometry.same_as(grid, tolerance_mm=1e-6)
    assert np.array_equal(labels.array, np.array([0, 10, 150, 250])[number])
    assert labels.array.dtype == np.uint8
    assert probabilities.shape == (4, *prepared.geometry.shape)
    assert prepared.geometry.shape == grid.canonical().shape


@pytest.mark.parametrize("ending", [".nii.gz", ".seg.nrrd", ".nrrd", ".mha"])
@pytest.mark.parametrize("spacing_mm", [(1.3, 1.6, 0.7), (4.0, 2.5, 2.5)], ids=["finer", "coarser"])
def test_a_resampled_case_comes_back_on_its_own_grid(tmp_path, ending, spacing_mm):
    grid = Geometry((20, 37, 43), (2.5, 1.1, 0.8), (3, -7, 11), GRIDS["oblique"].direction)
    _, reference = phantom(grid)
    image = Volume(reference.array.astype(np.float32) * 100, grid)
    write_volume(tmp_path / "image.nii.gz", image)
    package = package_of(tmp_path / "model", spacing_mm=spacing_mm, patch=(16, 16, 16))
    output = tmp_path / f"segmentation{ending}"
    summary = segment(package, {"": tmp_path / "image.nii.gz"}, output, network=Known(4))
    found = read_volume(output, kind="labels")
    assert found.geometry.same_as(read_volume(tmp_path / "image.nii.gz").geometry)
    wanted = np.array([0, 10, 150, 250])[reference.array]
    assert set(np.unique(found.array)) == {0, 10, 150, 250}
    assert (found.array == wanted).mean() > 0.93
    for label in SCHEME.labels:
        count = int((found.array == label.output_value).sum())
        assert summary["volumes_ml"][label.name] == pytest.approx(count * 2.5 * 1.1 * 0.8 / 1000, abs=2e-3)
    assert summary["model_sha256"] == package.manifest.sha256
    assert leftovers(tmp_path) == []


def test_probabilities_are_written_on_the_inputs_grid_and_sum_to_one(tmp_path):
    grid = GRIDS["oblique"]
    volume = Volume(np.zeros(grid.shape, np.float32), grid)
    volume.array[2:-2, 3:-1, 1:-4] = np.random.default_rng(0).uniform(1, 300, volume.array[2:-2, 3:-1, 1:-4].shape)
    write_volume(tmp_path / "image.nrrd", volume)
    package = package_of(tmp_path / "model", spacing_mm=(2.0, 0.6, 0.5))
    cropping = dataclasses.replace(package.manifest.plan, crop_to_nonzero=True)
    package = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, plan=cropping))
    found = segment(
        package,
        {"ct": tmp_path / "image.nrrd"},
        tmp_path / "out.nrrd",
        probabilities_path=tmp_path / "p.nii.gz",
        uncertainty_path=tmp_path / "u.nrrd",
        network=Known(4),
    )
    files = found["probabilities"]
    assert [Path(file).name for file in files] == [f"p_{name}.nii.gz" for name in ("background", "a", "b", "c")]
    maps = [read_volume(file) for file in files]
    assert all(one.geometry.same_as(grid) and one.array.dtype == np.float32 for one in maps)
    total = np.sum([one.array for one in maps], axis=0)
    assert np.abs(total - 1).max() < 1e-5
    labels = read_volume(tmp_path / "out.nrrd", kind="labels").array
    likeliest = np.array([0, 10, 150, 250])[np.argmax([one.array for one in maps], axis=0)]
    assert (likeliest == labels).all()
    assert maps[0].array[0].min() == 1.0, "beyond the crop there is background"
    unsure = read_volume(found["uncertainty"])
    assert unsure.geometry.same_as(grid) and unsure.array.dtype == np.float32
    assert np.abs(unsure.array - (1 - np.max([one.array for one in maps], axis=0))).max() < 1e-6
    assert 0.3 < unsure.array.max() <= 0.75 and unsure.array[0].max() == 0.0


def test_overlapping_regions_are_written_one_over_the_other_and_measured_whole(tmp_path):
    grid = PHANTOM_GRIDS[1]
    volume, number = steps_volume(grid)
    write_volume(tmp_path / "image.mha", volume)
    package = package_of(tmp_path / "model", scheme=REGIONS, spacing_mm=grid.canonical().spacing_mm)
    summary = segment(
        package,
        {"": tmp_path / "image.mha"},
        tmp_path / "out.seg.nrrd",
        probabilities_path=tmp_path / "p.nrrd",
        uncertainty_path=tmp_path / "u.nii.gz",
        network=Known(3, regions=True),
    )
    # Intensity 100 lies in the first region, 200 in the first two, 300 in all; they are written as 2, 1 and 4.
    found = read_volume(tmp_path / "out.seg.nrrd", kind="labels").array
    assert np.array_equal(found, np.array([0, 2, 1, 4])[number])
    voxel_ml = np.prod(grid.spacing_mm) / 1000
    wanted = {name: (number > index).sum() * voxel_ml for index, name in enumerate(("whole", "core", "hot"))}
    assert summary["volumes_ml"] == pytest.approx(wanted, abs=1e-3)
    maps = [read_volume(file).array for file in summary["probabilities"]]
    assert len(maps) == 3 and all(one.min() >= 0 and one.max() <= 1 for one in maps)
    assert np.array_equal(maps[0] > 0.5, number > 0)
    unsure = read_volume(tmp_path / "u.nii.gz").array
    assert np.abs(unsure - np.max([np.minimum(one, 1 - one) for one in maps], axis=0)).max() < 1e-6
    assert 0 < unsure.max() <= 0.5


def test_a_model_that_tells_left_from_right_is_not_mirrored_across_the_middle(tmp_path):
    scheme = LabelScheme((Label("Left kidney", (1,), 1), Label("Right kidney", (2,), 2)))
    package = package_of(tmp_path / "model", scheme)
    volume, _ = steps_volume(GRIDS["canonical"], 3)
    write_volume(tmp_path / "image.nii.gz", volume)
    inputs, network = {"": tmp_path / "image.nii.gz"}, Known(3)
    with pytest.raises(InvresError, match=r"tells left from right \(Left kidney\)"):
        segment(package, inputs, tmp_path / "out.nii.gz", SegmentOptions(mirror_axes=(0, 2)), network=network)
    assert not (tmp_path / "out.nii.gz").exists()
    segment(package, inputs, tmp_path / "out.nii.gz", SegmentOptions(mirror_axes=(0, 1)), network=network)


def test_a_window_beyond_the_volume_is_cut_to_it(tmp_path):
    """Or a wish for 5000 voxels would be filled up with repeated border until memory runs out."""
    package = package_of(tmp_path / "model")
    volume, _ = steps_volume(GRIDS["canonical"])
    write_volume(tmp_path / "image.nii.gz", volume)
    options, network = SegmentOptions(window=(5000, 5000, 6)), Known(4)
    found = segment(package, {"": tmp_path / "image.nii.gz"}, tmp_path / "o.nii.gz", options, network=network)
    depth, height, width = found["settings"]["window"]
    shape = volume.geometry.canonical().shape
    assert (depth, height, width) == (max(shape[0], 8), max(shape[1], 9), 6)
    assert plan_segmentation(
        package.manifest, shape, (1.0, 1.0, 1.0), torch.device("cpu"), (5000, 5000, 6)
    ).wanted_window == (depth, height, width)


def test_the_vae_branch_takes_no_part_in_segmenting(tmp_path):
    vae = VAEConfig(patch=(16, 16, 16), latent=4, reduced_channels=2)
    config = NetworkConfig(channels=(4, 16), vae=vae, out_channels=4)
    trained = build(config)
    plan = PreparationPlan((ChannelPlan("CT", "CT"),))
    package = save_package(
        tmp_path / "model",
        name="vae",
        network=trained.config,
        state_dict=trained.state_dict(),
        plan=plan,
        scheme=SCHEME,
        patch=(16, 16, 16),
    )
    network = load_network(package, torch.device("cpu"))
    image = torch.randn(1, 1, 16, 16, 16)
    assert network.vae is None and not network.training
    with torch.no_grad():
        assert torch.equal(network(image).logits, trained.eval()(image).logits)


# --- inputs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    grid = PHANTOM_GRIDS[0]
    first, second = steps_volume(grid, seed=1)[0], steps_volume(grid, seed=2)[0]
    write_volume(folder / "t1.nii.gz", first)
    write_volume(folder / "flair.nii.gz", second)
    joined = sitk.JoinSeries([sitk.ReadImage(str(folder / name)) for name in ("t1.nii.gz", "flair.nii.gz")])
    sitk.WriteImage(joined, str(folder / "both.nii.gz"))
    spacing_mm = grid.canonical().spacing_mm
    return folder, package_of(folder / "model", channels=("T1", "FLAIR"), spacing_mm=spacing_mm), first


@pytest.mark.parametrize("names", [("T1", "FLAIR"), ("flair", "t1"), ("Flair", "T1")])
def test_channels_are_matched_by_name_in_any_order_and_case(two_channels, tmp_path, names):
    folder, package, first = two_channels
    inputs = {name: folder / f"{name.lower()}.nii.gz" for name in names}
    segment(package, inputs, tmp_path / "out.nii.gz", network=Known(4, scale=100.0))
    found = read_volume(tmp_path / "out.nii.gz", kind="labels").array
    assert np.array_equal(found, np.array([0, 10, 150, 250])[(first.array / 100).astype(int)]), "T1 is the first"


def test_a_4d_file_gives_all_channels(two_channels, tmp_path):
    folder, package, first = two_channels
    segment(package, {"": folder / "both.nii.gz"}, tmp_path / "out.nii.gz", network=Known(4, scale=100.0))
    found = read_volume(tmp_path / "out.nii.gz", kind="labels").array
    assert np.array_equal(found, np.array([0, 10, 150, 250])[(first.array / 100).astype(int)])


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"T1": "t1"}, "takes the 2 channels T1, FLAIR; got T1"),
        ({"T1": "t1", "T2": "flair"}, "got T1, T2"),
        ({"T1": "t1", "FLAIR": "flair", "T2": "t1"}, "got T1, FLAIR, T2"),
        ({"T1": "t1", "t1": "t1", "FLAIR": "flair"}, "got T1, t1, FLAIR"),
        ({"": "t1", "FLAIR": "flair"}, "got a file without a channel name, FLAIR"),
        ({"": "t1"}, "t1.nii.gz holds 1 volume"),
    ],
)
def test_wrong_channels_are_told_with_the_right_ones(two_channels, tmp_path, inputs, told):
    folder, package, _ = two_channels
    paths = {name: folder / f"{file}.nii.gz" for name, file in inputs.items()}
    with pytest.raises(InvresError) as caught:
        segment(package, paths, tmp_path / "out.nii.gz")
    assert told in caught.value.message
    assert "--input T1=FILE --input FLAIR=FILE" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "probabilities", "uncertainty"),
    [
        ("out.png", None, None),
        ("out", None, None),
        ("out.nii.gz", "p.dcm", None),
        ("folder.nrrd", None, None),
        ("out.nii.gz", None, "u"),
        ("out.nii.gz", None, "folder.nrrd"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path, output, probabilities, uncertainty):
    (tmp_path / "folder.nrrd").mkdir()
    package = package_of(tmp_path / "model")
    network = Known(4)
    with pytest.raises(InvresError, match=r"cannot be written|is a folder"):
        segment(
            package,
            {"": tmp_path / "is_not_even_opened"},
            tmp_path / output,
            probabilities_path=None if probabilities is None else tmp_path / probabilities,
            uncertainty_path=None if uncertainty is None else tmp_path / uncertainty,
            network=network,
        )
    assert network.windows == []


def test_a_full_disk_leaves_the_older_segmentation(two_channels, tmp_path):
    folder, package, _ = two_channels
    (tmp_path / "out.seg.nrrd").write_text("older")
    with files_up_to(500), pytest.raises(InvresError, match="could not be written"):
        segment(package, {"": folder / "both.nii.gz"}, tmp_path / "out.seg.nrrd", network=Known(4))
    assert (tmp_path / "out.seg.nrrd").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.seg.nrrd"]


# --- devices and memory --------------------------------------------------------------------------------------------


def test_the_cpu_and_what_is_there_can_be_chosen():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "mps", "cuda:-1", "CPU please"])
def test_a_device_that_is_not_here_is_told(name):
    with pytest.raises(InvresError, match="cpu"):
        choose_device(name)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "numpy", "allocator", "no engine", "cuDNN"])
def test_when_memory_runs_out_smaller_windows_give_the_right_result(tmp_path, error):
    volume, number = steps_volume(Geometry((40, 37, 70), (1.0, 1.0, 1.0), NONE, np.eye(3)[:, ::-1]))
    package = package_of(tmp_path / "model", patch=(48, 64, 80))
    network, report = TooLarge(4, 32 * 32 * 40, error), Recorder()
    network.scale.data *= 100
    labels = segment_volumes(package, network, [volume], report=report)[0]
    assert np.array_equal(labels.array, np.array([0, 10, 150, 250])[number])
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert warnings == ["Memory ran out; the window is now 32x32x40 voxels."]
    assert set(network.windows) == {(48, 64, 80), (32, 32, 40)}


@pytest.mark.parametrize("window", [(32, 256, 256), (16, 300, 40), (200, 20, 32)])
def test_flat_windows_are_made_smaller_too(tmp_path, window):
    volume, number = steps_volume(Geometry((18, 40, 36), (1.0, 1.0, 1.0), NONE, np.eye(3)[:, ::-1]))
    package = package_of(tmp_path / "model", patch=window)
    network, report = TooLarge(4, 40 * 32 * 40, MemoryError()), Recorder()
    network.scale.data *= 100
    labels = segment_volumes(package, network, [volume], report=report)[0]
    assert np.array_equal(labels.array, np.array([0, 10, 150, 250])[number])
    assert all(w <= size for used in network.windows for w, size in zip(used, window, strict=True))
    assert any(event["event"] == "warning" for event in report.events)


def test_when_nothing_helps_it_is_told_with_exit_code_3(tmp_path):
    volume, _ = steps_volume(GRIDS["canonical"])
    package = package_of(tmp_path / "model", patch=(96, 64, 40))
    network = TooLarge(4, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(OutOfMemory, match="even in the smallest windows") as caught:
        segment_volumes(package, network, [volume])
    assert caught.value.exit_code == 3 and "crop" in caught.value.hint
    assert network.windows == [(96, 64, 40), (48, 32, 32), (32, 32, 32)]


def test_other_faults_are_not_taken_for_a_lack_of_memory(tmp_path):
    volume, _ = steps_volume(GRIDS["canonical"])
    network = TooLarge(4, 0, RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        segment_volumes(package_of(tmp_path / "model"), network, [volume])
    assert len(network.windows) == 1


class OnlyOnCPU(Known):
    """Has no memory on a card."""

    def forward(self, x):
        if x.is_cuda:
            self.windows.append(tuple(x.shape[2:]))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_when_a_card_is_too_small_the_cpu_takes_over(tmp_path):
    volume, number = steps_volume(GRIDS["canonical"])
    package = package_of(tmp_path / "model", patch=(64, 64, 64))
    network, report = OnlyOnCPU(4, scale=100.0).to("cuda"), Recorder()
    labels = segment_volumes(package, network, [volume], report=report)[0]
    assert np.array_equal(labels.array, np.array([0, 10, 150, 250])[number])
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert len(warnings) == 3
    assert "main memory" in warnings[0] and "32x32x32" in warnings[1] and "the CPU takes over" in warnings[2]
    assert next(network.parameters()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_and_the_cpu_give_the_same_segmentation(tmp_path):
    images, _ = phantom(PHANTOM_GRIDS[0])
    package = package_of(tmp_path / "model", patch=(16, 16, 16))
    results = [
        segment_volumes(package, load_network(package, torch.device(device)), images)[1] for device in ("cpu", "cuda:0")
    ]
    assert np.abs(results[0] - results[1]).max() < 1e-2
