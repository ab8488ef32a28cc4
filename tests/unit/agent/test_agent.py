"""An agent with real processes against a master in the test's hand."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from asyncio import to_thread
from pathlib import Path
from typing import Any

import pytest

from pscluster.agent import master_connection
from pscluster.agent.child import GracePeriods
from pscluster.errors import PsError, StateError
from pscluster.job.bundle import pack

pytestmark = pytest.mark.timeout(60)


def test_registers_starts_reports_and_ends(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready") and master.lines())
        node = master.registered[0]
        assert (node.node_id, node.protocol, node.resources.slots) == ("worker-0", 1, 2)
        assert node.resources.cpu_cores > 0
        assert node.resources.memory_bytes > 1 << 20
        seen = json.loads(master.lines()[0].removeprefix("serving "))
        assert seen["threads"] == "3"
        assert Path(seen["sockets"]).parent == bench.runtime_dir
        assert len(seen["sockets"]) < 80
        assert seen["cwd"] == seen["path"]
        await master.assign()
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.exit_code, status.signal, status.expected) == (0, 0, True)
        assert not status.HasField("error")
        await master.until(lambda: master.beats > 2)

    bench.run(body)


def test_a_changed_plan_is_forwarded_and_an_equal_one_is_not(bench: Any) -> None:
    async def body(master: Any) -> None:
        for generation in (1, 1, 2, 1, 3):
            await master.assign(bench.trainer("trainer-0", "serve", generation))
        await master.until(lambda: 3 in [adopted.generation for adopted in master.reports("plan_adopted")])
        generations = [adopted.generation for adopted in master.reports("plan_adopted")]
        assert generations == sorted(set(generations))

    bench.run(body)


@pytest.mark.parametrize(
    ("mode", "code", "memory", "error"),
    [("fail", 3, False, "PS-3005"), ("exhaust", 1, True, "PS-3006"), ("report_failure", 1, False, "PS-3005")],
)
def test_an_exit_is_told_with_its_cause(bench: Any, mode: str, code: int, memory: bool, error: str) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", mode))
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.exit_code, status.out_of_memory, status.expected) == (code, memory, False)
        assert status.error.code == error
        if mode == "fail":
            assert "last words" in status.error.details["stderr"]
            assert master.lines("stderr")[-1] == "last words"
        if mode == "report_failure":
            assert master.reports("failure")[0].error.code == "PS-2001"

    bench.run(body)


def test_kill_9_of_a_process_is_told_and_not_repaired(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready"))
        pid = master.messages("status")[0].pid
        os.kill(pid, signal.SIGKILL)
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.signal, status.pid, status.error.code) == (signal.SIGKILL, pid, "PS-3005")
        assert "trainer-0 ended by SIGKILL" in status.error.cause
        await master.assign(bench.trainer("trainer-0", "serve", 2), bench.trainer("trainer-1", "serve"))
        await master.until(lambda: len(master.reports("trainer_ready")) == 2)
        running = [status.process_id for status in master.messages("status") if status.phase == status.PHASE_RUNNING]
        assert running == ["job/trainer-0/1", "job/trainer-1/1"]

    bench.run(body)


def test_a_stubborn_process_is_killed_with_its_group(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "be_stubborn"))
        await master.until(lambda: master.reports("trainer_ready") and master.lines())
        below = int(master.lines()[0].removeprefix("below "))
        await master.assign()
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.signal, status.expected, status.out_of_memory) == (signal.SIGKILL, True, False)
        assert not status.HasField("error")
        assert await bench.gone(below)

    bench.run(body, GracePeriods(terminate_s=0.1, kill_s=0.3))


def test_a_bundle_is_fetched_once_and_first_on_the_path(bench: Any) -> None:
    code = bench.directory / "code"
    code.mkdir()
    (code / "users_module.py").write_text("WORDS = 'from the bundle'\n")
    (code / "pscluster").mkdir()
    (code / "pscluster" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    bundle = pack(code)

    async def body(master: Any) -> None:
        master.bundles[bundle.sha256] = bundle.data
        specs = [bench.trainer(f"trainer-{n}", "use_bundle", bundle_sha256=bundle.sha256) for n in range(2)]
        await master.assign(*specs)
        await master.until(lambda: len(master.reports("trainer_ready")) == 2 and len(master.lines()) == 4)
        assert master.lines().count("from the bundle") == 2
        assert master.downloads == [bundle.sha256]

    bench.run(body)


@pytest.mark.parametrize(
    ("sha256", "stored", "error"),
    [("0" * 64, None, "PS-1003"), ("1" * 64, b"something else", "PS-1002"), ("../../etc", None, "PS-1002")],
)
def test_a_bundle_that_cannot_be_had_is_told(bench: Any, sha256: str, stored: bytes | None, error: str) -> None:
    async def body(master: Any) -> None:
        if stored is not None:
            master.bundles[sha256] = stored
        await master.assign(bench.trainer("trainer-0", "serve", bundle_sha256=sha256))
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.exit_code, status.error.code, status.pid) == (127, error, 0)

    bench.run(body)


def test_a_process_waits_for_its_bundle_while_the_master_is_away(bench: Any) -> None:
    code = bench.directory / "code"
    code.mkdir()
    (code / "users_module.py").write_text("WORDS = 'late'\n")
    bundle = pack(code)

    async def body(master: Any) -> None:
        from pscluster.errors import UnreachableError

        master.bundles[bundle.sha256] = UnreachableError("not yet")
        await master.assign(bench.trainer("trainer-0", "use_bundle", bundle_sha256=bundle.sha256))
        await master.until(lambda: len(master.downloads) > 1 and master.beats > 0)
        master.bundles[bundle.sha256] = bundle.data
        await master.until(lambda: "late" in master.lines())

    bench.run(body)


def test_long_output_is_cut_and_bounded_and_the_loss_counted(bench: Any) -> None:
    async def body(master: Any) -> None:
        master.acknowledges = False
        await master.assign(bench.trainer("trainer-0", "chatter"))
        await master.until(lambda: master.exit_of("job/trainer-0/1"))
        logs = master.messages("log")
        lines = [line.text for log in logs for line in log.lines]
        assert max(len(line) for line in lines) <= 16 * 1024
        assert len(lines) + sum(log.dropped for log in logs) == 20_001
        assert lines[-1].startswith("line 19999 ")
        assert all(log.ByteSize() < 1 << 20 for log in logs)
        await master.stop()

    bench.run(body)


def test_nothing_is_lost_or_doubled_while_the_master_is_away(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "ticking"))
        await master.until(lambda: len(master.reports("progress")) > 5)
        for _ in range(2):
            await master.stop()
            hellos = len(master.hellos)
            await master.start()
            await master.until(lambda hellos=hellos: len(master.hellos) > hellos)
        (state,) = master.hellos[-1].processes
        assert state.status.phase == state.status.PHASE_RUNNING
        before = len(master.reports("progress"))
        await master.until(lambda: len(master.reports("progress")) > before + 5)
        await master.assign()
        await master.until(lambda: master.exit_of("job/trainer-0/1"))
        steps = [progress.step for progress in master.reports("progress")]
        assert steps == list(range(1, len(steps) + 1))
        assert master.reports("finished")[0].step == len(steps)
        assert sorted(master.durable) == list(range(1, len(master.durable) + 1))
        assert len({node.incarnation for node in master.registered}) == 1

    bench.run(body)


def test_what_was_not_acknowledged_is_sent_again(bench: Any) -> None:
    async def body(master: Any) -> None:
        master.acknowledges = False
        await master.assign(bench.trainer("trainer-0", "serve", 4))
        await master.until(lambda: master.reports("plan_adopted") and master.lines())
        await master.stop()
        kept = len(master.durable)
        master.acknowledges = True
        await master.start()
        await master.until(lambda: master.num_repeats == kept)
        (state,) = master.hellos[-1].processes
        assert state.ready.HasField("trainer_ready")
        assert state.generation == 4

    bench.run(body)


def test_a_master_that_is_no_longer_heard_is_sought_anew(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what the agent says, and nothing comes back: orders would not, either."""
    monkeypatch.setattr(master_connection, "SILENCE_S", 0.5)

    async def body(master: Any) -> None:
        await master.until(lambda: master.beats > 20)  # a second and more of answers
        assert len(master.hellos) == 1
        master.answers = False
        await master.until(lambda: len(master.hellos) == 3)
        assert master.registered[0].incarnation == master.registered[-1].incarnation
        master.answers = True
        count, beats = len(master.hellos), master.beats
        await master.until(lambda: master.beats > beats + 20)
        assert len(master.hellos) - count <= 1

    bench.run(body)


def test_counters_are_exported_while_the_process_lives(bench: Any) -> None:
    def scrape(address: str) -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "count"))
        await master.until(lambda: master.reports("trainer_ready"))
        address = master.registered[0].metrics_address
        text = await to_thread(scrape, address)
        assert 'ps_samples_total{job="job",rank="0"} 5.0' in text
        assert "# TYPE ps_samples_total counter" in text
        assert 'ps_phase_seconds{job="job",phase="pull",rank="0"} 1.5' in text
        assert 'ps_step{job="job",rank="0"} 7.0' in text
        assert "Bad" not in text
        assert "ps_master_connected 1.0" in text
        await master.assign()
        await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert 'job="job"' not in await to_thread(scrape, address)
        assert not master.reports("counters")

    bench.run(body)


def test_a_process_that_breaks_the_protocol_is_ended(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "talk_nonsense"))
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert status.signal == signal.SIGKILL

    bench.run(body)


def test_beats_tell_how_fast_living_trainers_compute(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "measuring"), bench.trainer("trainer-1", "serve"))
        await master.until(lambda: master.speeds and master.speeds[-1] == {"job/trainer-0/1": 0.25})
        await master.assign()
        await master.until(lambda: master.speeds[-1] == {})

    bench.run(body)


def test_told_to_end_it_waits_until_its_processes_were_moved(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready"))
        os.kill(os.getpid(), signal.SIGTERM)
        await master.until(lambda: master.messages("leaving"))
        assert master.exit_of("job/trainer-0/1") is None
        await master.assign()
        status = await master.until(lambda: master.exit_of("job/trainer-0/1"))
        assert (status.exit_code, status.expected) == (0, True)

    bench.run(body, GracePeriods(leave_s=30.0), signal_end=False)


def test_told_to_end_it_does_not_wait_for_ever(bench: Any) -> None:
    masters: list[Any] = []

    async def body(master: Any) -> None:
        masters.append(master)
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready"))

    bench.run(body, GracePeriods(leave_s=0.1))
    said = [message.WhichOneof("body") for _, message in sorted(masters[0].durable.items())]
    assert said[said.index("leaving") :] == ["leaving", "status", "goodbye"]
    assert masters[0].exit_of("job/trainer-0/1").expected


def test_a_superseded_agent_ends_its_processes_and_itself(bench: Any) -> None:
    async def body(master: Any) -> None:
        await master.assign(bench.trainer("trainer-0", "serve"))
        await master.until(lambda: master.reports("trainer_ready"))
        await master.stop()
        bench.supersede(master)
        await master.start()

    with pytest.raises(StateError, match="newer incarnation"):
        bench.run(body, signal_end=False)


def test_two_agents_do_not_share_a_state_directory(bench: Any) -> None:
    async def body(master: Any) -> None:
        from pscluster.agent.directories import AgentDirectories

        await master.until(lambda: master.registered)
        with pytest.raises(PsError, match="another agent runs"):
            AgentDirectories.claim(bench.state_dir)

    bench.run(body)
