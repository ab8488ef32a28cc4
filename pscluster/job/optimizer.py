"""The optimizer and the learning-rate schedule of a job spec, with torch's names, arguments and defaults."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from pscluster.job.section import Section

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
OptimizerName = Literal[
    "adamw", "adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "rprop", "lion"
]

_ADAM = ("betas", "eps", "weight_decay", "maximize")
OWN_KEYS: Mapping[str, Mapping[str, Any]] = {
    "adamw": dict.fromkeys(("amsgrad", *_ADAM)),
    "adam": dict.fromkeys(("amsgrad", *_ADAM)),
    "sgd": dict.fromkeys(("momentum", "dampening", "nesterov", "weight_decay", "maximize")),
    "rmsprop": {
        "lr": 1e-2, **dict.fromkeys(("alpha", "eps", "weight_decay", "momentum", "centered", "maximize"))
    },
    "adagrad": {
        "lr": 1e-2, "eps": 1e-10, **dict.fromkeys(("lr_decay", "weight_decay", "initial_accumulator_value", "maximize"))
    },
    "adadelta": {"lr": 1.0, "eps": 1e-6, **dict.fromkeys(("rho", "weight_decay", "maximize"))},
    "adamax": {"lr": 2e-3, **dict.fromkeys(_ADAM)},
    "nadam": {"lr": 2e-3, **dict.fromkeys(("momentum_decay", "decoupled_weight_decay", *_ADAM))},
    "radam": dict.fromkeys(("decoupled_weight_decay", *_ADAM)),
    "rprop": {"lr": 1e-2, **dict.fromkeys(("etas", "step_sizes", "maximize"))},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), **dict.fromkeys(("weight_decay", "maximize"))},
}  # fmt: skip
"""By optimizer: the keys that it has beside `lr` and the rules of decay and groups, with its default where that is not
the field's."""
_COMMON = ("name", "lr", "decay_norms_and_biases", "no_decay", "groups")


class GroupSection(Section):
    """Parameters with values of their own. `match`: globs of parameter names. What is not given is the optimizer's. A
    `weight_decay` given here is in force for all of the group, norms and biases too."""

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    betas: tuple[Fraction, Fraction] | None = None
    eps: Positive | None = None
    momentum: Fraction | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What the group sets, by key."""
        return self.model_dump(exclude={"match"}, exclude_none=True)


class OptimizerSection(Section):
    """`no_decay`: globs of parameter names without weight decay, beside norms and biases (ndim < 2). `groups`: the
    first whose globs match a parameter is its group. The other keys are those of the class of torch.optim."""

    name: OptimizerName = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    momentum: Fraction = 0.0
    nesterov: bool = False
    dampening: NonNegative = 0.0
    amsgrad: bool = False
    alpha: Fraction = 0.99
    centered: bool = False
    rho: Annotated[float, Field(ge=0, le=1)] = 0.9
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    momentum_decay: NonNegative = 4e-3
    decoupled_weight_decay: bool = False
    etas: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=1)]] = (0.5, 1.2)
    step_sizes: tuple[Positive, Positive] = (1e-6, 50.0)
    maximize: bool = False
    decay_norms_and_biases: bool = False
    no_decay: tuple[str, ...] = ()
    groups: tuple[GroupSection, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        """Fill in what this optimizer's default is, where it is not the field's."""
        if not isinstance(given, Mapping):
            return given
        own = OWN_KEYS.get(str(given.get("name", "adamw")), {})
        return {**{key: value for key, value in own.items() if value is not None}, **given}

    @model_validator(mode="after")
    def _own_keys(self) -> OptimizerSection:
        """Refuse a key that the optimizer does not have. One with the field's default says nothing."""
        own = {*_COMMON, *self.own_keys}
        for key, field in type(self).model_fields.items():
            if key not in own and getattr(self, key) != field.default:
                raise ValueError(f"{self.name} has no {key}; it has {', '.join(['lr', *sorted(self.own_keys)])}")
        for number, group in enumerate(self.groups):
            for key in group.given.keys() - own:
                raise ValueError(f"groups.{number}: {self.name} has no {key}")
        if self.nesterov and (self.momentum == 0 or self.dampening):
            raise ValueError("nesterov needs momentum above 0 and no dampening")
        if self.step_sizes[0] > self.step_sizes[1]:
            raise ValueError("step_sizes must rise")
        return self

    @property
    def own_keys(self) -> frozenset[str]:
        """The keys that this optimizer has, of those that not all have."""
        return frozenset(OWN_KEYS[self.name]) - {"lr"}

    def group_of(self, names: Sequence[str]) -> int:
        """The number of the first group that matches one of a parameter's names; -1: none does."""
        for number, group in enumerate(self.groups):
            if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in group.match):
                return number
        return -1

    def with_momentum(self, momentum: float) -> OptimizerSection:
        """The same with another momentum, or beta1, for all parameters."""
        key, value = ("betas", (momentum, self.betas[1])) if "betas" in self.own_keys else ("momentum", momentum)
        groups = tuple(group.model_copy(update={key: None}) for group in self.groups)
        return self.model_copy(update={key: value, "groups": groups})

    @cached_property
    def of_groups(self) -> tuple[OptimizerSection, ...]:
        """The optimizer of each group, and last, as number -1, that of all other parameters."""
        plain = self.model_copy(update={"groups": ()})
        return (*(plain.model_copy(update=group.given) for group in self.groups), plain)


ScheduleName = Literal[
    "constant", "linear", "cosine", "cosine_restarts", "polynomial", "exponential", "step", "multistep",
    "inverse_sqrt", "onecycle", "wsd",
]  # fmt: skip


class ScheduleSection(Section):
    """How the learning rate changes: a linear warm-up from 0, then the named curve. pscluster.step.schedule has the
    formulas; null is the default that is said there."""

    name: ScheduleName = "constant"
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    power: Positive = 1.0
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    period_steps: Annotated[int, Field(gt=0, strict=True)] | None = None
    period_factor: Annotated[int, Field(ge=1, strict=True)] = 1
    milestones: tuple[Annotated[int, Field(gt=0, strict=True)], ...] | None = None
    decay_steps: Annotated[int, Field(gt=0, strict=True)] | None = None
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    momentum_range: tuple[Fraction, Fraction] = (0.85, 0.95)

    @model_validator(mode="after")
    def _own_keys(self) -> ScheduleSection:
        own = {"name", *_CURVE_KEYS[self.name]}
        for key, field in type(self).model_fields.items():
            if key not in own and getattr(self, key) != field.default:
                raise ValueError(f"{self.name} has no {key}; it has {', '.join(sorted(own - {'name'})) or 'no keys'}")
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        return self


_CURVE_KEYS: Mapping[str, tuple[str, ...]] = {
    "constant": ("warmup_steps", "final_ratio"),
    "linear": ("warmup_steps", "final_ratio"),
    "cosine": ("warmup_steps", "final_ratio"),
    "cosine_restarts": ("warmup_steps", "final_ratio", "period_steps", "period_factor"),
    "polynomial": ("warmup_steps", "final_ratio", "power"),
    "exponential": ("warmup_steps", "gamma"),
    "step": ("warmup_steps", "gamma", "period_steps"),
    "multistep": ("warmup_steps", "gamma", "milestones"),
    "inverse_sqrt": ("warmup_steps",),
    "onecycle": ("rise", "div_factor", "final_div_factor", "momentum_range"),
    "wsd": ("warmup_steps", "final_ratio", "decay_steps"),
}
assert set(_CURVE_KEYS) == set(get_args(ScheduleName))
