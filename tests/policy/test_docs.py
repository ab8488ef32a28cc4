"""The documents are correct: commands exist, tables are complete, links have targets, the README's model runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from pydantic import BaseModel

import pscluster.agent.metrics  # registers the agents' metrics
import pscluster.telemetry  # noqa: F401 - registers every daemon's
from pscluster import errors
from pscluster.cli.main import psctl
from pscluster.job.spec import JobSpec, load_spec
from psmaster.api.join import JOINS
from psmaster.api.metrics import MasterMetrics
from psmaster.control.loop import clock
from psmaster.model.state import State
from psmaster.scheduling.draft import Limits
from psserver.partition.replication.in_sync import InSyncState
from psserver.partition.telemetry import PartitionCounters
from psworker.trainer.preflight.prepare import prepare
from psworker.trainer.telemetry import TrainerCounters

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def rows(page: str, first: str) -> Iterator[list[str]]:
    """The cells of every table row of a page whose first cell matches `first`."""
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and re.fullmatch(first, cells[0]):
            yield cells


# ---- links and commands ----


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_have_targets(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text())]
    missing = [name for name in targets if name and "://" not in name and not (page.parent / name).exists()]
    assert not missing


def test_each_line_about_models_names_a_test_that_exists() -> None:
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (\w+)", path.read_text(), re.M)
    }
    lines = [cells for cells in rows("models.md", ".*") if not re.fullmatch("-+|in the .*", cells[0])]
    assert len(lines) > 30
    assert [cells[0] for cells in lines if cells[-1].strip("`") not in known] == []


def test_the_picture_names_existing_files() -> None:
    homes = {
        "trainer": "worker/psworker/trainer",
        "partition": "paramserver/psserver/partition",
        "pscluster": "pscluster",
    }
    named = re.findall(r"(trainer|partition|pscluster)/([\w/]+\.py)", (ROOT / "docs" / "walk.svg").read_text())
    assert len(named) > 8
    assert [name for home, name in named if not (ROOT / homes[home] / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^ {4}|`)make ((?:[a-z-]+ ?)+?)(?:$|`| {2,})", page.read_text(), re.MULTILINE)
    assert {word for words in named for word in words.split()} <= targets


def test_the_readme_names_the_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "    make demo " in readme
    assert "    make test " in readme
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def verbs(group: click.Group, before: str = "psctl") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def test_every_verb_is_documented_with_its_options() -> None:
    def longs(command: click.Command) -> set[str]:
        shown = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
        return {name for option in shown for name in option.opts if name.startswith("--") and name != "--help"}

    documented = {cells[0].strip("`"): set(re.findall(r"--[\w-]+", cells[1])) for cells in rows("cli.md", "`psctl .*`")}
    assert documented == {name: longs(command) for name, command in verbs(psctl)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_psctl_line_names_a_verb_and_its_options(page: Path) -> None:
    known = dict(verbs(psctl))
    lines = re.findall(r"^(?: {4}|\$ )(psctl [^#|\n]*)", page.read_text(), re.MULTILINE)
    for line in lines:
        name = next((name for name in known if f"{line.strip()} ".startswith(name + " ")), None)
        assert name is not None, line
        options = {option for parameter in known[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in line.split() if word.startswith("-")}
        assert given <= options, line


# ---- tables ----


def keys(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str]]:
    """(key, default as the page writes it) of a spec's section and those below."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{before}{name}.")
            continue
        default = "required"
        if not field.is_required():
            default = f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        yield before + name, default


def test_every_key_of_a_spec_is_documented_with_its_default() -> None:
    documented = {cells[0].strip("`"): cells[1] for cells in rows("spec.md", "`.*`")}
    assert documented == dict(keys(JobSpec))
    assert all(cells[2] for cells in rows("spec.md", "`.*`"))


def test_every_choice_of_a_spec_is_documented() -> None:
    documented = {cells[0].strip("`"): " ".join(cells[1:]) for cells in rows("spec.md", "`.*`")}
    schema = JobSpec.model_json_schema()
    sections = {"": schema, **schema["$defs"]}
    for section in sections.values():
        for name, field in section["properties"].items():
            text = " ".join(page for key, page in documented.items() if key.rpartition(".")[2] == name)
            missing = [choice for choice in field.get("enum", []) if choice not in text]
            assert not missing, f"{name}: {missing}"


def kinds(root: type[errors.PsError]) -> Iterator[type[errors.PsError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def test_every_error_is_documented_with_its_exit_code() -> None:
    documented = {cells[0]: (cells[1].strip("`"), int(cells[3])) for cells in rows("errors.md", r"PS-\d{4}")}
    stable = {"code", "exit_code"}
    found = {kind.code: (kind.__name__, kind.exit_code) for kind in kinds(errors.PsError) if stable & set(vars(kind))}
    assert documented == found
    assert list(documented) == sorted(documented)


def exported() -> dict[str, str]:
    """The type of every metric of ours, by the name a scrape shows."""
    core: Any = SimpleNamespace(state=State(), limits=Limits(), now=clock, listeners=[])
    registry = CollectorRegistry()
    MasterMetrics(core, registry)
    families = [*registry.collect(), *JOINS.collect(), *REGISTRY.collect()]
    found = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in families
        if family.name.startswith("ps_")
    }
    partition = PartitionCounters()
    partition.refused(errors.FrameError("x"))
    replicated = partition.sample(
        partition=0, step=0, state_bytes=0, pull_bytes=0, standby=InSyncState(acked_version=0)
    )
    standing_by = partition.sample_standby(partition=0, step=0, state_bytes=0)
    for counters in (TrainerCounters().sample(), replicated, standing_by):
        found |= {f"ps_{sample.name}": "gauge" if sample.gauge else "counter" for sample in counters.samples}
    return found


def test_every_metric_is_documented_with_its_type() -> None:
    assert {cells[0].strip("`"): cells[1] for cells in rows("metrics.md", "`ps_.*`")} == exported()


# ---- the README's model ----


def test_the_readmes_model_passes_the_preflight_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text()
    code = dict(FENCE.findall(readme[readme.index("## Your own model") :][:4000]))
    assert len([line for line in code["python"].splitlines() if line.strip()]) <= 20
    (tmp_path / "task.py").write_text(code["python"])
    (tmp_path / "spec.yaml").write_text(code["yaml"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    prepared = prepare(load_spec(tmp_path / "spec.yaml"), tmp_path, "cpu")
    monkeypatch.delitem(sys.modules, "task", raising=False)

    assert all(check.ok for check in prepared.preflight.checks)
    batch = prepared.task.collate([prepared.train[i] for i in range(0, 1000, 50)])
    losses = []
    for _ in range(2):
        loss, weight = prepared.task.loss(prepared.model, batch)
        losses.append(float(loss.detach()) / float(weight))
        (loss / weight).backward()
        for parameter in prepared.model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.05 * parameter.grad
            parameter.grad = None
    assert losses[1] < losses[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_in_the_documents_compiles(page: Path) -> None:
    for language, text in FENCE.findall(page.read_text()):
        if language == "python":
            compile(text, str(page), "exec")
