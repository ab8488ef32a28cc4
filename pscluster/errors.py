"""Every error that a person or a peer can get, split by who must act.

    PsError
    |-- CallerError        the request is wrong: the caller must change it
    |   |-- SpecError          PS-1001  a job spec that cannot be accepted
    |   |-- BundleError        PS-1002  a code bundle that cannot be packed or extracted safely
    |   |-- NotFoundError      PS-1003  no such job, node, snapshot
    |   |-- StateError         PS-1004  the object exists but cannot do this now (delete a running job)
    |   |-- AuthError          PS-1005  no token, or a wrong one
    |   |-- SettingsError      PS-1006  a daemon's or psctl's own settings
    |   |-- TaskError          PS-2001  the user's task: does not import, raises, returns a wrong shape
    |   |-- LossContractError  PS-2002  loss() does not return (loss_sum, weight), or writes to parameters
    |   |-- DataError          PS-2003  data missing, unreadable, or differing between nodes
    |   |-- LayoutError        PS-2004  a model that cannot be laid out, or differs between trainers
    |   |-- NonFiniteError     PS-2005  NaN or infinity in loss or gradient
    |   |-- PreflightError     PS-2006  failed checks: one table of what is wrong on which node
    |   |-- ImpureError        PS-2007  reading a sample or computing a microbatch twice gives two results
    |   |-- ModelChangedError  PS-2008  a model that is no longer the one that was laid out
    |   `-- TaskExitError      PS-2009  user code ends its process: os._exit, a fatal signal twice at one place
    |-- PeerError            the peer is at fault or unreachable: it must act, or recover
    |   |-- UnreachableError   PS-3001  nobody answers (no cluster, master down)
    |   |-- FrameError         PS-3002  a data-plane frame that breaks the protocol
    |   |-- VersionSkewError   PS-3004  the peer has another protocol version
    |   |-- ProcessLostError   PS-3005  a trainer or partition was ended by a signal, or is gone
    |   |-- OutOfMemoryError   PS-3006  a process ran out of memory
    |   `-- AuditError         PS-3007  two computations of one microbatch gave different bits
    `-- LocalError           this machine or this program is at fault
        |-- AddressInUseError  PS-4001  a port or socket is taken
        |-- StorageError       PS-4002  a directory is not writable, a disk is full
        |   `-- DamagedError       PS-4005  data read differs from data written: torn, bit-flipped, gone
        |-- UnhealthyError     PS-4003  a daemon of the cluster is unhealthy
        |-- DeviceError        PS-4004  a CUDA device that does not exist, is taken, or that torch cannot use
        |-- JobFailedError     PS-4100  the job awaited ended FAILED
        |-- JobStoppedError    PS-4103  the job awaited ended STOPPED
        |-- WaitTimeoutError   PS-4101  the job awaited did not reach its goal in time
        `-- InternalError      PS-9001  a bug of pscluster

An error carries fields: `cause` says what happened, `action` what to do next, `details` is machine-readable (strings
only, so that every error crosses a process boundary unchanged). `to_dict` and `from_dict` are the one mapping to and
from plain data; ErrorDetail messages use it, and `pscluster.rpc` maps it to gRPC status and back. PS-3003 is
retired: do not reuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

TRACEBACK_HINT = "; the traceback is in `psctl describe`"
"""The end of an action, which a job without a traceback is shown without."""


class PsError(Exception):
    """Root of the tree. `code` is stable; `exit_code` is what psctl exits with."""

    code: ClassVar[str] = "PS-9000"
    exit_code: ClassVar[int] = 1
    default_action: ClassVar[str] = ""

    def __init__(self, cause: str, *, action: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.action = action or self.default_action
        self.details: dict[str, str] = dict(details or {})

    def __str__(self) -> str:
        return f"{self.code}: {self.cause}" + (f" ({self.action})" if self.action else "")

    def to_dict(self) -> dict[str, Any]:
        """The error as plain JSON types; `from_dict` returns an equal error in another process."""
        return {"code": self.code, "cause": self.cause, "action": self.action, "details": self.details}


def from_dict(data: Mapping[str, Any]) -> PsError:
    """The inverse of `to_dict`. An unknown code (of a newer peer) becomes a PsError that keeps it."""
    kind = _by_code().get(str(data.get("code", "")))
    error = (kind or PsError)(
        str(data.get("cause", "")),
        action=str(data.get("action", "")),
        details={str(k): str(v) for k, v in dict(data.get("details") or {}).items()},
    )
    if kind is None and data.get("code"):
        error.code = str(data["code"])  # type: ignore[misc]
    return error


def _by_code() -> dict[str, type[PsError]]:
    found: dict[str, type[PsError]] = {}
    waiting: list[type[PsError]] = [PsError]
    while waiting:
        kind = waiting.pop(0)
        found.setdefault(kind.code, kind)  # a subclass without its own code maps to its parent
        waiting.extend(kind.__subclasses__())
    return found


class CallerError(PsError):
    """The caller must change the request."""

    code = "PS-1000"


class SpecError(CallerError):
    code = "PS-1001"
    exit_code = 2
    default_action = "correct the spec and submit again"


class BundleError(CallerError):
    code = "PS-1002"


class NotFoundError(CallerError):
    code = "PS-1003"
    exit_code = 102
    default_action = "see `psctl list`"


class StateError(CallerError):
    code = "PS-1004"


class AuthError(CallerError):
    code = "PS-1005"
    exit_code = 4
    default_action = "use the certificate of this cluster, or its token file (psctl up writes it with mode 0600)"


class SettingsError(CallerError):
    code = "PS-1006"
    exit_code = 2


class TaskError(CallerError):
    code = "PS-2001"
    exit_code = 100
    default_action = "correct the task" + TRACEBACK_HINT


class LossContractError(TaskError):
    code = "PS-2002"
    default_action = "return (sum of the losses, number of losses), not their mean"


class DataError(TaskError):
    code = "PS-2003"
    default_action = "check data.uri, and that every node has the same data"


class LayoutError(TaskError):
    code = "PS-2004"
    default_action = "every trainer must build the same model of supported dtypes"


class NonFiniteError(TaskError):
    code = "PS-2005"
    default_action = "lower the learning rate, set train.clip_norm, or set on_nonfinite: skip"


class PreflightError(TaskError):
    code = "PS-2006"
    default_action = "fix the failing checks on each node"


class ImpureError(TaskError):
    """Where two results differ first: details["part"] is "sample", "batch", "loss", "gradient", "metric" or "draws",
    details["differs"] its name."""

    code = "PS-2007"


class ModelChangedError(TaskError):
    code = "PS-2008"
    default_action = "build the model as it is to be in build_model, and do not change its structure while it trains"


class TaskExitError(TaskError):
    """User code ended its process without an exception."""

    code = "PS-2009"
    default_action = "correct the task; `psctl logs` has the last output and the stacks of all threads"


class PeerError(PsError):
    """The peer must act, or recover."""

    code = "PS-3000"


class UnreachableError(PeerError):
    code = "PS-3001"
    exit_code = 3
    default_action = "start one with `psctl up`, or choose another with --address"


class FrameError(PeerError):
    code = "PS-3002"


class VersionSkewError(PeerError):
    code = "PS-3004"
    default_action = "run the same pscluster version on every node"


class ProcessLostError(PeerError):
    code = "PS-3005"


class OutOfMemoryError(PeerError):
    code = "PS-3006"
    default_action = "lower train.microbatch, or use a machine with more memory"


class AuditError(PeerError):
    """Its details name step, shard, the first bucket that differs, and nodes."""

    code = "PS-3007"


class LocalError(PsError):
    """This machine, or this program, is at fault."""

    code = "PS-4000"


class AddressInUseError(LocalError):
    code = "PS-4001"
    default_action = "choose another address, or end the process that holds it"


class StorageError(LocalError):
    code = "PS-4002"
    default_action = "make the directory writable or free space"


class UnhealthyError(LocalError):
    code = "PS-4003"
    exit_code = 5


class DeviceError(LocalError):
    code = "PS-4004"
    default_action = "see the devices of each node with `psctl nodes -o wide`, or set workers.device"


class DamagedError(StorageError):
    """The file was read and differs from what was written, so a retry does not help."""

    code = "PS-4005"
    default_action = "an older copy is used if there is one; check the disk that held this one"


class JobFailedError(LocalError):
    code = "PS-4100"
    exit_code = 100


class WaitTimeoutError(LocalError):
    code = "PS-4101"
    exit_code = 101


class JobStoppedError(LocalError):
    code = "PS-4103"
    exit_code = 103


class InternalError(LocalError):
    code = "PS-9001"
    default_action = "please report it with the log"
