"""Who may import whom, read from the imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

DAEMONS = {"psmaster", "psworker", "psserver"}
MAY_USE_TORCH = (
    "pscluster/step/codec.py",
    "pscluster/task.py",  # the base class of users' tasks, which run in trainers; imported when called
    "pscluster/cli/templates/",  # what `psctl init` writes: users' code
    "worker/psworker/",
    "paramserver/psserver/",
)
NEVER = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_daemons_import_pscluster_and_never_each_other(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} imports {module}"
        for source in product
        for module, line in source.imports()
        if module.partition(".")[0] in DAEMONS - {source.package}
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_stays_with_those_who_compute(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} imports {module}"
        for source in product
        for module, line in source.imports()
        if module.partition(".")[0] == "torch" and not source.name.startswith(MAY_USE_TORCH)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_relative_to_a_package(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line}" for source in product for module, line in source.imports() if module.startswith("None.")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_that_runs_what_it_reads_is_imported(product: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} imports {module}"
        for source in product
        for module, line in source.imports()
        if module.partition(".")[0] in NEVER
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("entry", "slow"),
    [
        ("pscluster.cli.main", {"torch", "numpy", "grpc", "pydantic", "rich"}),
        ("psmaster.daemon", {"torch", "numpy", "rich"}),
        ("psworker.daemon", {"torch", "numpy", "grpc", "pydantic"}),
        ("psserver.daemon", {"torch", "numpy", "grpc", "pydantic"}),
        ("pscluster.agent.node", {"torch", "numpy", "pydantic"}),
        ("pscluster.agent.launch", {"torch", "numpy", "grpc", "asyncio", "pydantic"}),
        ("pscluster", {"torch", "numpy", "grpc", "pydantic"}),
    ],
)
def test_what_must_start_fast_loads_nothing_slow(entry: str, slow: set[str]) -> None:
    code = f"import sys, {entry}; print(*sorted({slow!r} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split() == [], f"{entry} loads {outcome.stdout}"
