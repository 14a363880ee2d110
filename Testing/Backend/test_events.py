"""Events: one JSON object a line for programs, sentences and a bar for people, and honest times."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest

from invres.events import (
    SILENT,
    JsonReporter,
    Recorder,
    TerminalReporter,
    format_bytes,
    format_seconds,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 * 1024, "1.50 MiB"), (3 * 2**30, "3.00 GiB")],
        *[(5000 * 2**30, "5000.00 GiB"), (-2048, "-2.00 KiB")],
    ],
)
def test_bytes_are_told_in_binary_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(-3, "0 s"), (0.4, "0 s"), (99, "99 s"), (100, "1 min 40 s"), (185, "3 min 05 s"), (5999, "99 min 59 s")],
        *[(6000, "1 h 40 min"), (7800, "2 h 10 min"), (360_000, "100 h 00 min")],
    ],
)
def test_seconds_are_told_as_people_read_them(seconds, text):
    assert format_seconds(seconds) == text


def test_the_time_left_is_extrapolated_from_the_stages_own_speed():
    report, start = Recorder(), time.monotonic()
    report.progress("a", 0, 10)
    time.sleep(0.2)
    report.progress("a", 2, 10, loss=0.5)
    taken = time.monotonic() - start
    first, second = report.events
    assert first["eta_s"] is None
    assert 0.7 <= second["eta_s"] <= 4 * taken + 0.1
    assert second["loss"] == 0.5 and (second["done"], second["total"]) == (2, 10)


def test_work_done_before_a_stage_started_tells_nothing_about_its_speed():
    report, start = Recorder(), time.monotonic()
    report.progress("train", 90, 100)
    time.sleep(0.1)
    report.progress("train", 91, 100)
    taken = time.monotonic() - start
    assert report.events[0]["eta_s"] is None
    assert 0.8 <= report.events[1]["eta_s"] <= 9 * taken + 0.1


def test_another_stage_and_another_unit_start_the_clock_anew():
    report = Recorder()
    report.progress("a", 0, 4)
    time.sleep(0.15)
    report.progress("b", 1, 4)
    report.progress("b", 2, 4)
    report.progress("b", 50, 1000)
    report.progress("a", 0, 4)
    times = [event["eta_s"] for event in report.events]
    assert [eta_s is None for eta_s in times] == [True, True, False, True, True]
    assert times[2] < 0.15


def test_json_lines_are_ascii_flushed_and_one_each():
    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed = len(self.getvalue())

    stream = Stream()
    report = JsonReporter(stream)
    report.warning("Größe 海馬\nzweite Zeile", path="ü")
    assert stream.flushed == len(stream.getvalue())
    report.note("b")
    report.result(a=[1, None], b={"c": 1.5})
    report.error("code", "What.", "Next.")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and stream.getvalue().isascii()
    assert [json.loads(line)["event"] for line in lines] == ["warning", "note", "result", "error"]
    assert json.loads(lines[0]) == {"event": "warning", "message": "Größe 海馬\nzweite Zeile", "path": "ü"}
    assert json.loads(lines[3]) == {"event": "error", "code": "code", "message": "What.", "hint": "Next."}


def test_what_is_no_number_never_reaches_a_json_line():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="JSON"):
        JsonReporter(stream).result(dice=float("nan"))
    assert stream.getvalue() == ""


def test_json_lines_of_several_threads_stay_whole():
    class Slow(io.StringIO):
        def write(self, text):
            for character in text:
                super().write(character)
            return len(text)

    stream = Slow()
    report = JsonReporter(stream)

    def tell(name):
        for count in range(50):
            report.note("x" * 50, thread=name, count=count)

    threads = [threading.Thread(target=tell, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len({(event["thread"], event["count"]) for event in events}) == 200


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_bar_that_is_redrawn_and_closed_before_a_sentence():
    stream = Terminal()
    report = TerminalReporter(stream)
    report.progress("segment.tiles", 0, 4)
    report.progress("segment.tiles", 2, 4, loss=0.25)
    report.warning("Something.")
    report.progress("segment.tiles", 4, 4)
    report.note("Done.")
    text = stream.getvalue()
    assert text.count("\r") == 3 and text.endswith("Done.\n")
    second = text.split("\r")[2]
    assert second.count("█") == second.count("░") == 14
    assert "segment.tiles  2/4" in second and "loss 0.25" in second
    assert "\nWarning: Something.\n" in text
    assert "░" not in text.split("\r")[3]


def test_without_a_terminal_there_are_sentences_and_few_lines_of_progress():
    stream = io.StringIO()
    report = TerminalReporter(stream)
    for done in range(1000):
        report.progress("train", done, 1000)
    report.error("bad_input", "It is wrong.", "Do this.")
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 3 and lines[-1] == "Error: It is wrong. Do this."
    assert not any(character in stream.getvalue() for character in "\r█")


def test_a_stop_that_was_asked_for_is_no_error_and_a_time_budget_is_told_in_seconds():
    stream = io.StringIO()
    report = TerminalReporter(stream)
    report.progress("train", 17, 40, unit="s")
    report.error("cancelled", "Stopped after 3 of 9 iterations.", "Go on.")
    assert stream.getvalue() == "train  17 of 40 s\nStopped after 3 of 9 iterations. Go on.\n"


def test_an_epoch_is_a_line_with_loss_and_dice():
    stream = io.StringIO()
    dice = {"upper": 0.75, "lower": 0.5, "mean": 0.625}
    report = TerminalReporter(stream)
    report.emit({"event": "epoch", "epoch": 3, "loss": 0.5, "dice": dice, "seconds": 185})
    report.emit({"event": "epoch", "epoch": 4, "seconds": 1})
    first, second = stream.getvalue().splitlines()
    assert first == "epoch 3  loss 0.5000  Dice 0.625 (upper 0.750, lower 0.500)  3 min 05 s"
    assert second == "epoch 4  1 s"


def test_results_and_memory_are_not_shown_to_people_by_the_reporter():
    stream = io.StringIO()
    report = TerminalReporter(stream)
    report.result(model="x")
    report.emit({"event": "memory", "measured_bytes": 3})
    assert stream.getvalue() == ""


def test_the_silent_reporter_takes_everything():
    SILENT.progress("a", 1, 2)
    SILENT.warning("w")
    SILENT.error("c", "m")
    SILENT.result()
