"""The stopwatch of the benchmarks, on a clock that the cases themselves move."""

import json

import pytest
import torch
from scripts import load_script

timing = load_script("benchmarks/timing.py")


class Clock:
    """A clock that only the cases move, and the order in which they did."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def case(self, name, *durations):
        """A case whose n-th call takes the n-th duration, and every later one the last."""
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_every_round_gives_each_case_a_turn_and_warm_up_is_not_timed():
    clock = Clock()
    cases = {"a": clock.case("a", 100.0, 1.0), "b": clock.case("b", 200.0, 2.0)}
    times = timing.compare(cases, warm_up=1, repeats=3, clock=clock)
    assert clock.calls == ["a", "b"] * 4
    assert times.seconds == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_turn_of_several_calls_counts_with_their_mean():
    clock = Clock()
    cases = {"a": clock.case("a", 5.0, 9.0, 1.0, 2.0), "b": clock.case("b", 3.0)}
    times = timing.compare(cases, warm_up=1, repeats=2, in_a_row=2, clock=clock)
    assert clock.calls == ["a", "b"] + ["a", "a", "b", "b"] * 2
    assert times.seconds == {"a": [5.0, 2.0], "b": [3.0, 3.0]}


def test_medians_quartiles_and_ratios_by_hand():
    clock = Clock()
    cases = {"a": clock.case("a", 3.0, 1.0, 2.0, 90.0, 4.0), "b": clock.case("b", 6.0)}
    times = timing.compare(cases, warm_up=0, repeats=5, seconds=1e9, clock=clock)
    assert times.median("a") == 3.0
    assert times.quartiles("a") == (2.0, 4.0)
    assert times.ratio("b", "a") == 2.0
    assert times.ratio("a", "b") == 0.5
    assert times.as_dict("a")["b"] == {"median": 6.0, "quartiles": [6.0, 6.0], "ratio": 2.0, "turns": 5}


def test_no_round_starts_after_the_time_is_over_and_one_always_does():
    clock = Clock()
    times = timing.compare({"a": clock.case("a", 4.0)}, warm_up=0, repeats=100, seconds=10.0, clock=clock)
    assert len(times.seconds["a"]) == 3
    once = timing.compare({"a": clock.case("a", 4.0)}, warm_up=0, repeats=100, seconds=1.0, clock=clock)
    assert once.quartiles("a") == (4.0, 4.0)


def test_the_table_lines_up_and_names_the_reference(capsys):
    clock = Clock()
    bench = timing.Benchmark()
    cases = {"ours": clock.case("ours", 0.002), "theirs, longer": clock.case("theirs", 0.005)}
    bench.compare("a step", cases, reference="ours", repeats=2, clock=clock)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "a step",
        "",
        "|                | median ms | quartiles | x ours |",
        "| -------------- | --------: | --------: | -----: |",
        "| ours           |         2 |    2 .. 2 |   1.00 |",
        "| theirs, longer |         5 |    5 .. 5 |   2.50 |",
    ]


def test_a_script_writes_its_numbers_with_the_machine(tmp_path, capsys):
    clock = Clock()
    threads = torch.get_num_threads()

    def run(bench):
        assert bench.quick
        bench.compare("first", {"a": clock.case("a", 1.0)}, reference="a", repeats=50, clock=clock)
        bench.add("second", [["K", "MiB"], ["5", "7"]])

    path = tmp_path / "folder" / "out.json"
    try:
        timing.main(run, "what it measures", ["--quick", "--threads", "2", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert written["machine"]["threads"] == 2
    assert written["machine"]["torch"] == torch.__version__
    assert {"cpu", "device", "python"} < set(written["machine"])
    assert written["tables"][0]["cases"]["a"]["turns"] == 3  # of --quick
    assert written["tables"][1] == {"title": "second", "rows": [["K", "MiB"], ["5", "7"]]}
    assert "first" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="a case, a round and a call, got 0 cases"):
        timing.compare({})
    with pytest.raises(ValueError, match="reference must be one of the cases a, got 'b'"):
        timing.Benchmark().compare("title", {"a": lambda: None}, reference="b")
