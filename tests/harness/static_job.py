"""Trainers and partitions as real processes under a plan of the test: the data plane without a master."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from harness import zygote
from harness.certificates import CLUSTER, credentials, message
from pscluster.agent.link import FrameSplitter, encode_frame
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.storage.snapshot import read_parts
from pscluster.v1.plan_pb2 import (
    PartitionPlacement,
    Plan,
    ProcessOrder,
    ProcessReport,
    ProcessSpec,
    RestorePoint,
    ShardRange,
    Shutdown,
    SnapshotPart,
    TrainerPlacement,
)
from psworker.replica import state_tensors

DEADLINE_S = 120.0
JOB = "job-abc123"
TOKEN = b"0123456789abcdef"


class Process(Protocol):
    """The interface of a started process; subprocess.Popen has it."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


Launch = Callable[[str, Mapping[str, str], int, int], Process]
"""Starts a process: its name ("trainer-0"), its variables on top of ours, the descriptor of its control socket, and
the one that its output goes to."""


@dataclass
class Child:
    """One process and what it reported. `reports` has all reports except heartbeats and counters."""

    name: str
    process: Process
    control: socket.socket
    directory: str
    log: Path
    reports: list[ProcessReport] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def order(self, order: ProcessOrder) -> None:
        with contextlib.suppress(ConnectionError):
            self.control.sendall(encode_frame(order.SerializeToString()))


def _fork(name: str, environment: Mapping[str, str], control: int, output: int) -> Process:
    return zygote.fork(name.partition("-")[0], environment, control, output)


class StaticJob:
    """Starts the processes of one job, sends them plans, and waits for their reports. A context manager.

    `launch` starts them; `data_hosts[i]` is where partition i listens for TCP, when not on loopback; `device` is where
    trainers compute, when not where the spec says. `data_security`: of TCP data connections, as in ProcessSpec; each
    process then has a certificate of its own."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        workers: int,
        root: Path,
        *,
        launch: Launch = _fork,
        data_hosts: Sequence[str] = (),
        device: str = "",
        data_security: str = "",
    ) -> None:
        self.spec: JobSpec = parse_spec(spec)
        self.store = root / "store"
        self.root = root
        self.generation = 0
        self.restore_generation = 0
        self.resume_step = 0
        self.children: dict[str, Child] = {}
        self.parts: dict[int, dict[int, SnapshotPart]] = {}
        self._arrived: queue.Queue[tuple[Child, ProcessReport | None]] = queue.Queue()
        self._attempts: dict[str, int] = {}
        self.workers = workers
        self._launch = launch
        self._data_hosts = data_hosts
        self._device = device
        self._data_security = data_security
        self.reroute: Callable[[str], str] = lambda address: address  # of partitions, as the plan tells them
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> StaticJob:
        for index in range(self.spec.servers.partitions):
            self.start("partition", index)
        for rank in range(self.workers):
            self.start("trainer", rank)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children.values():
            child.order(ProcessOrder(shutdown=Shutdown()))
        for child in self.children.values():
            try:
                child.process.wait(10)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.control.close()
            shutil.rmtree(child.directory, ignore_errors=True)

    def start(self, kind: str, number: int) -> Child:
        """Start one process; it is the next attempt of its placement."""
        name = f"{kind}-{number}"
        attempt = self._attempts[name] = self._attempts.get(name, 0) + 1
        ours, theirs = socket.socketpair()
        directory = tempfile.mkdtemp(prefix="pst-")
        environment = {"PS_SOCKET_DIR": directory, "PS_AGENT_PID": ""}
        log = self.root / f"{name}.{attempt}.log"
        with log.open("wb") as output:
            process = self._launch(name, environment, theirs.fileno(), output.fileno())
        theirs.close()
        child = Child(name, process, ours, directory, log)
        self.children[name] = child
        spec = ProcessSpec(
            process_id=f"{JOB}/{name}/{attempt}", job_id=JOB, rank=number, attempt=attempt,
            kind=ProcessSpec.KIND_TRAINER if kind == "trainer" else ProcessSpec.KIND_PARTITION,
            spec_json=self.spec.canonical_json(), store=str(self.store),
            data_host=self._data_hosts[number] if kind == "partition" and self._data_hosts else "",
            device=self._device if kind == "trainer" else "",
        )  # fmt: skip
        if self._data_security:
            spec.cluster_id, spec.data_security = CLUSTER, self._data_security
            spec.credentials.CopyFrom(message(credentials(spec.process_id)))
        child.order(ProcessOrder(start=spec))
        threading.Thread(target=self._read, args=(child,), daemon=True).start()
        return child

    def renew_credentials(self) -> None:
        """Every process gets a new certificate, for connections that are made from now on."""
        for name, child in self.children.items():
            held = credentials(f"{JOB}/{name}/{self._attempts[name]}")
            child.order(ProcessOrder(credentials=message(held)))

    def kill(self, name: str) -> None:
        """Send SIGKILL and wait until the process is gone."""
        child = self.children.pop(name)
        child.process.send_signal(signal.SIGKILL)
        assert child.process.wait(10) == -signal.SIGKILL
        child.control.close()
        shutil.rmtree(child.directory, ignore_errors=True)

    def wait(self, condition: Callable[[], bool], what: str = "") -> None:
        """Read reports until the condition holds. Fails when a process fails or the time is up."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            try:
                child, report = self._arrived.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"timed out waiting for {what or condition}: {self.log_ends()}") from None
            if report is not None:
                self._take(child, report)
            elif self.children.get(child.name) is child:
                raise AssertionError(f"{child.name} ended: {child.log.read_text()[-2000:]}")

    def log_ends(self) -> str:
        return " | ".join(f"{c.name}: {c.log.read_text()[-500:]}" for c in self.children.values())

    def reported(self, name: str, body: str) -> list[Any]:
        """Every report of one kind that a process made."""
        child = self.children.get(name)
        return [getattr(r, body) for r in child.reports if r.WhichOneof("body") == body] if child else []

    def wait_ready(self) -> None:
        """Block until every process has reported that it is ready."""
        for name in list(self.children):
            body = "trainer_ready" if name.startswith("trainer") else "partition_ready"
            self.wait(lambda name=name, body=body: bool(self.reported(name, body)), f"{name} ready")  # type: ignore[misc]

    def publish(
        self, shards: Sequence[Sequence[tuple[int, int]]], *, restore: bool = False, stop: bool = False
    ) -> None:
        """Publish a new generation: `shards[rank]` are the (first, count) runs of each trainer."""
        self.generation += 1
        if restore or self.generation == 1:
            self.restore_generation = self.generation
            self.resume_step = self.complete_steps()[-1] if self.complete_steps() else 0
        ready = next(r for n in self.children if n.startswith("trainer") for r in self.reported(n, "trainer_ready"))
        plan = Plan(
            job_id=JOB, generation=self.generation, layout_json=ready.layout_json, data_token=TOKEN, stop=stop,
            restore_generation=self.restore_generation, resume_step=self.resume_step, final_step=ready.final_step,
            trainers=[
                TrainerPlacement(rank=rank, attempt=self._attempt(f"trainer-{rank}"),
                            active=f"trainer-{rank}" in self.children,
                            shards=[ShardRange(first=first, count=count) for first, count in runs])
                for rank, runs in enumerate(shards)
            ],
            partitions=[
                PartitionPlacement(index=i, attempt=self._attempt(f"partition-{i}"),
                              addresses=[self.reroute(address) for address in
                              self.reported(f"partition-{i}", "partition_ready")[-1].addresses])
                for i in range(self.spec.servers.partitions)
            ],
        )  # fmt: skip
        if self.resume_step:
            found = self.parts[self.resume_step]
            plan.restore.CopyFrom(RestorePoint(step=self.resume_step, parts=[found[i] for i in sorted(found)]))
        for child in self.children.values():
            child.order(ProcessOrder(plan=plan))

    def _attempt(self, name: str) -> int:
        return self._attempts.get(name, 0)

    def complete_steps(self) -> list[int]:
        """The steps whose parts all partitions have written."""
        return sorted(s for s, parts in self.parts.items() if s and len(parts) == self.spec.servers.partitions)

    @property
    def step(self) -> int:
        """The newest committed step reported by the coordinator."""
        return max((p.step for p in self.reported("partition-0", "progress")), default=-1)

    def wait_step(self, step: int) -> None:
        self.wait(lambda: self.step >= step, f"step {step}")

    def wait_finished(self) -> str:
        """Block until the coordinator has reported the end; the digest."""
        self.wait(lambda: bool(self.reported("partition-0", "finished")), "the end")
        return str(self.reported("partition-0", "finished")[-1].parameters_sha256)

    def _read(self, child: Child) -> None:
        splitter = FrameSplitter()
        with contextlib.suppress(OSError):
            while data := child.control.recv(1 << 16):
                for message in splitter.feed(data):
                    self._arrived.put((child, ProcessReport.FromString(message)))
        self._arrived.put((child, None))

    def _take(self, child: Child, report: ProcessReport) -> None:
        body = report.WhichOneof("body")
        if body == "counters":
            labels = {s.name + json.dumps(dict(s.labels), sort_keys=True): s.value for s in report.counters.samples}
            child.counters = labels
        elif body == "failure":
            child.reports.append(report)
            raise AssertionError(f"{child.name} failed: {report.failure}")
        elif body != "beat":
            child.reports.append(report)
        if body == "snapshot_part":
            part = report.snapshot_part
            if part.generation >= self.restore_generation:
                self.parts.setdefault(part.step, {})[part.partition] = part


def final_tensors(job: StaticJob) -> dict[str, torch.Tensor]:
    """The state dict in the newest complete snapshot of a finished job."""
    step = job.reported("partition-0", "finished")[-1].step
    job.wait(lambda: step in job.complete_steps(), "the final snapshot")
    paths = [job.store / part.path for _, part in sorted(job.parts[step].items())]
    layout, words = read_parts(paths)
    return state_tensors(layout, words)
