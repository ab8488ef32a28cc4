"""Export, evaluation and generation from a snapshot, through the process that psctl starts."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from harness.held_pieces import write_part
from pscluster.errors import DamagedError, InternalError, SpecError, StateError, StorageError, TaskError
from pscluster.job.bundle import pack
from pscluster.job.spec import JobSpec
from pscluster.step.layout import parameters_sha256
from pscluster.storage.snapshot import PartMeta
from psworker.replica import Replica, named_bytes
from psworker.tools import answer_request, write_weights
from psworker.trainer.data.batches import EvalBatches
from psworker.trainer.data.loading import build_model, load_task
from psworker.trainer.evaluation import evaluate

STEP = 7
WEIGHTS = {"x": torch.ones(2)}
NORM = "psworker.tasks.synthetic:SyntheticNorm"
LM = "psworker.tasks.synthetic:SyntheticLm"

OWN_TASK = """
import helper
from pscluster.task import Task
from torch import nn
print("loading mine")

class Mine(Task):
    def build_model(self): return nn.Linear(2, 1)
    def train_data(self): return helper.DATA
    def generate(self, model, prompt, max_new_tokens, temperature, seed):
        print("generating")
        return f"{prompt}|{max_new_tokens}|{temperature}|{seed}|{open('words.txt').read()}"
"""


def trained(spec: JobSpec, bundle_dir: Path | None = None) -> tuple[Any, nn.Module]:
    """A task and a model that training has moved somewhere, buffers included."""
    task = load_task(spec, bundle_dir)
    model = build_model(task)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 1 if not tensor.is_floating_point() else torch.rand_like(tensor) / 4
    return task, model


def snapshot(model: nn.Module, spec: JobSpec, store: Path, partitions: int = 2) -> list[str]:
    """The parts of one snapshot of `model`, as partitions write them."""
    replica = Replica(model, spec.train.optimizer)
    layout = replica.layout
    flats = [flat.numpy().tobytes() for flat in replica.flats]
    paths = []
    for partition in range(partitions):
        meta = PartMeta(
            job="job-1", step=STEP, generation=1, partition=partition, num_partitions=partitions,
            update_counts=(STEP,) * len(layout.tensors),
        )  # fmt: skip
        pieces = {
            (span.bucket, "values"): flats[span.bucket][4 * span.start : 4 * span.stop]
            for span in layout.spans(partition, partitions)
            if span.num_words
        }
        paths.append(str(store / write_part(store / f"part-{partition}", meta, layout, pieces).name))
    return paths


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Ask in this process: everything of a request but the command has a default."""

    def asking(spec: JobSpec, parts: list[str], **request: Any) -> dict[str, Any]:
        base = {"spec": spec.model_dump(mode="json"), "bundle": None, "parts": parts, "job": "job-1"}
        with TemporaryDirectory(dir=tmp_path) as aside:
            return answer_request({"output": str(tmp_path / "out"), "aside": aside, **base, **request})

    return asking


@pytest.mark.parametrize("entrypoint", [LM, NORM])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_an_export_loads_strictly_and_has_the_models_digest(
    make_spec: Any, ask: Any, tmp_path: Path, entrypoint: str, form: str
) -> None:
    spec = make_spec(entrypoint)
    task, model = trained(spec)

    answer = ask(spec, snapshot(model, spec, tmp_path), command="export", format=form)

    path = Path(answer["path"])
    loaded = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
    fresh = task.build_model()
    fresh.load_state_dict(loaded, strict=True)
    expected = model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    digest = parameters_sha256(named_bytes(dict(loaded)))
    assert (answer["step"], answer["parameters_sha256"]) == (STEP, digest)
    assert answer["size_bytes"] == path.stat().st_size < 200_000
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "part-0", "part-1"}


def test_safetensors_name_their_origin(make_spec: Any, ask: Any, tmp_path: Path) -> None:
    spec = make_spec()
    answer = ask(spec, snapshot(trained(spec)[1], spec, tmp_path), command="export", format="safetensors")

    with safe_open(answer["path"], "pt") as file:
        facts = file.metadata()

    expected = {"format": "pt", "job": "job-1", "step": "7", "parameters_sha256": answer["parameters_sha256"]}
    assert facts == expected


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Write weights to a path; afterwards only what the test wrote is beside them."""
    with TemporaryDirectory(dir=tmp_path) as aside:
        yield partial(write_weights, facts={}, aside=Path(aside))


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_an_export_that_fails_leaves_what_is_there(write: Any, tmp_path: Path, form: str) -> None:
    with pytest.raises(StorageError, match="there is no such directory"):
        write(WEIGHTS, form, tmp_path / "none" / "x")

    (tmp_path / "taken").mkdir()
    for force in (False, True):
        with pytest.raises(StateError, match="taken"):
            write(WEIGHTS, form, tmp_path / "taken", force=force)
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_an_export_overwrites_only_by_force(write: Any, tmp_path: Path, form: str) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(StateError, match="exists already"):
        write(WEIGHTS, form, path)
    assert path.read_text() == "old"
    assert path.stat().st_size != write(WEIGHTS, form, path, force=True) == path.stat().st_size


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_an_export_has_the_mode_of_a_new_file(write: Any, tmp_path: Path, form: str) -> None:
    (tmp_path / "new").touch()
    write(WEIGHTS, form, tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_file_that_appears_during_an_export_is_kept(
    write: Any, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exports to one path: the first to be complete stays."""
    path = tmp_path / "x"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_text("theirs"))
    with pytest.raises(StateError, match="exists already"):
        write(WEIGHTS, form, path)
    assert path.read_text() == "theirs"


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_full_disk_is_a_storage_error(write: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write(WEIGHTS, form, tmp_path / "x", force=True)
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_disk_that_fills_up_during_an_export_leaves_nothing(write: Any, form: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            write({"x": torch.ones(1 << 20)}, form, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "x").exists()


def test_another_format_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no export format 'onnx'"):
        write({}, "onnx", tmp_path / "x")


def test_evaluation_gives_the_numbers_of_the_job(make_spec: Any, ask: Any, tmp_path: Path) -> None:
    spec = make_spec(NORM)
    task, model = trained(spec)
    batches = EvalBatches(task.eval_data(), task.collate, spec.train.num_shards, spec.train.microbatch, spec.train.seed)

    answer = ask(spec, snapshot(model, spec, tmp_path, 3), command="eval")

    assert answer["metrics"] == evaluate(task, model, batches, "cpu")
    assert answer["num_samples"] == 48


def test_a_task_without_held_out_data_or_generation_says_so(make_spec: Any, ask: Any, tmp_path: Path) -> None:
    spec = make_spec(NORM, {"held_out": 0})
    parts = snapshot(trained(spec)[1], spec, tmp_path)

    with pytest.raises(StateError, match="no held-out data"):
        ask(spec, parts, command="eval")
    with pytest.raises(TaskError, match="SyntheticNorm does not generate"):
        ask(spec, parts, command="generate")


def test_evaluation_takes_other_data(make_spec: Any, ask: Any, tmp_path: Path) -> None:
    spec = make_spec("psworker.tasks.text_lm:TextLm", {"layers": 1, "d_model": 8, "heads": 2, "context": 8})
    text = tmp_path / "other.txt"
    text.write_text("other " * 100)

    answer = ask(spec, snapshot(trained(spec)[1], spec, tmp_path), command="eval", data_uri=str(text))

    assert answer["num_samples"] == 7


def test_a_torn_snapshot_and_an_unknown_command_are_named(make_spec: Any, ask: Any, tmp_path: Path) -> None:
    spec = make_spec()
    parts = snapshot(trained(spec)[1], spec, tmp_path)
    with pytest.raises(InternalError, match="no command 'frobnicate'"):
        ask(spec, parts, command="frobnicate")

    Path(parts[1]).write_bytes(Path(parts[1]).read_bytes()[:-1])
    with pytest.raises(StorageError, match="part-1"):
        ask(spec, parts, command="generate")


def run_tool(request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "psworker.tools"], input=json.dumps(request), env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def generation(make_spec: Any, tmp_path: Path, own_task: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The tool's run for a user's own task that generates."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine.py").write_text(own_task)
    (source / "helper.py").write_text("DATA = [1]\n")
    (source / "words.txt").write_text("from the bundle")
    archive = tmp_path / "bundle.tar.gz"
    archive.write_bytes(pack(source).data)
    spec = make_spec("mine:Mine")
    parts = snapshot(nn.Linear(2, 1), spec, tmp_path)
    request = {
        "command": "generate", "spec": spec.canonical_json(), "bundle": str(archive), "parts": parts,
        "prompt": "hello", "max_new_tokens": 3, "temperature": 0.5, "seed": 4,
    }  # fmt: skip
    return run_tool({**request, **more})


def test_a_users_own_task_generates_from_its_bundle_in_its_directory(make_spec: Any, tmp_path: Path) -> None:
    done = generation(make_spec, tmp_path, OWN_TASK)

    answer = json.loads(done.stdout)
    assert answer["ok"], answer
    assert answer["text"] == "hello|3|0.5|4|from the bundle"
    assert done.returncode == 0
    assert "loading mine" in done.stderr
    assert "generating" in done.stderr


def test_a_tool_has_the_tasks_directories_and_names_where_it_failed(make_spec: Any, tmp_path: Path) -> None:
    text = """        (self.scratch_dir / "aside").touch(exist_ok=False)
        (self.cache_dir / "download").touch()
        raise SystemExit(len(list(self.scratch_dir.iterdir())))
"""
    (tmp_path / "cache").mkdir()
    done = generation(make_spec, tmp_path, f"{OWN_TASK}{text}".replace("return f", "f"), cache_dir=f"{tmp_path}/cache")

    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["cause"]) == ("PS-2001", "generate raised SystemExit: 1")
    lines = f"{OWN_TASK}{text}".splitlines()
    line = next(number for number, line in enumerate(lines, 1) if "SystemExit" in line)
    details = error["details"]
    assert (details["file"], details["line"], details["function"]) == ("mine.py", str(line), "generate")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["download"]


def test_errors_come_as_answers_with_their_exit_status(make_spec: Any) -> None:
    missing = {"spec": make_spec().model_dump(mode="json"), "bundle": None, "parts": ["/none"]}

    named, ours = run_tool({"command": "eval", **missing}), run_tool({"command": "eval"})

    error = json.loads(named.stdout)["error"]
    assert (error["code"], named.returncode) == ("PS-4005", DamagedError.exit_code)
    assert "/none" in error["cause"]
    error = json.loads(ours.stdout)["error"]
    assert (error["code"], error["cause"]) == ("PS-9001", "KeyError: 'spec'")


@pytest.mark.parametrize("odd", ["sparse", "complex128"])
def test_what_safetensors_does_not_have_is_exported_as_pth(tmp_path: Path, odd: str) -> None:
    value = torch.eye(3).to_sparse() if odd == "sparse" else torch.randn(3, dtype=torch.complex128)
    tensors = {"weight": torch.ones(2), "odd": value}
    aside = tmp_path / "aside"
    aside.mkdir()
    with pytest.raises(SpecError, match=f"safetensors has no {odd}.* tensors: odd") as caught:
        write_weights(tensors, "safetensors", tmp_path / "out.safetensors", {}, aside=aside)
    assert "pth" in caught.value.action and list(tmp_path.rglob("*")) == [aside]

    write_weights(tensors, "pth", tmp_path / "out.pth", {}, aside=aside)
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert loaded["odd"].layout == value.layout and torch.equal(loaded["odd"].to_dense(), value.to_dense())
