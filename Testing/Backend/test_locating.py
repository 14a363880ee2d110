"""Two models in sequence: what the first finds is cut out, segmented as if it had come alone, and put back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_inference import Known
from tiny_datasets import GRIDS, invres

from invres import InvresError
from invres.config import ChannelPlan, CropPlan, Label, LabelScheme, PreparationPlan
from invres.events import Recorder
from invres.inference import load_network, segment
from invres.locating import boxes_around, can_locate, locate
from invres.modelpackage import save_package
from invres.networkconfig import NetworkConfig
from invres.networks import build
from invres.prediction import SegmentOptions
from invres.region import cut_out
from invres.sides import Side
from invres.volume import Geometry, Volume, read_volume, write_volume

HEAD = LabelScheme((Label("left hippocampus", (1,), 17), Label("right Hippocampus", (2,), 53)))
PARTS = LabelScheme((Label("front", (1,), 1), Label("back", (2,), 2)))
CROP = CropPlan(("hippocampus",), (3.0, 4.0, 2.0), (12.0, 12.0, 12.0))


def saved(path, scheme, modality, crop=None, channels=1, spacing_mm=(1.0, 1.0, 1.0)):
    """A package with random weights that tell voxels apart."""
    torch.manual_seed(1)
    config = NetworkConfig(channels=(4, 16), in_channels=channels, out_channels=scheme.out_channels)
    network = build(config)
    plans = tuple(ChannelPlan(f"T{number + 1}", modality) for number in range(channels))
    plan = PreparationPlan(plans, spacing_mm, crop_to_nonzero=modality != "CT", crop=crop)
    return save_package(
        path,
        name=path.name,
        network=network.config,
        state_dict=network.state_dict(),
        plan=plan,
        scheme=scheme,
        patch=(12, 12, 12),
    )


@pytest.fixture
def head(tmp_path):
    """The model of the whole, to which 100 is the left and 200 the right one; and the one that was trained on crops."""
    return saved(tmp_path / "head", HEAD, "CT"), saved(tmp_path / "parts", PARTS, "MR", CROP)


def image(grid):
    """Noise around 0 with two boxes of 100 and 200 in it, and a speck."""
    array = np.random.default_rng(3).normal(0, 8, grid.shape).astype(np.float32)
    d, h, w = (size // 4 for size in grid.shape)
    array[d : 2 * d, h : 2 * h, w : 2 * w] = 100
    array[d : 2 * d, h : 2 * h, 3 * w :] = 200
    array[-1, -1, -1] = 200
    return Volume(array, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_each_place_is_segmented_as_if_it_had_come_alone(head, tmp_path, grid):
    whole, parts = head
    plain = saved(tmp_path / "plain", PARTS, "MR")  # the same, but takes images of any size
    volume, network = image(dataclasses.replace(grid, spacing_mm=(1.0, 1.0, 1.0))), load_network(head[1], "cpu")
    write_volume(tmp_path / "head.nii.gz", volume)
    volume = read_volume(tmp_path / "head.nii.gz")
    boxes, measured = locate(whole, Known(3), [volume], CROP)
    assert len(boxes) == 2 and boxes[0][0] < boxes[1][0], "a speck is no place"
    found = segment(
        parts,
        {"T1": tmp_path / "head.nii.gz"},
        tmp_path / "found.nii.gz",
        SegmentOptions(device="cpu"),
        tmp_path / "p.nii.gz",
        network=network,
        locate=lambda volumes, report: locate(whole, Known(3), volumes, CROP, report),
        uncertainty_path=tmp_path / "u.nii.gz",
    )
    assert found["settings"]["boxes_mm"] == [list(box) for box in boxes]
    again = [parts, {"T1": tmp_path / "head.nii.gz"}, tmp_path / "o.nii.gz", SegmentOptions(device="cpu")]
    much = segment(*again, network=network, locate=lambda *_: (boxes, 10**9))["measured_bytes"]
    little = segment(*again, network=network, locate=lambda *_: (boxes, 0))["measured_bytes"]
    assert much == 10**9 + volume.array.nbytes
    assert measured > 0 and found["measured_bytes"] == max(little, measured + volume.array.nbytes)
    wanted, background = np.zeros(volume.array.shape, np.uint8), np.ones(volume.array.shape, np.float32)
    for number, box in enumerate(boxes):
        (part,), where = cut_out([volume], box)
        write_volume(tmp_path / f"{number}.nii.gz", part)
        arguments = [plain, {"T1": tmp_path / f"{number}.nii.gz"}, tmp_path / f"alone{number}.nii.gz"]
        segment(*arguments, SegmentOptions(device="cpu"), tmp_path / f"p{number}.nii.gz", network=network)
        alone = read_volume(tmp_path / f"alone{number}.nii.gz", kind="labels").array
        wanted[where] = np.where(alone != 0, alone, wanted[where])
        background[where] = read_volume(tmp_path / f"p{number}_background.nii.gz").array
    labels = read_volume(tmp_path / "found.nii.gz", kind="labels")
    assert labels.geometry.same_as(volume.geometry) and wanted.any()
    assert np.array_equal(labels.array, wanted)
    assert np.array_equal(read_volume(tmp_path / "p_background.nii.gz").array, background)
    unsure = read_volume(tmp_path / "u.nii.gz")
    surest = np.max([read_volume(path).array for path in found["probabilities"]], axis=0)
    assert unsure.geometry.same_as(volume.geometry) and np.abs(unsure.array - (1 - surest)).max() < 1e-6
    assert unsure.array.max() > 0.1
    voxel_ml = np.prod(volume.geometry.spacing_mm) / 1000
    assert found["volumes_ml"]["front"] == pytest.approx((wanted == 1).sum() * voxel_ml, abs=0.01)


def test_of_two_places_one_is_left_and_one_right(head, tmp_path):
    _, parts = head
    sides = (Side("front", 1, 11), Side("back", 2, 12))
    parts = dataclasses.replace(parts, manifest=dataclasses.replace(parts.manifest, sides=sides))
    grid = Geometry((20, 20, 60), (1, 1, 1), (-30, 0, 0), np.eye(3)[:, ::-1])
    write_volume(tmp_path / "head.nii.gz", image(grid))
    left, right = (-29.0, -19.0, 2.0, 12.0, 2.0, 12.0), (12.0, 22.0, 3.0, 13.0, 2.0, 12.0)

    def found(*boxes):
        files = {"T1": tmp_path / "head.nii.gz"}, tmp_path / "o.nii.gz"
        summary = segment(parts, *files, SegmentOptions(device="cpu"), locate=lambda *_: (boxes, 0))
        return read_volume(files[1], kind="labels").array, summary["volumes_ml"]

    plain, _ = found(left)
    assert set(np.unique(plain)) <= {0, 1, 2}, "one place may be on either side"
    array, volumes = found(left, right)
    assert set(np.unique(array[..., :30])) <= {0, 1, 2} and set(np.unique(array[..., 30:])) <= {0, 11, 12}
    assert np.array_equal(array[..., :30], plain[..., :30]) and (array > 10).any()
    assert [*volumes] == ["left front", "right front", "left back", "right back"]
    above = (left[0], left[1], 3.0, 13.0, 12.0, 19.0)
    assert set(np.unique(found(left, above)[0])) <= {0, 1, 2}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_box_holds_its_piece_with_the_margin(grid):
    mask = np.zeros(grid.shape, bool)
    mask[3:6, 4:9, 5:8] = True
    (box,) = boxes_around(mask, Volume(mask, grid), (0, 0, 0))
    (cut,), where = cut_out([Volume(mask.astype(np.uint8), grid)], box)
    assert cut.array.sum() == mask.sum() and cut.geometry.same_as(grid.crop(where))
    (wide,) = boxes_around(mask, Volume(mask, grid), (3, 4, 2))
    lengths = np.subtract(wide[1::2], wide[::2]) - np.subtract(box[1::2], box[::2])
    canonical = grid.canonical().direction
    assert np.allclose(lengths, 2 * np.abs(canonical) @ [3, 4, 2], atol=1e-6)


def test_a_crop_is_segmented_as_it_is_and_a_whole_image_is_refused_without_a_place(head, tmp_path):
    grid = Geometry((16, 15, 14), (1, 1, 1), (0, 0, 0), np.eye(3)[:, ::-1])
    write_volume(tmp_path / "crop.nii.gz", image(grid))
    asked = []
    arguments = [{"T1": tmp_path / "crop.nii.gz"}, tmp_path / "out.nii.gz", SegmentOptions(device="cpu")]
    report = Recorder()
    found = segment(head[1], *arguments, locate=lambda *given: asked.append(given), report=report)
    notes = " ".join(event["message"] for event in report.events if event["event"] == "note")
    assert "is a crop already, so nothing has to be located and --locate is left out." in notes
    assert not asked and found["settings"]["boxes_mm"] == []
    grid = dataclasses.replace(grid, shape=(30, 15, 14))
    write_volume(tmp_path / "crop.nii.gz", image(grid))
    with pytest.raises(InvresError, match="trained on crops around the hippocampus of up to 12 x 12 x 12 mm") as caught:
        segment(head[1], *arguments)
    assert caught.value.code == "needs_region" and "--locate" in caught.value.hint


def test_a_region_is_cut_out_for_a_model_of_crops(head, tmp_path):
    grid = Geometry((30, 20, 20), (1, 1, 1), (0, 0, 0), np.eye(3)[:, ::-1])
    volume, network = image(grid), load_network(head[1], "cpu")
    write_volume(tmp_path / "head.nii.gz", volume)
    box = (2.0, 15.0, 3.0, 14.0, 5.0, 18.0)
    options = SegmentOptions(device="cpu", roi_mm=box)
    asked, report = [], Recorder()
    given = {"network": network, "locate": lambda *volumes: asked.append(volumes), "report": report}
    segment(head[1], {"T1": tmp_path / "head.nii.gz"}, tmp_path / "out.nii.gz", options, **given)
    notes = [event["message"] for event in report.events if event["event"] == "note"]
    assert not asked and "With --roi nothing has to be located, so --locate is left out." in notes
    (part,), where = cut_out([volume], box)
    write_volume(tmp_path / "part.nii.gz", part)
    segment(head[1], {"T1": tmp_path / "part.nii.gz"}, tmp_path / "alone.nii.gz", network=network)
    labels, alone = (read_volume(tmp_path / name, kind="labels").array for name in ("out.nii.gz", "alone.nii.gz"))
    assert alone.any() and np.array_equal(labels[where], alone) and labels.sum() == alone.sum()


def test_what_cannot_be_located_is_told(head, tmp_path):
    volume = image(Geometry((16, 16, 16), (1, 1, 1), (0, 0, 0), np.eye(3)))
    other = LabelScheme((Label("thalamus", (1,), 1), Label("putamen", (2,), 2)))
    assert can_locate(HEAD, CROP) and not can_locate(other, CROP)
    with pytest.raises(InvresError, match="has no label hippocampus"):
        locate(saved(tmp_path / "other", other, "CT"), Known(3), [volume], CROP)
    with pytest.raises(InvresError, match="takes 2 channels"):
        locate(saved(tmp_path / "two", HEAD, "CT", channels=2), Known(3), [volume], CROP)
    nothing = Volume(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(16, 16, 16)), 1), volume.geometry)
    with pytest.raises(InvresError, match="found no hippocampus in this image"):
        locate(head[0], Known(3), [nothing], CROP)


def test_locating_is_a_stage_of_its_own_and_the_parts_count_as_one(head, tmp_path):
    grid = Geometry((24, 20, 30), (1, 1, 1), (0, 0, 0), np.eye(3)[:, ::-1])
    write_volume(tmp_path / "head.nii.gz", image(grid))
    report = Recorder()
    segment(
        head[1],
        {"T1": tmp_path / "head.nii.gz"},
        tmp_path / "out.nii.gz",
        SegmentOptions(device="cpu"),
        report=report,
        locate=lambda volumes, report: locate(head[0], Known(3), volumes, CROP, report),
    )
    stages = {}
    for event in report.events:
        if event["event"] == "progress":
            stages.setdefault(event["stage"], []).append((event["done"], event["total"]))
    assert list(stages).index("segment.locate") < list(stages).index("segment.tiles")
    for done in stages.values():
        parts = [count / total for count, total in done]
        assert parts == sorted(parts) and parts[-1] == 1, "no bar goes back or stops short"


def test_the_command_line_takes_two_models(head, tmp_path):
    grid = Geometry((24, 20, 30), (1, 1, 1), (0, 0, 0), np.eye(3)[:, ::-1])
    write_volume(tmp_path / "head.nii.gz", image(grid))
    arguments = ["segment", "--input", f"T1={tmp_path / 'head.nii.gz'}", "--output", str(tmp_path / "out.nii.gz")]
    for model, message in zip(head, ("segments whole images", "has no label hippocampus"), strict=True):
        outcome = invres(*arguments, "--model", model.path, "--locate", model.path)
        assert outcome.code == 2 and message in outcome.err
