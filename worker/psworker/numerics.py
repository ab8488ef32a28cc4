"""Numerics: what a job computes in, and which machines compute the same bits.

A small gradient through the kernels that models use most is computed and hashed. Machines whose hashes
agree are in one class; the detail string names what usually makes them differ.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pscluster.errors import InternalError
from pscluster.job.spec import JobSpec
from psworker.trainer.data.batches import preserved_generators, seed_step

_FLOAT32: AbstractContextManager[None] = nullcontext()
_VOCABULARY, _WIDTH, _LENGTH, _BATCH, _HEADS = 512, 128, 96, 8, 4


def settle_numerics(threads: int, device: str) -> None:
    """Make torch in this process deterministic and fix its intra-op threads. Call once, before any torch
    work.

    Thread counts, TensorFloat-32 and cuDNN's search for the fastest kernel all change bits. Repeating the
    call with the same arguments is harmless. Raises InternalError when torch has already run
    parallel work.
    """
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError as error:
            raise InternalError(f"settle_numerics came after torch's first parallel work: {error}") from error
    torch.set_deterministic_debug_mode("error")  # the same switch, without importing the compiler (1.3 s)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def precision(spec: JobSpec, device: str) -> AbstractContextManager[None]:
    """A context for everything that calls the task's model: torch.autocast when the spec asks for it.

    Backward follows the types of its forward by itself."""
    if spec.train.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def arithmetic(spec: JobSpec) -> str:
    """What a job computes in, for people."""
    narrow = f"float32 with {spec.train.autocast} autocast" if spec.train.autocast else "float32"
    return f"{narrow}, compiled" if spec.train.compile else narrow


def numerics_class(
    threads: int, device: str, arithmetic: str = "float32", precision: AbstractContextManager[None] = _FLOAT32
) -> tuple[str, str]:
    """(hex digest of a canary gradient, what usually makes digests differ, for people; `arithmetic` is named there).

    `precision`: the context in which the job's forward runs; machines that agree in one may differ in another.
    `settle_numerics(threads, device)` must have run. Takes some tens of milliseconds; leaves the generators
    as they were.
    """
    with preserved_generators():
        gradients = _canary_gradients(torch.device(device), precision)
    digest = blake2b(digest_size=16, person=b"ps-numerics")
    for tensor in gradients:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest(), numerics_detail(threads, device, arithmetic)


def numerics_detail(threads: int, device: str, arithmetic: str) -> str:
    """One line: device model, instruction set, versions, threads, arithmetic."""
    config = torch.__config__.show()
    libraries = [
        f"{name} {match.group(1)}"
        for name, pattern in (("MKL", r"Math Kernel Library Version ([\d.]+)"), ("oneDNN", r"MKL-DNN v([\d.]+)"))
        if (match := re.search(pattern, config))
    ]
    parts = [f"torch {torch.__version__}", *libraries, f"{threads} thread{'s' * (threads != 1)}", arithmetic]
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(device))
        return ", ".join([f"cuda {torch.version.cuda} {name}", *parts])
    return ", ".join([f"cpu {_cpu_model()}", torch.backends.cpu.get_cpu_capability(), *parts])


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else os.uname().machine


def _values(*shape: int, device: torch.device, salt: int) -> Tensor:
    """Numbers in (-0.5, 0.5) made by exact integer arithmetic, so that no generator or libm is involved."""
    count = torch.Size(shape).numel()
    words = (torch.arange(count, dtype=torch.int64) * 2654435761 + salt * 40503) % 65521
    return (words.to(torch.float32) / 65536 - 0.5).reshape(shape).to(device)


def _canary_gradients(device: torch.device, precision: AbstractContextManager[None]) -> list[Tensor]:
    """Loss and gradients of one block of every common kernel; sizes pass torch's thresholds for threading."""
    table = _values(_VOCABULARY, _WIDTH, device=device, salt=1).requires_grad_()
    qkv = (_values(3 * _WIDTH, _WIDTH, device=device, salt=2) / 4).requires_grad_()
    wide = (_values(4 * _WIDTH, _WIDTH, device=device, salt=3) / 4).requires_grad_()
    narrow = (_values(_WIDTH, 4 * _WIDTH, device=device, salt=4) / 8).requires_grad_()
    kernel = (_values(_WIDTH, _WIDTH, 5, device=device, salt=5) / 8).requires_grad_()
    scale = (1 + _values(_WIDTH, device=device, salt=6)).requires_grad_()
    parameters = [table, qkv, wide, narrow, kernel, scale]
    tokens = (torch.arange(_BATCH * _LENGTH) * 7919 % _VOCABULARY).reshape(_BATCH, _LENGTH).to(device)

    seed_step(0, 0, 0)
    with precision:
        x = functional.dropout(functional.embedding(tokens, table), 0.1)
        q, k, v = functional.linear(functional.layer_norm(x, (_WIDTH,), scale), qkv).chunk(3, dim=-1)
        q, k, v = (t.reshape(_BATCH, _LENGTH, _HEADS, -1).transpose(1, 2) for t in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).reshape(_BATCH, _LENGTH, _WIDTH)
        x = x + functional.linear(functional.gelu(functional.linear(x, wide)), narrow)
        x = x + functional.conv1d(x.transpose(1, 2), kernel, padding=2).transpose(1, 2).tanh()
        logits = functional.linear(x, table)
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().roll(-1), reduction="sum")
    return [loss, *torch.autograd.grad(loss, parameters)]
