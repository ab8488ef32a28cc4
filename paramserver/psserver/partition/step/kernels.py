"""One update of a chunk by each optimizer: torch's own kernels and functions, and Lion.

A kernel updates `value` and `moments` in place. All are one-dimensional float32 tensors of one length; `gradient` may
be overwritten. `count` is the number of this update, from 1; `lr` and `section` hold for the whole chunk. In the first
update moments are zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch.optim.adadelta import adadelta
from torch.optim.adamax import adamax
from torch.optim.nadam import nadam
from torch.optim.radam import radam
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop

from pscluster.job.optimizer import OptimizerSection

Moments = Sequence[torch.Tensor]
Kernel = Callable[[OptimizerSection, torch.Tensor, torch.Tensor, Moments, int, float], None]


def moments_of(section: OptimizerSection) -> int:
    """How many float32 words of state an element has beside its value. A group may set momentum where the optimizer
    does not."""
    with_momentum = any(group.momentum for group in section.of_groups)
    match section.name:
        case "sgd":
            return int(with_momentum)
        case "rmsprop":
            return 1 + int(with_momentum) + int(section.centered)
        case "adam" | "adamw":
            return 2 + int(section.amsgrad)
        case "adagrad" | "lion":
            return 1
    return 2


def adam(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019), with amsgrad (Reddi et al., 2018)."""
    # The kernel reads the count of this update and does not advance it.
    kernel = torch._fused_adamw_ if section.name == "adamw" else torch._fused_adam_
    kernel(
        [value],
        [gradient],
        [moments[0]],
        [moments[1]],
        [moments[2]] if section.amsgrad else [],
        [torch.tensor(float(count))],
        lr=lr,
        beta1=section.betas[0],
        beta2=section.betas[1],
        weight_decay=section.weight_decay,
        eps=section.eps,
        amsgrad=section.amsgrad,
        maximize=section.maximize,
    )


def sgd(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """SGD with optional momentum and Nesterov's variant (Sutskever et al., 2013)."""
    torch._fused_sgd_(
        [value],
        [gradient],
        [moments[0]] if section.momentum else [],
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        lr=lr,
        dampening=section.dampening,
        nesterov=section.nesterov,
        maximize=section.maximize,
        is_first_step=count == 1,
    )


def _adagrad(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """Adagrad (Duchi et al., 2011)."""
    if count == 1:
        moments[0].fill_(section.initial_accumulator_value)
    torch._fused_adagrad_(
        [value],
        [gradient],
        [moments[0]],
        [torch.tensor(float(count))],
        lr=lr,
        lr_decay=section.lr_decay,
        weight_decay=section.weight_decay,
        eps=section.eps,
        maximize=section.maximize,
    )


def _rmsprop(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """RMSprop (Tieleman and Hinton, 2012), centered (Graves, 2013)."""
    rest = list(moments[1:])
    means = [rest.pop(0)] if section.centered else []
    rmsprop(
        [value], [gradient], [moments[0]], means, rest if section.momentum else [], _before(count), foreach=False,
        maximize=section.maximize, lr=lr, alpha=section.alpha, eps=section.eps, weight_decay=section.weight_decay,
        momentum=section.momentum, centered=section.centered,
    )  # fmt: skip


def _adadelta(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """Adadelta (Zeiler, 2012)."""
    adadelta(
        [value], [gradient], [moments[0]], [moments[1]], _before(count), foreach=False, lr=lr, rho=section.rho,
        eps=section.eps, weight_decay=section.weight_decay, maximize=section.maximize,
    )  # fmt: skip


def _adamax(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """AdaMax (Kingma and Ba, 2015)."""
    adamax(
        [value], [gradient], [moments[0]], [moments[1]], _before(count), foreach=False, maximize=section.maximize,
        eps=section.eps, beta1=section.betas[0], beta2=section.betas[1], lr=lr, weight_decay=section.weight_decay,
    )  # fmt: skip


def _nadam(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """NAdam (Dozat, 2016). The product of all mu is a function of the count; torch keeps it in float32."""
    product = torch.tensor(_mu_product(section.betas[0], section.momentum_decay, count - 1))
    nadam(
        [value], [gradient], [moments[0]], [moments[1]], [product], _before(count),
        decoupled_weight_decay=section.decoupled_weight_decay, foreach=False, maximize=section.maximize,
        beta1=section.betas[0], beta2=section.betas[1], lr=lr, weight_decay=section.weight_decay,
        momentum_decay=section.momentum_decay, eps=section.eps,
    )  # fmt: skip


def _radam(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """RAdam (Liu et al., 2020)."""
    radam(
        [value], [gradient], [moments[0]], [moments[1]], _before(count),
        decoupled_weight_decay=section.decoupled_weight_decay, foreach=False, maximize=section.maximize,
        beta1=section.betas[0], beta2=section.betas[1], lr=lr, weight_decay=section.weight_decay, eps=section.eps,
    )  # fmt: skip


def _rprop(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, count: int, lr: float
) -> None:
    """Rprop (Riedmiller and Braun, 1993). The rate of the first update is the first size of every step."""
    if count == 1:
        moments[1].fill_(lr)
    low, high = section.step_sizes
    rprop(
        [value], [gradient], [moments[0]], [moments[1]], _before(count), foreach=False, maximize=section.maximize,
        step_size_min=low, step_size_max=high, etaminus=section.etas[0], etaplus=section.etas[1],
    )  # fmt: skip


def _lion(
    section: OptimizerSection, value: torch.Tensor, gradient: torch.Tensor, moments: Moments, _count: int, lr: float
) -> None:
    """Lion (Chen et al., 2023): w -= lr (sign(b1 m + (1 - b1) g) + decay w); m = b2 m + (1 - b2) g."""
    if section.maximize:
        gradient.neg_()
    (mean,) = moments
    beta1, beta2 = section.betas
    value.mul_(1.0 - lr * section.weight_decay)
    value.add_(torch.lerp(gradient, mean, beta1).sign_(), alpha=-lr)
    mean.lerp_(gradient, 1.0 - beta2)


KERNELS: Mapping[str, Kernel] = {
    "adamw": adam,
    "adam": adam,
    "sgd": sgd,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "adamax": _adamax,
    "nadam": _nadam,
    "radam": _radam,
    "rprop": _rprop,
    "lion": _lion,
}


def _before(count: int) -> list[torch.Tensor]:
    """The count that torch's functions advance themselves."""
    return [torch.tensor(float(count - 1))]


@lru_cache(maxsize=64)
def _mu_product(beta1: float, momentum_decay: float, count: int) -> float:
    """The product of mu over the first `count` updates, rounded to float32 after each, as torch's NAdam has it."""
    product = torch.ones(())
    for number in range(1, count + 1):
        if not product:  # it stays so; after some 900 updates
            break
        product *= beta1 * (1.0 - 0.5 * (0.96 ** (number * momentum_decay)))
    return float(product)
