"""`python -m psworker.tools`: what needs torch or the user's code, for psctl: export, eval, generate.

One JSON request on stdin, one JSON answer on stdout; whatever user code prints goes to stderr.

    {"command": "export" | "eval" | "generate",
     "spec": {...} or its JSON text, "bundle": path of an archive or null,
     "parts": [absolute paths or URLs of all parts of one snapshot], "job": id,
     "cache_dir": the task's, or absent for an empty one,                            eval, generate
     "format": "safetensors" | "pth", "output": path,                               export
     "aside": a directory on its file system, to write it in first, "force": overwrite,
     "data_uri": another data.uri, or absent,                                        eval
     "prompt": text, "max_new_tokens": 200, "temperature": 0.8, "seed": 0}           generate

    {"ok": true, "step": ..., "parameters_sha256": ...,
     "path", "format", "tensors", "size_bytes" | "metrics", "num_samples" | "text"}
    {"ok": false, "error": {"code", "cause", "action", "details"}}                   exit status: the error's"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pscluster.agent.cache import hold
from pscluster.errors import InternalError, PsError, SpecError, StateError, StorageError, TaskError
from pscluster.job.bundle import extract
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.layout import Layout, parameters_sha256
from pscluster.storage.exports import SUFFIXES, check_free
from pscluster.storage.snapshot import read_part, read_parts
from pscluster.task import Task
from pscluster.user_frames import frame_details, relative_to
from psworker.numerics import precision, settle_numerics
from psworker.replica import load_words, named_bytes, state_tensors
from psworker.trainer.data.batches import EvalBatches
from psworker.trainer.data.loading import build_model, load_data, load_task, user_code
from psworker.trainer.evaluation import evaluate

_DEVICE = "cpu"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model's committed values as read from its parts."""

    job: str
    step: int
    layout: Layout
    words: list[bytearray]
    sha256: str


def main() -> int:
    """Answer the request on stdin. The exit status is 0, or that of the error in the answer."""
    answers = _claim_stdout()
    try:
        answer: dict[str, Any] = {"ok": True, **answer_request(json.load(sys.stdin))}
        status = 0
    except PsError as error:
        answer, status = {"ok": False, "error": error.to_dict()}, error.exit_code
    except Exception as error:
        ours = InternalError(f"{type(error).__name__}: {error}", details={"traceback": traceback.format_exc()})
        answer, status = {"ok": False, "error": ours.to_dict()}, ours.exit_code
    json.dump(answer, answers)
    answers.write("\n")
    answers.close()
    return status


def answer_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a request asks for. Raises PsError kinds; KeyError for a request without a needed field."""
    command = {"export": _export, "eval": _eval, "generate": _generate}.get(request["command"])
    if command is None:
        raise InternalError(f"psworker.tools has no command {request['command']!r}")
    raw = request["spec"]
    spec = parse_spec(json.loads(raw) if isinstance(raw, str) else raw)
    settle_numerics(spec.workers.threads, _DEVICE)
    snapshot = read_snapshot([str(part) for part in request["parts"]], str(request.get("job", "")))
    answer = command(spec, snapshot, request)
    return {"step": snapshot.step, "parameters_sha256": snapshot.sha256, **answer}


def read_snapshot(parts: Sequence[str | Path], job: str) -> Snapshot:
    """Read and verify all parts. Raises StorageError for a missing or torn one."""
    layout, words = read_parts(parts)
    meta = read_part(parts[0]).meta
    digest = parameters_sha256(named_bytes(state_tensors(layout, words)))
    return Snapshot(job=job or meta.job, step=meta.step, layout=layout, words=words, sha256=digest)


def _export(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> dict[str, Any]:
    del spec
    tensors = state_tensors(snapshot.layout, snapshot.words)
    facts = {"job": snapshot.job, "step": str(snapshot.step), "parameters_sha256": snapshot.sha256}
    path = Path(request["output"]).absolute()
    aside, force = Path(request["aside"]), bool(request.get("force"))
    size = write_weights(tensors, request["format"], path, facts, aside=aside, force=force)
    return {"path": str(path), "format": request["format"], "tensors": len(tensors), "size_bytes": size}


def _eval(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("data_uri") is not None:
        data = spec.data.model_copy(update={"uri": str(request["data_uri"])})
        spec = spec.model_copy(update={"data": data})
    with _restored(spec, snapshot, request) as (task, model):
        _, held_out = load_data(task)
        if held_out is None:
            raise StateError("the task has no held-out data", action="return a data set from eval_data() to evaluate")
        train = spec.train
        batches = EvalBatches(held_out, task.collate, train.num_shards, train.microbatch, train.seed)
        with precision(spec, _DEVICE):
            metrics = evaluate(task, model, batches, _DEVICE)
        return {"metrics": metrics, "num_samples": len(held_out)}


def _generate(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> dict[str, Any]:
    with _restored(spec, snapshot, request) as (task, model):
        if type(task).generate is Task.generate:
            raise TaskError(f"{type(task).__name__} does not generate", action="define generate() in the task")
        model.eval()
        with user_code("generate"), torch.no_grad(), precision(spec, _DEVICE):
            text = task.generate(
                model,
                str(request.get("prompt", "")),
                int(request.get("max_new_tokens", 200)),
                float(request.get("temperature", 0.8)),
                int(request.get("seed", 0)),
            )
    return {"text": str(text)}


@contextmanager
def _restored(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> Iterator[tuple[Task, nn.Module]]:
    """The task and its model with the snapshot's values. Like a trainer it has the files of the bundle in a working
    directory of its own, a scratch directory, and a cache; errors name the user's files relative to the first."""
    with tempfile.TemporaryDirectory(prefix="ps-tools-") as temporary:
        code, scratch = Path(temporary) / "code", Path(temporary) / "scratch"
        cache = Path(request.get("cache_dir") or Path(temporary) / "cache")
        for directory in (scratch, cache, *(() if request.get("bundle") else (code,))):
            directory.mkdir(exist_ok=True)
        if request.get("bundle"):
            extract(Path(request["bundle"]), code)
        Task.scratch_dir, Task.cache_dir = scratch, cache
        before = Path.cwd()
        os.chdir(code)
        try:
            with hold(cache):
                task = load_task(spec, code if request.get("bundle") else None)
                model = build_model(task)
                load_words(model, snapshot.layout, snapshot.words)
                yield task, model
        except PsError as error:
            shown = relative_to(code, error.details.get("traceback", ""))
            error.details |= {"traceback": shown, **frame_details(shown)} if shown else {}
            raise
        finally:
            os.chdir(before)


def _claim_stdout() -> IO[str]:
    """The real stdout for the answer alone; from here on everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


# ---- trained weights as files ----


_NOT_IN_SAFETENSORS = {torch.complex32, torch.complex128, torch.float8_e8m0fnu}
_PTH = "export as pth, which has all of torch's"


def write_weights(
    tensors: Mapping[str, Tensor], form: str, path: Path, facts: Mapping[str, str], *, aside: Path, force: bool = False
) -> int:
    """Write every tensor under its name; tied weights under each of theirs. Returns the file's length in bytes.

    Written in the directory `aside`, synced and renamed: `path` is whole or as it was. What an error leaves aside is
    the caller's to remove. `facts` go into safetensors' metadata. Both forms load with `model.load_state_dict(...,
    strict=True)`, and pth with weights_only=True. Blocks on the disk. Raises SpecError for an unknown form, or one that
    has no such tensors, StorageError when the file cannot be written, and StateError when there is one already and not
    `force`."""
    if form not in SUFFIXES:
        raise SpecError(f"no export format {form!r}; there are {', '.join(SUFFIXES)}")
    strange = [name for name, tensor in tensors.items() if form == "safetensors" and not _has_safetensors(tensor)]
    if strange:
        raise SpecError(
            f"safetensors has no {_kind_of(tensors[strange[0]])} tensors: {', '.join(strange)}", action=_PTH
        )
    check_free(path, force=force)
    written = aside / path.name
    try:
        if form == "safetensors":
            save_file(_private(tensors, tied=False), str(written), metadata={"format": "pt", **facts})
            _give_usual_mode(written)
        else:
            torch.save(_private(tensors, tied=True), written)
        _sync(written)
        check_free(path, force=force)  # writing may have taken minutes
        os.replace(written, path)
        _sync(path.parent)
        return path.stat().st_size
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk as errors of their own.
        raise StorageError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def _give_usual_mode(path: Path) -> None:
    """Give a file the mode of a new one: safetensors writes it where only its owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _private(tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """A copy of each tensor. `tied`: one for each distinct memory, since torch.save would write a view's whole storage,
    and keeps ties; safetensors refuses tensors that share memory."""
    copies: dict[object, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tied and dense else name
        if key not in copies:
            copy = tensor.detach().clone()
            copies[key] = copy.contiguous() if dense else copy
        result[name] = copies[key]
    return result


def _has_safetensors(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dtype not in _NOT_IN_SAFETENSORS


def _kind_of(tensor: Tensor) -> str:
    return str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
