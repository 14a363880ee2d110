"""Every channel gets the right volume, or none: from DICOM headers, from names, and never silently wrong."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from InvResSegmentLib import ChannelMatching
from InvResSegmentLib.ChannelMatching import IntensityStatistics, VolumeDescription
from InvResSegmentLib.ContrastNames import Contrast, contrastOfChannel, contrastOfName, rejectedName
from InvResSegmentLib.GeometryDoctor import ALIGNED_FROM, align
from InvResSegmentLib.VolumeDescription import DICOM_TAGS, describeVolume
from small_models import add_volume, matrix

GLIOMA = ("T1", "T1ce", "T2", "FLAIR")


def channels(*names, modality="MR"):
    return [SimpleNamespace(name=name, modality=modality) for name in names]


def named(*names, **fields):
    return [VolumeDescription(name, key=name, **fields) for name in names]


def matched(wanted, volumes):
    """Channel -> name of the volume or None."""
    found = ChannelMatching.match(wanted, volumes)
    for one in found:
        assert one.sentence.endswith(".") and "{" not in one.sentence
        assert 0 <= one.confidence <= 1
        assert (one.volume is None) == (one.confidence == 0)
    taken = [one.volume.name for one in found if one.volume]
    assert len(taken) == len(set(taken))
    return {one.channel: one.volume.name if one.volume else None for one in found}


# ---------------------------------------------------------------- headers of one patient


@pytest.fixture(scope="module")
def series(data_dir):
    """Folder name -> header (keys of DICOM_TAGS) of the first slice of each series."""
    headers = {}
    for folder in sorted((data_dir / "dicom_gbm" / "Study1").iterdir()):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(min(folder.iterdir())))
        reader.ReadImageInformation()
        keys = {key: tag.replace(",", "|") for key, tag in DICOM_TAGS.items()}
        headers[folder.name] = {key: reader.GetMetaData(tag) for key, tag in keys.items() if reader.HasMetaDataKey(tag)}
    return headers


RIGHT = {
    "T1": "34909-T1prereg-84610",
    "T1ce": "12-T1post-05670",
    "T2": "37916-T2reg-88910",
    "FLAIR": "36459-FLAIRreg-76244",
}


@pytest.mark.parametrize("names", [GLIOMA, ("FLAIR", "T1w", "T1Gd", "T2w"), ("t1n", "t1c", "t2w", "t2f")])
def test_all_four_series_of_a_patient_are_right(series, names):
    volumes = [VolumeDescription.fromHeader(name, header, key=name) for name, header in series.items()]
    found = matched(channels(*names), volumes)
    kinds = {"T1w": "T1", "t1n": "T1", "T1Gd": "T1ce", "t1c": "T1ce", "T2w": "T2", "t2w": "T2", "t2f": "FLAIR"}
    assert found == {name: RIGHT[kinds.get(name, name)] for name in names}


@pytest.mark.parametrize("hidden", [(), ("seriesDescription",)], ids=["whole header", "no description"])
def test_the_headers_alone_are_enough(series, hidden):
    volumes = []
    for index, (name, header) in enumerate(series.items()):
        seen = {key: value for key, value in header.items() if key not in hidden}
        volumes.append(VolumeDescription.fromHeader(f"volume {index}", seen, key=name))
    found = ChannelMatching.match(channels(*GLIOMA), volumes)
    assert {one.channel: one.volume and one.volume.key for one in found} == RIGHT


def test_the_names_alone_are_enough(series):
    volumes = [VolumeDescription(name, key=name) for name in series]
    assert matched(channels(*GLIOMA), volumes) == RIGHT


def test_each_channel_alone_is_right_or_empty(series):
    volumes = [VolumeDescription.fromHeader(name, header, key=name) for name, header in series.items()]
    for name, right in RIGHT.items():
        assert matched(channels(name), volumes) == {name: right}
        others = [volume for volume in volumes if volume.key != right]
        assert matched(channels(name), others) == {name: None}


def test_a_header_that_contradicts_the_name_leaves_the_channel_empty(series):
    flair = series[RIGHT["FLAIR"]]
    wrong = VolumeDescription.fromHeader("T1", {**flair, "seriesDescription": "T1"}, key="T1")
    match = ChannelMatching.match(channels("T1"), [wrong])[0]
    assert match.volume is None
    assert "but TE 127.8, TR 9000, TI 2250 ms" in match.sentence


@pytest.mark.parametrize(
    "contrast, values",
    [
        (Contrast.T1, {"scanningSequence": "SE", "echoTime": 12, "repetitionTime": 550}),
        (Contrast.T1, {"scanningSequence": "GR\\IR", "echoTime": 2.98, "repetitionTime": 2300, "inversionTime": 900}),
        (Contrast.T1, {"scanningSequence": "GR", "echoTime": 3.2, "repetitionTime": 8.2, "flipAngle": 12}),
        (Contrast.T2, {"scanningSequence": "SE", "echoTime": 98, "repetitionTime": 5200}),
        (Contrast.FLAIR, {"scanningSequence": "SE\\IR", "echoTime": 90, "repetitionTime": 9000, "inversionTime": 2500}),
        (Contrast.STIR, {"scanningSequence": "SE\\IR", "echoTime": 70, "repetitionTime": 5000, "inversionTime": 160}),
        (Contrast.PD, {"scanningSequence": "SE", "echoTime": 15, "repetitionTime": 3000}),
        (Contrast.T2_STAR, {"scanningSequence": "GR", "echoTime": 20, "repetitionTime": 28, "flipAngle": 15}),
        (Contrast.DWI, {"scanningSequence": "EP", "echoTime": 80, "repetitionTime": 6000, "diffusionBValue": 1000}),
        (None, {"scanningSequence": "EP", "echoTime": 30, "repetitionTime": 2000}),
        (None, {"scanningSequence": "GR", "echoTime": 2, "repetitionTime": 5, "flipAngle": 2}),
    ],
)
def test_the_times_of_a_sequence_tell_its_contrast(contrast, values):
    assert ChannelMatching._fromHeader(VolumeDescription("", **values))[0] is contrast


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "names",
    [
        (
            "BraTS20_Training_001_t1",
            "BraTS20_Training_001_t1ce",
            "BraTS20_Training_001_t2",
            "BraTS20_Training_001_flair",
        ),
        ("BraTS-GLI-00000-000-t1n", "BraTS-GLI-00000-000-t1c", "BraTS-GLI-00000-000-t2w", "BraTS-GLI-00000-000-t2f"),
        ("sub-01_T1w", "sub-01_ce-gadolinium_T1w", "sub-01_T2w", "sub-01_FLAIR"),
        ("AX T1", "AX T1 POST GD", "AX T2", "AX T2 FLAIR"),
        ("t1_tse_tra", "T1 MPRAGE SAG +C", "t2_tse_tra", "t2_tirm_tra_dark-fluid"),
        ("T1 SE axial w/o", "T1 SE axial w/ contrast", "T2 FSE axial", "FLAIR coronal"),
        ("t1_mprage_nativ", "t1_mprage_KM", "t2_space_sag", "3D Brain VIEW FLAIR"),
        ("T1w without contrast", "T1w with contrast", "T2w", "T2w-FLAIR"),
        ("12: AX T1 PRE", "13: AX T1 C+", "14: AX T2 FRFSE", "15: AX FLAIR FS"),
        ("T1_registered_to_T2", "T1_post_reg_to_T2", "T2_reg_to_T1", "FLAIR in T1 space"),
        ("case7.T1-native", "case7.T1-contrast", "case7.T2-weighted", "case7.T2-FLAIR"),
        ("Patient_MPRAGE", "Patient_MPRAGE_Gd", "Patient_T2TSE", "Patient_T2 FLAIR"),
    ],
)
def test_common_habits_of_naming_are_understood_in_any_order(names):
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        volumes = named(*(names[index] for index in order), "localizer", "ADC_map", "MIP t1")
        assert matched(channels(*GLIOMA), volumes) == dict(zip(GLIOMA, names, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        ("case_0000", "case_0001", "case_0002", "case_0003"),
        ("Series 3", "Series 4", "Series 5"),
        ("volume", "volume_1", "image"),
        ("T1T2 ratio", "T1w divided by T2w"),
        ("T1 T2 PD",),
        ("HippoCrop",),
        ("ST1001", "AT2B", "pdf scan"),
    ],
)
def test_names_that_say_nothing_leave_every_channel_empty(names):
    assert set(matched(channels(*GLIOMA), named(*names)).values()) == {None}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("3-pl localizer", "a localizer"),
        ("AAHead_Scout", "a localizer"),
        ("Loc T2", "a localizer"),
        ("T1 MIP", "a projection or angiogram"),
        ("rCBV map", "a derived map"),
        ("T1_SUB", "a derived map"),
        ("mp2rage_INV1", "a derived map"),
        ("T1 map", "a derived map"),
        ("HCP_3T_T1w_MPR1", ""),
        ("dT1", "a derived map"),
        ("ep2d_perf", "a perfusion or functional series"),
        ("T1_seg", "a label map"),
        ("ASSET calibration", "a calibration scan"),
        ("Screenshot T1", "a picture or report"),
        ("sub-01_T1w", ""),
        ("BraTS20_Training_001_t1", ""),
        ("T2 FLAIR local shim", "a calibration scan"),
    ],
)
def test_series_that_no_model_takes_are_known(name, kind):
    assert rejectedName(name) == kind


@pytest.mark.parametrize(
    "name, contrast",
    [
        ("T1 FLAIR", Contrast.T1),
        ("FLAIR +C", Contrast.FLAIR),
        ("T2*", Contrast.T2_STAR),
        ("t2_tirm", Contrast.STIR),
        ("STIR T2", Contrast.STIR),
        ("ep2d_diff_b1000_ADC", Contrast.ADC),
        ("DWI b 1000", Contrast.DWI),
        ("PD TSE", Contrast.PD),
        ("PD_T2_dual", Contrast.CONFLICT),
        ("T1 pre post", Contrast.CONFLICT),
        ("T1 no contrast", Contrast.T1_PLAIN),
        ("T1 non-enhanced", Contrast.T1_PLAIN),
        ("T1w_CE", Contrast.T1_ENHANCED),
        ("T1 vor KM", Contrast.T1_PLAIN),
        ("T1 nach KM", Contrast.T1_ENHANCED),
        ("AX T1 PRE-CONTRAST", Contrast.T1_PLAIN),
        ("AX T1 PRE GAD", Contrast.T1_PLAIN),
        ("T1 sans injection", Contrast.T1_PLAIN),
        ("T1 injecté", Contrast.T1_ENHANCED),
        ("T1 con contraste", Contrast.T1_ENHANCED),
        ("T1 sin contraste", Contrast.T1_PLAIN),
        ("T1 Pre/Post", Contrast.CONFLICT),
        ("MR1_T1_C", Contrast.CONFLICT),
        ("t2_spc_da-fl_sag_p2_iso", Contrast.FLAIR),
        ("t1_mpr_ns_sag_p2_iso", Contrast.T1),
        ("sub-1_space-T1w_T2w", Contrast.T2),
        ("CT Abdomen", Contrast.CT),
        ("MRBrainT1", Contrast.T1),
        ("MRBrainT2", Contrast.T2),
        ("brainFLAIR", Contrast.FLAIR),
        ("CTBrain", Contrast.CT),
        ("headCT", Contrast.CT),
        ("ImpactCTScan", Contrast.CT),
        ("ACT1", None),
        ("SPECTrum", None),
        ("preCTimes", None),
        ("object", None),
    ],
)
def test_single_names(name, contrast):
    assert contrastOfName(name) is contrast


@pytest.mark.parametrize(
    "name, contrast",
    [
        ("T1-CE", Contrast.T1_ENHANCED),
        ("T1 with contrast", Contrast.T1_ENHANCED),
        ("T1+C", Contrast.T1_ENHANCED),
        ("t1w", Contrast.T1),
        ("T2-FLAIR", Contrast.FLAIR),
        ("MRI", Contrast.MR),
        ("CT", Contrast.CT),
        ("0", Contrast.MR),
        ("late enhancement", None),
    ],
)
def test_names_of_channels(name, contrast):
    assert contrastOfChannel(name) is contrast


# ---------------------------------------------------------------- never silently wrong


def test_two_that_fit_equally_well_leave_the_channel_empty_and_say_so():
    found = ChannelMatching.match(channels("T1", "T2"), named("T1 tra", "T1 sag", "T2"))
    assert found[0].volume is None and found[1].volume.name == "T2"
    assert found[0].sentence == "T1 tra and T1 sag fit the channel T1 about equally well; choose one."


def test_a_t1_after_contrast_is_not_taken_for_one_before_and_the_reverse():
    assert matched(channels("T1"), named("T1 post")) == {"T1": None}
    assert matched(channels("T1ce"), named("T1")) == {"T1ce": None}
    assert matched(channels("T1ce"), named("T1 pre")) == {"T1ce": None}
    assert matched(channels("T1"), named("T1 pre", "T1 post")) == {"T1": "T1 pre"}


def test_contrast_agent_in_the_header_of_a_plain_t1_decides():
    tags = {"echoTime": 10.0, "repetitionTime": 600.0, "scanningSequence": "SE", "modality": "MR"}
    before, after = VolumeDescription("T1 a", **tags), VolumeDescription("T1 b", contrastAgent="Gadovist 7 ml", **tags)
    assert matched(channels("T1", "T1ce"), [before, after]) == {"T1": "T1 a", "T1ce": "T1 b"}
    assert matched(channels("T1ce"), [before]) == {"T1ce": None}
    nothing = VolumeDescription("T1 c", contrastAgent="NONE", **tags)
    assert matched(channels("T1ce"), [nothing]) == {"T1ce": None}


def test_a_dual_echo_and_a_t1_of_everything_fill_nothing():
    assert set(matched(channels("PD", "T2"), named("PD_T2_dual echo")).values()) == {None}


def test_ct_and_mr_are_told_apart_by_header_name_and_values():
    ct = IntensityStatistics.of(np.linspace(-1024, 1500, 999).round())
    mr = IntensityStatistics.of(np.linspace(0, 900, 999).round())
    assert matched(channels("CT", modality="CT"), named("a", statistics=ct)) == {"CT": "a"}
    assert matched(channels("CT", modality="CT"), named("a", statistics=mr)) == {"CT": None}
    assert matched(channels("MR"), named("a", statistics=mr)) == {"MR": "a"}
    assert matched(channels("MR"), named("a", statistics=ct)) == {"MR": None}
    assert matched(channels("MR"), named("a", modality="CT")) == {"MR": None}
    assert matched(channels("image", modality="CT"), named("x", modality="CT")) == {"image": None}
    assert matched(channels("T1"), named("T1", modality="CT")) == {"T1": None}
    assert matched(channels("CT", modality="CT"), named("CT chest", "T1")) == {"CT": "CT chest"}


def test_a_generic_channel_takes_the_only_image_and_never_one_of_two():
    assert matched(channels("MR"), named("scan", modality="MR")) == {"MR": "scan"}
    assert matched(channels("MR"), named("scan", "scan 2", modality="MR")) == {"MR": None}
    assert matched(channels("MR"), named("T1", "localizer", modality="MR")) == {"MR": "T1"}


def test_label_maps_and_empty_volumes_are_no_images():
    labels = IntensityStatistics.of(np.repeat([0, 1, 2, 4], 50))
    flat = IntensityStatistics.of(np.zeros(50))
    assert matched(channels("T1"), named("T1", statistics=labels)) == {"T1": None}
    assert matched(channels("T1"), named("T1", statistics=flat)) == {"T1": None}


def test_a_channel_with_a_name_of_its_own_takes_the_volume_that_says_it():
    assert matched(channels("late enhancement"), named("Late_Enhancement_01", "cine")) == {
        "late enhancement": "Late_Enhancement_01"
    }


def test_nothing_loaded_and_nothing_wanted():
    assert matched(channels("T1"), []) == {"T1": None}
    assert ChannelMatching.match([], named("T1")) == []


def test_the_assignment_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for rows, columns in itertools.product(range(1, 5), range(0, 6)):
        gains = generator.uniform(0, 1, (rows, columns)).round(2) * generator.integers(0, 2, (rows, columns))
        chosen = ChannelMatching._assign(gains)
        taken = [column for column in chosen if column is not None]
        assert len(taken) == len(set(taken))
        places = [*range(columns), *[None] * rows]
        best = max(ChannelMatching._total(gains, order) for order in itertools.permutations(places, rows))
        assert ChannelMatching._total(gains, chosen) == pytest.approx(best)


def test_ten_channels_and_sixty_volumes_take_no_time():
    volumes = named(*(f"T{1 + index % 2} number {index}" for index in range(60)))
    assert set(matched(channels(*(f"T1 number {index}" for index in range(10))), volumes).values()) == {None}


# ---------------------------------------------------------------- from nodes


def test_a_node_is_described_by_its_attributes_and_voxels(scene):
    array = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    node = add_volume(scene, array, name="12: scan")
    node.SetAttribute("DICOM.SeriesDescription", "AX T2 FLAIR")
    node.SetAttribute("DICOM.EchoTime", "120")
    node.SetAttribute("DICOM.RepetitionTime", "not a number")
    found = describeVolume(node)
    assert (found.name, found.key, found.seriesDescription) == ("12: scan", node.GetID(), "AX T2 FLAIR")
    assert found.echoTime == 120 and found.repetitionTime is None
    assert (found.statistics.minimum, found.statistics.maximum, found.statistics.whole) == (0, 999, True)


def test_the_header_comes_from_slicers_database_where_there_is_one(scene, monkeypatch, data_dir):
    import slicer

    folder = data_dir / "dicom_gbm" / "Study1" / RIGHT["T1ce"]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(min(folder.iterdir())))
    reader.ReadImageInformation()

    class Database:
        """ctkDICOMDatabase.instanceValue, on one file."""

        def instanceValue(self, instance, tag):
            key = tag.replace(",", "|")
            return reader.GetMetaData(key) if instance == "1.2.3" and reader.HasMetaDataKey(key) else ""

    monkeypatch.setattr(slicer, "dicomDatabase", Database(), raising=False)
    node = add_volume(scene, np.arange(1000, dtype=np.int16).reshape(10, 10, 10), name="12: x")
    node.SetAttribute("DICOM.instanceUIDs", "1.2.3 1.2.4")
    found = describeVolume(node)
    assert found.seriesDescription == "T1post" and found.contrastAgent.startswith("9ml")
    assert found.seriesInstanceUid.endswith("5670") and found.frameOfReferenceUid
    assert matched(channels("T1ce"), [found]) == {"T1ce": "12: x"}


def test_an_aligned_volume_is_what_it_was_made_of(scene):
    array = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    first = add_volume(scene, array, name="T1 post")
    second = add_volume(scene, array, matrix(spacing=(1, 1, 1.2)), name="T2")
    second.SetAttribute("DICOM.EchoTime", "90")
    aligned = align(second, first)
    found = describeVolume(aligned)
    assert aligned.GetAttribute(ALIGNED_FROM) == found.name == "T2"
    assert found.echoTime == 90
    assert found.key == aligned.GetID()


def test_a_volume_without_voxels_is_described_without_values(scene):
    assert describeVolume(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "T1")).statistics is None
