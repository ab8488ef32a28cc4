"""Job specs: every refusal names the key; equal specs are equal text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pscluster import errors
from pscluster.errors import PsError, SpecError, from_dict
from pscluster.job.spec import JobSpec, apply_override, load_spec, parse_spec

GOOD: dict[str, Any] = {
    "name": "lm",
    "task": {"entrypoint": "task:Lm", "args": {"layers": 2}},
    "train": {"global_batch": 64, "microbatch": 16, "max_steps": 10},
}


def nested(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


def with_changes(**paths: Any) -> dict[str, Any]:
    """GOOD with `a__b=value` set at a.b."""
    data: dict[str, Any] = json.loads(json.dumps(GOOD))
    for path, value in paths.items():
        *parents, last = path.split("__")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return data


def refusal(data: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(data)
    return caught.value.cause


def test_a_short_spec_gets_the_defaults() -> None:
    spec = parse_spec(GOOD)
    assert (spec.train.num_shards, spec.workers.min, spec.servers.partitions) == (4, 1, 1)
    assert (spec.durability.every_steps, spec.evaluate.metric, spec.on_nonfinite) == (50, "loss", "stop")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_every_word_for_a_device_is_valid(device: str) -> None:
    assert parse_spec(with_changes(workers__device=device)).workers.device == device


def test_the_spec_of_the_manual_is_valid() -> None:
    text = """
    apiVersion: ps/v1
    name: imdb-12l
    task: {entrypoint: "psworker.tasks.imdb:ImdbClassification", args: {layers: 12, d_model: 64}}
    data: {uri: "imdb", mode: global}
    train: {mode: sync, numerics: auto, global_batch: 64, microbatch: 16, epochs: 3, max_steps: null, seed: 1,
            optimizer: {name: adamw, lr: 1.0e-3, weight_decay: 0.01}, schedule: {name: cosine, warmup_steps: 200},
            clip_norm: 1.0}
    workers: {min: 1, max: 8, device: auto, threads: 1}
    servers: {partitions: 2}
    durability: {tier: snapshot, every_steps: 50, store: null}
    evaluate: {every_steps: 200, metric: loss, goal: min}
    network: {transport: auto, push_codec: fp32, pull_codec: fp32}
    on_nonfinite: stop
    """
    import yaml

    assert parse_spec(yaml.safe_load(text)).train.epochs == 3


@pytest.mark.parametrize("transport", ["auto", "shm", "unix", "tcp"])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_transports_and_codecs_go_together_as_one_likes(transport: str, codec: str) -> None:
    network = parse_spec(
        with_changes(network={"transport": transport, "push_codec": codec, "pull_codec": codec})
    ).network
    assert (network.transport, network.push_codec, network.pull_codec) == (transport, codec, codec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__max_stesp": 3}, "train.max_stesp; did you mean max_steps?"),
        ({"workes": {}}, "workes; did you mean workers?"),
        ({"train__lr": 3}, "unknown key train.lr; did you mean train.optimizer.lr?"),
        ({"lr": 3}, "unknown key lr; did you mean train.optimizer.lr?"),
        ({"train__max": 3}, "unknown key train.max; did you mean max_steps or workers.max?"),
        ({"train__optimizer": {"learning_rate": 1}}, "unknown key train.optimizer.learning_rate"),
        ({"train__optimizer": {"name": "adamm"}}, "train.optimizer.name"),
        ({"train__global_batch": 65}, "the nearest that is: 64"),
        ({"train__microbatch": 0}, "train.microbatch"),
        ({"train__max_steps": "many"}, "train.max_steps: "),
        ({"train__max_steps": True}, "train.max_steps"),
        ({"train__max_steps": 2.5}, "train.max_steps"),
        ({"train__max_steps": None}, "epochs and max_steps"),
        ({"train__clip_norm": -1}, "train.clip_norm"),
        ({"train__clip_norm": math.inf}, "train.clip_norm"),
        ({"train__optimizer": {"lr": math.nan}}, "train.optimizer.lr"),
        ({"train__optimizer": {"betas": [0.9]}}, "train.optimizer.betas"),
        ({"train__optimizer": {"nesterov": True}}, "adamw has no nesterov"),
        ({"train__optimizer": {"name": "sgd", "nesterov": True}}, "nesterov needs"),
        ({"train__optimizer": {"name": "sgd", "betas": [0.8, 0.9]}}, "sgd has no betas"),
        ({"train__optimizer": {"groups": [{"match": ["*"], "momentum": 0.5}]}}, "adamw has no momentum"),
        ({"train__optimizer": {"groups": [{"match": []}]}}, "train.optimizer.groups.0.match"),
        ({"train__schedule": {"name": "linear", "gamma": 0.5}}, "linear has no gamma"),
        ({"train__schedule": {"name": "multistep", "milestones": [5, 3]}}, "milestones must rise"),
        ({"train__clip_norm": 1.0, "train__clip_value": 1.0}, "exclude each other"),
        ({"train__optimizer": {"momentum": 0.9}}, "adamw has no momentum"),
        ({"train__mode": "async"}, "train.mode"),
        ({"train__seed": -1}, "train.seed"),
        ({"workers__min": 5}, "exceeds the 4 shards"),
        ({"workers": {"min": 3, "max": 2}}, "workers.max 2 "),
        ({"workers__device": "tpu"}, "workers.device: 'tpu' "),
        ({"workers__device": "cuda:01"}, "workers.device: 'cuda:01' "),
        ({"workers__device": 3}, "workers.device: "),
        ({"train__autocast": "fp16"}, "train.autocast: "),
        ({"train__compile": "perhaps"}, "train.compile"),
        ({"train__freeze": "encoder.*"}, "train.freeze: Input should be a valid tuple"),
        ({"train__unfreeze_at": {"encoder.*": -1}}, "train.unfreeze_at.encoder.*"),
        ({"train__unfreeze_at": {"encoder.*": True}}, "train.unfreeze_at.encoder.*"),
        ({"train__unfreeze_at": ["encoder.*"]}, "train.unfreeze_at"),
        ({"name": "Not Lawful"}, "name"),
        ({"name": 7}, "name"),
        ({"task__entrypoint": "task.py"}, "task.entrypoint"),
        ({"task__args": {"when": math.nan}}, "when is nan"),
        ({"task__args": {"tree": nested(65)}}, "tree is nested more than 64 "),
        ({"task__args": {"tree": nested(5000)}}, "tree is nested more than 64 "),
        ({"task__args": {1: 2}}, "task.args"),
        ({"apiVersion": "ps/v2"}, "apiVersion"),
        ({"train": None}, "train"),
        ({"data": "imdb"}, "data"),
        ({"servers__partitions": 0}, "servers.partitions"),
        ({"network__transport": "rdma"}, "network.transport: "),
        ({"network__push_codec": "fp16"}, "network.push_codec: "),
        ({"network__pull_codec": None}, "network.pull_codec"),
        ({"network__codec": "bf16"}, "unknown key network.codec"),
    ],
)
def test_a_refusal_names_the_key(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(with_changes(**changes))


def test_what_is_missing_is_named() -> None:
    assert refusal({"name": "x"}) == "task is missing; train is missing"
    assert "a mapping, not list" in refusal([])


def test_a_long_value_is_not_shown_whole() -> None:
    assert len(refusal(with_changes(train__max_steps="x" * 1000))) < 250


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_spec(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


# --- files and overrides ---


def test_yaml_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: lm\ntask: {entrypoint: 'task:Lm', args: {layers: 2}}\n"
        "train: {global_batch: 64, microbatch: 16, max_steps: 10, optimizer: {lr: 1e-2}}\n"
    )
    (tmp_path / "a.toml").write_text(
        'name = "lm"\n[task]\nentrypoint = "task:Lm"\nargs = {layers = 2}\n'
        "[train]\nglobal_batch = 64\nmicrobatch = 16\nmax_steps = 10\noptimizer = {lr = 0.01}\n"
    )
    (tmp_path / "a.json").write_text(json.dumps(with_changes(train__optimizer={"lr": 0.01})))
    texts = {load_spec(tmp_path / f"a.{suffix}").canonical_json() for suffix in ("yaml", "toml", "json")}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "name: [", "does not parse"),
        ("a.toml", "name =", "does not parse"),
        ("a.yaml", "", "no mapping at its top"),
        ("a.yaml", "- 1", "no mapping at its top"),
        ("a.yaml", "name: a\nname: b\n", "name is given twice"),
        ("a.yaml", "train:\n  seed: 1\n  seed: 2\n", "seed is given twice"),
        ("a.yaml", "x: !!python/object/apply:os.system [true]", "does not parse"),
    ],
)
def test_a_file_that_does_not_parse_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        load_spec(tmp_path / name)
    assert str(tmp_path / name) in caught.value.cause


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no spec file at"):
        load_spec(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="cannot read"):
        load_spec(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot read"):
        load_spec(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("pair", "path", "value"),
    [
        ("train.max_steps=20", ("train", "max_steps"), 20),
        ("train.clip_norm=null", ("train", "clip_norm"), None),
        ("name=x=y", ("name",), "x=y"),
        ("task.args.wide=true", ("task", "args", "wide"), True),
        ("train.optimizer={name: sgd, lr: 0.1}", ("train", "optimizer"), {"name": "sgd", "lr": 0.1}),
        ("data.uri=", ("data", "uri"), None),
    ],
)
def test_overrides_are_yaml(pair: str, path: tuple[str, ...], value: object) -> None:
    data = with_changes()
    apply_override(data, pair)
    found: Any = data
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize("pair", ["", "x", "=1", "name.x=1", "train=[", "a..b=1"])
def test_a_bad_override_is_refused(pair: str) -> None:
    def override_and_parse() -> None:
        data = with_changes()
        apply_override(data, pair)
        parse_spec(data)

    with pytest.raises(SpecError):
        override_and_parse()


# --- canonical text ---

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(args=st.dictionaries(st.text(), plain, max_size=4), seed=st.integers(0, 2**63 - 1), lr=st.floats(1e-12, 1e6))
def test_canonical_json_survives_the_journey(args: dict[str, Any], seed: int, lr: float) -> None:
    spec = parse_spec(with_changes(task__args=args, train__seed=seed, train__optimizer={"lr": lr}))
    text = spec.canonical_json()
    again = parse_spec(json.loads(text))
    assert again == spec
    assert again.canonical_json() == text
    assert "\n" not in text


def test_every_key_has_a_place_in_the_canonical_text() -> None:
    assert set(json.loads(parse_spec(GOOD).canonical_json())) == set(JobSpec.model_fields)


# --- errors on their journey ---


def all_kinds() -> list[type[PsError]]:
    kinds: list[type[PsError]] = [PsError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return [kind for kind in kinds if kind.__module__ == errors.__name__]


def test_every_code_is_unique() -> None:
    codes = [kind.code for kind in all_kinds()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", all_kinds())
def test_an_error_survives_the_journey(kind: type[PsError]) -> None:
    error = kind("cause", action="action", details={"step": "7"})
    again = from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(again) is kind
    assert again.to_dict() == error.to_dict()
    assert kind.code in (errors.__doc__ or "") or kind.code.endswith("000")


def test_the_code_of_a_newer_peer_is_kept() -> None:
    error = from_dict({"code": "PS-7777", "cause": "new"})
    assert (type(error), error.code, str(error)) == (PsError, "PS-7777", "PS-7777: new")
    assert PsError.code == "PS-9000"


def test_arguments_may_be_nested() -> None:
    spec = parse_spec(with_changes(task__args={"tree": nested(64)}))
    assert parse_spec(json.loads(spec.canonical_json())) == spec


def test_an_argument_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    train = "train: {global_batch: 2, microbatch: 2, epochs: 1}"
    path.write_text("name: lm\ntask: {entrypoint: 'task:Lm', args: {a: &a [*a, *a]}}\n" + train)
    with pytest.raises(SpecError, match="a is nested more than 64 "):
        load_spec(path, ())
