"""The master's values on the wire: nothing is dropped on the way to a client, or from an agent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message

from pscluster.client import records
from pscluster.errors import CallerError, InternalError
from pscluster.v1 import agents_pb2, jobs_pb2, plan_pb2
from psmaster.api import proto
from psmaster.model.job import Event, Instant
from psmaster.model.process import Failure, MeasuredSpeed, Process
from psmaster.model.reports import Progress
from tests.harness.master_world import full_job, make_record

NOW = Instant(mono_s=100.0, unix_s=1000.0)


def filled(message: Any, number: int = 1) -> Any:
    """A message with something in every field, nested ones included; of a oneof, in its last."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        number += 1
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name["value"]
            if entry.message_type is not None:
                filled(value[f"key {number}"])
            else:
                value[f"key {number}"] = f"value {number}" if entry.type == entry.TYPE_STRING else number / 2
        elif field.message_type is not None:
            filled(value.add() if field.is_repeated else value, number)
        elif field.enum_type is not None:
            setattr(message, field.name, 1)
        else:
            kinds = {field.TYPE_STRING: f"text {number}", field.TYPE_BYTES: b"bytes", field.TYPE_BOOL: True}
            scalar = kinds.get(field.type, number / 2 if field.type == field.TYPE_DOUBLE else number)
            if field.is_repeated:
                value.append(scalar)
            else:
                setattr(message, field.name, scalar)
    return message


def unset(message: Message, path: str = "") -> Iterator[str]:
    """The fields of a message, nested ones included, that are unset."""
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in present:
            yield f"{path}{field.name}"
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            inner = present[field.name]
            for one in inner if field.is_repeated else [inner]:
                yield from unset(one, f"{path}{field.name}.")


def test_every_field_of_a_job_reaches_the_client() -> None:
    points = tuple(make_record(step, time_s=998.0 + step) for step in (1, 2))
    job = replace(full_job(), window=points)
    process_id = job.trainers[0].process_id(job.job_id)
    speed = MeasuredSpeed(microbatch_s=0.5, measurements=1)
    processes = {process_id: Process(process_id=process_id, node_id="w", speed=speed)}
    events = (Event(time_s=1.0, reason="R", message="m", warning=True),)
    message = proto.job(job, events, NOW, full=True, processes=processes)
    left_out = ("plan.layout_json", "plan.data_token")  # secret, or large
    assert sorted(unset(message)) == sorted(left_out)
    found = records.job_of(jobs_pb2.Job.FromString(message.SerializeToString()))
    assert found.plan is not None and found.plan.partitions[0].standby is not None and found.error is not None
    assert found.plan.trainers[0].shards == ((1, 3), (5, 2))
    assert found.plan.partitions[0].standby.in_sync
    assert (found.state, found.best.step if found.best else None) == ("RUNNING", 10)
    assert found.error.to_dict() == {"code": "PS-2001", "cause": "c", "action": "a", "details": {"k": "v"}}
    assert found.spec["name"] == "job"
    missing = {name for name, value in found.to_dict().items() if value in (None, "", [], {})}
    assert missing == {"loss"}, "infinity is not known"


def test_a_job_in_a_list_has_no_details() -> None:
    message = proto.job(full_job(), (), NOW, full=False)
    assert not message.HasField("plan") and not message.connections and not message.checks and not message.events


REPORTS = sorted(field.name for field in plan_pb2.ProcessReport.DESCRIPTOR.fields)


@pytest.mark.parametrize("kind", REPORTS)
def test_every_field_of_a_report_is_read_and_written_again(kind: str) -> None:
    report = plan_pb2.ProcessReport()
    body = filled(getattr(report, kind))
    body.SetInParent()
    found = proto.report(report)
    if kind in proto._IGNORED_REPORTS:
        assert found is None
        return
    again = proto._REPORTS[kind].encode(found)
    not_read = {"num_samples", "connected_trainers"}
    assert {name.rpartition(".")[2] for name in unset(again)} <= not_read
    for name in not_read & set(body.DESCRIPTOR.fields_by_name):
        body.ClearField(name)
    assert again == body


def test_a_report_of_a_newer_kind_is_ignored() -> None:
    assert proto.report(plan_pb2.ProcessReport()) is None


def test_an_error_without_a_code_is_a_bug_of_ours() -> None:
    found = proto.report(plan_pb2.ProcessReport(failure=plan_pb2.Failure(error={"cause": "c"})))
    assert isinstance(found, Failure) and found.error.code == InternalError.code


def test_progress_is_read_in_order() -> None:
    records = [plan_pb2.StepRecord(step=step, loss=1.0 / step) for step in (1, 2)]
    found = proto.report(plan_pb2.ProcessReport(progress=plan_pb2.Progress(step=2, records=records)))
    assert isinstance(found, Progress) and [record.step for record in found.records] == [1, 2]


@pytest.mark.parametrize(
    "request_", [{}, {"node_id": "w", "incarnation": "i"}, {"node_id": "w", "role": 1}, {"incarnation": "i", "role": 1}]
)
def test_a_node_without_a_name_or_role_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(CallerError):
        proto.node(agents_pb2.RegisterRequest(**request_))


def test_a_node_of_an_unknown_role_is_refused() -> None:
    with pytest.raises(CallerError):
        proto.node(agents_pb2.RegisterRequest(node_id="w", incarnation="i", role=99))  # type: ignore[arg-type]


def test_every_field_of_a_node_reaches_the_client() -> None:
    node = replace(proto.node(filled(agents_pb2.RegisterRequest())), last_beat_s=5.0, connected=True)
    message = proto.CLUSTER_NODE.encode(node, ready=True, processes=["p"], drain="draining", waits_for=["x"])
    assert list(unset(message)) == []
    found = records.node_of(message)
    assert (found.slots, found.devices, found.role, found.ready) == (node.slots, node.devices, "worker", True)
