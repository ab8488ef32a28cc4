"""docs/walks.md says what the code does: every hop exists, and those of a gradient are the calls of a real step."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.jobs import even_split, lm_spec
from harness.static_job import StaticJob
from harness.trace import traced

ROOT = Path(__file__).parents[2]
HOMES = {"pscluster": ".", "psmaster": "master", "psworker": "worker", "psserver": "paramserver"}
PAGE = (ROOT / "docs" / "walks.md").read_text()
HOP = re.compile(r"^\d+\. `([\w/]+\.py): ([\w.]+)` - \S", re.MULTILINE)
ONCE_A_STEP = {
    "trainer": "psworker/trainer/loop.py: Trainer._train",
    "partition": "psserver/partition/step/machine.py: StepMachine.vote",
}
FILE = re.compile(r"`((?:pscluster|psworker|psserver|psmaster)/[\w/]+\.py)`")


class Hop(NamedTuple):
    file: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}: {self.function}"


def section(title: str) -> str:
    """The text under a heading, of whatever level, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/walks.md has no section {title!r}"
    return found[1]


def hops(text: str) -> list[Hop]:
    return [Hop(*match) for match in HOP.findall(text)]


def test_every_hop_is_a_function_of_the_product() -> None:
    found = hops(PAGE)
    lines = [line for line in PAGE.splitlines() if re.match(r"\d+\. ", line)]
    assert len(lines) == len(found) > 60, "a hop that is not written `file: function` - what it does"
    missing = [str(hop) for hop in found if hop.function not in functions(hop.file)]
    assert not missing, missing


def test_the_table_counts_what_the_walks_have() -> None:
    walks = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    counted = [(len({hop.file for hop in hops(text)}), len(hops(text))) for text in walks]
    rows = re.findall(r"^\| a .* \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert [(int(files), int(number)) for files, number in rows] == counted


def functions(file: str) -> set[str]:
    """Qualified names of every function in a file of the product, nested ones as "outer.inner"."""
    path = ROOT / HOMES[file.partition("/")[0]] / file
    assert path.exists(), file
    names: set[str] = set()

    def walk(node: ast.AST, before: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{before}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    names.add(name)
                walk(child, f"{name}.")
            else:
                walk(child, before)

    walk(ast.parse(path.read_text()), "")
    return names


def one_step(calls: Sequence[str], kind: str) -> Sequence[str]:
    """A process's calls from its second step's marker to its fourth's: whole steps, however they overlap.

    The first step also maps memory and sends first values, so it is left out."""
    at = [number for number, call in enumerate(calls) if call == ONCE_A_STEP[kind]]
    assert len(at) >= 5, f"{ONCE_A_STEP[kind]} was called {len(at)} times"
    return calls[at[1] : at[3]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The product's calls of a trainer and of a partition, of two and one, over a few steps of a language model."""
    directory = tmp_path_factory.mktemp("walks")
    spec = lm_spec(partitions=1, steps=6)
    with StaticJob(spec, 2, directory / "job", launch=traced(directory)) as job:
        job.wait_ready()
        job.publish(even_split(job.spec.train.num_shards, job.workers))
        job.wait_finished()
    return {kind: (directory / f"{kind}-0.calls").read_text().split("\n") for kind in ("trainer", "partition")}


@pytest.mark.parametrize(("kind", "title"), [("trainer", "In the trainer"), ("partition", "In the partition")])
def test_a_gradient_walks_as_the_page_says(kind: str, title: str, traces: dict[str, list[str]]) -> None:
    walk = hops(section(title))
    called = one_step(traces[kind], kind)
    at = 0
    for hop in walk:
        assert str(hop) in called[at:], f"{hop} is not called after the hops before it"
        at += called[at:].index(str(hop))


@pytest.mark.parametrize(("kind", "title"), [("trainer", "In the trainer"), ("partition", "In the partition")])
def test_no_other_file_takes_part_in_a_step(kind: str, title: str, traces: dict[str, list[str]]) -> None:
    walk = hops(section(title))
    named = {hop.file for hop in walk} | set(FILE.findall(section(f"Beside the walk, {title[0].lower()}{title[1:]}")))
    called = {call.partition(":")[0] for call in one_step(traces[kind], kind)}
    assert called <= named, f"called, and not named in docs/walks.md: {sorted(called - named)}"
    assert {hop.file for hop in walk} <= called
