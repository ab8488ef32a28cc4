"""Sizes, names, and forbidden calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}

MAY_READ_ENVIRONMENT = (
    "pscluster/agent/daemon.py",  # settings of the agents, and what their processes inherit
    "pscluster/agent/launch.py",  # what an agent tells a process it starts
    "pscluster/agent/link.py",
    "pscluster/cli/",  # an entry point
    "pscluster/client/cluster.py",  # the entry point of a notebook
    "pscluster/settings.py",
    "master/psmaster/daemon.py",
    "worker/psworker/numerics.py",  # sets what torch reads, before its first use
    "paramserver/psserver/partition/__main__.py",  # told by its agent
    "worker/psworker/trainer/__main__.py",
    "worker/psworker/tools.py",
)


def test_files_and_functions_stay_small(everything: list[Any]) -> None:
    wrong = [
        f"{source.name}: {source.text.count(chr(10))} lines"
        for source in everything
        if source.text.count("\n") >= MAX_FILE_LINES
    ]
    for source in everything:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= MAX_FUNCTION_LINES:
                    wrong.append(f"{source.name}:{node.lineno} {node.name}: {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_no_file_has_a_name_that_says_nothing(everything: list[Any]) -> None:
    wrong = [source.name for source in everything if set(Path(source.name).with_suffix("").parts) & EMPTY_NAMES]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is_for(product: list[Any]) -> None:
    wrong = [source.name for source in product if source.text.strip() and not ast.get_docstring(source.tree)]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_where_settings_are_resolved(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{node.lineno}"
        for source in product
        if not source.name.startswith(MAY_READ_ENVIRONMENT)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in ("os.environ", "os.getenv", "environb")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_that_runs_what_it_reads_is_called(everything: list[Any]) -> None:
    wrong = [
        f"{source.name}:{call.lineno} {why}"
        for source in everything
        for call in ast.walk(source.tree)
        if isinstance(call, ast.Call) and (why := _unsafe(call))
    ]
    assert not wrong, "\n".join(wrong)


def _unsafe(call: ast.Call) -> str:
    """Why a call could run code that came from elsewhere; empty when it could not."""
    name = ast.unparse(call.func)
    if name == "torch.load" and _keyword(call, "weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and _keyword(call, "allow_pickle") not in ("", "False"):
        return "numpy.load with allow_pickle"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return name
    if _keyword(call, "shell") == "True":
        return "a shell"
    return ""


def _keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), "")


def test_processes_are_not_forked_with_code_in_between(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{call.lineno}"
        for source in product
        for call in _calls(source.tree)
        if ast.unparse(call.func) in ("os.fork", "os.forkpty") or _keyword(call, "preexec_fn")
    ]
    assert not wrong, "\n".join(wrong)


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))
