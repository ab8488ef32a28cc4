"""What a node tells of itself: memory, devices, kills for want of memory; and how long it waits."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pscluster.agent import resources
from pscluster.agent.metrics import ProcessMetrics
from pscluster.agent.process import num_threads, wanted_device
from pscluster.v1.plan_pb2 import Counters, ProcessSpec
from pscluster.wire.backoff import CAP_S, delay_s


def make(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "limit", "kills"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "1000\n", "a/b/memory.events": "low 0\noom 2\noom_kill 3\n"}, 1000, 3),
        ("0::/a\n", {"memory.max": "2000\n", "memory.events": "oom_kill 1\n"}, 2000, 1),
        ("0::/\n", {"memory.max": "max\n"}, None, 9),
        (
            "9:cpu:/\n4:memory:/x\n0::/\n",
            {"memory/x/memory.limit_in_bytes": "500\n", "memory/x/memory.oom_control": "under_oom 0\noom_kill 4\n"},
            500,
            4,
        ),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, None, 9),
        ("", {}, None, 9),
    ],
)
def test_control_groups(tmp_path: Path, groups: str, files: dict[str, str], limit: int | None, kills: int) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    make(proc, {"self/cgroup": groups, "vmstat": "nr_free 1\noom_kill 9\n"})
    make(root, files)
    assert resources.memory_limit_bytes(proc, root) == limit
    assert resources.oom_kills(proc, root) == kills


def test_devices_are_counted_and_hidden(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert resources.cuda_devices({}, tmp_path) == ["cuda:0", "cuda:1"]
    assert resources.cuda_devices({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == ["cuda:0"]
    assert resources.cuda_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert resources.cuda_devices({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == []
    assert resources.cuda_devices({}, tmp_path / "none") == []


def test_this_node_has_something() -> None:
    found = resources.measure(3, ["cuda:0"])
    assert (found.slots, found.devices) == (3, ["cuda:0"])
    assert found.cpu_cores >= 1
    assert resources.memory_available_bytes() > 0


def test_waits_grow_and_stay_bounded_and_differ() -> None:
    for failures in range(1, 100):
        low, high = delay_s(failures, 0.0), delay_s(failures, 0.999)
        assert 0 < low < high <= CAP_S
    assert delay_s(1, 0.999) <= 0.1
    assert delay_s(50, 0.0) == CAP_S / 2


def test_threads_of_trainers_follow_the_spec() -> None:
    text = '{"workers": {"threads": 4}}'
    assert num_threads(ProcessSpec(kind=ProcessSpec.KIND_TRAINER, spec_json=text)) == 4
    assert num_threads(ProcessSpec(kind=ProcessSpec.KIND_TRAINER, spec_json="{}")) == 1
    assert num_threads(ProcessSpec(kind=ProcessSpec.KIND_PARTITION, spec_json=text)) == 1


def test_the_device_that_is_wanted_is_the_specs() -> None:
    text = '{"workers": {"device": "cuda:1"}}'
    assert wanted_device(ProcessSpec(kind=ProcessSpec.KIND_TRAINER, spec_json=text)) == "cuda:1"
    assert wanted_device(ProcessSpec(kind=ProcessSpec.KIND_TRAINER, spec_json="{}")) == "auto"


def test_two_processes_of_a_job_share_a_family() -> None:
    registry = CollectorRegistry()
    held = ProcessMetrics()
    registry.register(held)
    for rank in range(2):
        spec = ProcessSpec(process_id=str(rank), kind=ProcessSpec.KIND_PARTITION, job_id="j", rank=rank)
        sample = Counters.Sample(name="pushes_total", labels={"result": "applied"}, value=rank)
        held.keep(spec, Counters(samples=[sample]))
    text = generate_latest(registry).decode()
    assert text.count("# TYPE ps_pushes_total counter") == 1
    assert 'ps_pushes_total{job="j",partition="0",result="applied"} 0.0' in text
    assert 'ps_pushes_total{job="j",partition="1",result="applied"} 1.0' in text
    held.drop("0")
    held.drop("0")
    assert 'partition="0"' not in generate_latest(registry).decode()
