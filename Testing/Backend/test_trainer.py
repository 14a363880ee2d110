"""The training loop: an interrupted training equals an undisturbed one, and every end of it keeps what was learnt."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from tiny_datasets import GRIDS, files_up_to, leftovers, phantom, tiny_recipe

from invres import Cancelled, InvresError
from invres.checkpoint import CHECKPOINT, load_checkpoint
from invres.config import ChannelPlan, Label, LabelScheme, PreparationPlan, TrainingConfig
from invres.events import Recorder
from invres.networks import build, with_patch
from invres.objectives import Segmentation
from invres.preprocessing import prepare
from invres.reversible import Couple
from invres.sampling import CaseBatches
from invres.trainer import StopRequest, Trainer, learning_rate_factor

SCHEME = LabelScheme((Label("upper", (1,), 1), Label("lower", (2,), 2), Label("core", (3,), 3)))
PLAN = PreparationPlan((ChannelPlan("T1"), ChannelPlan("T2")), (2.5, 1.1, 0.8))
NETWORKS = {
    "plain": {},
    "dropout and VAE": {"dropout": 0.2, "vae": {"latent": 4, "reduced_channels": 2}},
    "U-Net with batch norm": {"name": "unet3d", "channels": [4, 8], "norm": "batch", "dropout": 0.1},
}


@pytest.fixture(scope="module")
def cases():
    volumes = [phantom(grid, 2, seed) for seed, grid in enumerate(GRIDS)]
    return [prepare(images, label, PLAN, SCHEME, str(index)) for index, (images, label) in enumerate(volumes)]


class StopsAt:
    """Batches that ask for a stop when an iteration is drawn, as a person would from outside."""

    def __init__(self, batches, stop, iteration):
        self.batches, self.stop, self.iteration = batches, stop, iteration

    def batch(self, iteration):
        if iteration == self.iteration:
            self.stop.requested = True
        return self.batches.batch(iteration)


def trainer_of(cases, folder, network=None, stop_at=None, seed=0, validate=None, report=None, **training):
    folder.mkdir(parents=True, exist_ok=True)
    recipe = tiny_recipe({"in_channels": 2, "out_channels": 4, **(network or {})}, **training)
    config, stop = recipe.training, StopRequest()
    torch.manual_seed(seed)
    net = build(with_patch(recipe.network, config.patch), config.engine)
    batches = CaseBatches(cases, SCHEME, config, recipe.augmentation, torch.device("cpu"), PLAN)
    if stop_at is not None:
        batches = StopsAt(batches, stop, stop_at)
    return Trainer(net, batches, config, folder, Segmentation(False, config.loss), validate, report or Recorder(), stop)


def weight_sum(network):
    """A stand-in for Dice that depends on every weight."""
    total = sum(float(p.detach().double().abs().sum()) for p in network.parameters())
    return {"upper": total % 1.0, "mean": total % 1.0}


def without_seconds(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*((network, "adam") for network in NETWORKS.values()), (NETWORKS["plain"], "muon")],
    ids=[*NETWORKS, "Muon"],
)
def test_a_training_stopped_anywhere_and_resumed_ends_bit_equal(cases, tmp_path, network, optimizer):
    kind = {"network": network, "epochs": 3, "iterations_per_epoch": 3, "validate": weight_sum}
    kind |= {"optimizer": optimizer, "weight_decay": 0.1}
    whole = trainer_of(cases, tmp_path / "whole", **kind)
    wanted = whole.run()
    for stop_at in (1, 5):  # within an epoch and at its end
        folder = tmp_path / str(stop_at)
        with pytest.raises(Cancelled, match=f"Stopped after {stop_at + 1} of 9 iterations") as caught:
            trainer_of(cases, folder, stop_at=stop_at, **kind).run()
        assert caught.value.exit_code == 130 and "--resume" in caught.value.hint
        assert load_checkpoint(folder)["iteration"] == stop_at + 1
        second = trainer_of(cases, folder, seed=77, **kind)
        second.resume()
        result = second.run()
        assert equal(second.network.state_dict(), whole.network.state_dict()), stop_at
        assert equal(result.weights, wanted.weights), stop_at
        assert without_seconds(result.history) == without_seconds(wanted.history), stop_at
        assert without_seconds(metrics_of(folder)) == without_seconds(metrics_of(tmp_path / "whole"))
        assert (result.best_score, result.best_epoch) == (wanted.best_score, wanted.best_epoch)
        assert leftovers(folder) == []


def test_a_training_stopped_at_every_step_ends_bit_equal(cases, tmp_path):
    kind = {"network": NETWORKS["dropout and VAE"], "epochs": 2, "iterations_per_epoch": 2, "validate": weight_sum}
    whole = trainer_of(cases, tmp_path / "whole", **kind)
    whole.run()
    for stop_at in range(4):
        trainer = trainer_of(cases, tmp_path / "parts", stop_at=stop_at, seed=stop_at + 5 if stop_at else 0, **kind)
        if stop_at:
            trainer.resume()
        with pytest.raises(Cancelled):
            trainer.run()
    assert equal(trainer.network.state_dict(), whole.network.state_dict())


def test_without_the_random_state_dropout_would_make_another_training(cases, tmp_path):
    kind = {"network": {"dropout": 0.5}, "epochs": 1, "iterations_per_epoch": 4}
    whole = trainer_of(cases, tmp_path / "whole", **kind)
    whole.run()
    with pytest.raises(Cancelled):
        trainer_of(cases, tmp_path / "part", stop_at=1, **kind).run()
    second = trainer_of(cases, tmp_path / "part", **kind)
    second.resume()
    torch.manual_seed(1)
    second.run()
    assert not equal(second.network.state_dict(), whole.network.state_dict())


def test_checkpoints_are_written_within_an_epoch_when_they_are_due(cases, tmp_path):
    seen = []

    class Looks:
        def __init__(self, batches):
            self.batches = batches

        def batch(self, iteration):
            seen.append(load_checkpoint(tmp_path)["iteration"] if (tmp_path / CHECKPOINT).exists() else None)
            return self.batches.batch(iteration)

    trainer = trainer_of(cases, tmp_path, epochs=1, iterations_per_epoch=4, checkpoint_every_s=0.0)
    trainer.batches = Looks(trainer.batches)
    trainer.run()
    assert seen == [None, 1, 2, 3]
    assert load_checkpoint(tmp_path)["iteration"] == 4


def test_a_finished_training_resumes_to_the_same_end_at_once(cases, tmp_path):
    first = trainer_of(cases, tmp_path, validate=weight_sum)
    result = first.run()
    again = trainer_of(cases, tmp_path, seed=9, validate=weight_sum)
    again.resume()
    repeated = again.run()
    assert equal(repeated.weights, result.weights) and repeated.history == result.history
    assert repeated.iterations == result.iterations == 4


def test_a_longer_plan_goes_on_from_the_end(cases, tmp_path):
    trainer_of(cases, tmp_path, epochs=2, schedule="constant").run()
    longer = trainer_of(cases, tmp_path, epochs=4, schedule="constant", seed=5)
    longer.resume()
    longer.run()
    whole = trainer_of(cases, tmp_path / "whole", epochs=4, schedule="constant")
    whole.run()
    assert equal(longer.network.state_dict(), whole.network.state_dict())


@pytest.mark.parametrize("network", [{"channels": [4, 32]}, {"name": "unet3d"}, {"dropout": 0.5}])
def test_a_checkpoint_of_another_network_is_refused(cases, tmp_path, network):
    trainer_of(cases, tmp_path, epochs=1).run()
    with pytest.raises(InvresError, match="belongs to another network") as caught:
        trainer_of(cases, tmp_path, network=network).resume()
    assert "recipe" in caught.value.hint


def test_a_checkpoint_of_another_program_is_refused(cases, tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / CHECKPOINT)
    with pytest.raises(InvresError, match="belongs to another network"):
        trainer_of(cases, tmp_path).resume()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_asks_for_a_stop_and_a_second_one_does_not_wait(number):
    found = signal.signal(number, signal.SIG_DFL)  # where the tests were started by nohup one is ignored
    try:
        with StopRequest().listening() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, found)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# --- the disk ------------------------------------------------------------------------------------------------------


def test_a_stop_while_the_disk_is_full_does_not_say_that_all_is_saved(cases, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    def stopped(report, **more):
        trainer = trainer_of(cases, tmp_path, epochs=3, iterations_per_epoch=2, report=report, **more)
        if (tmp_path / CHECKPOINT).exists():
            trainer.resume()
        with pytest.raises(InvresError) as caught:
            trainer.run()
        return caught.value

    report = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr("invres.trainer.save_checkpoint", refuse)
        error = stopped(report, stop_at=1)
    assert not isinstance(error, Cancelled) and error.code == "write_failed"
    assert "Stopped after 2 of 6 iterations" in error.message and "nothing is saved" in error.message
    assert any("there is none before it" in event.get("message", "") for event in report.events)
    assert isinstance(stopped(Recorder(), stop_at=1), Cancelled)
    with monkeypatch.context() as patch:
        patch.setattr("invres.trainer.save_checkpoint", refuse)
        error = stopped(Recorder(), stop_at=3)
    assert "what is saved is of iteration 2" in error.message
    assert load_checkpoint(tmp_path)["iteration"] == 2


def test_a_full_disk_at_a_checkpoint_warns_and_the_training_goes_on(cases, tmp_path):
    whole = trainer_of(cases, tmp_path / "whole").run()
    with pytest.raises(Cancelled):
        trainer_of(cases, tmp_path / "full", stop_at=1).run()
    report = Recorder()
    trainer = trainer_of(cases, tmp_path / "full", report=report, checkpoint_every_s=0.0)
    trainer.resume()
    with files_up_to(5000):
        result = trainer.run()
    assert equal(result.weights, whole.weights)
    warnings = [event["message"] for event in report.events if event["event"] == "warning"]
    assert len(warnings) >= 2
    assert all("could not be saved" in text and "the one before it is kept" in text for text in warnings)
    assert load_checkpoint(tmp_path / "full")["iteration"] == 2, "the older one is still there"
    assert leftovers(tmp_path) == []


def test_metrics_that_cannot_be_written_are_a_warning(cases, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    report = Recorder()
    result = trainer_of(cases, tmp_path, report=report).run()
    assert result.epochs == 2
    assert any("metrics.jsonl could not be written" in event.get("message", "") for event in report.events)
    assert leftovers(tmp_path) == []


# --- ends ----------------------------------------------------------------------------------------------------------


def test_a_time_budget_ends_the_training_in_time_and_the_schedule_with_it(cases, tmp_path):
    report = Recorder()
    trainer = trainer_of(
        cases, tmp_path, epochs=100_000, iterations_per_epoch=1000, time_s=0.8, validate=weight_sum, report=report
    )
    result = trainer.run()
    assert 0.8 <= result.seconds < 3
    assert 2 <= result.iterations < 1000
    assert result.epochs == 1 and result.history[0]["iteration"] == result.iterations, "the part of an epoch counts"
    assert result.best_score is not None, "what the time left over is validated"
    assert result.history[-1]["learning_rate"] < 0.3 * trainer.config.learning_rate
    assert load_checkpoint(tmp_path)["iteration"] == result.iterations
    progress = [event for event in report.events if event["event"] == "progress"]
    assert {event["total"] for event in progress[1:]} == {1}, "counted in seconds of the budget"


def test_a_time_budget_that_is_used_up_trains_no_further(cases, tmp_path):
    first = trainer_of(cases, tmp_path, time_s=0.2, epochs=1000).run()
    again = trainer_of(cases, tmp_path, time_s=0.2, epochs=1000)
    again.resume()
    assert again.run().iterations == first.iterations
    longer = trainer_of(cases, tmp_path, time_s=first.seconds + 0.3, epochs=1000)
    longer.resume()
    assert longer.run().iterations > first.iterations


class Scores:
    """Validation that returns the given means and keeps the weights it was shown."""

    def __init__(self, *means):
        self.means, self.shown = list(means), []

    def __call__(self, network):
        assert not network.training
        self.shown.append({key: tensor.clone() for key, tensor in network.state_dict().items()})
        return {"upper": self.means[len(self.shown) - 1], "mean": self.means[len(self.shown) - 1]}


def test_the_weights_of_the_best_epoch_are_kept_not_those_of_the_last(cases, tmp_path):
    scores = Scores(0.2, 0.7, 0.7, 0.4)
    trainer = trainer_of(cases, tmp_path, epochs=4, validate=scores)
    result = trainer.run()
    assert (result.best_score, result.best_epoch) == (0.7, 2), "the first of equals"
    assert equal(result.weights, scores.shown[1])
    assert not equal(result.weights, scores.shown[3])
    assert trainer.network.training
    assert [entry["dice"]["mean"] for entry in metrics_of(tmp_path)] == [0.2, 0.7, 0.7, 0.4]


def test_without_validation_the_last_weights_are_kept(cases, tmp_path):
    trainer = trainer_of(cases, tmp_path)
    result = trainer.run()
    assert equal(result.weights, trainer.network.state_dict())
    assert result.best_score is None and "dice" not in result.history[0]


def test_a_training_without_progress_stops_early(cases, tmp_path):
    report = Recorder()
    scores = Scores(0.1, 0.5, 0.4, 0.5, 0.3, 0.9)
    result = trainer_of(cases, tmp_path, epochs=6, early_stop_epochs=3, validate=scores, report=report).run()
    assert result.stopped_early and result.epochs == 5 and result.best_epoch == 2
    assert any("no better Dice in the last 3 epochs" in event.get("message", "") for event in report.events)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 10), (3, 10), (5, 10), (6, 15)])
def test_patience_ends_when_a_look_was_in_vain_and_not_between_two_looks(cases, tmp_path, patience, epochs):
    """A fine-tuning validates every fifth epoch: waiting for 3 epochs is to look once more."""
    config = {"epochs": 20, "iterations_per_epoch": 1, "validate_every": 5, "early_stop_epochs": patience}
    result = trainer_of(cases, tmp_path / "worse", validate=Scores(0.5, 0.4, 0.3, 0.2), **config).run()
    assert result.stopped_early and result.epochs == epochs and result.best_epoch == 5
    better = Scores(0.1, 0.2, 0.3, 0.4)
    result = trainer_of(cases, tmp_path / "better", validate=better, **config).run()
    assert not result.stopped_early and result.epochs == 20


def test_validation_happens_every_so_often_and_at_the_end(cases, tmp_path):
    scores = Scores(0.1, 0.2, 0.3)
    result = trainer_of(cases, tmp_path, epochs=5, validate_every=2, validate=scores).run()
    assert ["dice" in entry for entry in result.history] == [False, True, False, True, True]


def test_a_step_that_is_not_finite_leaves_the_weights_alone_and_is_told(cases, tmp_path):
    class Broken:
        def __init__(self, batches):
            self.batches = batches

        def batch(self, iteration):
            image, target = self.batches.batch(iteration)
            return (image * float("nan") if iteration == 1 else image), target

    report = Recorder()
    trainer = trainer_of(cases, tmp_path, report=report)
    trainer.batches = Broken(trainer.batches)
    result = trainer.run()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.weights.values())
    assert math.isfinite(result.history[0]["loss"]), "the mean of the others"
    told = [event["message"] for event in report.events if event["event"] == "warning"]
    steps = trainer.config.iterations_per_epoch
    words = "the loss or its gradient was not finite; these steps were left out."
    assert told == [f"In 1 of {steps} steps of epoch 1 {words}"]
    json.dumps(report.events, allow_nan=False)


def test_a_training_of_which_no_step_can_be_taken_says_so_instead_of_training_nothing(cases, tmp_path, monkeypatch):
    """The loss may well be finite all the while: it is the gradient that counts."""
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(math.inf))
    trainer = trainer_of(cases, tmp_path, epochs=3, iterations_per_epoch=10)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    with pytest.raises(InvresError, match="Not one of 10 steps could be taken") as caught:
        trainer.run()
    assert "--precision fp32" in caught.value.hint
    assert all(torch.equal(one, p) for one, p in zip(before, trainer.network.parameters(), strict=True))


def test_a_training_that_diverges_late_ends_with_its_best_weights(cases, tmp_path, monkeypatch):
    """Also when it is resumed, which would only draw the same batches again."""
    report, real = Recorder(), torch.nn.utils.get_total_norm
    config = {"epochs": 9, "iterations_per_epoch": 10, "validate": Scores(0.4, 0.5, 0.5, 0.5), "report": report}
    trainer = trainer_of(cases, tmp_path, **config)
    monkeypatch.setattr(
        torch.nn.utils,
        "get_total_norm",
        lambda found: real(found) if trainer.iteration < 20 else torch.tensor(math.inf),
    )
    result = trainer.run()
    assert (result.stopped_early, result.epochs, result.best_epoch) == (True, 3, 2)
    told = [event["message"] for event in report.events if event["event"] == "warning"]
    assert told[-1] == "The training ends here; the weights of epoch 2 are kept."
    again = trainer_of(cases, tmp_path, **config)
    again.resume()
    assert again.run().iterations == result.iterations


# --- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "progress", "wanted"),
    [
        *[("constant", progress, 1.0) for progress in (0.0, 0.5, 1.0)],
        *[("cosine", 0.0, 1.0), ("cosine", 0.5, 0.505), ("cosine", 1.0, 0.01), ("cosine", 7.0, 0.01)],
        *[("cosine", 0.25, 0.01 + 0.99 * 0.85355339), ("cosine", -1.0, 1.0)],
        *[("poly", 0.0, 1.0), ("poly", 0.5, 0.5**0.9), ("poly", 1.0, 0.001**0.9)],
    ],
)
def test_the_schedule_has_its_published_values(schedule, progress, wanted):
    config = TrainingConfig(schedule=schedule)
    assert learning_rate_factor(config, 1000, progress) == pytest.approx(wanted, abs=1e-7)


def test_the_warm_up_rises_in_equal_steps():
    config = TrainingConfig(warmup_iterations=4, schedule="constant")
    assert [learning_rate_factor(config, i, 0) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_optimizer_gets_the_learning_rate_of_the_schedule(cases, tmp_path):
    trainer = trainer_of(cases, tmp_path, epochs=4, iterations_per_epoch=1, warmup_iterations=2)
    rates = [entry["learning_rate"] for entry in trainer.run().history]
    config = trainer.config
    wanted = [config.learning_rate * learning_rate_factor(config, i, i / 4) for i in range(4)]
    assert rates == pytest.approx(wanted) and len(set(rates)) == 4


def test_events_tell_progress_losses_and_memory(cases, tmp_path):
    report = Recorder()
    network = {"vae": {"latent": 4, "reduced_channels": 2}}
    result = trainer_of(cases, tmp_path, network=network, validate=weight_sum, report=report).run()
    progress = [(event["done"], event["total"]) for event in report.events if event["event"] == "progress"]
    assert progress == [(done, 4) for done in range(5)]
    epochs = [event for event in report.events if event["event"] == "epoch"]
    assert [{k: v for k, v in event.items() if k != "event"} for event in epochs] == metrics_of(tmp_path)
    first, weights = epochs[0], TrainingConfig().loss
    parts = ("cross_entropy", "dice_loss", "reconstruction", "kullback_leibler")
    factors = (weights.cross_entropy, weights.dice, weights.reconstruction, weights.kullback_leibler)
    total = sum(factor * first[part] for factor, part in zip(factors, parts, strict=True))
    assert first["loss"] == pytest.approx(total, abs=1e-4)
    memory = [event for event in report.events if event["event"] == "memory"]
    # In the second step, and with each epoch.
    assert [event["measured_bytes"] for event in memory] == [result.peak_bytes] * 3 and result.peak_bytes > 10_000


def test_memory_is_measured_again_after_each_start(cases, tmp_path):
    """Two batches are half as large after a reduction, and whoever looks on is told so."""
    kind, report = {"epochs": 4, "iterations_per_epoch": 1, "engine": "stored"}, Recorder()
    with pytest.raises(Cancelled):
        trainer_of(cases, tmp_path, stop_at=1, batch_size=4, **kind).run()
    before = load_checkpoint(tmp_path)["peak_bytes"]
    second = trainer_of(cases, tmp_path, batch_size=1, report=report, **kind)
    second.resume()
    result = second.run()
    assert 0 < result.peak_bytes < 0.7 * before
    told = [event["measured_bytes"] for event in report.events if event["event"] == "memory"]
    assert told and set(told) == {result.peak_bytes}
    ended = trainer_of(cases, tmp_path, batch_size=1, **kind)
    ended.resume()
    assert ended.run().peak_bytes == result.peak_bytes, "nothing was measured, so what is known stays"


@pytest.mark.parametrize(
    ("asked", "training", "cut_short"), [(True, {}, True), (False, {}, False), (True, {"time_s": 1e-6}, False)]
)
def test_a_training_that_came_to_its_end_was_not_cut_short_whatever_was_asked(
    cases, tmp_path, asked, training, cut_short
):
    trainer = trainer_of(cases, tmp_path, **training)
    trainer.stop.finish = asked
    assert trainer.run().cut_short is cut_short


def test_the_loss_falls(cases, tmp_path):
    result = trainer_of(cases, tmp_path, epochs=2, iterations_per_epoch=25, schedule="constant").run()
    assert result.history[1]["loss"] < 0.8 * result.history[0]["loss"]


def test_drift_is_reported_and_a_drifting_block_is_stored_from_then_on(cases, tmp_path):
    recorder = Recorder()
    trainer = trainer_of(cases, tmp_path / "run", report=recorder, epochs=1, iterations_per_epoch=12)
    trainer.run()
    (event,) = [e for e in recorder.events if e["event"] == "drift"]
    couplings = [step for step in trainer.network.program.steps if isinstance(step, Couple)]
    assert event["blocks"] == len(couplings)
    assert 0 < event["worst"] < 1e-4 and event["overflows"] == 0
    recorder = Recorder()
    trainer = trainer_of(cases, tmp_path / "other", report=recorder, epochs=1, iterations_per_epoch=12)
    last = [step for step in trainer.network.program.steps if isinstance(step, Couple)][-1]
    with torch.no_grad():
        last.n2[0].conv.bias.fill_(3e5)
    trainer.run()
    (event,) = [e for e in recorder.events if e["event"] == "drift"]
    assert event["worst"] > 1e-3
    assert last.keep
    assert [e for e in recorder.events if e["event"] == "warning" and "its input is stored" in e["message"]]
