"""The model may not change unseen: every microbatch checks that it is still the one that was laid out.

Parameters are views of their buckets, and hooks take the gradients of those that train. A parameter that forward
replaces, resizes, moves to other memory or thaws would keep its first value for ever, without a word. The check reads a
few facts of each parameter, about a microsecond each. Which parameters train in which step is set here, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pscluster.errors import ModelChangedError
from psworker.replica import Replica
from psworker.tensor_words import same_bits, tensor_view

Held = dict[str, nn.Module | nn.Parameter | None]


class ModelWatch:
    """Made when the replica is bound; keeps the model's modules and parameters alive, so that no other takes their
    identity."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._modules = [(name, module, _held(module)) for name, module in replica.model.named_modules()]
        self._known = self._identities()
        self._numbers: list[int] = []
        self._parameters: list[nn.Parameter] = []
        for number, found in enumerate(replica.found):
            for tensor in found.tensors:
                if isinstance(tensor, nn.Parameter):
                    self._numbers.append(number)
                    self._parameters.append(tensor)
        self._trains = [parameter.requires_grad for parameter in self._parameters]
        steps = [replica.thaws.get(parameter) for parameter in self._parameters]
        self._thaws = [(place, step) for place, step in enumerate(steps) if step is not None]
        self._modes = [module.training for _, module, _ in self._modules]
        self._note()

    def enter_train_mode(self) -> None:
        """As the model's own train() does it; every microbatch begins so."""
        self._replica.model.train()
        self._modes = [module.training for _, module, _ in self._modules]

    def begin(self, version: int) -> None:
        """Have those parameters train that do in the step that starts from `version`, and no others; drop what the last
        microbatch made of the buffers and of the modules' modes. Raises ModelChangedError."""
        if [module.training for _, module, _ in self._modules] != self._modes:
            for (_, module, _), mode in zip(self._modules, self._modes, strict=True):
                module.training = mode
        for place, step in self._thaws:
            if self._trains[place] is not (version >= step):
                self._trains[place] = version >= step
                self._parameters[place].requires_grad_(version >= step)
        with _in_step(version):
            self._replica.buffers.restore()

    def check_parameters(self, version: int) -> None:
        """Between forward and backward. Memory that was replaced by equal values is put back, as flatten_parameters of
        an LSTM on CUDA needs. Raises ModelChangedError with the name of what changed."""
        with _in_step(version):
            if self._identities() != self._known:
                raise self._difference()
            parameters = self._parameters
            if [p.requires_grad for p in parameters] != self._trains:
                raise self._thawed(version)
            same = (
                [p.data_ptr() for p in parameters] == self._addresses
                and [p.shape for p in parameters] == self._shapes
                and [p.stride() for p in parameters] == self._strides
                and [_version_of(p) for p in parameters] == self._versions
            )
            if not same:
                self._mend()

    def moved_buffers(self, version: int) -> list[int]:
        """After backward: the averaged buffers that the microbatch moved. Raises ModelChangedError for one that moved
        and may not."""
        with _in_step(version):
            return self._replica.buffers.check()

    def _note(self) -> None:
        parameters = self._parameters
        self._addresses = [p.data_ptr() for p in parameters]
        self._shapes = [p.shape for p in parameters]
        self._strides = [p.stride() for p in parameters]
        self._versions = [_version_of(p) for p in parameters]

    def _identities(self) -> list[int]:
        return [
            id(held)
            for _, module, _ in self._modules
            for store in (module._modules, module._parameters)
            for held in store.values()
        ]

    def _difference(self) -> ModelChangedError:
        """What was added, removed or replaced, by its name."""
        for prefix, module, before in self._modules:
            now = _held(module)
            for leaf in [*before, *(leaf for leaf in now if leaf not in before)]:
                was, held = before.get(leaf), now.get(leaf)
                if was is not held:
                    what = "module" if isinstance(was if was is not None else held, nn.Module) else "parameter"
                    done = "was added to" if was is None else "was removed from" if held is None else "was replaced in"
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    return _changed(what, name, f"{done} the model")
        return ModelChangedError("modules of the model were put into another order")

    def _thawed(self, version: int) -> ModelChangedError:
        place = next(i for i, p in enumerate(self._parameters) if p.requires_grad is not self._trains[i])
        name = self._name(place)
        if self._trains[place]:
            return _changed(
                "parameter", name, "no longer requires grad",
                f'name it in train.freeze to keep it as it is from the start, e.g. freeze: ["{name}"]',
            )  # fmt: skip
        return _changed(
            "parameter", name, "requires grad now, which it did not when the model was laid out",
            f'name it in train.unfreeze_at to train it from a step on, e.g. unfreeze_at: {{"{name}": {version}}}',
        )  # fmt: skip

    def _mend(self) -> None:
        """Bind what has equal values in other memory; raise for the rest."""
        replica = self._replica
        for place, parameter in enumerate(self._parameters):
            name = self._name(place)
            if parameter.shape != self._shapes[place] or parameter.dtype != self._dtype(place):
                before = f"{list(self._shapes[place])} of {self._dtype(place)}"
                raise _changed(
                    "parameter", name, f"changed from {before} to {list(parameter.shape)} of {parameter.dtype}"
                )
            written = _version_of(parameter) != self._versions[place]
            if parameter.data_ptr() != self._addresses[place] or parameter.stride() != self._strides[place]:
                view = tensor_view(replica.layout, replica.flats, self._numbers[place])
                if view.device != parameter.device or not same_bits(view, parameter):
                    raise _changed("parameter", name, "was moved to other memory with other values", _COMPUTE)
                parameter.data = view
            elif written:
                raise _changed("parameter", name, "was written to", _COMPUTE)
        self._note()

    def _name(self, place: int) -> str:
        return self._replica.found[self._numbers[place]].spec.name

    def _dtype(self, place: int) -> torch.dtype:
        dtype = getattr(torch, self._replica.found[self._numbers[place]].spec.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


_COMPUTE = "compute a new tensor from the parameter in loss() or forward, and leave the parameter to the optimizer"


def _changed(what: str, name: str, how: str, action: str = "") -> ModelChangedError:
    return ModelChangedError(f"the {what} {name} {how}", action=action, details={what: name})


@contextmanager
def _in_step(version: int) -> Iterator[None]:
    """Errors name the step that is being computed from `version`."""
    try:
        yield
    except ModelChangedError as error:
        raise ModelChangedError(
            f"in step {version + 1} {error.cause}",
            action=error.action,
            details={**error.details, "step": str(version + 1)},
        ) from None


def _held(module: nn.Module) -> Held:
    return dict((*module._modules.items(), *module._parameters.items()))


def _version_of(parameter: nn.Parameter) -> int:
    """How often torch has counted a write to it; a tensor of inference mode has no such count."""
    return 0 if parameter.is_inference() else parameter._version
