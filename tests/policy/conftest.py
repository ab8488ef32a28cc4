"""Every source file of the product, parsed once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = ("pscluster", "master", "worker", "paramserver")


@dataclass(frozen=True, kw_only=True)
class Source:
    """`name` is the path from the repository's root; `package` the top package it belongs to."""

    name: str
    package: str
    text: str
    tree: ast.Module

    def imports(self) -> Iterator[tuple[str, int]]:
        """(module, line) of every import that can run: those for type checkers only are left out."""
        skipped = {id(node) for block in ast.walk(self.tree) if _for_types(block) for node in ast.walk(block)}
        for node in ast.walk(self.tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _for_types(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _read(path: Path) -> Source:
    name = path.relative_to(ROOT).as_posix()
    parts = Path(name).parts
    text = path.read_text(encoding="utf-8")
    return Source(
        name=name, package=parts[0] if parts[0] == "pscluster" else parts[1], text=text, tree=ast.parse(text, name)
    )


def _generated(path: Path) -> bool:
    return path.is_relative_to(ROOT / "pscluster" / "v1")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def product() -> list[Source]:
    """The four packages, without generated code."""
    paths = [path for home in HOMES for path in sorted((ROOT / home).rglob("*.py"))]
    return [_read(path) for path in paths if not _generated(path)]


@pytest.fixture(scope="session")
def everything(product: list[Source]) -> list[Source]:
    """The product, and its examples, benchmarks and tests."""
    others = [path for home in ("examples", "benchmarks", "tests") for path in sorted((ROOT / home).rglob("*.py"))]
    return [*product, *(_read(path) for path in others)]
