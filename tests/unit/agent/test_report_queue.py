"""The outbox keeps what the master has not acknowledged, in order, within its bound."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from pscluster.agent.report_queue import ReportQueue
from pscluster.agent.status import NONE, SILENT
from pscluster.v1.agents_pb2 import AgentMessage, LogLine, LogLines, ProcessEvent, ProcessStatus
from pscluster.v1.plan_pb2 import ProcessReport, Progress


def status(name: str = "p") -> AgentMessage:
    return AgentMessage(status=ProcessStatus(process_id=name))


def running(suspicion: ProcessStatus.Suspicion, name: str = "p") -> AgentMessage:
    status = ProcessStatus(process_id=name, phase=ProcessStatus.PHASE_RUNNING, suspicion=suspicion)
    return AgentMessage(status=status)


def exited(name: str = "p") -> AgentMessage:
    return AgentMessage(status=ProcessStatus(process_id=name, phase=ProcessStatus.PHASE_EXITED))


def log(size: int = 100) -> AgentMessage:
    return AgentMessage(log=LogLines(lines=[LogLine(text="x" * size)]))


def progress(size: int = 100) -> AgentMessage:
    report = ProcessReport(progress=Progress(step=1))
    return AgentMessage(event=ProcessEvent(process_id="x" * size, report=report))


def sequences(queue: ReportQueue, after: int = 0) -> list[int]:
    return [message.sequence for message in queue.after(after, 1000)]


def test_sequences_rise_by_one_and_acknowledgement_forgets() -> None:
    queue = ReportQueue()
    assert [queue.add(status()) for _ in range(4)] == [1, 2, 3, 4]
    assert sequences(queue) == [1, 2, 3, 4]
    assert sequences(queue, after=2) == [3, 4]
    assert [message.sequence for message in queue.after(0, 2)] == [1, 2]
    queue.acknowledge(3)
    queue.acknowledge(1)
    assert sequences(queue) == [4]
    queue.acknowledge(99)
    assert len(queue) == 0
    assert sequences(queue) == []
    assert queue.add(status()) == 5


def test_output_and_progress_give_way_before_anything_else() -> None:
    queue = ReportQueue(max_bytes=1_000)
    queue.add(status("keep"))
    for _ in range(10):
        queue.add(log())
        queue.add(progress())
    kinds = [message.WhichOneof("body") for message in queue.after(0, 1000)]
    assert kinds[0] == "status"
    assert queue.num_dropped == 21 - len(kinds) > 0
    assert queue.last_sequence == 21


def test_the_newest_stays_even_when_it_alone_is_too_big() -> None:
    queue = ReportQueue(max_bytes=10)
    queue.add(status())
    queue.add(log(1000))
    assert sequences(queue) == [2]


def test_the_share_of_output_is_known() -> None:
    queue = ReportQueue()
    queue.add(status())
    assert queue.log_bytes == 0
    queue.add(log(500))
    assert queue.log_bytes > 500
    queue.acknowledge(2)
    assert queue.log_bytes == 0


def test_of_how_a_process_looks_only_the_newest_word_is_sent() -> None:
    """A master that was away must not hear first that it is silent, and then that this is over."""
    queue = ReportQueue()
    for message in (running(SILENT), running(SILENT, "q"), progress(), running(NONE)):
        queue.add(message)
    assert [message.status.suspicion for message in queue.after(0, 10) if message.HasField("status")] == [SILENT, NONE]
    assert sequences(queue) == [2, 3, 4]
    assert queue.num_dropped == 0, "nothing was lost"
    assert sequences(queue, after=2) == [3, 4], "the sender takes a gap in its stride"
    queue.acknowledge(4)
    assert len(queue) == 0


def test_an_exit_ends_what_was_said_before_and_is_kept() -> None:
    queue = ReportQueue()
    for message in (running(SILENT), exited(), exited("q"), running(NONE, "q")):
        queue.add(message)
    phases = [(message.status.process_id, message.status.phase) for message in queue.after(0, 10)]
    assert phases == [
        ("p", ProcessStatus.PHASE_EXITED),
        ("q", ProcessStatus.PHASE_EXITED),
        ("q", ProcessStatus.PHASE_RUNNING),
    ]


def test_a_word_that_was_acknowledged_or_given_up_is_not_looked_for() -> None:
    queue = ReportQueue(max_bytes=100)
    queue.add(running(SILENT))
    queue.acknowledge(1)
    queue.add(running(NONE))
    queue.add(log(200))
    assert sequences(queue) == [3]
    queue.add(running(SILENT))
    assert sequences(queue) == [4]
    assert queue.num_dropped == 2


@given(st.lists(st.tuples(st.sampled_from("slpa"), st.integers(0, 30)), max_size=60))
def test_against_a_plain_list(actions: list[tuple[str, int]]) -> None:
    queue = ReportQueue(max_bytes=2_000)
    acknowledged = 0
    made: dict[str, Callable[[], AgentMessage]] = {"s": status, "l": log, "p": progress}
    for kind, number in actions:
        if kind == "a":
            queue.acknowledge(number)
            acknowledged = max(acknowledged, min(number, queue.last_sequence))
        else:
            queue.add(made[kind]())
        held = sequences(queue)
        assert held == sorted(held)
        assert all(acknowledged < sequence <= queue.last_sequence for sequence in held)
        assert len(held) == len(queue)
        assert sum(message.ByteSize() for message in queue.after(0, 1000)) <= 2_000
        assert queue.num_dropped + len(held) + acknowledged >= queue.last_sequence
