"""Image quality transfer: pairs of two resolutions, patches, stitching, geometry, training, errors, the verbs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from grids import RAS, rotation
from tiny_datasets import GRIDS, invres, leftovers, phantom, write_recipe

from invres import Cancelled, InvresError
from invres.checkpoint import CHECKPOINT, load_checkpoint
from invres.config import Recipe, TrainingConfig
from invres.configjson import from_dict, to_dict
from invres.diffusion import file_frame, turned
from invres.enhancement import compared, enhanced, finer, loaded_enhancer, stitch
from invres.enhancementconfig import EnhancementConfig, EnhancementPlan
from invres.enhancementscores import cubic, paired_test, region_errors, regions
from invres.enhancementtraining import train_enhancer
from invres.events import Recorder
from invres.imagepairs import ImagePair, PatchPairs, choose_centres, plan_of, prepare_pairs
from invres.modelpackage import open_package, verify_package
from invres.networkconfig import NetworkConfig
from invres.networks import shuffle
from invres.scans import find_scans, read_scan, scan_of
from invres.trainer import StopRequest
from invres.trainingrun import TrainOptions
from invres.volume import Geometry, Volume, read_channels, read_volume, write_channels, write_volume

TWICE = (2, 2, 2)
OBLIQUE = rotation(11) @ RAS[:, [1, 0, 2]] * [1, -1, 1]  # turned, flipped and in another order
RECIPE = {
    "name": "tiny-iqt",
    "network": {"name": "espcn_rn", "channels": [4, 6], "blocks": [1]},
    "training": {
        **{"patch": [7, 7, 7], "batch_size": 2, "iterations_per_epoch": 2, "epochs": 2},
        **{"learning_rate": 0.01, "gradient_clip": 0},
    },
    "enhancement": {"kind": "image", "patches": 40},
}
DIRECTIONS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]])
DIRECTIONS = DIRECTIONS / np.maximum(np.linalg.norm(DIRECTIONS, axis=1, keepdims=True), 1)


def recipe_of(kind="image", name="espcn_rn", **training):
    values = json.loads(json.dumps(RECIPE))
    values["enhancement"]["kind"] = kind
    values["network"]["name"] = name
    if name == "espcn":
        del values["network"]["blocks"]
    values["training"].update(training)
    return from_dict(Recipe, values)


def ball(shape):
    """A bright ball with a smooth pattern, dark noise around it."""
    d, h, w = (np.linspace(-1, 1, n) for n in shape)
    d, h, w = d[:, None, None], h[None, :, None], w[None, None, :]
    inside = d**2 + h**2 + w**2 < 0.9
    noise = np.random.default_rng(0).normal(0, 1, shape)
    return np.where(inside, 300 + 60 * np.sin(4 * d) + 50 * np.cos(5 * h) + 40 * w + noise, 5 + noise).astype(
        np.float32
    )


def write_scan(folder, name="scan", shape=(20, 18, 19), direction=OBLIQUE, kind="image", spacing=(2.0, 1.0, 1.5)):
    """A plain volume, or a diffusion scan with its tables, on a grid of any orientation."""
    grid = Geometry(shape, spacing, (3.0, -20.0, 7.0), direction)
    image = ball(shape)
    path = folder / f"{name}.nii.gz"
    if kind == "image":
        write_volume(path, Volume(image, grid))
        return path
    # The tensor of the world at each voxel: one that changes from place to place.
    base = np.stack(
        [1.0 + image / 500, 0.2 * image / 300, 0 * image, 0.7 + 0 * image, 0.1 + 0 * image, 1.3 - image / 900]
    )
    matrices = np.empty((*shape, 3, 3))
    for values, (i, j) in zip(base * 1e-3, ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)), strict=True):
        matrices[..., i, j] = matrices[..., j, i] = values
    b_values = np.array([1000.0] * 6 + [0.0])
    exponents = np.einsum("ni,dhwij,nj->ndhw", DIRECTIONS, matrices, DIRECTIONS)
    signal = (image * np.exp(-b_values[:, None, None, None] * exponents)).astype(np.float32)
    write_channels(path, [Volume(one, grid) for one in signal])
    np.savetxt(folder / f"{name}.bval", b_values[None], fmt="%g")
    np.savetxt(folder / f"{name}.bvec", (DIRECTIONS @ file_frame(grid)).T, fmt="%.8f")
    return path


def striped_scan(tmp_path):
    """A folder with a scan of stripes finer than the low resolution shows, whose strength it does show."""
    folder = tmp_path / "data"
    folder.mkdir()
    grid = Geometry((20, 20, 20), (1, 1, 1), (0, 0, 0), RAS)
    d, h, w = np.indices(grid.shape)
    strength = 1 + np.sin(0.4 * d) * np.sin(0.3 * h + 0.2 * w)
    write_volume(folder / "a.nii.gz", Volume((100 + 40 * strength * (w % 2 * 2.0 - 0.5)).astype(np.float32), grid))
    write_volume(folder / "a_mask.nii.gz", Volume(np.ones(grid.shape, np.uint8), grid))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_scan(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    write_scan(folder, "dwi", kind="tensor")
    return folder


def trained(folder, data, kind="image", **changes):
    scans = find_scans(data, kind)
    return train_enhancer(scans, recipe_of(kind, **changes), folder, TrainOptions("cpu"), Recorder())


@pytest.fixture(scope="module")
def models(tmp_path_factory, images, diffusion):
    folder = tmp_path_factory.mktemp("models")
    return {
        "image": trained(folder / "image", images),
        "tensor": trained(folder / "tensor", diffusion, "tensor"),
    }


# Geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [RAS, OBLIQUE])
def test_at_half_the_spacing_the_extent_is_the_same_and_centres_shift_by_a_quarter_of_the_old_spacing(direction):
    grid = Geometry((5, 6, 7), (2.0, 1.0, 4.0), (3.0, -20.0, 7.0), direction)
    fine = finer(grid, TWICE)
    assert fine.shape == (10, 12, 14) and fine.spacing_mm == (1.0, 0.5, 2.0)
    np.testing.assert_allclose(fine.direction, grid.direction)
    shift = np.linalg.inv(grid.direction) @ (np.array(fine.origin_mm) - grid.origin_mm)
    np.testing.assert_allclose(shift, [-0.5, -0.25, -1.0], atol=1e-9)

    def outer_corner(one, end):
        return one.affine @ [*(np.array(one.shape) - 0.5 if end else [-0.5] * 3), 1]

    for end in (False, True):
        np.testing.assert_allclose(outer_corner(fine, end), outer_corner(grid, end), atol=1e-9)


def test_a_canonical_volume_goes_back_to_the_axes_of_its_file():
    for direction in (RAS, OBLIQUE, RAS[:, [2, 0, 1]] * [-1, 1, -1]):
        volume = Volume(
            np.random.default_rng(0).normal(size=(3, 4, 5)), Geometry((3, 4, 5), (1, 2, 3), (4, 5, 6), direction)
        )
        back = volume.canonical().oriented_as(volume.geometry.direction)
        assert np.array_equal(back.array, volume.array) and back.geometry.same_as(volume.geometry, 1e-9)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_channels_are_written_as_one_file_and_read_again(tmp_path, ending):
    grid = Geometry((3, 4, 5), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), OBLIQUE)
    channels = [Volume(np.random.default_rng(k).normal(size=grid.shape).astype(np.float32), grid) for k in range(6)]
    write_channels(tmp_path / f"tensor{ending}", channels)
    for found, wanted in zip(read_channels(tmp_path / f"tensor{ending}"), channels, strict=True):
        assert np.array_equal(found.array, wanted.array) and found.geometry.same_as(grid)


# Scans --------------------------------------------------------------------------------------------------------------


def test_scans_are_found_with_what_lies_beside_them(tmp_path):
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        write_scan(tmp_path / place, "dwi", (6, 6, 6), kind="tensor")
    write_scan(tmp_path / "a", "t1", (6, 6, 6))
    write_volume(
        tmp_path / "a" / "t1_mask.nii.gz",
        Volume(np.ones((6, 6, 6), np.uint8), Geometry((6,) * 3, (1,) * 3, (0,) * 3, RAS)),
    )
    (tensor_a, tensor_b), (image,) = find_scans(tmp_path, "tensor"), find_scans(tmp_path, "image")
    assert (tensor_a.name, tensor_b.name, image.name) == ("a/dwi", "b/c/dwi", "a/t1")
    assert tensor_a.gradients == (tmp_path / "a" / "dwi.bval", tmp_path / "a" / "dwi.bvec") and image.gradients is None
    assert image.mask == tmp_path / "a" / "t1_mask.nii.gz" and tensor_a.mask is None
    (tmp_path / "list.txt").write_text("# two\na/dwi.nii.gz\nb/c/dwi.nii.gz\n", encoding="utf-8")
    assert [scan.image for scan in find_scans(tmp_path / "list.txt", "tensor")] == [tensor_a.image, tensor_b.image]
    assert find_scans(tensor_a.image, "tensor")[0].gradients == tensor_a.gradients
    with pytest.raises(InvresError, match=r"There is no diffusion scan .* in"):
        find_scans(tmp_path / "a" / "t1.nii.gz", "tensor")


def test_label_maps_are_no_scans_and_a_note_says_how_many_are_left_out(tmp_path):
    for place in ("imagesTr", "labelsTr", "Labels/manual", "more"):
        (tmp_path / place).mkdir(parents=True)
    grid = Geometry((6,) * 3, (1,) * 3, (0,) * 3, RAS)
    label_maps = ("labelsTr/a", "Labels/manual/a", "more/b_seg", "more/b_dseg", "more/b_LABEL", "more/b_labels")
    for name in ("imagesTr/a", "more/b", "more/b_mask", *label_maps):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(np.ones((6, 6, 6), np.uint8), grid))
    report = Recorder()
    assert [scan.name for scan in find_scans(tmp_path, "image", report)] == ["imagesTr/a", "more/b"]
    (note,) = [event["message"] for event in report.events if event["event"] == "note"]
    assert note.startswith("6 files are left out, for they look like label maps")
    # What is given itself is taken, whatever it is called.
    assert len(find_scans(tmp_path / "labelsTr", "image")) == 1
    assert len(find_scans(tmp_path / "more" / "b_seg.nii.gz", "image")) == 1


def test_the_diffusion_folder_of_hcp_is_trained_on_and_evaluated_as_unpacked(tmp_path):
    """Diffusion Preprocessed: `data` with `bvals`, `bvecs` and a mask, and the coils' `grad_dev` beside it."""
    for subject in ("100307", "100408"):
        folder = tmp_path / "HCP" / subject / "T1w" / "Diffusion"
        folder.mkdir(parents=True)
        grid = read_channels(write_scan(folder, "data", kind="tensor"))[0].geometry
        for ending, name in (("bval", "bvals"), ("bvec", "bvecs")):
            (folder / f"data.{ending}").rename(folder / name)
        write_channels(folder / "grad_dev.nii.gz", [Volume(np.zeros(grid.shape, np.float32), grid)] * 9)
        mask = (ball(grid.shape) > 100).astype(np.uint8)
        write_volume(folder / "nodif_brain_mask.nii.gz", Volume(mask, grid))
    scans = find_scans(tmp_path / "HCP", "tensor")
    assert [scan.image.name for scan in scans] == ["data.nii.gz"] * 2
    assert all(scan.mask is not None and scan.mask.name == "nodif_brain_mask.nii.gz" for scan in scans)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(to_dict(recipe_of("tensor", epochs=1, iterations_per_epoch=1))), encoding="utf-8")
    run, device = tmp_path / "run", ("--device", "cpu")
    outcome = invres("train", "-r", recipe, "-d", tmp_path / "HCP", "-o", run, *device)
    assert outcome.code == 0, outcome
    evaluated = ("evaluate", "-m", run / "model", "-d", tmp_path / "HCP", "-o", tmp_path / "m.json")
    assert invres(*evaluated, *device).code == 0
    assert len(json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["scans"]) == 2
    refused = invres(*evaluated, "--device", "nonsense:9")
    assert refused.code != 0 and "nonsense:9" in refused.err


def test_the_low_resolution_is_the_mean_of_blocks_in_the_same_place(images):
    scan = read_scan(find_scans(images, "image")[0], "image", 1500)
    whole, low = scan.cut(TWICE), scan.reduced(TWICE)
    assert scan.geometry.shape[0] % 2 or scan.geometry.shape[1] % 2 or scan.geometry.shape[2] % 2
    assert finer(low.geometry, TWICE).same_as(whole.geometry, 1e-6)
    block = whole.signal[0, 4:6, 6:8, 2:4]
    assert low.signal[0, 2, 3, 1] == pytest.approx(block.mean(), rel=1e-6)
    assert low.mask[2, 3, 1] == (whole.mask[4:6, 6:8, 2:4].mean() >= 0.5)


def test_diffusion_is_reduced_in_the_raw_images_and_fitted_afterwards(diffusion):
    scan = read_scan(find_scans(diffusion, "tensor")[0], "tensor", 1500).cut(TWICE)
    low = scan.reduced(TWICE)
    means = scan.channels().reshape(6, *(x for n in low.geometry.shape for x in (n, 2))).mean(axis=(2, 4, 6))
    found = low.channels()
    inside = low.mask & (scan.mask.reshape(*(x for n in low.mask.shape for x in (n, 2))).mean(axis=(1, 3, 5)) == 1)
    np.testing.assert_allclose(found[:, inside], means[:, inside], rtol=0.1, atol=3e-5)
    assert np.abs(found - means)[:, inside].max() > 1e-7, "the fit is not linear, so that the two differ"
    assert not found[:, ~low.mask].any()


def test_a_volume_of_tensors_says_the_same_as_the_scan_that_it_was_fitted_to(diffusion, tmp_path):
    scan = read_scan(find_scans(diffusion, "tensor")[0], "tensor", 1500)
    volumes = [
        Volume(one, scan.geometry).oriented_as(scan.direction) for one in turned(scan.channels(), scan.file_frame.T)
    ]
    write_channels(tmp_path / "tensor.nii.gz", volumes)
    again = read_scan(scan_of(tmp_path / "tensor.nii.gz", "tensor"), "tensor", 1500)
    np.testing.assert_allclose(again.channels(), scan.channels(), rtol=1e-4, atol=1e-9)
    assert np.array_equal(again.mask, scan.mask)
    with pytest.raises(InvresError, match="A volume of tensors cannot be reduced"):
        again.reduced(TWICE)


def test_weightings_above_the_largest_b_are_left_out(diffusion, tmp_path):
    for file in diffusion.iterdir():
        shutil.copy(file, tmp_path / file.name)
    table = np.loadtxt(tmp_path / "dwi.bval")
    stored = read_channels(tmp_path / "dwi.nii.gz")
    write_channels(tmp_path / "dwi.nii.gz", [*stored, Volume(stored[0].array * 0 + 9, stored[0].geometry)])
    np.savetxt(tmp_path / "dwi.bval", np.append(table, 3000)[None], fmt="%g")
    np.savetxt(tmp_path / "dwi.bvec", np.column_stack([np.loadtxt(tmp_path / "dwi.bvec"), [0, 0, 1]]), fmt="%.8f")
    report = Recorder()
    found = read_scan(find_scans(tmp_path, "tensor")[0], "tensor", 1500, report)
    wanted = read_scan(find_scans(diffusion, "tensor")[0], "tensor", 1500)
    assert np.array_equal(found.channels(), wanted.channels())
    assert any("1 volumes above b = 1500 are left out" in event.get("message", "") for event in report.events)


# Patches ------------------------------------------------------------------------------------------------------------


def pair_of(shape=(12, 11, 10), channels=1, seed=0):
    high = np.random.default_rng(seed).normal(size=(channels, *(2 * n for n in shape))).astype(np.float32)
    low = high.reshape(channels, *(x for n in shape for x in (n, 2))).mean(axis=(2, 4, 6))
    mask = np.zeros(shape, bool)
    mask[2:-2, 1:-1, 2:-1] = True
    return ImagePair(low, high, mask, np.repeat(np.repeat(np.repeat(mask, 2, 0), 2, 1), 2, 2))


CONFIG = TrainingConfig(patch=(7, 7, 7), batch_size=3)
SETTINGS = EnhancementConfig(patches=50, held_out=0.2)


def patches_of(pairs, config=CONFIG, settings=SETTINGS):
    plan = plan_of(pairs, settings)
    chosen = choose_centres(pairs, config.patch, settings, 0)
    return [PatchPairs(pairs, centres, plan, TWICE, config, torch.device("cpu")) for centres in chosen]


def test_patches_lie_in_the_mask_and_a_fifth_of_all_is_held_out():
    pairs = [pair_of(seed=0), pair_of((14, 12, 11), seed=1)]
    training, held_out = (batches.centres for batches in patches_of(pairs))
    assert (len(training), len(held_out)) == (80, 20)
    both = np.concatenate([training, held_out])
    assert len(np.unique(both, axis=0)) == 100 and np.bincount(both[:, 0]).tolist() == [50, 50]
    assert all(pairs[p].low_mask[d, h, w] for p, d, h, w in both)
    again = choose_centres(pairs, CONFIG.patch, SETTINGS, 0)
    assert np.array_equal(again[0], training) and not np.array_equal(
        choose_centres(pairs, CONFIG.patch, SETTINGS, 1)[0], training
    )


def test_a_target_is_what_lies_at_the_middle_of_its_patch():
    batches, _ = patches_of([pair_of()])
    plan = batches.plan
    for iteration in range(12):
        image, target = batches.batch(iteration)
        assert image.shape == (3, 1, 7, 7, 7) and target.shape == (3, 8, 3, 3, 3) and target.dtype == torch.float32
        fine = shuffle(target, TWICE) * plan.target_std[0] + plan.target_mean[0]
        means = torch.nn.functional.avg_pool3d(fine, 2)
        middle = image[:, :, 2:-2, 2:-2, 2:-2] * plan.input_std[0] + plan.input_mean[0]
        torch.testing.assert_close(means, middle, rtol=1e-4, atol=1e-5)


def test_a_batch_is_a_function_of_seed_and_iteration_and_uses_every_centre_once():
    first, second = patches_of([pair_of()])[0], patches_of([pair_of()])[0]
    second.batch(9)
    for one, other in zip(first.batch(4), second.batch(4), strict=True):
        assert torch.equal(one, other)
    used = [first._centre(place) for place in range(2 * len(first.centres))]
    assert sorted(used[: len(first.centres)]) == sorted(used[len(first.centres) :]) == list(range(len(first.centres)))
    assert used[: len(first.centres)] != used[len(first.centres) :]


def test_inside_the_masks_each_channel_is_scaled_to_mean_0_and_variance_1():
    pairs = [pair_of(channels=6, seed=0), pair_of((13, 13, 13), channels=6, seed=1)]
    plan = plan_of(pairs, EnhancementConfig("tensor"))
    for mean, std, parts in (
        (plan.input_mean, plan.input_std, [pair.low[:, pair.low_mask] for pair in pairs]),
        (plan.target_mean, plan.target_std, [pair.high[:, pair.high_mask] for pair in pairs]),
    ):
        scaled = (np.concatenate(parts, axis=1) - np.array(mean)[:, None]) / np.array(std)[:, None]
        np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=1), 1, rtol=1e-6)


def test_volumes_that_are_too_small_for_a_patch_are_refused():
    with pytest.raises(InvresError, match="too small for patches of 11x11x11"):
        choose_centres([pair_of((6, 6, 6))], (11, 11, 11), SETTINGS, 0)


def test_pairs_are_prepared_once(images, tmp_path, monkeypatch):
    scans = find_scans(images, "image")
    first = prepare_pairs(scans, SETTINGS, TWICE, tmp_path)
    monkeypatch.setattr("invres.imagepairs.read_scan", lambda *_: pytest.fail("read again"))
    (again,) = prepare_pairs(scans, SETTINGS, TWICE, tmp_path)
    assert np.array_equal(again.low, first[0].low) and np.array_equal(again.high_mask, first[0].high_mask)
    inside = again.low[:, again.low_mask]
    assert abs(inside.mean()) < 1e-5 and inside.std() == pytest.approx(1, rel=1e-4)
    with pytest.raises(Cancelled):
        prepare_pairs(scans, SETTINGS, TWICE, tmp_path, stopped=lambda: True)


# Stitching ----------------------------------------------------------------------------------------------------------


def nearest(patches):
    middle = patches[:, :, 2:-2, 2:-2, 2:-2]
    for axis in (2, 3, 4):
        middle = np.repeat(middle, 2, axis)
    return middle


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("shape", [(9, 6, 12), (3, 2, 13), (1, 1, 1)])
def test_patches_are_stitched_to_the_whole_volume(shape, overlap):
    low = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    found = stitch(low, nearest, (7, 7, 7), TWICE, 2, overlap)
    wanted = np.repeat(np.repeat(np.repeat(low, 2, 1), 2, 2), 2, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_where_outputs_overlap_their_mean_is_taken_and_empty_patches_are_left_out():
    calls = []

    def numbered(patches):
        calls.append(len(patches))
        numbers = np.arange(len(patches), dtype=np.float32).reshape(-1, 1, 1, 1, 1)
        return np.broadcast_to(numbers, (len(patches), 1, 6, 6, 6))

    low = np.ones((1, 3, 3, 5), np.float32)
    found = stitch(low, numbered, (7, 7, 7), TWICE, 1, overlap=1)
    assert found[0, 0, 0].tolist() == [0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1]
    low[:] = 0
    assert not stitch(low, numbered, (7, 7, 7), TWICE, 1, skip_empty=True).any() and calls == [2]
    with pytest.raises(InvresError, match="must be below the 3 voxels that a patch gives, got 3"):
        stitch(low, numbered, (7, 7, 7), TWICE, 1, overlap=3)


# Errors -------------------------------------------------------------------------------------------------------------


def test_the_exterior_is_where_a_patch_reaches_beyond_the_mask():
    low = np.zeros((12, 12, 12), bool)
    low[1:11, 1:11, 1:11] = True
    high = np.repeat(np.repeat(np.repeat(low, 2, 0), 2, 1), 2, 2)
    parts = regions(low, high, (7, 7, 7), TWICE)
    wanted = np.zeros(high.shape, bool)
    wanted[8:16, 8:16, 8:16] = True  # low-resolution voxels 4 to 7: three more on each side are still inside
    assert np.array_equal(parts["interior"], wanted)
    assert np.array_equal(parts["interior"] | parts["exterior"], parts["total"]) and np.array_equal(
        parts["total"], high
    )
    prediction, reference = np.zeros((2, 24, 24, 24)), np.zeros((2, 24, 24, 24))
    prediction[0][parts["exterior"]] = 3.0
    found = region_errors(prediction, reference, parts)
    assert found["interior"] == 0 and found["exterior"] == pytest.approx(3 / np.sqrt(2))
    share = parts["exterior"].sum() / parts["total"].sum()
    assert found["total"] == pytest.approx(found["exterior"] * np.sqrt(share))
    parts["interior"][:] = False
    assert region_errors(prediction, reference, parts)["interior"] is None


def test_cubic_interpolation_lies_on_the_finer_grid():
    d, h, w = np.meshgrid(*(np.arange(n, dtype=float) for n in (10, 9, 8)), indexing="ij")
    found = cubic((3 * d - 2 * h + w)[None], TWICE)
    fine = np.meshgrid(*(np.arange(2 * n) / 2 - 0.25 for n in (10, 9, 8)), indexing="ij")
    wanted = 3 * fine[0] - 2 * fine[1] + fine[2]
    inside = (0, *(slice(6, -6),) * 3)
    np.testing.assert_allclose(found[inside], wanted[6:-6, 6:-6, 6:-6], atol=0.02)


def test_the_paired_test_is_wilcoxons_and_its_approximation_the_papers():
    ours = [8.1, 7.9, 8.3, 8.8, 9.0, 8.2, 8.4, 7.5]
    others = [value + 0.1 * place for place, value in enumerate(ours, start=1)]
    found = paired_test(ours, others)
    assert (found["n"], found["W"]) == (8, 0)
    assert found["p"] == pytest.approx(2 / 2**8)
    assert found["p_normal"] == pytest.approx(0.0117, abs=5e-5), "as published for W = 0 and 8 subjects"
    assert paired_test([1.0], [2.0])["p"] is None and paired_test([1.0, 2.0], [1.0, 2.0])["p"] is None
    with pytest.raises(InvresError, match="must be of the same subjects"):
        paired_test([1.0, 2.0], [1.0])


# Training -----------------------------------------------------------------------------------------------------------


def without_seconds(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_a_training_makes_a_package_that_says_what_it_does(models, kind):
    package = verify_package(models[kind].path)
    manifest = package.manifest
    assert manifest.scheme.labels == () and manifest.network.name == "espcn_rn" and manifest.patch == (7, 7, 7)
    channels = 6 if kind == "tensor" else 1
    assert manifest.enhancement.kind == kind and len(manifest.enhancement.input_mean) == channels
    assert manifest.network.blocks == ((1, 1, 1) if kind == "tensor" else (0, 1, 1))
    (scores,) = manifest.metrics.values()
    assert set(scores) == {"RMSE", "RMSE of cubic interpolation"} and all(s["n"] == 8 for s in scores.values())
    entries = without_seconds(package.path.parent)
    assert [entry["epoch"] for entry in entries] == [1, 2] and all(set(e["rmse"]) == {"mean"} for e in entries)
    best = min(entry["rmse"]["mean"] for entry in entries)
    checkpoint = load_checkpoint(package.path.parent)
    assert checkpoint["best_score"] == pytest.approx(best, abs=1e-5), "the smallest error is the best"


def test_a_training_that_was_stopped_and_resumed_ends_bit_equal(images, tmp_path, models):
    wanted = models["image"]
    scans, recipe = find_scans(images, "image"), recipe_of()
    for stop_at in (1, 3):
        stop = StopRequest()

        class Stops(Recorder):
            def emit(self, event, stop=stop, stop_at=stop_at):
                if event["event"] == "progress" and event["stage"] == "train" and event["iteration"] == stop_at:
                    stop.requested = True

        run = tmp_path / str(stop_at)
        with pytest.raises(Cancelled):
            train_enhancer(scans, recipe, run, TrainOptions("cpu"), Stops(), stop)
        assert (run / CHECKPOINT).is_file() and not (run / "model").exists()
        package = train_enhancer(scans, recipe, run, TrainOptions("cpu", resume=True), Recorder())
        found, other = package.load_weights(), wanted.load_weights()
        assert all(torch.equal(found[key], other[key]) for key in other)
        assert without_seconds(run) == without_seconds(wanted.path.parent) and leftovers(run) == []
        assert package.manifest.enhancement == wanted.manifest.enhancement


def test_another_training_is_neither_overwritten_nor_resumed_by_mistake(images, models, tmp_path):
    scans, run = find_scans(images, "image"), models["image"].path.parent
    with pytest.raises(InvresError, match="There is already a training"):
        train_enhancer(scans, recipe_of(), run, TrainOptions("cpu"))
    with pytest.raises(InvresError, match="is of espcn_rn, the recipe asks for espcn"):
        train_enhancer(scans, recipe_of(name="espcn"), run, TrainOptions("cpu", resume=True))
    renamed = [dataclasses.replace(scans[0], name="other")]
    with pytest.raises(InvresError, match="The scans differ from those"):
        train_enhancer(renamed, recipe_of(), run, TrainOptions("cpu", resume=True))
    with pytest.raises(InvresError, match=r"training\.patch must be 5 voxels or more"):
        train_enhancer(scans, recipe_of(patch=[4, 7, 7]), tmp_path / "new", TrainOptions("cpu"))


def test_a_time_budget_ends_the_training(images, tmp_path):
    recipe = recipe_of(epochs=100_000, time_s=0.5)
    package = train_enhancer(find_scans(images, "image"), recipe, tmp_path, TrainOptions("cpu"))
    assert package.manifest.training.seconds < 20 and package.manifest.training.iterations < 100_000


def test_on_something_that_can_be_learnt_the_network_beats_cubic_interpolation(tmp_path):
    """A pattern of stripes finer than the low resolution shows: only what was seen before can say where they lie."""
    folder = striped_scan(tmp_path)
    recipe = recipe_of(name="espcn", epochs=1, iterations_per_epoch=80, learning_rate=0.02, batch_size=3)
    package = train_enhancer(find_scans(folder, "image"), recipe, tmp_path / "run", TrainOptions("cpu"))
    (scores,) = package.manifest.metrics.values()
    assert scores["RMSE"]["mean"] < 0.5 * scores["RMSE of cubic interpolation"]["mean"]


# Whole volumes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_an_enhanced_file_lies_in_the_same_place_at_half_the_spacing(models, images, diffusion, tmp_path, kind):
    source = images / "scan.nii.gz" if kind == "image" else diffusion / "dwi.nii.gz"
    outcome = invres("enhance", "-m", models[kind].path, "-i", source, "-o", tmp_path / "fine.nii.gz", "--json")
    assert outcome.code == 0, outcome
    found, stored = read_channels(tmp_path / "fine.nii.gz"), read_channels(source)
    assert len(found) == (6 if kind == "tensor" else 1) and leftovers(tmp_path) == []
    assert found[0].geometry.same_as(finer(stored[0].geometry, TWICE))
    result = outcome.events[-1]
    assert result["shape"] == [2 * n for n in stored[0].geometry.shape] and result["spacing_mm"] == [1.0, 0.5, 0.75]
    network, plan = loaded_enhancer(models[kind], torch.device("cpu"))
    scan = read_scan(scan_of(source, kind), kind, 1500)
    values = enhanced(network, plan, (7, 7, 7), scan)
    if kind == "tensor":
        outside = ~np.kron(scan.mask, np.ones(TWICE, bool))
        assert outside.any() and not values[:, outside].any(), "where there is no brain there is no tensor"
    written = np.stack([volume.canonical().array for volume in found])
    if kind == "tensor":
        written = turned(written, scan.file_frame)
    np.testing.assert_allclose(written, values, rtol=1e-3, atol=1e-3 * np.abs(values).max())


def test_turned_voxel_axes_change_nothing(models, tmp_path):
    """The same scan stored with flipped and exchanged axes gives the same tensors of the world."""
    results = []
    model = models["tensor"]
    network, plan = loaded_enhancer(model, torch.device("cpu"))
    first = write_scan(tmp_path, "one", (12, 14, 13), RAS, "tensor", (1.0, 1.0, 1.0))
    volumes, other = read_channels(first), tmp_path / "two.nii.gz"
    frame = file_frame(volumes[0].geometry)
    flipped = [volume.oriented_as(RAS[:, [2, 0, 1]] * [1, -1, 1]) for volume in (v.canonical() for v in volumes)]
    write_channels(other, flipped)
    shutil.copy(tmp_path / "one.bval", tmp_path / "two.bval")
    vectors = np.loadtxt(tmp_path / "one.bvec").T @ frame.T @ file_frame(flipped[0].geometry)
    np.savetxt(tmp_path / "two.bvec", vectors.T, fmt="%.8f")
    for path in (first, other):
        results.append(enhanced(network, plan, (7, 7, 7), read_scan(scan_of(path, "tensor"), "tensor", 1500)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-7)


def test_brightness_and_contrast_of_a_plain_image_come_back(models, images):
    network, plan = loaded_enhancer(models["image"], torch.device("cpu"))
    scan = read_scan(scan_of(images / "scan.nii.gz", "image"), "image", 1500)
    brighter = dataclasses.replace(scan, signal=scan.signal * 3 + 100)
    one, other = (enhanced(network, plan, (7, 7, 7), s) for s in (scan, brighter))
    np.testing.assert_allclose(other, one * 3 + 100, rtol=1e-3, atol=0.1)


def test_a_reference_is_compared_with_beside_cubic_interpolation(models, images, tmp_path):
    model, truth = models["image"], images / "scan.nii.gz"
    scan = read_scan(scan_of(truth, "image"), "image", 1500)
    low, whole = scan.reduced(TWICE), scan.cut(TWICE)
    for name, one in (("low", low), ("high", whole)):
        volume = Volume(one.signal[0], one.geometry).oriented_as(scan.direction)
        write_volume(tmp_path / f"{name}.nii.gz", volume)
        mask = Volume(one.mask.astype(np.uint8), one.geometry).oriented_as(scan.direction)
        write_volume(tmp_path / f"{name}_mask.nii.gz", mask)
    paths = [tmp_path / name for name in ("low.nii.gz", "fine.nii.gz", "high.nii.gz")]
    outcome = invres("enhance", "-m", model.path, "-i", paths[0], "-o", paths[1], "--reference", paths[2], "--json")
    assert outcome.code == 0, outcome
    errors = outcome.events[-1]["errors"]
    found = read_volume(paths[1]).canonical().array[None]
    wanted = compared("low.nii.gz", found, low, whole, (7, 7, 7), TWICE)
    for method in ("network", "cubic"):
        for region, value in wanted[method].items():
            assert errors[method][region] == (None if value is None else pytest.approx(value, rel=1e-3)), region
    shown = invres("enhance", "-m", model.path, "-i", paths[0], "-o", paths[1], "--reference", paths[2])
    assert "Root mean square error" in shown.out and "cubic" in shown.out and "no test" in shown.out
    refused = invres("enhance", "-m", model.path, "-i", paths[0], "-o", paths[1], "--reference", paths[0])
    assert refused.code == 2 and "does not lie on the grid of the result" in refused.err


def test_a_model_is_evaluated_on_scans_reduced_by_itself(models, tmp_path):
    for name in ("one", "two", "three"):
        write_scan(tmp_path, name, (16, 18, 14))
    outcome = invres("evaluate", "-m", models["image"].path, "-d", tmp_path, "-o", tmp_path / "m.json")
    assert outcome.code == 0, outcome
    assert "3 scans" in outcome.out and "Wilcoxon signed-rank test" in outcome.out and "n = 3" in outcome.out
    written = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert [scan["name"] for scan in written["scans"]] == ["one", "three", "two"]
    assert written["summary"]["network"]["total"]["n"] == 3 and written["summary"]["wilcoxon"]["p"] == 0.25


def test_voxels_of_another_size_than_those_trained_on_are_told(models, images, tmp_path):
    """The model learned to refine voxels of (2, 4, 3) mm, which its scans were reduced to, and is given others."""
    model, source = models["image"], images / "scan.nii.gz"
    assert model.manifest.plan.spacing_mm == (2.0, 4.0, 3.0)
    scan = read_scan(scan_of(source, "image"), "image", 1500)
    low = scan.reduced(TWICE)
    write_volume(tmp_path / "low.nii.gz", Volume(low.signal[0], low.geometry).oriented_as(scan.direction))
    write_scan(tmp_path, "other", (16, 18, 14), spacing=(2.0, 1.0, 1.0))
    command = ("enhance", "-m", model.path, "-o", tmp_path / "out.nrrd", "--json", "-i")
    for path, told in ((source, True), (tmp_path / "low.nii.gz", False)):
        warnings = [event["message"] for event in invres(*command, path).of("warning")]
        assert ["voxels of 2 x 4 x 3 mm" in message for message in warnings] == [True] * told, warnings
    for folder in ("same", "else"):
        (tmp_path / folder).mkdir()
    shutil.copy(source, tmp_path / "same" / "a.nii.gz")
    shutil.copy(tmp_path / "other.nii.gz", tmp_path / "else" / "b.nii.gz")
    command = ("evaluate", "-m", model.path, "-o", tmp_path / "m.json", "--json", "-d")
    assert invres(*command, tmp_path / "same").of("warning") == []
    (warning,) = invres(*command, tmp_path / "else").of("warning")
    assert warning["scan"] == "b" and warning["message"].startswith("b: The image has voxels of 2 x 4 x 2")


# The verbs ----------------------------------------------------------------------------------------------------------


def test_the_verbs_train_and_resume(images, tmp_path):
    recipe = tmp_path / "iqt.json"
    recipe.write_text(json.dumps(to_dict(recipe_of())), encoding="utf-8")
    command = ("train", "-d", images, "-r", recipe, "-o", tmp_path / "run")
    new = invres("train", "-d", images, "-r", recipe, "-o", tmp_path / "new", "--resume", "--json")
    assert new.code == 0 and "so the training starts" in " ".join(event["message"] for event in new.of("note")), new
    outcome = invres(*command, "--licence", "CC0-1.0", "--source", "A ball.")
    assert outcome.code == 0 and "RMSE of cubic interpolation" in outcome.out, outcome
    manifest = open_package(tmp_path / "run" / "model").manifest
    assert (manifest.licence, manifest.training.data) == ("CC0-1.0", "A ball.")
    assert invres(*command).code == 2
    again = invres("train", "-d", images, "-o", tmp_path / "run", "--resume", "--epochs", "3", "--json")
    assert again.code == 0 and again.events[-1]["epochs"] == 3
    assert invres(*command, "--vram", "8GB").code == 2


def test_a_model_is_described_and_listed_as_what_it_is(models):
    described = invres("describe", models["tensor"].path)
    assert described.code == 0 and "enhances   diffusion tensors: 2 x 2 x 2 times as many voxels" in described.out
    assert "RMSE of cubic interpolation: " in described.out and "labels  " not in described.out
    assert "a plain image" in invres("describe", models["image"].path).out


def test_models_are_listed_with_what_they_do(models, tmp_path):
    assert invres("models", "import", models["image"].path, "--models-dir", tmp_path).code == 0
    listed = invres("models", "list", "--models-dir", tmp_path)
    assert listed.code == 0 and "tiny-iqt 1.0.0  enhances images" in listed.out
    assert invres("models", "verify", "tiny-iqt", "--models-dir", tmp_path).code == 0


def test_segmenting_and_enhancing_models_are_not_mixed_up(models, images, tmp_path):
    segmenting = tmp_path / "data"
    segmenting.mkdir()
    volumes, label = phantom(GRIDS[0])
    (segmenting / "imagesTr").mkdir()
    write_volume(segmenting / "imagesTr" / "a_0000.nii.gz", volumes[0])
    write_volume(segmenting / "labelsTr" / "a.nii.gz", label)
    names = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (segmenting / "dataset.json").write_text(json.dumps({**names, "numTraining": 1}), encoding="utf-8")
    recipe = write_recipe(tmp_path / "recipe.json", epochs=1, iterations_per_epoch=1)
    assert invres("train", "-d", segmenting, "-r", recipe, "-o", tmp_path / "seg").code == 0
    source, output = images / "scan.nii.gz", tmp_path / "out.nii.gz"
    labels = tmp_path / "e.seg.nrrd"
    for command, told in (
        (("enhance", "-m", models["image"].path, "-i", source, "-o", labels), "has the ending of a segmentation, but"),
        (("segment", "-m", models["image"].path, "-i", source, "-o", output), "enhances images; it does not segment"),
        (("finetune", "-m", models["image"].path, "-d", segmenting, "-o", tmp_path / "f"), "does not segment them"),
        (
            ("plan", "-m", models["image"].path, "--shape", "9", "9", "9", "--spacing", "1", "1", "1"),
            "does not segment",
        ),
        (("enhance", "-m", tmp_path / "seg" / "model", "-i", source, "-o", output), "segments images; it does not enh"),
        (("evaluate", "-m", tmp_path / "seg" / "model", "-d", images, "-o", tmp_path / "m.json"), "does not enhance"),
    ):
        outcome = invres(*command)
        assert outcome.code == 2 and told in outcome.err and len(outcome.err.splitlines()) == 1, outcome
    assert not output.exists() and not labels.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bval", "x.bval"], "--bval and --bvec belong together"),
        (["--bval", "x.bval", "--bvec", "x.bvec"], "enhances plain images, which have no --bval"),
        (["--overlap", "-1"], "The overlap must be 0 or more voxels"),
        (["--overlap", "3"], "must be below the 3 voxels"),
        (["-o", "out.png"], "out.png cannot be written"),
        (["-i", "missing.nii.gz"], "There is no file"),
        (["--mask", "missing.nii.gz"], "There is no file"),
    ],
)
def test_wrong_wishes_are_told_in_a_sentence(models, images, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    command = ("enhance", "-m", models["image"].path, "-i", images / "scan.nii.gz", "-o", "out.nii.gz", *arguments)
    outcome = invres(*command)
    assert outcome.code == 2 and told in outcome.err and list(tmp_path.iterdir()) == [], outcome


def test_a_file_that_is_no_diffusion_scan_is_refused(models, images, tmp_path):
    outcome = invres("enhance", "-m", models["tensor"].path, "-i", images / "scan.nii.gz", "-o", tmp_path / "o.nii.gz")
    assert outcome.code == 2 and "holds 1 volumes without b-values" in outcome.err


# Configuration ------------------------------------------------------------------------------------------------------


def test_the_recipes_are_the_published_one_and_one_for_plain_images(repository):
    published, plain = (
        Recipe.read(repository / "Resources" / "Recipes" / f"{name}.json") for name in ("iqt", "iqt-t1")
    )
    training, settings = published.training, published.enhancement
    assert (published.network.name, training.patch, training.learning_rate) == ("espcn_rn", (11, 11, 11), 1e-4)
    assert (settings.kind, settings.patches, settings.held_out, training.epochs) == ("tensor", 2250, 0.2, 100)
    # Eight subjects: every training patch once in an epoch.
    assert training.iterations_per_epoch * training.batch_size == 8 * 2250 * 0.8
    assert plain.enhancement.kind == "image"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enhancement": None}, "segments images, but its network espcn_rn enhances them"),
        ({"network": NetworkConfig()}, "enhances images, but its network fully_invres segments them"),
    ],
)
def test_a_recipe_does_one_of_the_two(changes, words):
    with pytest.raises(InvresError, match=words):
        dataclasses.replace(recipe_of(), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"patches": 1}, "must be 2 or more"), ({"held_out": 1.0}, "below 1"), ({"largest_b": 0.0}, "above 0 s/mm2")],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(InvresError, match=words):
        EnhancementConfig(**changes)


def test_a_manifest_that_contradicts_itself_is_refused(models):
    manifest = models["image"].manifest
    six = EnhancementPlan("tensor", (0.0,) * 6, (1.0,) * 6, (0.0,) * 6, (1.0,) * 6)
    for changes, words in (
        ({"enhancement": None}, "which enhances images, but enhancement is not there"),
        ({"enhancement": six}, "enhancement has 6 channels, but the network 1 in and 1 out"),
        ({"metrics": {"liver": {}}}, "has the entry 'liver'"),
    ):
        with pytest.raises(InvresError, match=words):
            dataclasses.replace(manifest, **changes)
    with pytest.raises(InvresError, match="must have 1 means and standard deviations"):
        EnhancementPlan("image", (0.0, 1.0), (1.0,), (0.0,), (1.0,))
