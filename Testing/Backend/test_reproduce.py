"""Tables of the papers: as printed, beside figures of our own that are computed or come from the user's evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny_datasets import BACKEND, invres

from invres import InvresError, cli, fixedbudget, furthertables, invrestables, published, reproduction
from invres.fixedbudget import Holding, holdings, largest
from invres.memory import predict_training
from invres.networkconfig import NetworkConfig, VAEConfig
from invres.reproduction import Comparison, Row, cells, find_table, table, tables

TABLES = {"fcn-1", "fcn-4", "invres-1", "invres-2", "invres-3", "invres-4", "iqt-4", "iqt-6", "mbconv-claims"}
TISSUES = {"CSF": 0.81, "GM": 0.72, "WM": 0.63}


def evaluated(path, scores, count=3):
    """A file as `invres evaluate` writes it, as far as it is read."""
    spread = {
        name: {"Dice": {"mean": dice, "n": count}, "HD": {"mean": 10 * dice, "n": count}} for name, dice in scores
    }
    path.write_text(json.dumps({"summary": spread}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def iseg(tmp_path_factory):
    """Table 2 with scores of one network."""
    file = evaluated(tmp_path_factory.mktemp("scores") / "metrics.json", TISSUES.items())
    outcome = invres("reproduce", "invres-2", "--metrics", f"fully_invres={file}", "--json")
    assert outcome.code == 0, outcome
    return outcome.events[-1]


def test_every_table_is_listed_with_its_source():
    found = invres("reproduce", "--list", "--json").events[-1]["tables"]
    assert {one["name"] for one in found} >= TABLES
    assert all(one["title"] and one["source"] for one in found)
    for arguments in (["--list"], []):
        text = invres("reproduce", *arguments).out
        assert all(name in text for name in TABLES)


def test_the_list_needs_no_torch():
    code = "import sys; from invres.cli import main; main(['reproduce', '--list']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(BACKEND)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "name", [name for name in published.__all__ if isinstance(getattr(published, name), published.PublishedTable)]
)
def test_a_published_table_has_a_value_for_every_column_and_a_name_for_every_row(name):
    printed = getattr(published, name)
    assert printed.title and printed.source and printed.rows.keys() == printed.names.keys()
    assert all(len(values) == len(printed.columns) for values in printed.rows.values())


@pytest.mark.slow
def test_growth_with_depth_has_the_order_that_is_printed():
    rows = invres("reproduce", "invres-1", "--json").events[-1]["rows"]
    memory = {row["of"]: row for row in rows if row["figure"].startswith("activations")}
    assert [row["published"] for row in memory.values()] == [4, 2, 1.5, 1]
    assert list(memory) == sorted(memory, key=lambda name: -memory[name]["ours"])
    assert all(row["ours"] <= row["published"] + 1e-9 for row in memory.values())
    assert memory["Invertible Networks: O(1)"]["ours"] == 1 and memory["Naive: O(L)"]["ours"] > 3.5
    operations = {row["of"]: row["ours"] for row in rows if row["figure"].startswith("operations")}
    assert operations["Recursive: O(log L)"] > 1.15 > operations["Checkpointing: O(sqrt L)"] > 0.95


def test_memory_is_what_the_network_is_predicted_to_need(iseg):
    memory = {row["of"]: row for row in iseg["rows"] if row["figure"] == "memory, GB"}
    assert {name: row["published"] for name, row in memory.items()} == {
        "3D U-Net (baseline)": 4.18,
        "Partially-InvRes": 3.60,
        "Fully-InvRes": 2.12,
    }
    config = NetworkConfig(name="fully_invres", in_channels=2, out_channels=4, vae=VAEConfig())
    expected = predict_training(config, (64, 64, 64)).peak_bytes / 2**30
    assert memory["Fully-InvRes"]["ours"] == pytest.approx(expected)
    for row in memory.values():
        assert row["ratio"] == pytest.approx(row["ours"] / row["published"])
    (share,) = [row for row in iseg["rows"] if "baseline's" in row["figure"] and row["of"] == "Fully-InvRes"]
    assert share["published"] == pytest.approx(2.12 / 4.18)
    assert share["ours"] == pytest.approx(expected / memory["3D U-Net (baseline)"]["ours"])


def test_accuracy_comes_from_the_users_evaluation_alone(iseg):
    scores = [row for row in iseg["rows"] if row["figure"].startswith(("Dice", "Hausdorff"))]
    assert len(scores) == 3 * 6 and all(row["published"] for row in scores)
    given = {row["figure"]: row for row in scores if row["of"] == "Fully-InvRes"}
    for tissue, dice in TISSUES.items():
        assert given[f"Dice {tissue}, %"]["ours"] == pytest.approx(100 * dice)
        assert given[f"Hausdorff {tissue}"]["ours"] == pytest.approx(10 * dice)
        assert given[f"Dice {tissue}, %"]["remark"] == "3 cases"
    others = [row for row in scores if row["of"] != "Fully-InvRes"]
    assert all(row["ours"] is None and row["ratio"] is None for row in others)


def test_a_score_of_cases_that_chose_the_epoch_says_so(tmp_path):
    for chosen, wanted in (
        (["a"], "3 cases; epoch chosen on 1 of them, so optimistic"),
        (["a", "b", "c"], "on them"),
        ([], "3 cases"),
    ):
        file = evaluated(tmp_path / "metrics.json", TISSUES.items())
        content = json.loads(file.read_text(encoding="utf-8")) | {"epoch_chosen_on": chosen}
        file.write_text(json.dumps(content), encoding="utf-8")
        rows = invres("reproduce", "invres-2", "--metrics", f"unet3d={file}", "--json").events[-1]["rows"]
        remarks = {
            row["remark"] for row in rows if row["of"].startswith("3D") and row["figure"].startswith(("Dice", "H"))
        }
        (remark,) = remarks
        assert wanted in remark and ("optimistic" in remark) == bool(chosen)


def test_distances_to_empty_masks_are_told_and_left_out_beside_the_mean(tmp_path, monkeypatch):
    memory = invrestables._memory
    monkeypatch.setattr(invrestables, "_memory", lambda network, patch, *rest: memory(network, (32, 32, 32), *rest))
    distances = {
        "(1, 2, 4)": [(8.0, "none"), (10.0, "none"), (12.0, "none"), (14.0, "none")],
        "(1, 4)": [(5.0, "none"), (7.0, "none"), (9.0, "none"), (0.0, "both")],
        "4": [(4.0, "none"), (6.0, "none"), (373.1287, "reference"), (373.1287, "predicted")],
    }
    names = dict(zip(distances, ("whole_tumour", "tumour_core", "enhancing_tumour"), strict=True))
    cases = [
        {
            "metrics": {key: {"HD": of[n][0]} for key, of in distances.items()},
            "empty": {k: of[n][1] for k, of in distances.items()},
        }
        for n in range(4)
    ]
    means = {names[key]: sum(value for value, _ in of) / 4 for key, of in distances.items()}
    summary = {name: {"Dice": {"mean": 0.8, "n": 4}, "HD": {"mean": mean, "n": 4}} for name, mean in means.items()}
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"summary": summary, "label_names": names, "metric_per_case": cases}), encoding="utf-8")
    found = invres("reproduce", "invres-3", "--metrics", f"fully_invres={file}", "--json").events[-1]
    rows = {row["figure"]: row for row in found["rows"] if row["of"] == "Fully-InvRes"}
    assert rows["Hausdorff ET"]["ours"] == pytest.approx((4 + 6 + 2 * 373.1287) / 4)
    without = {name: row for name, row in rows.items() if name.endswith("without empty masks")}
    assert {name: (row["published"], row["ours"]) for name, row in without.items()} == {
        "Hausdorff ET without empty masks": (6.68, 5.0),
        "Hausdorff TC without empty masks": (8.33, 7.0),
    }
    assert (
        without["Hausdorff ET without empty masks"]["remark"] == "2 cases; left out: 2 with one mask empty, 0 with both"
    )
    assert (
        without["Hausdorff TC without empty masks"]["remark"] == "3 cases; left out: 0 with one mask empty, 1 with both"
    )
    (note,) = [note for note in found["notes"] if note.startswith("Empty masks")]
    assert "373.1287 mm" in note and "6.68" in note and "at most 1 such case" in note


def test_what_an_empty_cell_needs_is_said_in_commands_that_exist(iseg):
    (note,) = [note for note in iseg["notes"] if "are empty" in note]
    assert "unet3d, partially_invres are empty" in note and "iSeg-2019" in note
    commands = [line.strip() for line in note.splitlines() if line.startswith("  invres ")]
    assert [command.split()[1] for command in commands] == ["train", "evaluate", "reproduce"]
    for command in commands:
        words = command.partition("   (")[0].replace("NETWORK", "unet3d").split()
        cli._parser().parse_args(words[1:])


def test_another_module_adds_a_table_by_one_function(monkeypatch):
    monkeypatch.setattr(reproduction, "_TABLES", dict(reproduction._TABLES))

    @table("extra-1", "An extra table", "A paper, table 1")
    def _make(request):
        return Comparison([Row("net", "memory, GB", 4.0, 1.0, "smaller")], ["A note."])

    outcome = invres("reproduce", "extra-1")
    assert outcome.code == 0 and outcome.out.startswith("extra-1: An extra table\nA paper, table 1\n")
    assert "| net | memory, GB | 4.00      | 1.00 | 0.250 | smaller |" in outcome.out
    assert outcome.out.rstrip().endswith("A note.")
    assert "extra-1" in invres("reproduce", "--list").out


def test_literature_stands_beside_our_parameters(monkeypatch):
    memory = invrestables._memory
    monkeypatch.setattr(invrestables, "_memory", lambda network, patch, *rest: memory(network, (32, 32, 32), *rest))
    rows = invres("reproduce", "invres-4", "--json").events[-1]["rows"]
    parameters = {row["of"]: row for row in rows if row["figure"] == "parameters"}
    assert len(parameters) == 5 and all(row["ours"] > 1e6 for row in parameters.values())
    assert parameters["3D U-Net"]["published"] == 19_069_955 and "1606.06650" in parameters["3D U-Net"]["remark"]
    second_hand = parameters["No New-Net"]
    assert second_hand["published"] == 12_430_000 and "second hand" in second_hand["remark"]
    assert parameters["Fully-InvRes"]["published"] is None and parameters["Fully-InvRes"]["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["invres-9"], "no table 'invres-9'"),
        (["invres-2", "--vram", "8GB"], "does not depend"),
        (["invres-2", "--metrics", "mbconv_unet={file}"], "its networks are unet3d"),
        (["invres-2", "--metrics", "{file}"], "its networks are unet3d"),
        (["mbconv-claims", "--metrics", "unet3d={file}"], "it takes none"),
        (["invres-2", "--metrics", "unet3d={file}", "--metrics", "unet3d={file}"], "given twice"),
        (["invres-2", "--metrics", "unet3d=nowhere.json"], "no file nowhere.json"),
        (["invres-3", "--metrics", "unet3d={file}"], "no Dice of 'whole_tumour'; their labels are CSF, GM, WM"),
        (["mbconv-claims", "--vram", "much"], "8GB"),
        (["mbconv-claims", "--device", "cpu"], "measures nothing"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, wanted):
    file = evaluated(tmp_path / "metrics.json", TISSUES.items())
    outcome = invres("reproduce", *(text.format(file=file) for text in arguments), "--json")
    assert outcome.code == 2
    assert wanted in outcome.events[-1]["message"]


def test_a_file_that_is_no_evaluation_is_told(tmp_path):
    (tmp_path / "metrics.json").write_text("[1]", encoding="utf-8")
    outcome = invres("reproduce", "invres-2", "--metrics", f"unet3d={tmp_path / 'metrics.json'}", "--json")
    assert outcome.code == 2 and "none" in outcome.events[-1]["message"]


def test_cells_leave_out_what_is_repeated_and_what_is_not_known():
    first, second = cells([Row("net", "memory", 4.0, 1.0), Row("net", "Dice", 92.5)])
    assert (first["of"], first["published"], first["ours"], first["ratio"]) == ("net", "4.00", "1.00", "0.250")
    assert (second["of"], second["ours"], second["ratio"]) == ("", "", "")
    assert cells([Row("net", "parameters", 19069955, None)])[0]["published"] == "19,069,955"


def test_a_table_is_found_by_its_name_only():
    assert [find_table(one.name) for one in tables()] == tables()
    with pytest.raises(InvresError) as caught:
        find_table("invres2")
    assert caught.value.hint == "Did you mean invres-2?"


# --- what a fixed amount of memory holds -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [1, 2, 7, 20])
def test_the_largest_that_fits_is_found_with_few_tries(end):
    for start in (0, 1, 3):
        for limit in range(start - 1, end + 3):
            tried = []

            def fits(number, limit=limit, tried=tried):
                tried.append(number)
                return number <= limit

            if start <= end:
                assert largest(fits, start, end) == (min(limit, end) if limit >= start else start - 1)
                assert len(tried) <= 12 and all(start <= number <= end for number in tried)


@pytest.mark.slow
def test_a_budget_is_filled_and_not_exceeded():
    config = NetworkConfig(name="mbconv_unet", channels=(16, 32), in_channels=1, out_channels=2)
    budget = predict_training(config, (48,) * 3, engine="stored").peak_bytes
    stored, reversible = holdings(config, budget)
    assert (stored.side, stored.blocks, stored.width, stored.at_side) == (48, 3, 16, 48)
    assert reversible.side > stored.side and reversible.blocks > stored.blocks and reversible.width > stored.width

    def needed(side):
        return predict_training(config, (side,) * 3, engine="reversible").peak_bytes

    assert needed(reversible.side) <= budget < needed(reversible.side + 16)
    wide = NetworkConfig(
        name="mbconv_unet", channels=(reversible.width, 2 * reversible.width), in_channels=1, out_channels=2
    )
    assert predict_training(wide, (48,) * 3, engine="reversible").peak_bytes <= budget


def test_too_small_a_budget_is_told():
    config = NetworkConfig(name="mbconv_unet", channels=(16, 32), in_channels=1, out_channels=2)
    with pytest.raises(InvresError, match="too little to train mbconv_unet"):
        holdings(config, 2**16)


def test_the_claims_are_ratios_of_what_both_hold(monkeypatch):
    def given(config, budget_bytes, report=None):
        return (
            Holding("stored", 64, 14, 32, 64, (True, True, True)),
            Holding("reversible", 128, 28, 96, 64, (True, False, True)),
        )

    monkeypatch.setattr(fixedbudget, "holdings", given)
    found = find_table("mbconv-claims").make(fixedbudget.Request(vram_bytes=8 * 2**30))
    assert isinstance(found, Comparison)
    claims = {row.figure: row for row in found.rows if row.published is not None}
    assert {name: (row.published, row.ours) for name, row in claims.items()} == {
        "volume, times": (3.0, 8.0),
        "depth, times": (1.25, 2.0),
        "channels, times": (2.0, 3.0),
    }
    assert claims["depth, times"].remark == "at least" and not claims["volume, times"].remark


def test_errors_of_an_enhancing_model_stand_beside_the_papers(tmp_path):
    means = (("interior", None), ("exterior", 3e-4), ("total", 2e-4))
    errors = {"summary": {"network": {region: {"mean": mean, "sd": None} for region, mean in means}}}
    (tmp_path / "errors.json").write_text(json.dumps(errors), encoding="utf-8")
    given = ("--metrics", f"espcn_rn4-8={tmp_path / 'errors.json'}")
    found = invres("reproduce", "iqt-4", *given, "--json").events[-1]
    ours = {row["figure"]: row["ours"] for row in found["rows"] if row["of"] == "ESPCN-RN4, 8 subjects"}
    filled = {figure: value for figure, value in ours.items() if value is not None}
    assert filled == {"RMSE exterior, mean": pytest.approx(0.3), "RMSE total, mean": pytest.approx(0.2)}
    assert len(ours) == 6
    assert all(row["ours"] is None for row in found["rows"] if row["of"] != "ESPCN-RN4, 8 subjects")
    evaluated(tmp_path / "other.json", TISSUES.items())
    outcome = invres("reproduce", "iqt-4", "--metrics", f"espcn-8={tmp_path / 'other.json'}")
    assert outcome.code == 2 and "model that enhances" in outcome.err


def test_the_test_of_the_paper_is_made_on_the_scans_that_both_models_were_scored_on(tmp_path):
    def scored(name, errors):
        scans = [{"name": f"scan{n}", "network": {"total": error}} for n, error in enumerate(errors)]
        regions = {region: {"mean": 1e-3, "sd": 1e-4} for region in ("interior", "exterior", "total")}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"scans": scans, "summary": {"network": regions}}), encoding="utf-8")
        return ["--metrics", f"{name}={path}"]

    better, worse = [1e-3 * (n + 1) for n in range(8)], [1.1e-3 * (n + 1) for n in range(9)]
    given = scored("espcn_rn4-32", better) + scored("espcn-32", worse)
    rows = invres("reproduce", "iqt-4", *given, "--json").events[-1]["rows"]
    tests = [row for row in rows if row["figure"].startswith("Wilcoxon")]
    assert [row["published"] for row in tests] == [0, 0.0117] * 2
    of_best, of_32 = tests[:2], tests[2:]
    assert [row["ours"] for row in of_best] == [None, None]
    assert of_32[0]["ours"] == 0 and of_32[1]["ours"] == pytest.approx(0.0117, abs=1e-4), "8 subjects, all better"
    spreads = {row["figure"]: row["ours"] for row in rows if row["of"] == "ESPCN, 32 subjects"}
    assert spreads["RMSE total, sd"] == pytest.approx(0.1)
    # A scan without brain has no error, and a file may lack its scans: no test then, but the rest.
    broken = {"scans": [{"name": "a", "network": {"total": None}}]}
    assert furthertables._tested(broken, broken) == furthertables._tested(broken, {"scans": [{"name": "a"}]}) == {}


def test_the_gain_by_large_patches_needs_both_evaluations(tmp_path):
    small = ("--metrics", f"96x96x96={evaluated(tmp_path / 'small.json', {'kidney': 0.90, 'tumour': 0.70}.items())}")
    large = ("--metrics", f"256x256x152={evaluated(tmp_path / 'large.json', {'kidney': 0.94, 'tumour': 0.80}.items())}")
    for given, ours in ((small, [None, 80.0, None]), (small + large, [87.0, 80.0, 7.0])):
        rows = invres("reproduce", "fcn-4", *given, "--json").events[-1]["rows"]
        assert [row["ours"] for row in rows] == [one if one is None else pytest.approx(one) for one in ours]
        assert rows[-1]["published"] == 5.0
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    outcome = invres("reproduce", "fcn-4", "--metrics", f"96x96x96={tmp_path / 'other.json'}")
    assert outcome.code == 2 and "The metrics of 96x96x96 hold no Dice." in outcome.err


@pytest.mark.slow
def test_the_figure_of_image_quality_transfer_has_memory_and_time_beside_the_papers():
    rows = invres("reproduce", "iqt-6", "--json").events[-1]["rows"]
    of_naive = {row["of"]: row for row in rows if row["figure"] == "memory, of naive"}
    assert of_naive["ESPCN-RN4 Naive"]["ours"] == 1 and of_naive["ESPCN-RN4"]["published"] == pytest.approx(541 / 1091)
    assert of_naive["ESPCN-RN4"]["ours"] < 0.5, "the paper's saving at the least"
    assert all(row["ours"] > 0 for row in rows)


def test_the_table_of_compact_networks_keeps_what_did_not_fit_empty(monkeypatch):
    from invres import fcn_table

    whole = fcn_table.compare_table
    monkeypatch.setattr(fcn_table, "compare_table", lambda report: whole(sizes=("96x96x96",), report=report))
    rows = find_table("fcn-1").make(reproduction.Request()).rows
    baseline = [row for row in rows if row.of == "Baseline U-Net"]
    assert [row.figure for row in baseline] == ["parameters, M", "96x96x96, GB", "96x96x96, of the baseline's"]
    assert baseline[0].ratio == pytest.approx(1, abs=0.05) and baseline[1].published == 3.7
    assert [row.published for row in rows if row.of == "fully_invres"] == [None, None, None]
