"""What is wrong on a node is found before step 0, named, and leaves no trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pscluster.errors import (
    DataError,
    LayoutError,
    LossContractError,
    NonFiniteError,
    PreflightError,
    PsError,
    TaskError,
    from_dict,
)
from pscluster.task import Task
from psworker.trainer.data.loading import build_model
from psworker.trainer.first_model import settle_model
from psworker.trainer.preflight.prepare import prepare, run_preflight
from psworker.trainer.preflight.table import CheckResult, checks_of

NORM = "psworker.tasks.synthetic:SyntheticNorm"


class Squares(Task):
    """A linear model whose loss is replaced by what a test passes."""

    def __init__(self, loss: Any = None, dataset: Any = None) -> None:
        self._loss = loss
        self._dataset = dataset

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> Any:
        return self._dataset or [torch.tensor([float(i), 1.0]) for i in range(9)]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        squares = model(batch).square()
        return self._loss(squares) if self._loss else (squares.sum(), len(batch))


def check(task: Task, spec: Any, held_out: Any = None) -> tuple[CheckResult, ...]:
    model, _ = settle_model(task, build_model(task), task.train_data(), spec, "cpu")
    return run_preflight(task, model, task.train_data(), held_out, spec, "cpu").checks


def refused(task: Task, spec: Any, held_out: Any = None) -> PsError:
    with pytest.raises(PsError) as caught:
        check(task, spec, held_out)
    return caught.value


@pytest.mark.parametrize("entrypoint", ["psworker.tasks.synthetic:SyntheticLm", NORM])
def test_an_honest_task_passes_every_check(make_spec: Any, entrypoint: str) -> None:
    prepared = prepare(make_spec(entrypoint), None, "cpu")

    table = {check.name: check for check in prepared.preflight.checks}
    assert all(check.ok for check in table.values())
    assert set(table) >= {"imports", "task", "data", "versions", "fingerprint", "loss", "halving", "metrics"}
    assert set(table) >= {"parameters", "layout", "canary"}
    assert table["data"].detail.startswith("512 training samples")
    assert "accuracy" in table["metrics"].detail
    assert prepared.preflight.numerics_class[:12] in table["canary"].detail


def test_the_model_and_the_generators_are_as_before(make_spec: Any) -> None:
    spec = make_spec(NORM)
    checked = prepare(spec, None, "cpu")
    task, model = checked.task, build_model(checked.task)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    generator = torch.get_rng_state()

    run_preflight(task, model, checked.train, checked.held_out, spec, "cpu")

    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_checking_twice_gives_the_same_facts(make_spec: Any) -> None:
    first, second = (prepare(make_spec(), None, "cpu").preflight for _ in range(2))

    assert (first.fingerprint, first.numerics_class) == (second.fingerprint, second.numerics_class)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda s: (s.mean(), len(s)), "loss.. returns a mean"),
        (lambda s: (s.sum(), 1.0), "the weight must count"),
        (lambda s: (s.sum() / math.sqrt(len(s)), len(s)), "not a sum over samples"),
        (lambda s: s.sum(), "not a pair"),
        (lambda s: (s, len(s)), r"a tensor of shape \(4, 1\)"),
        (lambda s: (float(s.sum().detach()), len(s)), "a float as loss_sum"),
        (lambda s: (s.sum(), "4"), "a str as weight"),
        (lambda s: (s.sum(), True), "a bool as weight"),
        (lambda s: (s.sum(), float("nan")), "weight nan"),
        (lambda s: (s.sum(), -1), "weight -1"),
        (lambda s: (s.sum(), 0), "weight 0"),
        (lambda s: (s.detach().sum(), len(s)), "does not require grad"),
        (lambda s: (torch.ones((), requires_grad=True) * 1, len(s)), "no parameter"),
    ],
)
def test_a_loss_that_breaks_its_contract_is_named(make_spec: Any, loss: Any, expected: str) -> None:
    error = refused(Squares(loss), make_spec())

    assert isinstance(error, LossContractError)
    assert error.code == "PS-2002"
    with pytest.raises(LossContractError, match=expected):
        raise error


def test_a_loss_that_is_not_finite_stops_the_job_unless_the_spec_skips_it(make_spec: Any) -> None:
    def infinite(squares: Tensor) -> tuple[Tensor, int]:
        return squares.sum() * float("inf"), len(squares)

    assert isinstance(refused(Squares(infinite), make_spec()), NonFiniteError)
    assert all(c.ok for c in check(Squares(infinite), make_spec(on_nonfinite="skip")))


def test_halving_is_skipped_by_name_where_it_means_nothing(make_spec: Any) -> None:
    def mean(squares: Tensor) -> tuple[Tensor, int]:
        return squares.mean(), len(squares)

    single = make_spec(train={"global_batch": 4, "microbatch": 1})
    (skipped,) = [c for c in check(Squares(mean), single) if c.name == "halving"]
    assert re.search("skipped.*one sample", skipped.detail)

    coupled = Squares(mean)
    coupled.loss_adds_up = False
    (skipped,) = [c for c in check(coupled, make_spec()) if c.name == "halving"]
    assert re.search("skipped.*loss_adds_up", skipped.detail)


def test_rounding_is_no_mean(make_spec: Any) -> None:
    def rough(squares: Tensor) -> tuple[Tensor, int]:
        return squares.sum() * (1 + 1e-5 * len(squares)), len(squares)

    assert all(c.ok for c in check(Squares(rough), make_spec()))


def test_a_step_larger_than_the_data_is_fine(make_spec: Any) -> None:
    assert all(c.ok for c in check(Squares(), make_spec(train={"global_batch": 64, "microbatch": 16})))


def test_an_error_of_the_users_carries_its_traceback_and_the_whole_table(make_spec: Any) -> None:
    def broken(squares: Tensor) -> Any:
        raise KeyError(f"no {len(squares)}")

    error = refused(Squares(broken), make_spec())

    assert type(error) is TaskError
    assert re.search("loss .*KeyError: 'no 4'", error.cause)
    assert "in broken" in error.details["traceback"]
    table = {c.name: c for c in checks_of(from_dict(error.to_dict()))}
    assert (table["loss"].ok, table["loss"].detail) == (False, error.cause)
    assert table["canary"].ok


def test_a_model_that_cannot_be_laid_out_is_in_the_table(make_spec: Any) -> None:
    class Double(Squares):
        def build_model(self) -> nn.Module:
            return nn.Linear(2, 1).double()

        def loss(self, model: nn.Module, batch: Any) -> Any:
            return super().loss(model, batch.double())

    error = refused(Double(), make_spec())

    assert type(error) is LayoutError
    (failed,) = [c for c in checks_of(error) if not c.ok]
    assert failed.name == "layout"
    assert "weight" in failed.detail


def test_a_lazy_model_has_its_shapes_by_the_time_it_is_laid_out(make_spec: Any) -> None:
    class Lazy(Squares):
        def build_model(self) -> nn.Module:
            return nn.LazyLinear(1)

    assert all(c.ok for c in check(Lazy(), make_spec()))


def test_several_failures_make_one_table(make_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(Squares):
        def train_data(self) -> Any:
            raise FileNotFoundError("/data/missing")

        def build_model(self) -> nn.Module:
            raise ValueError("no such layer")

    monkeypatch.setattr("psworker.trainer.preflight.prepare.load_task", lambda *_: Torn())
    with pytest.raises(PreflightError, match=r"2 of \d checks failed") as caught:
        prepare(make_spec(), None, "cpu")

    failed = [c.name for c in checks_of(caught.value) if not c.ok]
    assert failed == ["task", "data"]
    assert "no such layer" in caught.value.details["traceback"]


def test_missing_data_are_a_data_error(make_spec: Any, tmp_path: Any) -> None:
    spec = make_spec("psworker.tasks.text_lm:TextLm", data={"uri": str(tmp_path / "none.txt")})

    with pytest.raises(DataError, match=r"nothing at .*none\.txt") as caught:
        prepare(spec, None, "cpu")

    assert [c.name for c in checks_of(caught.value) if not c.ok] == ["data"]


def test_a_metric_that_is_not_there_is_named(make_spec: Any) -> None:
    spec = make_spec(evaluate={"metric": "accurcy"})

    with pytest.raises(TaskError, match=r"accurcy.*accuracy"):
        prepare(spec, None, "cpu")


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([], "metrics.. returned a list"),
        ({"loss_sum": 1.0}, "kept for what loss.. returned"),
        ({"x": "y"}, "returned a str as 'x'"),
    ],
)
def test_statistics_of_another_form_are_named(make_spec: Any, returned: Any, expected: str) -> None:
    class Odd(Squares):
        def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
            del model, batch
            return returned  # type: ignore[no-any-return]

    error = refused(Odd(), make_spec(), held_out=[torch.ones(2)])

    with pytest.raises(TaskError, match=expected):
        raise error


# ---- parameters that a task writes to ----


class Bounded(nn.Module):
    """A linear layer with a frozen gain, whose forward does to its parameters what a test says."""

    def __init__(self, write: Callable[[Bounded], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -3.0]]))
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("calls", torch.zeros(1))
        self._write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self._write(self)
        return functional.linear(x, self.weight) * self.gain


class Writing(Squares):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def build_model(self) -> nn.Module:
        return self._model


def replace_weight(model: Bounded) -> None:
    model.weight = nn.Parameter(model.weight.clamp(-5, 5))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda model: model.weight.clamp_(-1, 1), "parameter weight"),
        (lambda model: model.weight.clamp_(-5, 5), "parameter weight"),  # the same bytes today, others tomorrow
        (lambda model: model.weight.data.clamp_(-1, 1), "parameter weight"),
        (lambda model: setattr(model.weight, "data", model.weight.data.clamp(-5, 5)), "parameter weight"),
        (replace_weight, "parameter weight"),
        (lambda model: model.gain.data.mul_(0.5), "parameter gain"),
        (lambda model: [parameter.data.mul_(0.5) for parameter in model.parameters()], "parameters weight, gain"),
    ],
)
def test_a_write_to_a_parameter_is_refused_by_name(make_spec: Any, write: Any, named: str) -> None:
    error = refused(Writing(Bounded(write)), make_spec())

    assert isinstance(error, LossContractError)
    assert error.cause.endswith(f" {named}")
    assert "torch.nn.functional.normalize(weight)" in error.action
    assert [c.name for c in checks_of(error) if not c.ok] == ["parameters"]


def test_an_embedding_that_renormalises_itself_is_refused(make_spec: Any) -> None:
    class Tokens(Squares):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(9, 4, max_norm=100.0), nn.Linear(4, 1))

        def train_data(self) -> Any:
            return list(torch.arange(9))

    error = refused(Tokens(), make_spec())

    assert isinstance(error, LossContractError)
    assert error.cause.endswith("parameter 0.weight")


def test_a_write_in_evaluation_alone_is_found_too(make_spec: Any) -> None:
    model = Bounded(lambda model: None if model.training else model.weight.data.mul_(2))

    assert "parameter weight" in refused(Writing(model), make_spec(), held_out=[torch.ones(2)]).cause


def test_a_write_that_backward_stumbles_over_is_named_beside_it(make_spec: Any) -> None:
    class Hasty(Squares):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))

        def loss(self, model: Any, batch: Any) -> Any:
            returned = super().loss(model, batch)
            with torch.no_grad():
                model[2].weight.mul_(2)
            return returned

    error = refused(Hasty(), make_spec())

    assert isinstance(error, PreflightError)
    assert [c.name for c in checks_of(error) if not c.ok] == ["loss", "parameters"]
    assert "parameter 2.weight" in error.cause


def test_buffers_may_change_and_lazy_parameters_are_watched_too(make_spec: Any) -> None:
    counting = Bounded(lambda model: model.calls.add_(1))
    (found,) = [c for c in check(Writing(counting), make_spec()) if c.name == "parameters"]
    assert (found.ok, found.detail[:2]) == (True, "2 ")

    lazy = Writing(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1)))
    (found,) = [c for c in check(lazy, make_spec()) if c.name == "parameters"]
    assert (found.ok, found.detail[:2]) == (True, "4 ")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({}, "1 thread, float32"),
        ({"autocast": "bf16"}, "1 thread, float32 with bf16 autocast"),
        ({"autocast": "bf16", "compile": True}, "1 thread, float32 with bf16 autocast, compiled"),
        ({"compile": True}, "1 thread, float32, compiled"),
    ],
)
def test_the_numerics_name_the_arithmetic(make_spec: Any, train: dict[str, Any], words: str) -> None:
    prepared = prepare(make_spec(train=train), None, "cpu").preflight

    assert prepared.numerics_detail.endswith(words)
    same = prepared.numerics_class == prepare(make_spec(), None, "cpu").preflight.numerics_class
    assert same is ("autocast" not in train)  # the canary is computed as the job is


# ---- the smallest batches ----


class Normed(Squares):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def test_the_smallest_microbatch_is_tried_and_the_hint_names_drop_last(make_spec: Any) -> None:
    """9 samples in microbatches of 4: the last of an epoch has one, with which BatchNorm cannot train."""
    error = refused(Normed(), make_spec())
    assert isinstance(error, TaskError)
    assert "the smallest microbatch, 1 sample at the end of an epoch: loss raised ValueError" in error.cause
    assert "data.drop_last: true" in error.action
    assert [c.name for c in checks_of(error) if not c.ok] == ["smallest"]

    assert all(c.ok for c in check(Normed(), make_spec(data={"drop_last": True})))


def test_a_job_that_ends_before_its_uneven_end_does_not_try_it(make_spec: Any) -> None:
    few = make_spec(train={"global_batch": 4, "microbatch": 4, "max_steps": 2})
    (found,) = [c for c in check(Normed(), few) if c.name == "smallest"]
    assert found.detail == "4 samples in training"


def test_the_smallest_batch_of_evaluation_is_tried_too(make_spec: Any) -> None:
    class Pairing(Squares):
        def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
            return {"next": model(batch)[1].sum()}

    even = make_spec(train={"max_steps": 1}, data={"drop_last": True})
    error = refused(Pairing(), even, held_out=[torch.ones(2)] * 5)
    assert isinstance(error, TaskError)
    assert "the smallest batch of evaluation, 1 sample: metrics raised IndexError" in error.cause
    assert "evaluation uses every sample" in error.action


def test_statistics_of_another_shape_in_the_last_batch_are_named(make_spec: Any) -> None:
    class Shaped(Squares):
        def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
            del model
            return {"each": torch.zeros(len(batch))}

    error = refused(Shaped(), make_spec(), held_out=[torch.ones(2)] * 5)
    assert isinstance(error, TaskError)
    assert "other names or shapes" in error.cause


def test_a_loss_that_is_not_finite_for_one_sample_is_found(make_spec: Any) -> None:
    def spread(squares: Tensor) -> tuple[Tensor, int]:
        return squares.sum() * (1 + 0 * squares.std()), len(squares)

    error = refused(Squares(spread), make_spec())
    assert isinstance(error, NonFiniteError)
    assert "data.drop_last" in error.action


def test_too_few_samples_for_drop_last_are_a_data_error(make_spec: Any) -> None:
    spec = make_spec(args={"num_samples": 3, "held_out": 0}, data={"drop_last": True})
    with pytest.raises(DataError, match="do not fill one microbatch of 4"):
        prepare(spec, None, "cpu")


def test_the_table_counts_what_is_left_out(make_spec: Any) -> None:
    spec = make_spec(args={"num_samples": 31}, data={"drop_last": True})
    (found,) = [c for c in prepare(spec, None, "cpu").preflight.checks if c.name == "data"]
    assert found.detail == (
        "31 training samples (3 of them left out of each epoch by data.drop_last), 48 held out; 2 steps an epoch"
    )
