"""Writes to parameters, found by comparing traces of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pscluster.errors import LossContractError
from psworker.trainer.preflight.content import checksum

_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a write to a parameter changes. Keeps the parameter alive, so that another cannot take its address.

    `version` also shows a write of the same bytes, as clamping within bounds is; `checksum` shows a write through
    `.data`, which torch does not count."""

    parameter: nn.Parameter
    address: int
    version: int
    checksum: int

    def is_of(self, other: Trace | None) -> bool:
        """Whether nothing was written between the two."""
        if other is None or other.parameter is not self.parameter:
            return False
        return (self.address, self.version, self.checksum) == (other.address, other.version, other.checksum)


def traces(model: nn.Module) -> dict[str, Trace]:
    """A trace of each parameter, frozen ones included. They are dense and have values: see `settle_model`.

    Reads every parameter once, a CUDA model's through host memory, one tensor at a time."""
    return {
        name: Trace(
            parameter=parameter,
            address=parameter.data_ptr(),
            version=0 if parameter.is_inference() else parameter._version,
            checksum=checksum(parameter),
        )
        for name, parameter in model.named_parameters()
    }


def check_unwritten(before: Mapping[str, Trace], after: Mapping[str, Trace]) -> str:
    """What was compared, in words. Raises LossContractError naming the parameters that were written to or replaced."""
    written = [name for name, trace in before.items() if not trace.is_of(after.get(name))]
    if written:
        named = ", ".join(written[:_MOST_NAMED]) + (", ..." if len(written) > _MOST_NAMED else "")
        raise LossContractError(
            f"forward or backward writes to the parameter{'s' if len(written) > 1 else ''} {named}",
            action="constrain weights in the task's loss by computing a new tensor, e.g. "
            "torch.nn.functional.normalize(weight), instead of writing to the parameter (as max_norm of nn.Embedding "
            "does); keep a moving average of weights in buffers",
        )
    return f"{len(before)} unchanged by forward and backward"
