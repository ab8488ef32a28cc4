"""Records as the store holds them: what version 0.1 wrote is read under today's names."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pscluster.errors import StorageError
from psmaster.model.job import VOLATILE, Job, JobWarning
from psmaster.model.plan import Plan
from psmaster.storage import records
from tests.harness.master_world import full_job, make_job


def as_written_by_01(text: str) -> dict[str, Any]:
    """A record as 0.1 wrote it."""
    data: dict[str, Any] = json.loads(text)
    data["trouble"] = data.pop("snapshot_warning")
    data["trouble"]["problem"] = data["trouble"].pop("error")
    data["plan"]["lead_generation"] = data["plan"].pop("coordinator_generation")
    return data


def test_a_full_job_has_something_in_every_field() -> None:
    """So that a field which is dropped on the way is missed."""
    job, plain = full_job(), make_job()
    stored = [field.name for field in dataclasses.fields(Job) if field.name not in VOLATILE]
    optional = [name for name in stored if name not in ("job_id", "name", "spec", "created_s", "data_token")]
    assert [name for name in optional if getattr(job, name) == getattr(plain, name)] == []
    assert job.plan is not None
    defaults = {field.name: field.default for field in dataclasses.fields(Plan)}
    assert [name for name, default in defaults.items() if getattr(job.plan, name) == default] == []
    placements = (*job.trainers, *job.standbys)
    for field in dataclasses.fields(placements[0]):
        assert any(getattr(placement, field.name) != field.default for placement in placements), field.name


def test_a_job_comes_back_as_it_was() -> None:
    job = full_job()
    assert records.job_of(records.job_text(job), job.layout_json) == job


def test_names_of_01_are_read() -> None:
    job = full_job()
    assert job.snapshot_warning is not None
    old = json.dumps(as_written_by_01(records.job_text(job)))
    assert "snapshot_warning" not in old
    assert records.job_of(old, job.layout_json) == job


def test_a_name_of_one_record_is_not_read_in_another() -> None:
    """An error of a job is no problem of a warning."""
    with pytest.raises((TypeError, KeyError)):
        records.typed(JobWarning, {"step": 1, "trouble": {"code": "PS-2001", "cause": "c"}})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job_id": "x"}'])
def test_what_is_no_job_is_refused(text: str) -> None:
    with pytest.raises((StorageError, AttributeError)):
        records.job_of(text, b"")
