"""The smaller decisions: numerics, layouts compared, submissions, rates, what people read."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster.errors import InternalError, SpecError
from psmaster.control.submission import new_job
from psmaster.model import reports
from psmaster.model.job import Instant, JobState, enter_state
from psmaster.model.plan import Placement, ProcessKind
from psmaster.model.process import PartitionFacts
from psmaster.scheduling import numerics
from psmaster.scheduling.startup import first_difference
from psmaster.storage import records
from tests.harness.master_world import TRAINER, World, make_job, make_record, make_spec

NOW = Instant(mono_s=1.0, unix_s=1000.0)


def report(node_id: str, numerics_class: str) -> tuple[Placement, PartitionFacts]:
    facts = PartitionFacts(addresses=(), numerics_class=numerics_class * 16, numerics_detail=f"cpu {numerics_class}")
    return Placement(kind=ProcessKind.TRAINER, rank=0, node_id=node_id), facts


A, B, C = report("worker-0", "a"), report("worker-1", "b"), report("worker-2", "a")
P = report("server-0", "p")


@pytest.mark.parametrize("wanted", ["auto", "strict"])
def test_when_all_agree_it_is_strict(wanted: str) -> None:
    choice = numerics.choose(wanted, [A, C], [P])
    assert (choice.mode, choice.left_out) == ("strict", ())
    assert choice.trainer_class == "a" * 16
    assert choice.explanation == "strict: checked by a canary gradient and the preflight on 2 nodes (class aaaaaaaa)"


def test_when_nodes_differ_auto_is_mixed_and_says_with_what_consequence() -> None:
    choice = numerics.choose("auto", [A, B], [P])
    assert choice.mode == "mixed"
    assert "exactly once" in choice.explanation
    assert "worker-0 aaaaaaaa" in choice.explanation
    assert "worker-1 bbbbbbbb" in choice.explanation


def test_strict_leaves_the_minority_out_and_says_why() -> None:
    choice = numerics.choose("strict", [B, A, C], [P])
    assert choice.left_out == (("worker-1", "numerics class bbbbbbbb (cpu b) differs from the job's aaaaaaaa"),)


def test_strict_keeps_the_class_that_the_job_has_bits_of() -> None:
    choice = numerics.choose("strict", [B, A, C], [P], ("b" * 16, ""))
    assert [node_id for node_id, _ in choice.left_out] == ["worker-0", "worker-2"]


def test_mixed_takes_everybody() -> None:
    assert numerics.choose("mixed", [A, B], [P, report("server-1", "q")]).left_out == ()


def test_a_late_comer_of_another_class_is_welcome_in_mixed_only() -> None:
    assert numerics.differs("mixed", "", B[1]) == ""
    assert numerics.differs("strict", "a" * 16, A[1]) == ""
    assert numerics.differs("strict", "a" * 16, B[1])


def test_a_strict_job_starts_without_the_other_class_and_says_so() -> None:
    world = World()
    world.cluster(3)
    world.submit(train={"numerics": "strict"})
    world.report("trainer-1", replace(TRAINER, numerics_class="M" * 16, numerics_detail="cpu AVX2"))
    world.ready()
    plan = world.job().plan
    assert plan is not None
    assert [placement.rank for placement in plan.trainers if placement.active] == [0, 2]
    assert any(re.search("worker-1 .*MMMMMMMM.*cpu AVX2", e.message) for e in world.events)


def test_a_strict_job_that_has_too_few_of_one_class_waits_and_says_for_what() -> None:
    world = World()
    world.cluster(2)
    world.submit(train={"numerics": "strict"}, workers={"min": 2})
    world.report("trainer-1", replace(TRAINER, numerics_class="Z" * 16))
    world.ready()
    assert world.job().state is JobState.STARTING
    assert re.search("trainer-1.*worker-1", world.job().reason)
    world.join("worker-2")
    world.ready()
    assert world.job().plan is not None


@pytest.mark.parametrize(
    ("left", "right", "where"),
    [
        (b'{"a": {"b": [1, 2]}}', b'{"a": {"b": [1, 3]}}', "a.b[1]: 2 is not 3"),
        (b'{"a": [1]}', b'{"a": [1, 2]}', "a has 1 entries, not 2"),
        (b'{"a": 1}', b'{"b": 1}', "a is only in one of them"),
        (b"[1]", b"[1]", "only in form"),
        (b"1", b'"x"', "value: 1 is not 'x'"),
        (b"{", b"{}", "the layouts do not parse"),
    ],
)
def test_the_first_difference_is_named(left: bytes, right: bytes, where: str) -> None:
    assert first_difference(left, right) == where


def test_a_submission_becomes_a_job_with_a_name_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("jobs")
    job = new_job(make_spec().canonical_json(), "", "r", directory, NOW)
    name, _, suffix = job.job_id.rpartition("-")
    assert name == "job"
    assert len(suffix) == 6
    assert set(suffix) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert job.store == f"{directory}/{job.job_id}/snapshots"
    assert len(job.data_token) == 32
    elsewhere = new_job(make_spec(durability={"store": "/shared"}).canonical_json(), "", "", directory, NOW)
    assert elsewhere.store == f"/shared/{elsewhere.job_id}"
    assert (elsewhere.owner, job.owner) == ("local", "local")
    theirs = new_job(elsewhere.spec.canonical_json(), "", "", directory, NOW, owner="alice", cluster_id="0" * 16)
    assert (theirs.owner, theirs.store) == ("alice", f"/shared/{'0' * 16}/{theirs.job_id}")
    assert elsewhere.request_id
    with pytest.raises(SpecError):
        new_job("[]", "", "", directory, NOW)
    with pytest.raises(SpecError, match="not JSON"):
        new_job("[" * 100_000, "", "", directory, NOW)


def test_rates_are_measured_over_the_last_seconds() -> None:
    world = World()
    world.running()
    job = world.job()
    rates = reports.rates(job, Instant(mono_s=0, unix_s=1005.0))
    assert rates.steps_per_s == 1.0
    assert rates.samples_per_s == 16.0
    assert rates.weight_per_s == 64.0
    assert reports.rates(job, Instant(mono_s=0, unix_s=1100.0)).steps_per_s == 0.0
    one = replace(job, window=(make_record(1),))
    assert reports.rates(one, NOW).steps_per_s == 0.0


def test_the_window_is_bounded() -> None:
    world = World()
    world.running()
    for start in range(6, 4000, 200):
        records_ = tuple(make_record(step, time_s=2000.0 + step / 1000) for step in range(start, start + 200))
        world.report("partition-0", reports.Progress(generation=1, step=start + 199, records=records_))
    assert len(world.job().window) <= reports.MAX_POINTS


def test_an_impossible_transition_is_a_bug() -> None:
    with pytest.raises(InternalError):
        enter_state(make_job(), JobState.SUCCEEDED, "no")


@given(st.floats(), st.integers(0, 2**63), st.binary(), st.text())
def test_records_come_back_as_they_were(loss: float, step: int, token: bytes, text: str) -> None:
    loss = math.nan if math.isnan(loss) else loss
    job = replace(make_job(), loss=loss, step=step, data_token=token, traceback=text, layout_json=b"L")
    assert records.job_of(records.job_text(job), b"L") == job


def test_unknown_fields_of_a_record_are_ignored_and_missing_ones_get_their_default() -> None:
    text = records.job_text(make_job())
    assert records.job_of(text.replace('"step":0,', '"from_the_future":[1],'), b"") == make_job()
