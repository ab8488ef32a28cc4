"""Every call, field and value of the contract says what it means; numbers are never used twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FIELD = re.compile(r"^\s*(repeated |optional )?(map<.*>|[\w.]+) \w+ = (\d+);")
VALUE = re.compile(r"^\s*[A-Z][A-Z0-9_]* = (\d+);")
CALL = re.compile(r"^\s*rpc \w+\(")
OPENING = re.compile(r"^\s*(message|enum|service) (\w+)")

PROTOS = sorted((Path(__file__).parents[2] / "proto").rglob("*.proto"))


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_everything_is_documented(path: Path) -> None:
    lines = path.read_text().splitlines()
    wrong = []
    for number, line in enumerate(lines):
        if not any(pattern.match(line) for pattern in (FIELD, VALUE, CALL)):
            continue
        above = lines[number - 1].strip() if number else ""
        if "//" not in line and not above.startswith("//"):
            wrong.append(f"{path.name}:{number + 1} {line.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_no_number_stands_for_two_fields(path: Path) -> None:
    seen: list[tuple[str, set[str]]] = []
    for line in path.read_text().splitlines():
        code = line.partition("//")[0]
        if opening := OPENING.match(code):
            seen.append((opening[2], set()))
        elif code.strip().endswith("{"):
            seen.append((seen[-1][0], seen[-1][1]) if seen else ("", set()))
        if found := FIELD.match(code) or VALUE.match(code):
            name, numbers = seen[-1]
            used = found[found.lastindex or 0]
            assert used not in numbers, f"{path.name}: {name} uses {used} twice"
            numbers.add(used)
        if code.strip().endswith("}") and seen:
            seen.pop()


def test_there_are_protos() -> None:
    assert {path.name for path in PROTOS} >= {"agents.proto", "jobs.proto", "plan.proto"}
