"""The plan of a segmentation against what a real one takes; regions of interest; provenance; deleting packages."""

from __future__ import annotations

import dataclasses
import platform
import tracemalloc

import numpy as np
import pytest
import torch
from grids import GRIDS as ORIENTATIONS
from grids import REGIONS
from tiny_datasets import GRIDS, invres, phantom

from invres import InvresError, __version__, devices
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan
from invres.devices import DeviceInfo
from invres.inference import load_network, segment, segment_volumes
from invres.memory import PeakResident, predict_forward
from invres.modelpackage import delete_package, open_package, save_package
from invres.networkconfig import NetworkConfig
from invres.networks import NetworkOutput, build
from invres.pace import remember_speed, remember_windows, windows_of
from invres.planning import _bytes, plan_segmentation
from invres.prediction import SegmentOptions
from invres.preprocessing import PreparedCase, prepare
from invres.region import clear_outside, crop_to_region, region_shape
from invres.volume import Geometry, Volume, read_volume, write_volume

CPU = torch.device("cpu")
SCHEME = LabelScheme((Label("a", (1,), 1), Label("b", (2,), 2), Label("c", (3,), 3)))
RAS = np.eye(3)[:, ::-1]
PLAIN = Geometry((40, 44, 48), (1.0, 1.0, 1.0), (0, 0, 0), RAS)


@pytest.fixture(autouse=True)
def nothing_has_run(monkeypatch):
    """The models here have the same weights, by which a process remembers them."""
    monkeypatch.setattr("invres.pace._SPEED", {})
    monkeypatch.setattr("invres.pace._WINDOWS", {})


def package(
    path,
    scheme=SCHEME,
    channels=2,
    spacing_mm=(1.0, 1.0, 1.0),
    patch=(16, 16, 16),
    modality="MR",
    widths=(4, 16),
    name="fully_invres",
):
    config = NetworkConfig(name, channels, scheme.out_channels, channels=widths)
    torch.manual_seed(0)
    net = build(config)
    return save_package(
        path,
        name="planned",
        network=net.config,
        state_dict=net.state_dict(),
        plan=PreparationPlan(tuple(ChannelPlan(f"c{i}", modality) for i in range(channels)), spacing_mm),
        scheme=scheme,
        patch=patch,
    )


def images(grid, channels=2):
    rng = np.random.default_rng(0)
    return [Volume(rng.uniform(1, 100, grid.shape).astype(np.float32), grid) for _ in range(channels)]


class Known(torch.nn.Module):
    """Class k where the intensity is 100 k."""

    def __init__(self, classes):
        super().__init__()
        self.scale, self.classes = torch.nn.Parameter(torch.tensor(100.0)), classes

    def forward(self, x):
        centres = 100.0 * torch.arange(self.classes).reshape(1, -1, 1, 1, 1)
        return NetworkOutput(-self.scale * (x[:, :1] - centres).abs() / 20)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patch", "widths", "mirror_axes"),
    [
        ("fully_invres", (16, 16, 16), (4, 16), ()),
        ("fully_invres", (32, 32, 32), (16, 48), ()),
        ("unet3d", (24, 24, 24), (8, 16), (0, 2)),
        ("partially_invres", (24, 24, 24), (8, 16), ()),
        ("fully_invres", (24, 24, 24), (8, 16), (0, 2)),
        ("fully_invres", (48, 64, 56), (8, 16), ()),
    ],
)
def test_the_predicted_peak_is_what_a_real_run_measures(tmp_path, name, patch, widths, mirror_axes):
    model = package(tmp_path / "m", patch=patch, name=name, widths=widths)
    files = {}
    for index, volume in enumerate(images(PLAIN)):
        files[f"c{index}"] = tmp_path / f"{index}.nrrd"
        write_volume(files[f"c{index}"], volume, compress=False)
    options = SegmentOptions("cpu", mirror_axes=mirror_axes)
    measured = segment(model, files, tmp_path / "o.nrrd", options)["measured_bytes"]
    plan = plan_segmentation(model.manifest, PLAIN.shape, PLAIN.spacing_mm, CPU, mirror_axes=mirror_axes)
    assert 0.99 * measured <= plan.predicted_bytes <= 1.2 * measured


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (0.7, 0.8, 0.9)])
@pytest.mark.parametrize("first", [False, True])
def test_preparing_stays_below_its_prediction_whatever_is_scaled_first(tmp_path, spacing_mm, first):
    """In images without empty background every voxel is inside the mask, which takes most memory."""
    grid = Geometry((60, 64, 68), (1.0, 1.0, 1.0), (0, 0, 0), RAS * [-1, 1, -1])
    plan = PreparationPlan((ChannelPlan("a"), ChannelPlan("b")), spacing_mm, normalise_first=first)
    volumes = images(grid)
    tracemalloc.start()
    prepared = prepare(volumes, None, plan, SCHEME).geometry.shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    manifest = dataclasses.replace(package(tmp_path / "m").manifest, plan=plan)
    files = sum(volume.array.nbytes for volume in volumes)
    _, on_host = _bytes(manifest, grid.shape, prepared, prepared, (16, 16, 16), 0.5, torch.device("cuda"), False)
    assert peak + files <= on_host


def test_where_the_network_is_the_largest_part_the_prediction_is_exact(tmp_path):
    model = package(tmp_path / "m", patch=(32, 32, 32), channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    found = segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", SegmentOptions("cpu"))
    plan = plan_segmentation(model.manifest, PLAIN.shape, PLAIN.spacing_mm, CPU)
    assert plan.predicted_bytes == pytest.approx(found["measured_bytes"], rel=0.01)
    assert plan.windows == found["settings"]["windows"] and list(plan.window) == found["settings"]["window"]
    assert plan.shape == PLAIN.shape and plan.device == "cpu" and plan.host_bytes == plan.predicted_bytes


def test_a_larger_volume_window_or_network_needs_more(tmp_path):
    model = package(tmp_path / "m", patch=(32, 32, 32))
    wide = package(tmp_path / "w", patch=(32, 32, 32), widths=(16, 48)).manifest

    def need(manifest=model.manifest, shape=(40, 40, 40), **options):
        return plan_segmentation(manifest, shape, (1.0, 1.0, 1.0), CPU, **options).predicted_bytes

    assert need() < need(shape=(80, 80, 80))
    assert need(window=(16, 16, 16)) < need()
    assert need() < need(wide)
    # With many classes the network's answer takes more than preparing the image does.
    labels = LabelScheme(tuple(Label(f"label {value}", (value,), value) for value in range(1, 20)))
    many = package(tmp_path / "many", labels, patch=(32, 32, 32)).manifest
    assert need(many, shape=(96, 96, 96), roi_shape=(10, 10, 10)) < need(many, shape=(96, 96, 96))


def test_the_forward_of_a_window_is_measured_without_allocating(tmp_path):
    config = NetworkConfig(channels=(16, 48, 96), in_channels=4, out_channels=4)
    before = PeakResident()
    weights, forward = predict_forward(config, (160, 160, 160))
    assert weights == sum(4 * p.numel() for p in build(config).parameters())
    assert forward > 4 * 160**3 * 16
    growth = before.growth_bytes()
    assert growth is None or growth < forward / 4


@pytest.mark.parametrize(
    ("free_bytes", "fits", "some_window"), [(10**12, True, True), (None, True, True), (1000, False, False)]
)
def test_what_is_free_decides_what_fits(tmp_path, monkeypatch, free_bytes, fits, some_window):
    monkeypatch.setattr("invres.planning.device_info", lambda device: DeviceInfo("cpu", "CPU", free_bytes, 10**12))
    model = package(tmp_path / "m", patch=(64, 64, 64))
    plan = plan_segmentation(model.manifest, (80, 80, 80), (1.0, 1.0, 1.0), CPU)
    assert plan.fits is fits and (plan.seconds is not None) is some_window
    assert plan.window == plan.wanted_window == (64, 64, 64)
    assert ("too little" in plan.sentence) is not some_window and plan.sentence.endswith(".")


def test_the_largest_window_that_fits_is_found(tmp_path, monkeypatch):
    manifest = package(tmp_path / "m", patch=(64, 64, 64), channels=1, widths=(16, 48)).manifest
    whole = plan_segmentation(manifest, (64, 64, 64), (1.0, 1.0, 1.0), CPU)
    free = int(whole.predicted_bytes * 1.1) - 1
    monkeypatch.setattr("invres.planning.device_info", lambda device: DeviceInfo("cpu", "CPU", free, 10**12))
    plan = plan_segmentation(manifest, (64, 64, 64), (1.0, 1.0, 1.0), CPU)
    assert not plan.fits and plan.wanted_window == (64, 64, 64) and plan.window < (64, 64, 64)
    assert all(side >= 32 and side % 2 == 0 for side in plan.window)
    assert plan.predicted_bytes * 1.1 <= free and "64 x 64 x 64" in plan.sentence


def test_the_time_comes_from_the_last_run_of_the_model(tmp_path):
    manifest = package(tmp_path / "m").manifest
    remember_speed(manifest.sha256, "cpu", 10, (16, 16, 16), 1000.0)
    plan = plan_segmentation(manifest, (16, 16, 32), (1.0, 1.0, 1.0), CPU)
    assert plan.windows == 3 and plan.seconds == pytest.approx(300, abs=2)


def test_the_number_of_windows_is_that_of_the_last_image_of_this_size(tmp_path):
    """Empty borders are cropped, which only the image shows: before the first one the time is a bound, and said so."""
    model = package(tmp_path / "m", channels=1)
    array = images(PLAIN, 1)[0].array.copy()
    array[:, 20:], array[..., 20:] = 0, 0
    write_volume(tmp_path / "i.nrrd", Volume(array, PLAIN))

    def plan(shape=PLAIN.shape, **options):
        return plan_segmentation(model.manifest, shape, PLAIN.spacing_mm, CPU, **options)

    before = plan()
    assert not before.windows_known and ", at most about " in before.sentence
    turned = Geometry(PLAIN.shape[::-1], PLAIN.spacing_mm, (5, 6, 7), RAS[:, ::-1])  # the same, with axes exchanged
    windows = segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", SegmentOptions("cpu"))["settings"][
        "windows"
    ]
    after = plan()
    assert after.windows == windows < before.windows / 2 and after.windows_known
    assert ", about " in after.sentence and f"({windows} windows of " in after.sentence
    assert after.predicted_bytes == before.predicted_bytes, "the memory stays a bound"
    assert windows_of(model.id, turned, (16, 16, 16), 0.5) == windows
    for other in (plan((40, 44, 49)), plan(window=(24, 24, 24)), plan(overlap=0.25), plan(roi_shape=(9, 9, 9))):
        assert not other.windows_known


def test_in_how_many_places_a_model_of_crops_will_look_is_left_open(tmp_path):
    model = package(tmp_path / "m", channels=1)

    def sentence():
        crop, whole = (16, 16, 16), (40, 44, 48)
        return plan_segmentation(model.manifest, crop, PLAIN.spacing_mm, CPU, cut_from=whole).sentence

    assert " for each place (1 window of " in sentence()
    remember_windows(model.id, PLAIN, (16, 16, 16), 0.5, 2)
    assert " for each place" not in sentence() and "at most" not in sentence() and "(2 windows of " in sentence()


def test_a_region_says_nothing_of_the_whole_image(tmp_path):
    model = package(tmp_path / "m", channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    options = SegmentOptions("cpu", roi_mm=middle_box(PLAIN, 4.0))
    segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", options)
    assert not plan_segmentation(model.manifest, PLAIN.shape, PLAIN.spacing_mm, CPU).windows_known


def test_the_time_is_of_the_right_size(tmp_path):
    model = package(tmp_path / "m", patch=(32, 32, 32), channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    plan = plan_segmentation(model.manifest, PLAIN.shape, PLAIN.spacing_mm, CPU)
    segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", SegmentOptions("cpu"))
    real = segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", SegmentOptions("cpu"))["seconds"]["total"]
    # Other programs share this machine; what matters is the order of magnitude.
    assert real / 12 < plan.seconds < real * 12 + 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", 8, 8, 8),
        ("--spacing", 1, 1, 1),
        ("--shape", 0, 8, 8, "--spacing", 1, 1, 1),
        ("--shape", 8, 8, 8, "--spacing", 1, 0, 1),
        ("--shape", 8, 8, 8, "--spacing", 1, 1, "nan"),
        ("--shape", 8, 8, 8, "--spacing", 1, 1, 1, "--roi-shape", 0, 1, 1),
        ("--shape", 8, 8, 8, "--spacing", 1, 1, 1, "--device", "cuda:99"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path, arguments):
    package(tmp_path / "m")
    outcome = invres("plan", "--model", tmp_path / "m", *arguments, "--json")
    assert outcome.code == 2 and outcome.of("error")[0]["code"] != "internal"


def test_the_command_line_plans(tmp_path):
    package(tmp_path / "m")
    arguments = ("plan", "--model", tmp_path / "m", "--shape", 20, 20, 20, "--spacing", 1, 1, 1, "--device", "cpu")
    result = invres(*arguments, "--json").of("result")[0]
    assert result["fits"] is True and result["window"] == [16, 16, 16]
    assert result["predicted_bytes"] > 0 and result["free_bytes"] > 0
    assert invres(*arguments).out.startswith("Needs ")


def test_main_memory_is_known_without_psutil(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    free, total = devices._main_memory()
    assert (free is None) == (total is None) and (free is None or 0 < free <= total)


# --- a region of interest -------------------------------------------------------------------------------------------


def inside(grid, bounds):
    index = np.stack(np.meshgrid(*(np.arange(size) for size in grid.shape), indexing="ij"))
    position = np.tensordot(grid.affine[:3, :3], index, 1) + grid.affine[:3, 3].reshape(3, 1, 1, 1)
    low, high = np.reshape(bounds, (3, 2)).T.reshape(2, 3, 1, 1, 1)
    return ((position >= low - 1e-4) & (position <= high + 1e-4)).all(axis=0)


def middle_box(grid, half_mm):
    centre = grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]
    return tuple(np.c_[centre - half_mm, centre + half_mm].ravel().tolist())


@pytest.mark.parametrize("grid", [*ORIENTATIONS.values(), *GRIDS], ids=[*ORIENTATIONS, "p0", "p1", "p2"])
def test_a_region_changes_nothing_inside_and_leaves_nothing_outside(tmp_path, grid):
    """A network that looks at single voxels must give the same inside, whatever the orientation."""
    number = np.random.default_rng(0).integers(0, 4, grid.shape)
    volume = Volume(100.0 * number.astype(np.float32), grid)
    model = package(tmp_path / "m", channels=1, modality="CT", spacing_mm=grid.canonical().spacing_mm, patch=(4, 4, 4))
    bounds = middle_box(grid, 0.25 * np.array(grid.shape).min() * np.array(grid.spacing_mm).min())
    whole = segment_volumes(model, Known(4), [volume])[0].array
    found, _, prepared = segment_volumes(model, Known(4), [volume], SegmentOptions(roi_mm=bounds))
    box = inside(grid, bounds)
    assert box.any() and not box.all()
    assert np.array_equal(found.array, np.where(box, whole, 0))
    assert found.geometry.same_as(grid, tolerance_mm=1e-6)
    assert prepared.image.size < number.size


@pytest.mark.parametrize("spacing_mm", [(1.3, 1.6, 0.7), (2.0, 2.5, 2.5)])
def test_a_region_of_a_resampled_volume_lies_where_it_belongs(tmp_path, spacing_mm):
    grid = Geometry((20, 37, 43), (2.5, 1.1, 0.8), (3, -7, 11), ORIENTATIONS["oblique"].direction)
    _, reference = phantom(grid)
    volume = Volume(reference.array.astype(np.float32) * 100, grid)
    model = package(tmp_path / "m", channels=1, modality="CT", spacing_mm=spacing_mm, patch=(8, 8, 8))
    bounds = middle_box(grid, 9.0)
    whole = segment_volumes(model, Known(4), [volume])[0].array
    found = segment_volumes(model, Known(4), [volume], SegmentOptions(roi_mm=bounds))[0].array
    box = inside(grid, bounds)
    assert not found[~box].any()
    assert (found[box] == whole[box]).mean() > 0.999


def test_intensities_are_scaled_by_the_whole_volume_whatever_the_region(tmp_path):
    images_, _ = phantom(GRIDS[0])
    model = package(tmp_path / "m", channels=1, spacing_mm=GRIDS[0].canonical().spacing_mm, patch=(8, 8, 8))
    network = load_network(model, CPU)
    whole = segment_volumes(model, network, images_)[2]
    part = segment_volumes(model, network, images_, SegmentOptions(roi_mm=middle_box(GRIDS[0], 4.0)))[2]
    start = np.round(
        np.linalg.solve(whole.geometry.affine[:3, :3], np.subtract(part.geometry.origin_mm, whole.geometry.origin_mm))
    ).astype(int)
    box = tuple(slice(a, a + size) for a, size in zip(start, part.geometry.shape, strict=True))
    assert np.array_equal(whole.image[(slice(None), *box)], part.image)
    assert part.image.size < whole.image.size


def test_the_context_around_a_region_is_at_least_a_window():
    prepared = PreparedCase("", np.zeros((1, 40, 44, 48), np.float32), None, PLAIN, PLAIN)
    for bounds in ((0, 1, 0, 1, 0, 1), (46, 60, 40, 60, 38, 60), (20, 21, 20, 21, 20, 21)):
        shape = crop_to_region(prepared, bounds, (16, 20, 64)).geometry.shape
        assert shape[0] >= 16 and shape[1] >= 20 and shape[2] == 48
    assert region_shape((1, 1, 1), (40, 44, 48), (16, 20, 64)) == (16, 20, 48)
    assert region_shape((30, 1, 1), (40, 44, 48), (16, 20, 64)) == (38, 20, 48)


def test_regions_that_overlap_are_measured_inside_the_box_only(tmp_path):
    model = package(tmp_path / "m", scheme=REGIONS, channels=1, modality="CT")
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    bounds = (10.0, 20.0, 10.0, 20.0, 10.0, 20.0)

    class Everything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return NetworkOutput(torch.full((len(x), 3, *x.shape[2:]), 2.0) * self.weight)

    found = segment(
        model,
        {"": tmp_path / "i.nrrd"},
        tmp_path / "o.seg.nrrd",
        SegmentOptions(roi_mm=bounds),
        tmp_path / "p.nrrd",
        network=Everything(),
        uncertainty_path=tmp_path / "u.nrrd",
    )
    assert set(found["volumes_ml"].values()) == {11**3 / 1000}
    maps = [read_volume(path).array for path in found["probabilities"]]
    assert all((one > 0.5).sum() == 11**3 and one[0].max() == 0 for one in maps)
    unsure = read_volume(found["uncertainty"]).array
    assert np.allclose(unsure, np.where(maps[0] > 0.5, 1 - maps[0], 0)) and unsure.max() > 0.1
    assert found["settings"]["roi_mm"] == list(bounds)


@pytest.mark.parametrize("bounds", [(90, 99, 0, 9, 0, 9), (0, 9, -99, -90, 0, 9)])
def test_a_region_beside_the_volume_is_told(tmp_path, bounds):
    model = package(tmp_path / "m", channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    with pytest.raises(InvresError, match="outside the volume") as caught:
        segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", SegmentOptions(roi_mm=bounds))
    assert caught.value.code == "empty_region" and not (tmp_path / "o.nrrd").exists()


@pytest.mark.parametrize("bounds", [(1, 0, 0, 1, 0, 1), (0, 1, 0, 1), (0, float("nan"), 0, 1, 0, 1)])
def test_a_region_that_is_no_box_is_refused(bounds):
    with pytest.raises(InvresError, match="six ends"):
        SegmentOptions(roi_mm=bounds)


def test_the_command_line_takes_a_region_with_exponents(tmp_path):
    model = package(tmp_path / "m", channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    arguments = ("segment", "-m", model.path, "-i", tmp_path / "i.nrrd", "-o", tmp_path / "o.nrrd", "--device", "cpu")
    outcome = invres(*arguments, "--roi", "-1e-05", "20", "-3.5e+00", "2e1", "-.5", "15", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.of("result")[0]["settings"]["roi_mm"] == [-1e-05, 20, -3.5, 20, -0.5, 15]
    found = read_volume(tmp_path / "o.nrrd", kind="labels")
    assert not found.array[~inside(found.geometry, (0, 20, -3.5, 20, -0.5, 15))].any()


def test_clearing_outside_takes_any_value_and_type():
    grid = ORIENTATIONS["oblique"]
    bounds = middle_box(grid, 1.5)
    for dtype, value in ((np.uint8, 7), (np.float32, 1.0), (bool, False)):
        array = np.ones(grid.shape, dtype)
        clear_outside(array, grid, bounds, value)
        assert np.array_equal(array, np.where(inside(grid, bounds), dtype(1), dtype(value)))


# --- provenance and deleting ----------------------------------------------------------------------------------------


def test_the_result_says_how_it_came_about(tmp_path):
    model = package(tmp_path / "m", channels=1)
    write_volume(tmp_path / "i.nrrd", images(PLAIN, 1)[0])
    options = SegmentOptions("cpu", overlap=0.25, mirror_axes=(2,), window=(24, 24, 24))
    found = segment(model, {"": tmp_path / "i.nrrd"}, tmp_path / "o.nrrd", options)
    versions = {"invres": __version__, "python": platform.python_version(), "torch": torch.__version__}
    assert versions.items() <= found["software"].items()
    assert (found["model"], found["model_id"], found["model_sha256"]) == ("planned", model.id, model.manifest.sha256)
    assert found["settings"]["window"] == [24, 24, 24] and found["settings"]["overlap"] == 0.25
    assert set(found["seconds"]) == {"read", "load", "prepare", "predict", "restore", "write", "total"}
    assert found["seconds"]["total"] >= max(found["seconds"].values())
    assert found["measured_bytes"] > 0 and found["device"] == "cpu" and found["device_title"].startswith("CPU")
    assert found["measured_rss_bytes"] is None or found["measured_rss_bytes"] >= 0


@pytest.mark.parametrize("name", ["model", "model.invres"])
def test_a_package_is_deleted_whole(tmp_path, name):
    model = package(tmp_path / name)
    delete_package(model)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvresError, match="There is no model"):
        open_package(tmp_path / name)


def test_of_a_model_behind_a_link_the_link_is_deleted(tmp_path):
    trained = package(tmp_path / "RUN" / "model")
    (tmp_path / "Models").mkdir()
    (tmp_path / "Models" / "mine").symlink_to(trained.path, target_is_directory=True)
    outcome = invres("models", "delete", trained.name, "--models-dir", tmp_path / "Models")
    assert outcome.code == 0, outcome
    assert list((tmp_path / "Models").iterdir()) == [] and open_package(trained.path)


def test_a_bundled_package_and_a_folder_with_more_in_it_are_not_deleted(tmp_path, monkeypatch):
    bundled = package(tmp_path / "Resources" / "model")
    monkeypatch.setattr("invres.modelpackage.bundled_models_dir", lambda: tmp_path / "Resources")
    with pytest.raises(InvresError, match="came with InvResSegment") as caught:
        delete_package(bundled)
    assert caught.value.code == "bundled_model" and open_package(bundled.path)
    own = package(tmp_path / "own")
    (own.path / "thesis.txt").write_text("mine")
    with pytest.raises(InvresError, match=r"holds 'thesis.txt'"):
        delete_package(own)
    assert (own.path / "thesis.txt").read_text() == "mine" and open_package(own.path)
