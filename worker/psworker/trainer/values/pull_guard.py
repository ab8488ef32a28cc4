"""Forward may start before all values are here: each operation waits for just the parameters that it reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class PullGuard(TorchFunctionMode):
    """A context in which no torch operation sees a parameter whose bucket has not landed.

    Every torch function and tensor method passes through here with its arguments, so it does not matter by which
    module, or past which module, a parameter is used: an index into an embedding's weight, a tied head, the weights
    that an LSTM hands to its kernel. Costs a few microseconds an operation, only while values are missing.
    `sees_everything` is False where operations bypass torch's dispatch."""

    def __init__(self, bucket_of: Mapping[int, int], wait: Callable[[int], None]) -> None:
        """`bucket_of`: id of each trained parameter -> bucket; `wait(bucket)` blocks until it has landed."""
        super().__init__()
        self._bucket_of = bucket_of
        self._wait = wait
        self._landed: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        self._wait_for(args)
        if kwargs:
            self._wait_for(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _wait_for(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, nn.Parameter):
                bucket = self._bucket_of.get(id(value), -1)
                if bucket >= 0 and bucket not in self._landed:
                    self._wait(bucket)
                    self._landed.add(bucket)
            elif isinstance(value, list | tuple):
                self._wait_for(value)
            elif isinstance(value, dict):
                self._wait_for(value.values())


def sees_everything(model: nn.Module) -> bool:
    """Whether a guard around this model's forward would see each use of a parameter.

    Not with TorchScript, whose modules read their parameters in C++, and not once torch.compile has compiled anything
    in the process (the preflight runs the model once): it may trace through the guard and leave it out of its code."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return False
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is None or not dynamo.counters["frames"]
