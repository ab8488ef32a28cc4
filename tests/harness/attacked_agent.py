"""Stands for an agent with a key: starts `tests.harness.attack` as an agent starts its trainers, in the way that the
first argument names, and prints what the attack got and whether the key is still in its place.

Arguments: mode, state directory, the secret, the user that mode `uid` becomes. Only the standard library, so that it
runs as any user, with any Python."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

from pscluster.agent.confine import Mode, protect_memory
from pscluster.agent.isolation import IDENTITY, Account, Isolation, hidden_paths


def main() -> None:
    mode, state_dir, secret = Mode(sys.argv[1]), Path(sys.argv[2]), os.environ["PLAYED_SECRET"]
    user = pwd.getpwnam(sys.argv[3])
    account = Account(name=user.pw_name, uid=user.pw_uid, gid=user.pw_gid, home=user.pw_dir)
    key, own = state_dir / IDENTITY / "key.pem", state_dir / "jobs"
    state_dir.mkdir(mode=0o711)
    own.mkdir(mode=0o700)
    key.parent.mkdir(mode=0o700)
    key.write_text(secret)
    key.chmod(0o600)
    os.chdir(state_dir)
    held = key.open()  # in a descriptor as well
    if mode is not Mode.NONE:
        protect_memory()
    environ = {name: value for name, value in os.environ.items() if name != "PLAYED_SECRET"}
    isolation = Isolation(mode=mode, hidden=hidden_paths(state_dir, environ, None), account=account, home=str(own))
    isolation.give(own)
    become = str(account.uid if mode is Mode.UID else os.getuid())
    launch = [sys.executable, "-P", "-m", "pscluster.agent.launch", "tests.harness.attack"]
    done = subprocess.run(
        [*launch, str(key), secret[::-1], str(own), become],
        env={**environ, **isolation.environment(), "PS_AGENT_PID": str(os.getpid())},
        cwd=own,
        stdout=subprocess.PIPE,
        check=True,
    )
    intact = key.exists() and key.read_text() == secret and os.listdir(key.parent) == [key.name]
    print(json.dumps({"got": json.loads(done.stdout), "intact": intact, "kept": not held.closed}))


if __name__ == "__main__":
    main()
