"""In which types a job's forward and backward compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from pscluster.job.spec import JobSpec


def precision(spec: JobSpec, device: str) -> AbstractContextManager[None]:
    """A context for everything that calls the task's model: torch.autocast when the spec asks for it.

    Backward follows the types of its forward by itself."""
    if spec.train.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def arithmetic(spec: JobSpec) -> str:
    """What a job computes in, for people."""
    narrow = f"float32 with {spec.train.autocast} autocast" if spec.train.autocast else "float32"
    return f"{narrow}, compiled" if spec.train.compile else narrow
