"""`invres compare`: two evaluations paired case by case, against figures computed another way, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from tiny_datasets import invres

from invres import InvresError
from invres.config import Label, LabelScheme
from invres.evaluation import score_pairs
from invres.events import Recorder
from invres.files import write_json
from invres.resultcomparison import compare, comparison_table, read_result
from invres.volume import Geometry, Volume, write_volume

TWO = LabelScheme((Label("liver", (1,), 1), Label("tumour", (2,), 2)))
GRID = Geometry((8, 12, 14), (2.0, 1.1, 0.9), (0, 0, 0), np.eye(3))
# Of each case, how far its prediction lies beside its reference, in A and in B; the tumour is always found in B.
SHIFTS = {"c0": (2, 1), "c1": (3, 1), "c2": (2, 0), "c3": (3, 2), "c4": (1, 1), "c5": (3, 0), "c6": (2, 1)}
PATIENTS = {"c0": "Anna", "c1": "Anna"}


def labels(shift=0, tumour=True):
    array = np.zeros(GRID.shape, dtype=np.uint8)
    array[1:5, 2:8, 1:9] = 1
    array[5:7, 2:6, 2:6] = 2 if tumour else 0
    return np.roll(array, shift, axis=2)


def result(folder, name, shifts, scheme=TWO, patients=PATIENTS, tolerance_mm=1.0, without_tumour=()):
    """A file as `invres evaluate` writes it."""
    pairs = []
    for case, shift in shifts.items():
        predicted, reference = folder / name / f"{case}.nii.gz", folder / "references" / f"{case}.nii.gz"
        write_volume(predicted, Volume(labels(shift, case not in without_tumour), GRID))
        write_volume(reference, Volume(labels(tumour=case not in without_tumour), GRID))
        pairs.append((case, predicted, reference))
    path = folder / f"{name}.json"
    write_json(path, score_pairs(pairs, scheme, tolerance_mm=tolerance_mm, patients=patients), "metrics")
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return tuple(
        result(folder, name, {case: shifts[place] for case, shifts in SHIFTS.items()})
        for place, name in enumerate(("first", "second"))
    )


def found(*paths, report=None):
    return compare(*(read_result(path) for path in paths), *(() if report is None else (report,)))


def table_of(path, label, metric):
    """Values by patient, read from the file itself."""
    content = json.loads(path.read_text(encoding="utf-8"))
    key = next(key for key, name in content["label_names"].items() if name == label)
    values = {}
    for case in content["metric_per_case"]:
        values.setdefault(PATIENTS.get(case["name"], case["name"]), []).append(case["metrics"][key][metric])
    return values


def changed(path, target, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def named(content, old, new):
    for case in content["metric_per_case"]:
        case["name"] = new if case["name"] == old else case["name"]


@pytest.mark.parametrize("metric", ["Dice", "HD95", "NSD", "ASD", "MHD"])
@pytest.mark.parametrize("label", ["liver", "tumour"])
def test_differences_are_those_of_a_paired_t_test_over_patients(both, label, metric):
    of = found(*both)["labels"][label][metric]
    a, b = (table_of(path, label, metric) for path in both)
    assert len(a) == 6 and len(a["Anna"]) == 2
    before, after = ([np.mean(values) for values in one.values()] for one in (a, b))
    expected = stats.ttest_rel(after, before)
    bounds = expected.confidence_interval(0.95)
    assert of["difference"]["mean"] == pytest.approx(np.mean(after) - np.mean(before))
    assert of["difference"]["ci95"] == pytest.approx([bounds.low, bounds.high])
    assert of["p"] == pytest.approx(expected.pvalue) and of["difference"]["n"] == 6
    assert of["a"]["mean"] == pytest.approx(np.mean(before)) and of["b"]["mean"] == pytest.approx(np.mean(after))
    assert of["b"]["sd"] == pytest.approx(np.std(after, ddof=1))
    assert (of["b"]["n"], of["b"]["n_patients"]) == (7, 6)


def test_the_mean_over_labels_decides_and_b_minus_a_has_the_sign(both):
    forth, back = found(*both), found(*both[::-1])
    assert (forth["verdict"], back["verdict"]) == ("better", "worse")
    assert forth["n_cases"] == 7 and forth["n_patients"] == 6
    means = [
        np.mean([[np.mean(values) for values in table_of(path, label, "Dice").values()] for label in TWO.names], axis=0)
        for path in both
    ]
    expected = stats.ttest_rel(means[1], means[0])
    assert forth["overall"]["Dice"]["p"] == pytest.approx(expected.pvalue) == back["overall"]["Dice"]["p"]
    change = forth["overall"]["Dice"]["difference"]["mean"]
    assert change == pytest.approx(np.mean(means[1] - means[0])) == -back["overall"]["Dice"]["difference"]["mean"]
    assert "On 7 cases of 6 patients the Dice is" in forth["sentence"] and "B is better than A." in forth["sentence"]
    assert forth["sentence"].endswith("Labels that are better in B: liver, tumour.")
    assert forth["better_labels"] == back["worse_labels"] == ["liver", "tumour"]


def test_the_means_beside_a_difference_are_of_the_same_patients(both, tmp_path):
    """The many cases of one patient get better in B, those of each other patient worse: over cases the mean rises."""

    def of_many(one, others):
        def change(content):
            first = content["metric_per_case"][0]
            cases = [("Anna", one)] * 50 + [(f"p{number}", value) for number, value in enumerate(others)]
            content["metric_per_case"] = [
                {
                    **first,
                    "name": f"c{number}",
                    "patient": patient,
                    "metrics": {key: {**of, "Dice": dice} for key, of in first["metrics"].items()},
                }
                for number, (patient, dice) in enumerate(cases)
            ]

        return change

    a = changed(both[0], tmp_path / "a.json", of_many(0.8, [0.60, 0.61, 0.62, 0.63]))
    b = changed(both[0], tmp_path / "b.json", of_many(0.9, [0.50, 0.50, 0.52, 0.54]))
    content = found(a, b)
    dice = content["overall"]["Dice"]
    assert dice["a"]["mean"] == pytest.approx(np.mean([0.8, 0.60, 0.61, 0.62, 0.63]))
    for of in (dice, *(content["labels"][label]["Dice"] for label in TWO.names)):
        assert of["b"]["mean"] - of["a"]["mean"] == pytest.approx(of["difference"]["mean"])
        assert of["difference"]["mean"] < 0 and (of["a"]["n"], of["a"]["n_patients"]) == (54, 5)
    assert "the Dice is 0.652 in A and 0.592 in B (difference -0.060" in content["sentence"]
    assert "Means, differences and p are over patients" in comparison_table(content)


def test_labels_of_a_metric_are_tested_together(both, tmp_path):
    """p of 0.04 alone is beyond doubt with one label, and not beside a second one that does not differ."""
    dice = {"1": [0.04, 0.10, 0.14, 0.0, 0.08, 0.01], "2": [0.01, -0.01, 0.02, -0.02, 0.0, 0.0]}
    assert 0.025 < stats.ttest_1samp(dice["1"], 0).pvalue < 0.05

    def with_dice(add):
        def change(content):
            content["metric_per_case"] = content["metric_per_case"][1:]
            for place, case in enumerate(content["metric_per_case"]):
                case["patient"] = case["name"]
                for key, of_label in case["metrics"].items():
                    of_label["Dice"] = 0.5 + add * dice[key][place]

        return change

    a, b = (changed(both[0], tmp_path / f"{add}.json", with_dice(add)) for add in (0, 1))
    together = found(a, b)
    assert not together["labels"]["liver"]["Dice"]["beyond_doubt"] and together["better_labels"] == []

    def liver_alone(content):
        del content["label_names"]["2"]
        for case in content["metric_per_case"]:
            del case["metrics"]["2"]

    a, b = (changed(path, path.with_suffix(".alone.json"), liver_alone) for path in (a, b))
    alone = found(a, b)
    assert alone["labels"]["liver"]["Dice"]["beyond_doubt"] and alone["better_labels"] == ["liver"]
    assert "mean of labels" not in comparison_table(alone) and "Holm" not in comparison_table(alone)


def test_the_same_result_twice_is_as_good(both):
    assert found(both[0], both[0])["verdict"] == "as good"


def test_two_patients_prove_nothing(both, tmp_path):
    def few(content):
        content["metric_per_case"] = content["metric_per_case"][:3]

    two = found(*(changed(path, tmp_path / path.name, few) for path in both))
    assert (two["n_cases"], two["n_patients"]) == (3, 2) and two["verdict"] == "not enough data to tell"
    assert two["sentence"].endswith(": not enough data to tell.")


def test_the_worst_cases_for_b_come_first(both):
    one = found(*both[::-1])
    changes = {name: pytest.approx(one) for name, one in zip(SHIFTS, _mean_changes(both[::-1]), strict=True)}
    assert {case["case"]: case["difference"] for case in one["cases"]} == changes
    order = [case["difference"] for case in one["cases"]]
    assert order == sorted(order) and len(order) == 7
    lines = comparison_table(one).splitlines()
    start = lines.index("Worst for B (difference in Dice, mean over labels):")
    assert [line.split()[0] for line in lines[start + 2 :]] == [case["case"] for case in one["cases"][:5]]


def _mean_changes(paths):
    contents = [json.loads(path.read_text(encoding="utf-8"))["metric_per_case"] for path in paths]
    dice = np.array([[[of["Dice"] for of in case["metrics"].values()] for case in cases] for cases in contents])
    return (dice[1] - dice[0]).mean(axis=1)


def test_cases_that_one_alone_has_are_counted_and_left_out(both, tmp_path):
    b = changed(both[1], tmp_path / "b.json", lambda content: named(content, "c6", "other"))
    report = Recorder()
    one = found(both[0], b, report=report)
    assert (one["n_cases"], one["only_a"], one["only_b"]) == (6, ["c6"], ["other"])
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert warnings == [f"Only {both[0]} has 1 case, left out here: c6.", f"Only {b} has 1 case, left out here: other."]
    assert "Left out, as only A has them: 1 case: c6." in comparison_table(one)


def test_a_file_of_an_earlier_version_is_compared_by_what_it_has(both, tmp_path):
    """Without patients, and without ASD and MHD."""

    def older(content):
        for case in content["metric_per_case"]:
            del case["patient"]
            for of_label in case["metrics"].values():
                del of_label["ASD"], of_label["MHD"]

    old = [changed(path, tmp_path / path.name, older) for path in both]
    one = found(*old)
    assert one["n_patients"] == 7 and list(one["overall"]) == ["Dice", "HD95", "NSD"]
    assert found(old[0], both[1])["n_patients"] == 6, "the newer of the two files knows the patients"


def test_masks_that_are_empty_are_counted(tmp_path):
    shifts = {"c0": 1, "c1": 0, "c2": 2, "c3": 1}
    a = result(tmp_path, "a", shifts, without_tumour=("c1", "c2"))
    b = changed(
        a,
        tmp_path / "b.json",
        lambda content: [case["empty"].update({"2": "predicted"}) for case in content["metric_per_case"][:1]],
    )
    one = found(a, b)
    assert one["labels"]["tumour"]["both_empty"] == {"a": 2, "b": 2}
    assert one["labels"]["tumour"]["one_empty"] == {"a": 0, "b": 1}
    table = comparison_table(one)
    assert "Empty in prediction and reference, which counts as Dice 1 (cases of A/B): tumour 2/2." in table
    assert "One mask empty, which counts as Dice 0 and 373.1287 mm (cases of A/B): tumour 0/1." in table


def test_other_references_are_warned_of_and_chosen_epochs_told(both, tmp_path):
    def change(content):
        content["metric_per_case"][2]["metrics"]["1"]["n_ref"] += 1
        content["epoch_chosen_on"] = ["c0", "c1", "elsewhere"]

    report = Recorder()
    one = found(both[0], changed(both[1], tmp_path / "b.json", change), report=report)
    (warning,) = [event["message"] for event in report.events if event["event"] == "warning"]
    assert "different references" in warning and warning.endswith("c2.")
    assert "The epoch of B was chosen by the Dice of 2 cases, which flatters it." in comparison_table(one)


def _of_other_patient(content):
    content["metric_per_case"][0]["patient"] = "Berta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("metric_per_case"), "is no result of `invres evaluate`"),
        (lambda content: content.pop("label_names"), "is no result of `invres evaluate`"),
        (lambda content: content.update(metric_per_case=[]), "is no result of `invres evaluate`"),
        (lambda content: content["metric_per_case"][0]["metrics"].clear(), "is no result of `invres evaluate`"),
        (lambda content: named(content, "c0", "c1"), "is no result of `invres evaluate`"),
        (
            lambda content: content["label_names"].update({"2": "lesion"}),
            "only .*first.json has tumour; only .* lesion",
        ),
        (lambda content: content.update(tolerance_mm=2.0), "is 1 mm in .*first.json and 2 mm in"),
        (_of_other_patient, "case c0 is of the patient Anna in .*first.json and of Berta in"),
        (lambda content: [named(content, name, f"x{name}") for name in SHIFTS], "no case in common: c0, c1"),
    ],
)
def test_what_cannot_be_paired_is_refused_with_the_reason(both, tmp_path, change, words):
    with pytest.raises(InvresError, match=words):
        found(both[0], changed(both[1], tmp_path / "b.json", change))


@pytest.mark.parametrize("metric", ["Dice", "HD95", "ASD", "MHD", "NSD"])
@pytest.mark.parametrize("value", [None, "0.5", True, [0.5], float("nan"), float("inf")], ids=str)
def test_a_metric_that_is_no_finite_number_is_refused_by_its_name(both, tmp_path, metric, value):
    def change(content):
        content["metric_per_case"][4]["metrics"]["2"][metric] = value

    damaged = changed(both[1], tmp_path / "b.json", change)
    with pytest.raises(
        InvresError, match=rf"b.json is damaged: the {metric} of tumour in the case c4 is .*, not a fin"
    ):
        read_result(damaged)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["metric_per_case"][1]["metrics"].update({"2": []}),
        lambda content: content["metric_per_case"][1].update(empty=["both"]),
        lambda content: content["metric_per_case"].append(None),
        lambda content: content["label_names"].update({"2": None}),
        lambda content: content["label_names"].update({"2": "liver"}),
        lambda content: content["label_names"].clear(),
        lambda content: content.update(tolerance_mm=None),
        lambda content: content.update(tolerance_mm=10**400),
        lambda content: content.update(epoch_chosen_on=[1, "c0"]),
    ],
)
def test_a_damaged_file_is_refused_and_no_fault_of_the_program(both, tmp_path, change):
    damaged = changed(both[1], tmp_path / "b.json", change)
    outcome = invres("compare", both[0], damaged, "--json")
    assert outcome.code == 2 and outcome.events[-1]["message"].startswith(f"{damaged} is no result of"), outcome.err


def test_a_folder_is_told_to_be_one(both):
    outcome = invres("compare", both[0], both[0].parent, "--json")
    assert outcome.code == 2 and outcome.events[-1]["message"] == f"{both[0].parent} is a folder."
    assert outcome.events[-1]["hint"] == "Give the JSON file that `invres evaluate` wrote."


def test_labels_of_one_name_and_other_values_are_refused(both, tmp_path):
    other = LabelScheme((Label("liver", (1, 2), 1), Label("tumour", (2,), 2)), regions=True)
    path = result(tmp_path, "b", {"c0": 1}, scheme=other)
    with pytest.raises(InvresError, match=r"liver has the values 1 in .*first.json and \(1, 2\) in"):
        found(both[0], path)


def test_the_verb_prints_and_writes_the_comparison(both, tmp_path):
    output = tmp_path / "new" / "compared.json"
    outcome = invres("compare", *both, "-o", output)
    assert outcome.code == 0, outcome.err
    content = json.loads(output.read_text(encoding="utf-8"))
    assert outcome.out.startswith(f"A: {both[0]}\nB: {both[1]}\n{content['sentence']}\n") and "Holm" in outcome.out
    assert max(map(len, outcome.out.splitlines()[3:])) <= 120
    again = invres("compare", *both, "-o", output, "--json")
    event = again.events[-1]
    assert event.pop("event") == "result" and event.pop("output") == str(output) and event == content
    assert invres("compare", *both, "--json").events[-1]["output"] is None


def test_the_verb_never_overwrites_what_it_compares_or_something_else(both, tmp_path):
    before = both[0].read_bytes()
    for output in (both[0], result(tmp_path, "third", {"c0": 0})):
        outcome = invres("compare", *both, "-o", output, "--json")
        assert outcome.code == 2 and outcome.events[-1]["code"] == "output_is_input"
    assert both[0].read_bytes() == before
    for wrong in (tmp_path / "nowhere.json", tmp_path / "third" / "c0.nii.gz"):
        outcome = invres("compare", both[0], wrong, "--json")
        assert outcome.code == 2 and str(wrong) in outcome.events[-1]["message"]
