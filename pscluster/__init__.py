"""pscluster: a PyTorch-native parameter-server cluster.

    from pscluster import Task        # what you write: model, data, loss
    from pscluster import Cluster     # what a notebook talks to

Names are loaded when first used: importing the package imports neither torch nor grpc.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pscluster.client import Cluster, Job
    from pscluster.errors import PsError
    from pscluster.job.bundle import Bundle, pack
    from pscluster.job.spec import JobSpec, load_spec, parse_spec
    from pscluster.task import Task

__version__ = "0.1.0"

__all__ = ["Bundle", "Cluster", "Job", "JobSpec", "PsError", "Task", "__version__", "load_spec", "pack", "parse_spec"]

_HOMES = {
    "Bundle": "pscluster.job.bundle",
    "Cluster": "pscluster.client",
    "Job": "pscluster.client",
    "JobSpec": "pscluster.job.spec",
    "PsError": "pscluster.errors",
    "Task": "pscluster.task",
    "load_spec": "pscluster.job.spec",
    "pack": "pscluster.job.bundle",
    "parse_spec": "pscluster.job.spec",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
