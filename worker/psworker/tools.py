"""`python -m psworker.tools`: what needs torch or the user's code, for psctl: export, eval, generate.

One JSON request on stdin, one JSON answer on stdout; whatever user code prints goes to stderr.

    {"command": "export" | "eval" | "generate",
     "spec": {...} or its JSON text, "bundle": path of an archive or directory or null,
     "parts": [absolute paths or URLs of all parts of one snapshot], "job": id,
     "format": "safetensors" | "pth", "output": path,                               export
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

from pscluster.errors import InternalError, PsError, SpecError, StateError, StorageError, TaskError
from pscluster.job.bundle import extract
from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.layout import Layout, parameters_sha256
from pscluster.storage.snapshot import read_part, read_parts
from pscluster.task import Task
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
    size = write_weights(tensors, request["format"], path, facts)
    return {"path": str(path), "format": request["format"], "tensors": len(tensors), "size_bytes": size}


def _eval(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("data_uri") is not None:
        data = spec.data.model_copy(update={"uri": str(request["data_uri"])})
        spec = spec.model_copy(update={"data": data})
    with _restored(spec, snapshot, request.get("bundle")) as (task, model):
        _, held_out = load_data(task)
        if held_out is None:
            raise StateError("the task has no held-out data", action="return a data set from eval_data() to evaluate")
        train = spec.train
        batches = EvalBatches(held_out, task.collate, train.num_shards, train.microbatch, train.seed)
        with precision(spec, _DEVICE):
            metrics = evaluate(task, model, batches, _DEVICE)
        return {"metrics": metrics, "num_samples": len(held_out)}


def _generate(spec: JobSpec, snapshot: Snapshot, request: Mapping[str, Any]) -> dict[str, Any]:
    with _restored(spec, snapshot, request.get("bundle")) as (task, model):
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
def _restored(spec: JobSpec, snapshot: Snapshot, bundle: str | None) -> Iterator[tuple[Task, nn.Module]]:
    """The task and its model with the snapshot's values, in the bundle's directory as trainers are."""
    with tempfile.TemporaryDirectory(prefix="ps-tools-") as temporary:
        directory = _unpacked(bundle, Path(temporary))
        before = Path.cwd()
        os.chdir(directory)
        try:
            task = load_task(spec, directory if bundle else None)
            model = build_model(task)
            load_words(model, snapshot.layout, snapshot.words)
            yield task, model
        finally:
            os.chdir(before)


def _unpacked(bundle: str | None, temporary: Path) -> Path:
    if bundle is None:
        return temporary
    if Path(bundle).is_dir():
        return Path(bundle).resolve()
    extract(Path(bundle), temporary / "bundle")
    return temporary / "bundle"


def _claim_stdout() -> IO[str]:
    """The real stdout for the answer alone; from here on everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


# ---- trained weights as files ----


FORMATS = ("safetensors", "pth")
_NOT_IN_SAFETENSORS = {torch.complex32, torch.complex128, torch.float8_e8m0fnu}
_PTH = "export as pth, which has all of torch's"


def write_weights(tensors: Mapping[str, Tensor], form: str, path: Path, facts: Mapping[str, str]) -> int:
    """Write every tensor under its name; tied weights under each of theirs. Returns the file's length in bytes.

    Written aside, synced and renamed: `path` is whole or as it was. `facts` go into safetensors' metadata. Both
    forms load with `model.load_state_dict(..., strict=True)`, and pth with weights_only=True. Blocks on the disk.
    Raises SpecError for an unknown form, or one that has no such tensors, StorageError when the file cannot be
    written."""
    if form not in FORMATS:
        raise SpecError(f"no export format {form!r}; there are {', '.join(FORMATS)}")
    strange = [name for name, tensor in tensors.items() if form == "safetensors" and not _has_safetensors(tensor)]
    if strange:
        raise SpecError(
            f"safetensors has no {_kind_of(tensors[strange[0]])} tensors: {', '.join(strange)}", action=_PTH
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        if form == "safetensors":
            save_file(_private(tensors, tied=False), str(temporary), metadata={"format": "pt", **facts})
        else:
            torch.save(_private(tensors, tied=True), temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
        return path.stat().st_size
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk or a missing directory as errors of their own.
        temporary.unlink(missing_ok=True)
        reason = "there is no such directory" if not path.parent.is_dir() else str(error).splitlines()[0]
        raise StorageError(f"cannot write {path}: {reason}") from error


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
