"""Golden hashes find a change of the step that changes bits, even when it changes every configuration alike.

A machine whose numerics class has no hash here skips them; the end of pytest's output then names both classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.jobs import crossed_split, lm_spec, norm_spec
from harness.static_job import StaticJob

# Numerics class of the trainer -> parameters_sha256 of the two jobs. Add a class after a run on a machine of it.
GOLDEN = {
    "419b9a0c5c38": {
        "lm": "ccdaaa9a85c02fa34768bcc0eafeeebfebd8fc45b13152770edd74deb2b2fdbe",
        "norm": "00015ef9689761fb1592df9fe2ceee5bd329ddb754b41f390118ea5426a6a4b7",
    },
    "101c5a35cfbd": {
        "lm": "ae55d49b843d316a496243d49e8764be024cf14a3408acec223ae4551bf1addc",
        "norm": "57bee54c4cdfc3418ca5529f1b16cedbfb500db1c6a9028610b9efbcc3e76e25",
    },
}


@pytest.mark.parametrize(("name", "spec"), [("lm", lm_spec(partitions=2, d_model=128)), ("norm", norm_spec())])
def test_golden_hash(name: str, spec: dict[str, object], tmp_path: Path) -> None:
    with StaticJob(spec, 2, tmp_path) as job:
        job.wait_ready()
        numerics = job.reported("trainer-0", "trainer_ready")[0].numerics_class[:12]
        if numerics not in GOLDEN:
            pytest.skip(f"golden hashes are known for numerics class {', '.join(GOLDEN)}; this machine is {numerics}")
        job.publish(crossed_split(7, 2))
        assert job.wait_finished() == GOLDEN[numerics][name]
