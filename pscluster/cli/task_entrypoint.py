"""Checks a task's entrypoint in the directory to bundle, before anything is uploaded."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from pathlib import Path

from pscluster.errors import SpecError

_BUILT_IN = "psworker.tasks."


def is_built_in(entrypoint: str) -> bool:
    """Whether the task comes with pscluster, so that no code is uploaded."""
    return entrypoint.startswith(_BUILT_IN)


def check_entrypoint(entrypoint: str, directory: Path, packed: Collection[str] | None = None) -> None:
    """Raise SpecError unless `directory` holds the module and, as far as its source shows, the class; with `packed`,
    the relative paths of a bundle, also unless the module's file is among them. Runs no user code."""
    module, _, name = entrypoint.partition(":")
    found = _module_file(module, directory)
    if found is None:
        near = difflib.get_close_matches(module, _modules(directory), n=1, cutoff=0.5)
        raise SpecError(
            f"task.entrypoint {entrypoint}: there is no module {module} in {directory}",
            action=f"did you mean {near[0]}:{name}?" if near else _where(module),
        )
    relative = found.relative_to(directory).as_posix()
    if packed is not None and relative not in packed:
        raise SpecError(
            f"task.entrypoint {entrypoint}: {relative} is left out of the bundle by a .gitignore",
            action=f"add the line !{relative}",
        )
    _check_name(entrypoint, name, found, relative)


def never_evaluates(entrypoint: str, directory: Path) -> bool:
    """Whether the task certainly has no evaluation data: its class derives from pscluster's Task alone, and its file
    does not contain eval_data. False when the source does not show it, and for a built-in task. Runs no user code."""
    module, _, name = entrypoint.partition(":")
    found = None if is_built_in(entrypoint) else _module_file(module, directory)
    if found is None:
        return False
    source = found.read_bytes()
    if b"eval_data" in source:
        return False
    body = ast.parse(source).body
    bases = [
        list(map(ast.unparse, node.bases)) for node in body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    imported = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "pscluster"]
    names = {alias.asname or alias.name for node in imported for alias in node.names if alias.name == "Task"}
    return len(bases) == 1 and len(bases[0]) == 1 and bases[0][0] in {*names, "pscluster.Task"}


def _where(module: str) -> str:
    return f"the spec's directory is what is uploaded: put {module.replace('.', '/')}.py there"


def _module_file(module: str, directory: Path) -> Path | None:
    base = directory.joinpath(*module.split("."))
    for candidate in (base / "__init__.py", base.with_name(base.name + ".py")):
        if candidate.is_file():
            return candidate
    return None


def _modules(directory: Path) -> list[str]:
    """Modules at the top of a directory and one package down, for suggestions."""
    names = [path.stem for path in directory.glob("*.py")]
    names += [f"{path.parent.name}.{path.stem}" for path in directory.glob("*/*.py") if path.stem != "__init__"]
    return sorted(names)


def _check_name(entrypoint: str, name: str, file: Path, relative: str) -> None:
    try:
        tree = ast.parse(file.read_bytes(), filename=relative)
    except (OSError, SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise SpecError(f"task.entrypoint {entrypoint}: {relative}{where}: {reason}") from None
    names, complete = _bound_names(tree)
    if complete and name not in names:
        near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        hint = f"did you mean {entrypoint.partition(':')[0]}:{near[0]}?" if near else ""
        raise SpecError(f"task.entrypoint {entrypoint}: {relative} defines no {name}", action=hint)


def _bound_names(tree: ast.Module) -> tuple[set[str], bool]:
    """Names that the module binds, and whether these are all (no star import, no module __getattr__)."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return names, "*" not in names and "__getattr__" not in names
