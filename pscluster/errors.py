"""Every error a person or a peer can meet, split by who must act.

    PsError
    |-- CallerError        the request is wrong: whoever asked must change it
    |   |-- SpecError          PS-1001  a job spec that cannot be accepted
    |   |-- BundleError        PS-1002  a code bundle that cannot be packed or extracted safely
    |   |-- NotFoundError      PS-1003  no such job, node, snapshot
    |   |-- StateError         PS-1004  the thing exists but cannot do this now (delete a running job)
    |   |-- AuthError          PS-1005  no token, or a wrong one
    |   |-- SettingsError      PS-1006  a daemon's or psctl's own settings
    |   |-- TaskError          PS-2001  the user's task: does not import, raises, returns a wrong shape
    |   |-- LossContractError  PS-2002  loss() does not return (loss_sum, weight), or writes to parameters
    |   |-- DataError          PS-2003  data missing, unreadable, or differing between nodes
    |   |-- LayoutError        PS-2004  a model that cannot be laid out, or differs between trainers
    |   |-- NonFiniteError     PS-2005  NaN or infinity in loss or gradient
    |   `-- PreflightError     PS-2006  one table of what is wrong on which node
    |-- PeerError            the other side is at fault or away: it must act, or come back
    |   |-- UnreachableError   PS-3001  nobody answers (no cluster, master away)
    |   |-- FrameError         PS-3002  a data-plane frame that breaks the protocol
    |   |-- VersionSkewError   PS-3004  the peer speaks another protocol version
    |   |-- ProcessLostError   PS-3005  a trainer or partition ended by a signal or vanished
    |   `-- OutOfMemoryError   PS-3006  a process ended for want of memory
    `-- LocalError           this machine or this program is at fault
        |-- AddressInUseError  PS-4001  a port or socket is taken
        |-- StorageError       PS-4002  a directory is not writable, a disk is full, a file is torn
        |-- UnhealthyError     PS-4003  a member of the cluster is sick
        |-- DeviceError        PS-4004  a CUDA device that is not there, is taken, or that torch cannot use
        |-- DamagedError       PS-4005  what is read is not what was written: torn, bit-flipped, gone
        |-- JobFailedError     PS-4100  the job awaited ended FAILED
        |-- JobStoppedError    PS-4103  the job awaited ended STOPPED
        |-- WaitTimeoutError   PS-4101  the job awaited did not get there in time
        `-- InternalError      PS-9001  a bug of ours

An error carries fields, not prose: `cause` says what happened, `action` what to do next, `details` the
machine-readable rest (strings only, so that every error crosses a process boundary unchanged).
`to_dict` and `from_dict` are that crossing; `pscluster.rpc` maps it to gRPC status and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


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
        """The error as plain JSON types; `from_dict` gives an equal error in another process."""
        return {"code": self.code, "cause": self.cause, "action": self.action, "details": self.details}


def from_dict(data: Mapping[str, Any]) -> PsError:
    """The error that `to_dict` described. An unknown code (a newer peer's) gives a PsError that keeps it."""
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
        found.setdefault(kind.code, kind)  # one without a code of its own is known by its parent's
        waiting.extend(kind.__subclasses__())
    return found


class CallerError(PsError):
    """Whoever asked must change the request."""

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
    default_action = "use the token file of this cluster (psctl up writes it with mode 0600)"


class SettingsError(CallerError):
    code = "PS-1006"
    exit_code = 2


class TaskError(CallerError):
    code = "PS-2001"
    exit_code = 100
    default_action = "correct the task; the traceback is in `psctl describe`"


class LossContractError(TaskError):
    code = "PS-2002"
    default_action = "return (sum of the losses, how many were summed), not their mean"


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
    default_action = "mend what the table names on each node"


class PeerError(PsError):
    """The other side must act, or come back."""

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
    default_action = "see what each node has with `psctl nodes -o wide`, or set workers.device"


class DamagedError(StorageError):
    """Not for want of a disk or a network: the file was read, and is not what was written. Trying again is in vain."""

    code = "PS-4005"
    default_action = "an older copy is used where there is one; look at the disk that held it"


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
