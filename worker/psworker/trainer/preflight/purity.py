"""Whether the task is a pure function: the same sample, loss and gradients however often, and after whatever else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from pscluster.errors import ImpureError, PsError
from pscluster.task import Task
from psworker.staging import available_bytes
from psworker.trainer.first_model import build_anew, settle_model
from psworker.trainer.preflight.content import Leaf, first_difference, leaves_of
from psworker.trainer.preflight.probe import Computed, Inputs, Probe

_DRAW = "draw random numbers from the global generators of torch, numpy and random only: they are seeded for each batch"
_FEW = 1024
_NEXT = 1 + 2**-7  # what a step makes of a parameter, about
_DECLARE = "or declare train.numerics: mixed, which promises no bits"


def check_purity(probe: Probe, untouched: Task, trained: Computed, evaluated: Computed | None) -> tuple[bool, str]:
    """Compute the first microbatch, and the first held-out batch, a second time. The caller has computed others in
    between. Then again with another model, built by a copy of the task that was `untouched` by any batch, after another
    microbatch. Raises ImpureError naming what differed first."""
    probe.read_ends()
    compare(trained, probe.train_microbatch(0, 0), probe.train_inputs, "train_data", "microbatch")
    seen = f"a microbatch computed twice, with others between: same samples, loss and {_gradients(trained)} gradients"
    if evaluated is not None:
        compare(evaluated, probe.held_out_batch(0), probe.held_out_inputs, "eval_data", "batch of evaluation")
        seen += "; a batch of evaluation, too"
    return True, f"{seen}; {_other_way_round(probe, untouched, trained)}"


def _other_way_round(probe: Probe, untouched: Task, first: Computed) -> str:
    """Whether the microbatch that a model sees first, to which it may fit itself, leaves a trace in the next. What was
    found, in words, or why it was not tried. Raises ImpureError."""
    other = probe.other_microbatch()
    if other is None:
        return "there is no other one to begin with"
    if why := _not_twice(probe.model, probe.device):
        return f"not tried with another one first: {why}"
    try:
        task, model = build_anew(untouched, probe.model, probe.spec)
        model, _ = settle_model(task, model, probe.train, probe.spec, probe.device)
        _compare_models(probe.model, model)
        twin = replace(probe, task=task, model=model)
        _with_other_values(model, lambda: twin.train_microbatch(*other, "second"))
        again = twin.train_microbatch(0, 0)
    except ImpureError:
        raise
    except PsError as error:  # of code that cannot be called twice
        return f"not tried with another one first: {error.cause}"
    if found := first_difference(first.results, again.results):
        name = found[0].path
        what = f"a microbatch that was not the first to be computed gave another value of {name}{_values(found)}"
        where = "look for what the model or the task keeps of the first batch that it sees: fit it in build_model()"
        raise _error("first", name, what, where)
    return "the same after another one"


def _with_other_values(model: nn.Module, compute: Callable[[], object]) -> None:
    """As after a step, since a task may keep what it has seen of the parameters, too."""
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value * _NEXT)
    compute()
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)


State = Mapping[str, str]


def kept_state(task: Task, model: nn.Module) -> State:
    """What a task and its model keep beside parameters and buffers, by name: numbers, words, small tensors, and how
    long containers are. Private attributes of modules are torch's or a cache, their tensors what forward computed."""
    found = {f"task.{name}": _brief(value) for name, value in vars(task).items()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name[0] != "_" and name != "training" and not isinstance(value, torch.Tensor):
                found[f"model.{prefix}.{name}" if prefix else f"model.{name}"] = _brief(value)
    return {name: text for name, text in found.items() if text}


def _brief(value: object) -> str:
    if isinstance(value, int | float | str):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return str(leaves_of(value)) if value.numel() <= _FEW else ""
    return f"{len(value)} entries" if isinstance(value, list | dict | set | deque) else ""


def changed_state(before: State, after: State) -> str:
    """A warning that names what changed from one computation of a microbatch to the next; empty: nothing."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not changed:
        return ""
    name = changed[0]
    one, other = (state.get(name, "nothing")[:40] for state in (before, after))
    names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    return (
        f"{names} changed from one computation of a microbatch to the next ({one}, then {other}): where loss() or the "
        "model use it, the bits depend on which worker computes what; keep it in a buffer, and have audit.share check"
    )


def _not_twice(model: nn.Module, device: str) -> str:
    """Why a second model cannot be built to compute a microbatch; empty: it can."""
    if any(type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        return "the model is compiled"
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    # Its gradients, too, and what other trainers of the node need at the same time.
    return "a second model would need too much memory" if 4 * size_bytes > available_bytes(device) else ""


def _compare_models(first: nn.Module, again: nn.Module) -> None:
    """What only one of them has, forward has added."""
    built = dict((*again.named_parameters(), *again.named_buffers()))
    for name, tensor in (*first.named_parameters(), *first.named_buffers()):
        if name in built and (found := first_difference(leaves_of(tensor, name), leaves_of(built[name], name))):
            what = f"building the model twice gave two values of {found[0].path}{_values(found)}"
            where = f"look at build_model(): {_DRAW}, and leave no memory uninitialised"
            raise _error("model", found[0].path, what, where)


def compare(first: Computed, again: Computed, read: Callable[[], Inputs], data: str, batch: str) -> None:
    """Raise ImpureError where the two differ, in the order in which one thing follows from another.

    An object that a first use completes, as a lazily loaded image is, may have changed once: only where the results
    differ, too, or `read` gives a third state, are the samples not the same."""
    if first.inputs != again.inputs and not (_same_results(first, again) and read() == again.inputs):
        _compare_inputs(first.inputs, again.inputs, data)
    if first.read_draws != again.read_draws:
        what = f"reading the samples of one {batch} twice drew random numbers more often in one of them"
        where = f"look for a cache in {data}() that keeps what was drawn at random"
        raise _error("draws", "samples", what, where)
    if found := first_difference(first.results, again.results):
        name = found[0].path
        what = f"computing one {batch} twice, with others between, gave two values of {name}{_values(found)}"
        where = "look for state that loss(), metrics() or the model keep from one batch to the next, and for clocks"
        raise _error(_part(name), name, what, f"{where}; {_DRAW}")
    if first.draws != again.draws:
        what = f"computing one {batch} twice, with others between, drew random numbers more often in one of them"
        where = "look for a draw in loss() or the model that happens at the first call only"
        raise _error("draws", "results", what, where)


def _compare_inputs(first: Inputs, again: Inputs, data: str) -> None:
    for name, leaves in first.samples.items():
        if found := first_difference(leaves, again.samples[name]):
            what = f"reading {name} twice gave two values" + _of(found)
            raise _error("sample", f"{name}{found[0].path}", what, f"look at {data}() and its __getitem__: {_DRAW}")
    if found := first_difference(first.batch, again.batch):
        what = "collate() made two batches of the same samples" + _of(found)
        raise _error("batch", f"batch{found[0].path}", what, f"look at collate(): {_DRAW}")


def _same_results(first: Computed, again: Computed) -> bool:
    one, other = ((c.results, c.draws, c.read_draws) for c in (first, again))
    return one == other


def _error(part: str, differs: str, what: str, where: str) -> ImpureError:
    return ImpureError(f"impure: {what}", action=f"{where}; {_DECLARE}", details={"part": part, "differs": differs})


def _part(name: str) -> str:
    if name.startswith("gradient "):
        return "gradient"
    return "metric" if name.startswith("the statistic ") else "loss"


def _of(found: tuple[Leaf, Leaf]) -> str:
    return (f" of {found[0].path}" if found[0].path else "") + _values(found)


def _values(found: tuple[Leaf, Leaf]) -> str:
    one, other = map(str, found)
    return f": {one}, then {other}" if one != other else f" ({one})"


def _gradients(computed: Computed) -> int:
    return sum(leaf.path.startswith("gradient ") for leaf in computed.results)
