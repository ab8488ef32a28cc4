"""The first code of a process that an agent starts: it ties its life to the agent's, confines itself if the agent says
so, then runs the given module.

    python -P -m pscluster.agent.launch psworker.trainer

Nothing else happens before the module's slow imports (torch), so an agent that is killed at that moment leaves no
orphan. The code bundle is put first on the path only after our own packages are imported: a bundle with a directory
named `pscluster` does not replace ours.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys

from pscluster.agent.confine import CONFINEMENT, Confinement, confine

CONTROL_FD = "PS_CONTROL_FD"
AGENT_PID = "PS_AGENT_PID"
SOCKET_DIR = "PS_SOCKET_DIR"
BUNDLE_DIR = "PS_BUNDLE_DIR"

_PR_SET_PDEATHSIG = 1


def end_with_agent() -> None:
    """Have the kernel SIGKILL this process when the agent's thread that started it ends; exits at once when that agent
    is already gone. Does nothing in a process that no agent started. Safe to repeat."""
    agent = os.environ.get(AGENT_PID, "")
    if not agent:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(agent):
        os._exit(128 + signal.SIGKILL)


def main() -> None:
    end_with_agent()
    confinement = os.environ.pop(CONFINEMENT, "")
    if confinement:
        confine(Confinement.from_json(confinement))
        end_with_agent()  # a change of user has cleared it
    module = sys.argv[1]
    importlib.import_module(module.partition(".")[0])
    bundle = os.environ.get(BUNDLE_DIR, "")
    if bundle:
        sys.path.insert(0, bundle)
        inherited = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = bundle + (os.pathsep + inherited if inherited else "")
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
