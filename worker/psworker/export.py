"""Trained weights as files that other programs read: safetensors, or a plain PyTorch state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pscluster.errors import SpecError, StorageError

FORMATS = ("safetensors", "pth")


def write_weights(tensors: Mapping[str, Tensor], form: str, path: Path, facts: Mapping[str, str]) -> int:
    """Write every tensor under its name; tied weights under each of theirs. Returns the file's length in bytes.

    Written aside, synced and renamed: `path` is whole or as it was. `facts` go into safetensors' metadata. Both
    forms load with `model.load_state_dict(..., strict=True)`, and pth with weights_only=True. Blocks on the disk.
    Raises SpecError for an unknown form, StorageError when the file cannot be written."""
    if form not in FORMATS:
        raise SpecError(f"no export format {form!r}; there are {', '.join(FORMATS)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        if form == "safetensors":
            save_file(_private(tensors), str(temporary), metadata={"format": "pt", **facts})
        else:
            torch.save(_private_but_tied(tensors), temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
        return path.stat().st_size
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk or a missing directory as errors of their own.
        temporary.unlink(missing_ok=True)
        reason = "there is no such directory" if not path.parent.is_dir() else str(error).splitlines()[0]
        raise StorageError(f"cannot write {path}: {reason}") from error


def _private(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _private_but_tied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One copy for each distinct memory: torch.save would write a view's whole storage, and keeps ties."""
    copies: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.detach().clone().contiguous()
        result[name] = copies[key]
    return result


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
