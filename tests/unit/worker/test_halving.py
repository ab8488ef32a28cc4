"""A mean for a sum is found, with noise or without; a sum of any kind passes, and what cannot be judged is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pscluster.errors import LossContractError
from pscluster.task import Task
from psworker.trainer.data.loading import build_model
from psworker.trainer.preflight.prepare import run_preflight

SIZE = 6  # of a microbatch: halves of three


class Line(Task):
    """Fits a sine with what a test passes as the loss of (model, x, y)."""

    def __init__(self, loss: Any, model: nn.Module | None = None, collate: Any = None) -> None:
        self._loss = loss
        self._model = model or nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        if collate:
            self.collate = collate

    def build_model(self) -> nn.Module:
        return self._model

    def train_data(self) -> Any:
        points = torch.linspace(-3, 3, 60).reshape(-1, 2)
        return [(x, x.sin()) for x in points]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self._loss(model, *batch)


def halving(task: Task, make_spec: Any) -> str:
    """The detail of the check; raises its error."""
    spec = make_spec(train={"global_batch": 2 * SIZE, "microbatch": SIZE})
    torch.manual_seed(0)
    checks = run_preflight(task, build_model(task), task.train_data(), None, spec, "cpu").checks
    return next(check.detail for check in checks if check.name == "halving")


def total(predicted: Tensor, y: Tensor) -> tuple[Tensor, int]:
    return functional.mse_loss(predicted, y, reduction="sum"), len(y)


def mean(predicted: Tensor, y: Tensor) -> tuple[Tensor, int]:
    return functional.mse_loss(predicted, y), len(y)


def test_halves_of_opposite_signs_are_compared_by_their_size(make_spec: Any) -> None:
    """The whole is the rest of two large numbers: little but their rounding."""

    def difference(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        del y
        return (1e4 * x[:, 0].sign() + 1e-3 * model(x)[:, 0]).sum(), len(x)

    class Signed(Line):
        def train_data(self) -> Any:
            return [(torch.full((2,), sign * n), torch.ones(2)) for n in (1.0, 2.0, 3.0) for sign in (1, -1)]

    assert " = " in halving(Signed(difference), make_spec)


# ---- noise ----


def gaussian(x: Tensor) -> Tensor:
    return x + 0.5 * torch.randn_like(x)


def of_normal(x: Tensor) -> Tensor:
    return torch.normal(x, torch.full_like(x, 0.5))


def masked(x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full(x.shape, 0.5))


def dropped(x: Tensor) -> Tensor:
    return functional.dropout(x, 0.5, training=True)


def in_place(x: Tensor) -> Tensor:
    return x + torch.empty_like(x).uniform_(-1, 1)


def from_a_distribution(x: Tensor) -> Tensor:
    return x + torch.distributions.Normal(0.0, 1.0).sample(x.shape)


def time_steps(x: Tensor) -> Tensor:
    return x * torch.randint(1, 9, (len(x),))[:, None]


def second_axis(x: Tensor) -> Tensor:
    return x + torch.rand(2, len(x)).T


def flattened(x: Tensor) -> Tensor:
    return x + torch.rand(x.numel()).reshape(x.shape)


def shared_by_all(x: Tensor) -> Tensor:
    return x + torch.randn(2)


def several(x: Tensor) -> Tensor:
    return dropped(gaussian(x)) + torch.rand(1)


def of_numpy(x: Tensor) -> Tensor:
    return x + torch.from_numpy(np.random.normal(size=tuple(x.shape))).float()


NOISES = [
    gaussian, of_normal, masked, dropped, in_place, from_a_distribution, time_steps, second_axis, flattened,
    shared_by_all, several, of_numpy,
]  # fmt: skip


@pytest.mark.parametrize("noise", NOISES)
def test_a_noisy_sum_passes_with_the_same_noise(make_spec: Any, noise: Any) -> None:
    detail = halving(Line(lambda model, x, y: total(model(noise(x)), y)), make_spec)
    assert detail.endswith("with the same random numbers")


@pytest.mark.parametrize("noise", NOISES)
def test_a_noisy_mean_is_still_found(make_spec: Any, noise: Any) -> None:
    with pytest.raises(LossContractError, match="returns a mean"):
        halving(Line(lambda model, x, y: mean(model(noise(x)), y)), make_spec)


def test_noise_that_cannot_be_divided_is_not_judged(make_spec: Any) -> None:
    """Mixup pairs each sample with another of the batch."""

    def mixed(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        order, share = torch.randperm(len(x)), np.random.beta(1, 1)
        return total(model(share * x + (1 - share) * x[order]), share * y + (1 - share) * y[order])

    assert halving(Line(mixed), make_spec).startswith("skipped: draws noise")


def test_a_mean_with_noise_that_cannot_be_divided_is_found_all_the_same(make_spec: Any) -> None:
    def mixed(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        order = torch.randperm(len(x))
        return mean(model(0.9 * x + 0.1 * x[order]), y)

    with pytest.raises(LossContractError, match="returns a mean"):
        halving(Line(mixed), make_spec)


def test_a_variational_autoencoder_passes(make_spec: Any) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(2, 8), nn.Linear(4, 2)

    def loss(model: Any, x: Tensor, y: Tensor) -> Any:
        del y
        centre, spread = model.encode(x).chunk(2, dim=1)
        z = centre + torch.randn_like(spread) * (0.5 * spread).exp()
        divergence = -0.5 * (1 + spread - centre**2 - spread.exp()).sum()
        return functional.mse_loss(model.decode(z), x, reduction="sum") + divergence, len(x)

    assert halving(Line(loss, Autoencoder()), make_spec).endswith("with the same random numbers")


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: torch.tensor([np.random.rand()], dtype=torch.float32)])
def test_noise_of_each_sample_in_collate_is_the_same_for_the_halves(make_spec: Any, draw: Any) -> None:
    def collate(samples: Any) -> Any:
        return torch.stack([x * draw() for x, _ in samples]), torch.stack([y for _, y in samples])

    task = Line(lambda model, x, y: total(model(x), y), collate=collate)
    assert halving(task, make_spec).endswith("with the same random numbers")


# ---- samples of one batch that depend on each other ----


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    similar = functional.normalize(model(x)) @ functional.normalize(y + 0.1).T
    return functional.cross_entropy(5 * similar, torch.arange(len(x)), reduction="sum"), len(x)


def pairs(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    del y
    return torch.cdist(model(x), model(x)).sum(), len(x) ** 2


@pytest.mark.parametrize("loss", [contrastive, pairs])
def test_an_in_batch_loss_is_not_accused(make_spec: Any, loss: Any) -> None:
    detail = halving(Line(loss), make_spec)
    assert detail.startswith("skipped")
    assert "loss_adds_up = False" in detail


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2, momentum=None)]
)
def test_batch_norm_is_not_accused(make_spec: Any, norm: nn.Module) -> None:
    halving(Line(lambda model, x, y: total(model(x), y), nn.Sequential(nn.Linear(2, 2), norm)), make_spec)


def test_a_model_that_computes_losses_in_train_mode_only_is_not_accused(make_spec: Any) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return {"loss": functional.mse_loss(self.inner(x), y, reduction="sum")} if self.training else [x]

    detail = halving(Line(lambda model, x, y: (model(x, y)["loss"], len(x)), Detector()), make_spec)
    assert detail.startswith("skipped: loss raised TypeError")


# ---- what is wrong ----


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, x, y: mean(model(x), y),
        lambda model, x, y: (functional.mse_loss(model(x), y), 1.0),
        lambda model, x, y: (functional.mse_loss(model(x), y, reduction="sum"), 1),
        lambda model, x, y: (functional.mse_loss(model(x), y).sqrt(), len(x)),
        lambda model, x, y: (functional.mse_loss(model(x), y, reduction="sum"), len(x) ** 2),
    ],
)
def test_what_is_no_sum_is_refused_and_the_hint_names_the_way_out(make_spec: Any, loss: Any) -> None:
    with pytest.raises(LossContractError) as caught:
        halving(Line(loss), make_spec)
    assert "loss_adds_up = False" in caught.value.action
