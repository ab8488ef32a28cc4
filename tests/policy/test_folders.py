"""Which folder of a package may import which: imports go one way, and never in a circle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

ROOT_FOLDER = ""  # the modules directly in the package
FOLDERS: Mapping[str, Mapping[str, set[str]]] = {
    "psmaster": {
        ROOT_FOLDER: {"api", "control", "scheduling", "storage", "model"},
        "api": {"control", "scheduling", "storage", "model"},
        "control": {"scheduling", "storage", "model"},
        "scheduling": {"model"},
        "storage": {"model"},
        "model": set(),
    },
    "psserver.partition": {
        ROOT_FOLDER: {"ingress", "step", "coordinator", "replication", "checkpoint"},
        "ingress": {ROOT_FOLDER, "replication", "step"},
        "coordinator": {ROOT_FOLDER, "replication", "step"},
        "replication": {ROOT_FOLDER, "step"},
        "checkpoint": {ROOT_FOLDER, "step"},
        "step": {ROOT_FOLDER},
    },
    "psworker.trainer": {
        ROOT_FOLDER: {"data", "gradients", "preflight"},
        "data": set(),
        "gradients": {ROOT_FOLDER},
        "preflight": {ROOT_FOLDER, "data"},
    },
    "pscluster": {
        ROOT_FOLDER: {"client", "job"},  # the names that `import pscluster` offers
        "cli": {ROOT_FOLDER, "agent", "client", "job", "security", "storage"},
        "agent": {ROOT_FOLDER, "job", "rpc", "security", "storage", "wire"},
        "client": {ROOT_FOLDER, "job", "rpc", "security", "storage", "wire"},
        "job": {ROOT_FOLDER, "storage"},
        "rpc": {ROOT_FOLDER, "security"},
        "wire": {ROOT_FOLDER, "security", "step"},
        "security": {ROOT_FOLDER},
        "storage": {ROOT_FOLDER, "step"},
        "step": {ROOT_FOLDER},
    },
}
"""By package and folder: the other folders of the package that it may import. Modules of the root are shared by all,
or put the folders together; test_no_module_imports_itself_through_others keeps them apart."""

MAX_FOLDER_LEVELS = {"psmaster": 7}
MAX_MODULE_LEVELS = {"psmaster": 13}

Imports = Mapping[str, set[str]]


def imports_within(product: list[Any], package: str) -> Imports:
    """By module of a package, the modules of it that it imports, at the top or in a function."""
    named = ((_module_of(source), source) for source in product)
    sources = {module: source for module, source in named if f"{module}.".startswith(f"{package}.")}
    return {
        module: {found for name, _ in source.imports() if (found := _resolve(name, sources)) not in (None, module)}
        for module, source in sources.items()
    }


def _module_of(source: Any) -> str:
    path = source.name.removesuffix(".py").removesuffix("/__init__")
    return str(path[path.index(source.package) :].replace("/", "."))


def _resolve(name: str, modules: Mapping[str, Any]) -> str | None:
    """The module that `import name` or `from ... import name` reads."""
    if name in modules:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in modules else None


def _folder_of(module: str, package: str) -> str:
    """A folder's own __init__ belongs to the folder."""
    first, _, rest = module.removeprefix(package).removeprefix(".").partition(".")
    return first if rest or first in FOLDERS.get(package, {}) else ROOT_FOLDER


def chains(imports: Imports) -> Iterator[list[str]]:
    """The longest chain of imports from each module. Fails on a cycle."""
    longest: dict[str, list[str]] = {}

    def chain_of(module: str, above: tuple[str, ...]) -> list[str]:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in longest:
            below = [chain_of(other, (*above, module)) for other in sorted(imports[module])]
            longest[module] = [module, *max(below, key=len, default=[])]
        return longest[module]

    for module in imports:
        yield chain_of(module, ())


@pytest.mark.parametrize("package", ["pscluster", "psmaster", "psserver", "psworker"])
def test_no_module_imports_itself_through_others(product: list[Any], package: str) -> None:
    assert any(chains(imports_within(product, package)))


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_import_one_way(product: list[Any], package: str) -> None:
    allowed = FOLDERS[package]
    wrong = [
        f"{module} imports {other}"
        for module, others in imports_within(product, package).items()
        for other in others
        if (here := _folder_of(module, package)) != (there := _folder_of(other, package)) and there not in allowed[here]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", MAX_FOLDER_LEVELS)
def test_few_levels_of_imports(product: list[Any], package: str) -> None:
    """Levels of folders as the table allows them, the modules of the root one by one; and of modules, as they are."""
    imports = imports_within(product, package)
    deepest = max(chains(imports), key=len)
    assert len(deepest) <= MAX_MODULE_LEVELS[package], " -> ".join(deepest)
    levels: dict[str, set[str]] = {}
    for module, others in imports.items():
        here = _folder_of(module, package) or module
        levels.setdefault(here, set()).update(_folder_of(other, package) or other for other in others)
    folders = max(chains({name: others - {name} for name, others in levels.items()}), key=len)
    assert len(folders) <= MAX_FOLDER_LEVELS[package], " -> ".join(folders)
