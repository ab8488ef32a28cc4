"""Names that only this project understood stay retired: what replaced them is in the glossary of
docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Words that no identifier may have as a part: `hear_verdict` and `VerdictKind` have one.
RETIRED_PARTS = set(
    """
    seat seats unseat verdict verdicts ballot bond bonds uplink principal tether lawful modesty shunned barred soundness
    leftovers endings relief dealing greeting refusals trouble reckon owed owe deaf attendant timeline
    timelines reception
    """.split()  # noqa: SIM905 - a list of words is read as one
)
# Whole identifiers; as parts of others they may have a meaning that everybody knows.
RETIRED = set(
    """
    Lead LeadWire Turn Problem Notes Heart Heard Wish Absence Sharing AgentLine PeerLine SeatLog attend give_way
    was_deaf send_away told heard
    """.split()  # noqa: SIM905
)
STORED = {
    "lead_generation"  # field names of records that 0.1 wrote: see psmaster.storage.records
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every class, function, parameter, attribute and variable that a module defines."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno


def parts_of(name: str) -> set[str]:
    """The words of an identifier, whatever its case."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def is_retired(name: str) -> bool:
    return name not in STORED and (name.strip("_") in RETIRED or bool(parts_of(name) & RETIRED_PARTS))


def test_what_is_retired_is_found() -> None:
    assert parts_of("hear_LeadVerdictURL2") == {"hear", "lead", "verdict", "url"}
    assert all(map(is_retired, ("_hear_verdict", "VerdictKind", "Turn", "empty_seats", "SEATS")))
    assert not any(map(is_retired, ("returned", "leading_dim", "heartbeat", "lead_generation")))
    tree = ast.parse("class Bond:\n    def hear(self, seat):\n        self.verdict = lead = 1")
    assert {name for name, _ in identifiers(tree)} == {"Bond", "hear", "self", "seat", "verdict", "lead"}


def test_no_identifier_is_retired(everything: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} {name}"
        for source in everything
        for name, line in identifiers(source.tree)
        if is_retired(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_message_of_the_contract_is_retired(root: Path) -> None:
    wrong = [
        f"{path.name}: {name}"
        for path in sorted((root / "proto").rglob("*.proto"))
        for name in re.findall(r"\b([A-Za-z_]+)\b", re.sub(r"//.*", "", path.read_text()))
        if is_retired(name)
    ]
    assert not wrong, "\n".join(wrong)
