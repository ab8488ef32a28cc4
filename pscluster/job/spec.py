"""The job spec: what a user may request, validated once, before anything starts.

`load_spec(path, overrides)` reads YAML or TOML, applies `--set key=value` pairs and validates. Every problem
is a `SpecError` that names the key and, for an unknown one, the nearest known key. A `JobSpec` is
immutable; `canonical_json` is what is stored, hashed and sent.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pscluster.devices import AUTO, is_valid_device
from pscluster.errors import SpecError
from pscluster.spelling import nearest
from pscluster.storage import check_location

# Strict: `true` is not a number of steps. Floats stay lax, since YAML reads 1e-3 as text.
PositiveInt = Annotated[int, Field(gt=0, strict=True)]


_MOST_NESTED = 64  # of a task's arguments: far below the recursion limits of json and pydantic
_LONGEST_SHOWN = 80


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class TaskSection(_Section):
    """Where the user's code is. `entrypoint` is "module:Class"; `args` go to the class by keyword."""

    entrypoint: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("args")
    @classmethod
    def _plain(cls, args: dict[str, Any]) -> dict[str, Any]:
        """Arguments are sent as JSON: what JSON would change (dates, sets, NaN) is refused."""
        for key, value in args.items():
            if _is_deeper_than(_MOST_NESTED, value):
                raise ValueError(f"{key} is nested more than {_MOST_NESTED} levels deep")
            try:
                same = json.loads(json.dumps(value, allow_nan=False)) == value
            except (TypeError, ValueError):
                same = False
            if not same:
                raise ValueError(
                    f"{key} is {value!r}: only text, finite numbers, booleans, lists and mappings are allowed"
                )
        return args


class DataSection(_Section):
    """`uri` is passed to the task as it is. `mode: global`: all shards share one permutation of the data.

    `drop_last`: the samples at the end of an epoch that do not fill a microbatch are left out of it."""

    uri: str = ""
    mode: Literal["global"] = "global"
    drop_last: bool = False


class OptimizerSection(_Section):
    """`no_decay`: globs of parameter names without weight decay, beside norms and biases (ndim < 2)."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    decay_norms_and_biases: bool = False
    no_decay: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSection:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name: sgd and momentum above 0")
        if self.momentum and self.name != "sgd":
            raise ValueError("momentum belongs to name: sgd; adam and adamw have betas")
        return self


class ScheduleSection(_Section):
    """Learning rate: linear warm-up from 0, then constant, or a half cosine down to `final_ratio` of lr."""

    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class TrainSection(_Section):
    """`max_steps` or `epochs` defines when training ends; with both, whichever comes first.

    `autocast`: forward and backward run under torch.autocast in that type; parameters stay float32. `compile`: the
    model goes through torch.compile. `freeze`: globs of parameter names that do not train; `unfreeze_at`: globs of
    those that train from a step on, with the number of steps that are made without them."""

    mode: Literal["sync"] = "sync"
    numerics: Literal["auto", "strict", "mixed"] = "auto"
    global_batch: PositiveInt
    microbatch: PositiveInt
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    autocast: Literal["bf16"] | None = None
    compile: bool = False
    freeze: tuple[str, ...] = ()
    unfreeze_at: dict[str, Annotated[int, Field(ge=0, strict=True)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _divisible(self) -> TrainSection:
        if self.global_batch % self.microbatch:
            near = max(1, round(self.global_batch / self.microbatch)) * self.microbatch
            raise ValueError(
                f"global_batch {self.global_batch} is not divisible by microbatch {self.microbatch} "
                f"(the nearest that is: {near})"
            )
        if self.epochs is None and self.max_steps is None:
            raise ValueError("one of epochs and max_steps is needed")
        return self

    @property
    def num_shards(self) -> int:
        """D: how many microbatches make one step."""
        return self.global_batch // self.microbatch


class WorkersSection(_Section):
    """`device`: where trainers compute; `pscluster.devices` defines the values."""

    min: PositiveInt = 1
    max: PositiveInt | None = None
    device: str = AUTO
    threads: PositiveInt = 1

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if not is_valid_device(device):
            raise ValueError(f"{device!r:.40} is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
        return device

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSection:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"workers.max {self.max} is below workers.min {self.min}")
        return self


class ServersSection(_Section):
    partitions: PositiveInt = 1


class DurabilitySection(_Section):
    """`store: null` is the cluster's state directory; else an absolute directory, file:///... or s3://...
    `tier: replica` gives every partition a standby."""

    tier: Literal["snapshot", "replica"] = "snapshot"
    every_steps: PositiveInt = 50
    store: Annotated[str, AfterValidator(check_location)] | None = None


class EvaluateSection(_Section):
    """`every_steps: null`: at the end only. `metric` and `goal` define the best evaluated step."""

    every_steps: PositiveInt | None = None
    metric: str = "loss"
    goal: Literal["min", "max"] = "min"


class AuditSection(_Section):
    """`share`: of the steps in which one shard is computed twice. `on_mismatch`: what to do when the two differ; null
    is `stop`, or `warn` for a job of mixed numerics."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    on_mismatch: Literal["stop", "exclude", "warn"] | None = None


class NetworkSection(_Section):
    """`transport`: between trainer and partition. `auto` takes the best available to a pair: shm, else tcp.

    `congestion_control`: of TCP, by the kernel's name; null is the host's default."""

    transport: Literal["auto", "shm", "unix", "tcp"] = "auto"
    congestion_control: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,14}$")] | None = None
    push_codec: Literal["fp32", "bf16"] = "fp32"
    pull_codec: Literal["fp32", "bf16"] = "fp32"


class JobSpec(_Section):
    apiVersion: Literal["ps/v1"] = "ps/v1"  # noqa: N815 - as in other specs
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)] = 0
    task: TaskSection
    data: DataSection = DataSection()
    train: TrainSection
    workers: WorkersSection = WorkersSection()
    servers: ServersSection = ServersSection()
    durability: DurabilitySection = DurabilitySection()
    evaluate: EvaluateSection = EvaluateSection()
    audit: AuditSection = AuditSection()
    network: NetworkSection = NetworkSection()
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _shards_for_workers(self) -> JobSpec:
        if self.workers.min > self.train.num_shards:
            raise ValueError(
                f"workers.min {self.workers.min} exceeds the {self.train.num_shards} shards of a step "
                "(global_batch / microbatch): the surplus would have no work"
            )
        return self

    def canonical_json(self) -> str:
        """The spec as one line of JSON with sorted keys: equal specs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def parse_spec(data: object) -> JobSpec:
    """Validate plain data, as read from YAML, TOML or JSON. Raises SpecError naming every offending key."""
    if not isinstance(data, Mapping):
        raise SpecError(f"a job spec is a mapping, not {type(data).__name__}")
    try:
        return JobSpec.model_validate(dict(data))
    except ValidationError as error:
        raise SpecError(explain(error, JobSpec), details={"problems": str(error.error_count())}) from None


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a .yaml, .yml, .json or .toml spec, apply `key.path=value` overrides and validate."""
    data = read_spec_file(path)
    for pair in overrides:
        apply_override(data, pair)
    return parse_spec(data)


def read_spec_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no spec file at {path}", action="give the path of a job spec") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else _Loader.read(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of tomllib, also for numbers of many digits
        raise SpecError(f"{path} does not parse: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds no mapping at its top")
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of taking the last."""

    @classmethod
    def read(cls, text: str) -> Any:
        """The one document in `text`. Raises yaml.YAMLError."""
        try:
            loader = cls(text)
            try:
                return loader.get_single_data()
            finally:
                loader.dispose()
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # What its constructors raise for a value that is not of the type that its tag or its look says.
            raise yaml.YAMLError(f"a value cannot be read: {error}") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(data: dict[str, Any], pair: str) -> None:
    """Set `a.b.c=value` in nested mappings, in place. The value is read as YAML: null is None."""
    key, separator, value = pair.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {pair!r} is not of the form key=value")
    try:
        parsed = _Loader.read(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {key}: the value does not parse: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise SpecError(f"--set {key}: {parent} is not a section")
    data[last] = parsed


def _is_deeper_than(levels: int, value: object) -> bool:
    layer: list[Any] = [value]
    for _ in range(levels):
        held = {
            id(item): item for item in layer if isinstance(item, list | tuple | dict)
        }  # YAML can refer to one repeatedly
        layer = [inner for item in held.values() for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, list | tuple | dict) for item in layer)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of `error`, raised by validating `root`, each with its key and similar known keys."""
    return "; ".join(_explain_one(problem, root) for problem in error.errors())


def _explain_one(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = _near(problem["loc"], root)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown key {where}{hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    given = repr(problem["input"])
    return f"{where}: {message}, not {given if len(given) <= _LONGEST_SHOWN else given[:_LONGEST_SHOWN] + '...'}"


def _near(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """The most similar key of the same section, then the keys of the same name in other sections, since users often
    put a key in the wrong section."""
    *section, key = map(str, location)
    model: Any = root
    for part in section:
        model = model.model_fields[part].annotation
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == key]
    near = nearest(key, model.model_fields)
    return [*([near] if near else []), *elsewhere]


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model and of the sections in it, as "train.optimizer.lr"."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")
