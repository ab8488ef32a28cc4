"""What the benchmarks do with what they measure, and that each of them starts. Nothing is measured here."""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pscluster.job.spec import parse_spec

HOME = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in HOME.glob("[a-z]*.py"))
FOUND = {
    "ours": {"step_s": [0.4, 0.2, 0.3], "bytes_per_s": [9.0]},
    "stock": {"step_s": [0.6, 0.5, 0.1], "bytes_per_s": [3.0]},
    "tuned": {"step_s": [0.4, 0.4, 0.4], "bytes_per_s": [4.0]},
}


def load(name: str) -> ModuleType:
    """A module of benchmarks/, imported as it is when a script there runs."""
    if str(HOME) not in sys.path:
        sys.path.append(str(HOME))
    return importlib.import_module(name)


@pytest.fixture
def measure() -> Any:
    return load("_measure")


# ---- keys ----


def test_a_key_is_the_ratio_of_medians_over_the_better_baseline(measure: Any) -> None:
    key = measure.Key(what="step_s", of=("ours",), over=("stock", "tuned"))
    assert key.sides(FOUND) == ["ours", "tuned"]
    assert key.value(FOUND) == pytest.approx(0.3 / 0.4)
    assert key.compared(FOUND) == "ours over tuned"


def test_the_better_goodput_is_the_higher_one(measure: Any) -> None:
    key = measure.Key(what="bytes_per_s", of=("ours",), over=("stock", "tuned"), best="highest")
    assert key.value(FOUND) == pytest.approx(9 / 4)


def test_a_speedup_has_the_better_baseline_above(measure: Any) -> None:
    key = measure.Key(what="step_s", of=("stock", "tuned"), over=("ours",))
    assert key.value(FOUND) == pytest.approx(0.4 / 0.3)


def test_a_key_may_be_a_difference_or_stand_alone(measure: Any) -> None:
    less = measure.Key(what="step_s", of=("ours",), over=("stock", "tuned"), how="difference")
    assert less.value(FOUND) == pytest.approx(-0.1)
    assert less.compared(FOUND) == "ours less tuned"
    assert measure.Key(what="bytes_per_s", of=("ours",)).value(FOUND) == 9


def test_keys_of_the_documents_are_unique() -> None:
    keys = [key for script in SCRIPTS for key in load(script).KEYS]
    assert sorted(set(keys)) == sorted(keys)
    assert len(keys) >= 17


@pytest.mark.parametrize("script", [script for script in SCRIPTS if hasattr(load(script), "sides")])
def test_every_key_is_explained_and_needs_only_sides_that_there_are(script: str) -> None:
    module = load(script)
    sides = module.sides(12)
    for key, claim in module.KEYS.items():
        assert {*claim.of, *claim.over} <= set(sides), key
        assert f"    {key} " in (module.__doc__ or ""), key


# ---- rounds and results ----


def test_rounds_are_interleaved_and_samples_kept_in_order(measure: Any) -> None:
    ran: list[str] = []

    def side(name: str) -> dict[str, float]:
        ran.append(name)
        return {"step_s": float(len(ran))}

    found = measure.interleaved({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert ran == ["a", "b"] * 3
    assert found == {"a": {"step_s": [1.0, 3.0, 5.0]}, "b": {"step_s": [2.0, 4.0, 6.0]}}


def test_results_hold_keys_samples_and_circumstances(measure: Any, tmp_path: Path) -> None:
    keys = {
        "ours_over_baseline": measure.Key(what="step_s", of=("ours",), over=("stock", "tuned")),
        "not_run": measure.Key(what="step_s", of=("ours",), over=("elsewhere",)),
    }
    measure.write(tmp_path / "results", "name", keys, FOUND, "A small model", (0.5, 0.4, 0.3))
    record = json.loads((tmp_path / "results" / "name.json").read_text())
    assert record["keys"] == {"ours_over_baseline": pytest.approx(0.75)}
    assert record["samples"] == FOUND
    assert "A small model" in record["note"] and "ours over tuned" in record["note"]
    assert record["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert set(record["machine"]) >= {"cpu", "kernel", "python", "versions", "load_average"}


def test_only_some_sides_may_be_run(measure: Any) -> None:
    sides = {"a": dict, "b": dict}
    assert set(measure.selected(sides, None)) == {"a", "b"}
    assert set(measure.selected(sides, ["b"])) == {"b"}
    with pytest.raises(SystemExit, match="no side c; there are a, b"):
        measure.selected(sides, ["c"])


def test_options_have_defaults_and_refuse_nothing_at_all(measure: Any) -> None:
    parser: argparse.ArgumentParser = measure.options("What it is.", rounds=3, steps=24)
    chosen = parser.parse_args([])
    assert (chosen.rounds, chosen.steps, chosen.only, chosen.results) == (3, 24, None, HOME / "results")
    assert parser.parse_args(["--rounds", "1", "--only", "a", "b"]).only == ["a", "b"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "0"])


# ---- each script ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_measured(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"python benchmarks/{script}.py" in shown and "--rounds" in shown and "--steps" in shown


def test_the_slow_link_is_skipped_by_name_without_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["slow_link"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    load("slow_link").main()
    assert capsys.readouterr().out == "slow_link: skipped: hosts need root\n"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_specs_are_valid(accumulate: int) -> None:
    spec = parse_spec(load("_jobs").spec(workers=2, partitions=2, steps=9, transport="auto", accumulate=accumulate))
    assert spec.train.num_shards == 2 * accumulate


# ---- the instruments ----


def test_cpu_seconds_are_those_between_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = load("_watch")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch.time, "time", lambda: clock.now)
    processes = [
        SimpleNamespace(pid=pid, cpu_times=lambda pid=pid: SimpleNamespace(user=pid * clock.now, system=clock.now))
        for pid in (1, 2)
    ]
    series = watch.CpuSeries(lambda: processes[: 1 if clock.now < 1 else 2], 2)
    for now in (0.0, 1.0, 2.0, 4.0):
        clock.now = now
        series.look()
    assert series.between(1.5, 3.0) == pytest.approx(1.5 * (1 + 1) + 1.5 * (2 + 1))


def test_memory_is_what_a_process_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = load("_watch")
    before = watch.memory_of(os.getpid()).total
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # not what malloc has kept
        held.write(b"\1" * len(held))
        assert watch.memory_of(os.getpid()).total - before >= len(held) // 2
    series = watch.MemorySeries([7])
    for at, anonymous, shared in ((1.0, 10, 1), (2.0, 30, 2), (3.0, 20, 0)):
        monkeypatch.setattr(watch.time, "time", lambda at=at: at)
        memory = watch.Memory(anonymous=anonymous, shared=shared)
        monkeypatch.setattr(watch, "memory_of", lambda _, memory=memory: memory)
        series.look(7)
    assert (series.peak(7), series.peak(7, stop_s=1.5), series.peak(7, start_s=2.5)) == (32, 11, 20)


def test_the_raw_connection_carries_everything() -> None:
    raw = load("_raw_tcp")
    data = os.urandom(raw.CHUNK_BYTES + 12345)
    into = bytearray(len(data))
    near, far = socket.socketpair()
    with near, far:
        sending = threading.Thread(target=raw.send, args=(near, memoryview(data)))
        sending.start()
        raw.receive(far, memoryview(into))
        sending.join()
    assert into == data


def test_the_raw_connection_notices_a_wrong_checksum() -> None:
    raw = load("_raw_tcp")
    near, far = socket.socketpair()
    with near, far:
        near.sendall(bytes(1000) + b"\1\2\3\4")
        with pytest.raises(ValueError, match="checksum"):
            raw.receive(far, memoryview(bytearray(1000)))


def test_processes_start_where_and_as_they_are_told(tmp_path: Path) -> None:
    static = load("_static")
    code = "import os; print(*(os.environ[name] for name in ('PS_AGENT_PID', 'OMP_NUM_THREADS', 'HERE', 'THERE')))"
    place = static.Place(prefix=("env", "HERE=1"), environment={"THERE": "2"})
    starter = static.Starter(trainer=("-c", code), places=[static.Place(), place])
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "log").open("wb") as log:
        assert starter("trainer-1", {}, theirs.fileno(), log.fileno()).wait(10) == 0
    assert (tmp_path / "log").read_text().split() == [str(os.getpid()), "1", "1", "2"]


def test_the_pause_of_a_snapshot_is_that_of_the_step_in_which_it_is_copied() -> None:
    durability = load("durability")
    took = {step: 0.2 + 0.05 * (step % 12 == 1) + 0.01 * (step % 12 in (2, 3)) for step in range(1, 49)}
    times = {step: sum(took[earlier] for earlier in range(1, step + 1)) for step in took}
    found = durability.pauses({step: at for step, at in times.items() if step >= 6}, 12)
    assert found["step_s"] == pytest.approx(0.2)
    assert found["pause_over_step"] == pytest.approx(0.25)
    assert found["spread_over_step"] == pytest.approx(0.35)


def test_a_step_without_the_one_before_it_has_no_length() -> None:
    assert load("durability").lengths({3: 1.0, 4: 1.5, 7: 9.0}) == {4: 0.5}
