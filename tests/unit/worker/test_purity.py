"""What a task keeps from one batch to the next is found before step 0 and named; a pure task is never accused."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pscluster.errors import ImpureError, LossContractError, PsError
from pscluster.task import Task
from psworker.trainer.data.loading import build_model
from psworker.trainer.first_model import settle_model
from psworker.trainer.preflight.content import first_difference, leaves_of
from psworker.trainer.preflight.prepare import run_preflight
from psworker.trainer.preflight.table import CheckResult


class Lines:
    """A data set of which `make(index)` makes each sample."""

    def __init__(self, make: Callable[[int], Any], length: int = 30) -> None:
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def plain(index: int) -> tuple[Tensor, Tensor]:
    x = torch.tensor([index / 15 - 1])
    return x, x.sin()


class Line(Task):
    """Fits a sine. Each hook may be given as a function."""

    def __init__(self, make: Callable[[int], Any] = plain, **hooks: Any) -> None:
        self._make = make
        for name, hook in hooks.items():
            setattr(self, name, hook)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def train_data(self) -> Any:
        return Lines(self._make)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y = batch
        return functional.mse_loss(model(x), y, reduction="sum"), len(x)


def checks(task: Task, spec: Any, held_out: Any = None) -> dict[str, CheckResult]:
    model, _ = settle_model(task, build_model(task), task.train_data(), spec, "cpu")
    return {c.name: c for c in run_preflight(task, model, task.train_data(), held_out, spec, "cpu").checks}


def refused(task: Task, spec: Any, held_out: Any = None) -> PsError:
    with pytest.raises(PsError) as caught:
        checks(task, spec, held_out)
    return caught.value


# ---- samples ----


def own_generator() -> Callable[[int], Any]:
    generator = np.random.default_rng(0)
    return lambda index: (plain(index)[0] + float(generator.normal()), plain(index)[1])


def own_torch_generator() -> Callable[[int], Any]:
    generator = torch.Generator().manual_seed(0)
    return lambda index: (plain(index)[0] + torch.randn(1, generator=generator), plain(index)[1])


def own_python_generator() -> Callable[[int], Any]:
    generator = random.Random(0)
    return lambda index: (plain(index)[0] + generator.random(), plain(index)[1])


def clock() -> Callable[[int], Any]:
    return lambda index: (plain(index)[0] + time.perf_counter_ns(), plain(index)[1])


def counting() -> Callable[[int], Any]:
    calls = itertools.count()
    return lambda index: (plain(index)[0] * next(calls), plain(index)[1])


def cache_that_is_changed() -> Callable[[int], Any]:
    cache: dict[int, Any] = {}

    def make(index: int) -> Any:
        x, y = cache.setdefault(index, plain(index))
        x.mul_(0.5)  # the very tensor that was given before
        return x, y

    return make


def what_was_read_before() -> Callable[[int], Any]:
    last = [0]

    def make(index: int) -> Any:
        x, y = plain(index)
        before, last[0] = last[0], index
        return x + before, y

    return make


@pytest.mark.parametrize(
    "kind",
    [own_generator, own_torch_generator, own_python_generator, clock, counting, cache_that_is_changed,
     what_was_read_before],
)  # fmt: skip
def test_samples_that_differ_at_each_reading_are_named(make_spec: Any, kind: Any) -> None:
    error = refused(Line(kind()), make_spec())

    assert isinstance(error, ImpureError)
    assert (error.code, error.details["part"]) == ("PS-2007", "sample")
    assert error.details["differs"].endswith("of train_data[0]")
    assert "train_data()" in error.action
    assert "train.numerics: mixed" in error.action


def test_a_cache_of_what_was_drawn_at_random_is_named(make_spec: Any) -> None:
    """Its samples would be those of the step, and so of the worker, that happened to read them first."""
    cache: dict[int, Any] = {}

    def make(index: int) -> Any:
        if index not in cache:
            x, y = plain(index)
            cache[index] = x + torch.randn(1), y
        return cache[index]

    error = refused(Line(make), make_spec())
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("draws", "samples")
    assert "cache in train_data()" in error.action


def test_data_that_shuffle_themselves_when_they_are_begun_again_are_named(make_spec: Any) -> None:
    order = list(range(30))

    def make(index: int) -> Any:
        if index == 0:
            random.shuffle(order)
        return plain(order[index])

    error = refused(Line(make), make_spec())
    assert isinstance(error, ImpureError)
    assert error.details["part"] == "sample"


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda noise, x: {"x": x, "noise": noise}, "['noise']"),
        (lambda noise, x: {"x": x, "deep": [{"a": 1, "b": (noise, None)}]}, "['deep'][0]['b'][0]"),
        (lambda noise, x: UserDict(x=x, noise=np.array([noise])), "['noise']"),
        (lambda noise, x: Pair(x, noise), ".noise"),
        (lambda noise, x: Record(x, noise), ".noise"),
        (lambda noise, x: Plain(x, noise), ".noise"),
        (lambda noise, x: {"x": x, "noise": [1, 2, noise]}, "['noise']"),
        (lambda noise, x: {"x": x, "noise": str(noise)}, "['noise']"),
        (lambda noise, x: {"x": x, "noise": torch.sparse_coo_tensor([[0]], [noise], (3,))}, "['noise']"),
        (lambda noise, x: {"x": x, "noise": torch.tensor([noise, 1], dtype=torch.bfloat16)}, "['noise']"),
    ],
)
def test_the_field_that_differs_is_named_in_any_structure(make_spec: Any, wrap: Any, place: str) -> None:
    calls = itertools.count()

    def collate(samples: Any) -> Tensor:
        return torch.ones(len(samples), 1)

    def loss(model: nn.Module, batch: Tensor) -> Any:
        return model(batch).square().sum(), len(batch)

    task = Line(lambda index: wrap(float(next(calls) % 251), plain(index)[0]), collate=collate, loss=loss)
    error = refused(task, make_spec())

    assert isinstance(error, ImpureError)
    assert error.details["differs"].partition("train_data")[2] == place


Pair = namedtuple("Pair", ["x", "noise"])


@dataclass
class Record:
    x: Tensor
    noise: float


class Plain:
    def __init__(self, x: Tensor, noise: float) -> None:
        self.x = x
        self.noise = noise
        self._cache = time.perf_counter_ns()  # private: no part of the sample


def test_the_order_of_a_samples_keys_is_part_of_it(make_spec: Any) -> None:
    readings: Counter[int] = Counter()

    def make(index: int) -> dict[str, Tensor]:
        x, y = plain(index)
        readings[index] += 1
        return {"x": x, "y": y} if readings[index] % 2 else {"y": y, "x": x}

    task = Line(make, loss=lambda model, batch: ((model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"])))
    error = refused(task, make_spec())
    assert isinstance(error, ImpureError)
    assert error.details["part"] == "sample"


def test_a_collate_with_a_generator_of_its_own_is_named(make_spec: Any) -> None:
    generator = np.random.default_rng(0)

    def collate(samples: Any) -> Any:
        return torch.stack([x + float(generator.normal()) for x, _ in samples]), torch.stack([y for _, y in samples])

    error = refused(Line(collate=collate), make_spec())
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("batch", "batch[0]")
    assert "collate()" in error.action


def test_held_out_data_are_read_twice_too(make_spec: Any) -> None:
    error = refused(Line(), make_spec(), Lines(own_generator()))
    assert isinstance(error, ImpureError)
    assert error.details["differs"] == "sample 0 of eval_data[0]"


# ---- loss and gradients ----


def counter_in_the_loss() -> Any:
    calls = itertools.count(1)
    return lambda model, batch: (functional.mse_loss(model(batch[0]), batch[1], reduction="sum") / next(calls), 4)


def clock_in_the_loss() -> Any:
    return lambda model, batch: ((model(batch[0]) * time.perf_counter_ns()).square().sum(), len(batch[0]))


def own_noise_in_the_loss() -> Any:
    generator = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        return functional.mse_loss(model(x + torch.randn(x.shape, generator=generator)), y, reduction="sum"), len(x)

    return loss


def weight_that_counts_calls() -> Any:
    calls = itertools.count(1)
    return lambda model, batch: (functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), next(calls))


@pytest.mark.parametrize(
    ("kind", "differs"),
    [
        (counter_in_the_loss, "the loss"),
        (clock_in_the_loss, "the loss"),
        (own_noise_in_the_loss, "the loss"),
        (weight_that_counts_calls, "the weight"),
    ],
)
def test_a_loss_that_keeps_state_is_named(make_spec: Any, kind: Any, differs: str) -> None:
    error = refused(Line(loss=kind()), make_spec())
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("loss", differs)
    assert "loss()" in error.action


def test_a_gradient_that_differs_alone_is_named_by_its_parameter(make_spec: Any) -> None:
    class Scaled(Line):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            calls = itertools.count(1)
            model[2].weight.register_hook(lambda gradient: gradient * next(calls))  # type: ignore[index, union-attr]
            return model

    error = refused(Scaled(), make_spec())
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("gradient", "gradient 2.weight")


def test_a_draw_at_the_first_call_only_is_named(make_spec: Any) -> None:
    projection: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        if not projection:
            projection.append(torch.randn(3))
        return functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0])

    error = refused(Line(loss=loss), make_spec())
    assert isinstance(error, ImpureError)
    assert error.details["part"] == "draws"


def test_a_sample_that_the_loss_changes_in_place_is_named(make_spec: Any) -> None:
    kept = [plain(index) for index in range(30)]

    def loss(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        x.add_(1)
        return functional.mse_loss(model(x), y, reduction="sum"), 1

    one = make_spec(train={"microbatch": 1, "global_batch": 4})
    error = refused(Line(kept.__getitem__, collate=lambda samples: samples[0], loss=loss), one)
    assert isinstance(error, ImpureError)
    assert error.details["part"] == "sample"


def test_statistics_that_differ_are_named(make_spec: Any) -> None:
    calls = itertools.count()
    task = Line(metrics=lambda model, batch: {"calls": next(calls)})  # noqa: ARG005
    error = refused(task, make_spec(), Lines(plain))
    assert isinstance(error, ImpureError)
    assert (error.details["part"], error.details["differs"]) == ("metric", "the statistic calls")


# ---- mixed ----


def test_who_declares_mixed_trains_and_is_warned(make_spec: Any) -> None:
    table = checks(Line(own_generator()), make_spec(train={"numerics": "mixed"}))
    assert (table["purity"].ok, table["purity"].warning) == (True, True)
    assert table["purity"].detail.startswith("impure: reading sample ")


def test_a_mean_is_refused_all_the_same(make_spec: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def mean(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        return functional.mse_loss(model(x + 0.1 * torch.randn(x.shape, generator=generator)), y), len(x)

    assert isinstance(refused(Line(loss=mean), make_spec(train={"numerics": "mixed"})), LossContractError)


@pytest.mark.parametrize("numerics", ["auto", "strict"])
def test_nobody_else_is_excused(make_spec: Any, numerics: str) -> None:
    assert isinstance(refused(Line(own_generator()), make_spec(train={"numerics": numerics})), ImpureError)


def test_with_mixed_the_fingerprint_covers_what_is_the_same_everywhere(make_spec: Any) -> None:
    def fingerprint(make: Callable[[int], Any], length: int) -> str:
        task = Line(make)
        found = run_preflight(
            task, build_model(task), Lines(make, length), None, make_spec(train={"numerics": "mixed"}), "cpu"
        )
        return found.fingerprint

    assert fingerprint(clock(), 30) == fingerprint(clock(), 30) != fingerprint(clock(), 31)
    assert fingerprint(plain, 30) != fingerprint(clock(), 30)


# ---- what is pure ----


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 8, batch_first=True, dropout=0.2, num_layers=2)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, None])[0][:, 0])  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("positions", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.positions) < len(x):
            self.positions = torch.arange(len(x)).float()
        return self.linear(x) + 0 * self.positions[: len(x), None]  # type: ignore[no-any-return]


class Averaging(nn.Module):
    """Replaces a persistent buffer in each forward, as moving averages do, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.linear(x - self.mean)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
    "batch statistics": lambda: nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False), nn.Linear(1, 1)),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(1, 8)), nn.Linear(8, 1)),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(1, 8)), nn.Linear(8, 1)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(1, 8)), nn.Linear(8, 1)),
    "lstm": Stacked,
    "checkpoint": lambda: Checkpointed(False),
    "re-entrant checkpoint": lambda: Checkpointed(True),
    "growing cache": Growing,
    "moving average": Averaging,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(1)),
    "instance noise": lambda: nn.Sequential(nn.Linear(1, 8), nn.RReLU(), nn.Linear(8, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_pure_model_is_not_accused(make_spec: Any, name: str) -> None:
    # 30 samples: a last microbatch of two
    table = checks(Line(build_model=MODELS[name]), make_spec(), Lines(plain))
    assert all(check.ok and not check.warning for check in table.values())
    assert table["purity"].detail.startswith("a microbatch computed twice")


@pytest.mark.parametrize("name", ["batch norm", "spectral norm", "growing cache", "moving average"])
def test_the_buffers_are_as_before(make_spec: Any, name: str) -> None:
    task = Line(build_model=MODELS[name])
    model = build_model(task)
    before = {key: (value, value.clone()) for key, value in model.named_buffers()}
    run_preflight(task, model, task.train_data(), None, make_spec(), "cpu")
    for key, value in model.named_buffers():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


def global_draws(index: int) -> Any:
    x, y = plain(index)
    return x + torch.randn(1) + float(np.random.normal()) + random.random(), y


def test_draws_from_the_global_generators_are_fine(make_spec: Any) -> None:
    def collate(samples: Any) -> Any:
        return torch.stack([x * np.random.rand() for x, _ in samples]).float(), torch.stack([y for _, y in samples])

    assert all(check.ok for check in checks(Line(global_draws, collate=collate), make_spec()).values())


class Image:
    """What a data set of files gives: an object that is completed when it is first used."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pixels: Tensor | None = None

    @cached_property
    def target(self) -> Tensor:
        return plain(self.index)[1]

    def load(self) -> tuple[Tensor, Tensor]:
        if self.pixels is None:
            self.pixels = plain(self.index)[0]
        return self.pixels, self.target


@pytest.mark.parametrize(
    "collate", [lambda samples: samples, lambda samples: list(zip(*map(Image.load, samples), strict=True))]
)
def test_an_object_that_a_first_use_completes_is_fine(make_spec: Any, collate: Any) -> None:
    kept = [Image(index) for index in range(30)]

    def loss(model: nn.Module, batch: Any) -> Any:
        x, y = zip(*(image.load() for image in batch), strict=True) if isinstance(batch[0], Image) else batch
        return functional.mse_loss(model(torch.stack(x)), torch.stack(y), reduction="sum"), len(x)

    task = Line(kept.__getitem__, collate=collate, loss=loss)
    assert all(check.ok for check in checks(task, make_spec(), kept).values())


def test_an_object_that_each_use_changes_is_not(make_spec: Any) -> None:
    class Shrinking(Image):
        def load(self) -> tuple[Tensor, Tensor]:
            x, y = super().load()
            return x.mul_(0.5), y

    kept = [Shrinking(index) for index in range(30)]

    def collate(samples: Any) -> Any:
        x, y = zip(*(image.load() for image in samples), strict=True)
        return torch.stack(x), torch.stack(y)

    error = refused(Line(kept.__getitem__, collate=collate), make_spec())
    assert isinstance(error, ImpureError)
    assert error.details["part"] == "sample"


def test_state_that_changes_nothing_is_fine(make_spec: Any) -> None:
    class Diary(Line):
        calls = 0

        def loss(self, model: nn.Module, batch: Any) -> Any:
            self.calls += 1
            return super().loss(model, batch)

    task = Diary()
    assert all(check.ok for check in checks(task, make_spec()).values())


def test_three_microbatches_are_computed_in_train_mode(make_spec: Any) -> None:
    """As the tasks of other tests count on: the first, the smallest, the first again; then a copy of the task computes
    another and the first."""
    sizes = []

    class Counted(Line):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            if model.training:
                sizes.append(len(batch[0]))
            return super().loss(model, batch)

    checks(Counted(), make_spec(train={"max_steps": 1}))
    assert sizes == [4, 4, 4, 4, 4]
    sizes.clear()
    checks(Counted(), make_spec(train={"max_steps": 2}))
    assert sizes == [4, 2, 4, 4, 4]


def test_leaves_of_equal_things_are_equal_and_of_others_are_not() -> None:
    def things(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, generator=generator)
        return [
            x, x.numpy(), {"a": x}, [x], (x, 1), {1.5 * seed, 2}, str(seed), bytes([seed]), seed + 1j, x.to_sparse(),
            x.to(torch.complex64).conj(), np.array([seed, "b"], dtype=object), Plain(x, seed), range(seed), [seed] * 9,
            np.float32(seed), torch.tensor(seed > 1),
        ]  # fmt: skip

    for one, same, other in zip(things(1), things(1), things(2), strict=True):
        assert first_difference(leaves_of(one), leaves_of(same)) is None
        assert first_difference(leaves_of(one), leaves_of(other)) is not None
    assert first_difference(leaves_of([[1], [2]]), leaves_of([[1]])) is not None
    nan = torch.tensor(float("nan"))
    assert first_difference(leaves_of(nan), leaves_of(nan.clone())) is None
    around: list[Any] = [torch.ones(1)]
    around.append(around)
    assert leaves_of(around)
