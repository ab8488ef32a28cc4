"""Invalid requests, and machines that cannot serve them: a named error, an exit code, and no partial change."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from harness.cluster import LocalCluster, local_cluster
from harness.held_task import held_spec
from harness.jobs import lm_spec
from harness.plain import train_plainly
from pscluster.errors import AuthError, BundleError, NotFoundError, PsError, SpecError
from pscluster.job.bundle import Bundle
from pscluster.job.spec import parse_spec
from pscluster.rpc import Access, error_of, open_channel
from pscluster.settings import runtime_dir
from pscluster.v1 import jobs_pb2, jobs_pb2_grpc

STEPS = 6
SMALL: dict[str, Any] = {"layers": 1, "d_model": 32, "heads": 2, "context": 8, "vocabulary": 64}


def spec(**changes: Any) -> dict[str, Any]:
    return {**lm_spec(steps=STEPS, **SMALL), "workers": {"max": 1}, "evaluate": {}, **changes}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("bad"), workers=1, servers=1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_changes(cluster: LocalCluster) -> Iterator[None]:
    """Check that jobs, bundles and health are the same before and after each test."""
    before = remembered(cluster)
    yield
    assert remembered(cluster) == before
    with cluster.client() as client:
        assert client.health().problems == ()


def remembered(cluster: LocalCluster) -> tuple[list[str], list[str]]:
    with cluster.client() as client:
        jobs = [f"{job.job_id} {job.state}" for job in client.jobs()]
    return jobs, sorted(path.name for path in (cluster.state_dir / "master" / "bundles").iterdir())


# ---- specs ----

REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "misspelt key": ({"train": {"global_bach": 8, "microbatch": 2, "max_steps": 1}}, [], "did you mean global_batch?"),
    "unknown section": ({"wokers": {"min": 1}}, [], "unknown key wokers; did you mean workers?"),
    "wrong type": ({"workers": {"min": "three"}}, [], "workers.min"),
    "truth for a number": ({"servers": {"partitions": True}}, [], "servers.partitions"),
    "not divisible": ({}, ["--set", "train.global_batch=15"], "15 is not divisible by microbatch 2"),
    "more workers than shards": ({"workers": {"min": 8}}, [], "workers.min 8 exceeds the 7 shards"),
    "no end": ({}, ["--set", "train.max_steps=null"], "one of epochs and max_steps"),
    "--set without a value": ({}, ["--set", "train.max_steps"], "not of the form key=value"),
    "--set below a number": ({}, ["--set", "name.first=x"], "name is not a section"),
    "--set that does not parse": ({}, ["--set", "train={"], "does not parse"),
    "--set of no such key": ({}, ["--set", "train.max_step=3"], "did you mean max_steps?"),
    "relative store": ({"durability": {"store": "here"}}, [], "not an absolute directory"),
    "no such task module": ({"task": {"entrypoint": "nobody:Task"}}, [], "there is no module nobody"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_spec_that_is_wrong_is_refused_with_what_to_change(case: str, cluster: LocalCluster, tmp_path: Path) -> None:
    changes, options, expected_text = REFUSED[case]
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec(**changes)))
    done = cluster.psctl("submit", str(path), *options, expect=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: PS-1001: ")
    assert expected_text in done.stderr


def test_a_spec_that_is_no_file(cluster: LocalCluster, tmp_path: Path) -> None:
    assert "PS-1001: no spec file" in cluster.psctl("submit", str(tmp_path / "none.yaml"), expect=2).stderr
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    assert "name is given twice" in cluster.psctl("submit", str(tmp_path / "twice.yaml"), expect=2).stderr


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "x"}', "null", "[" * 100_000])
def test_the_master_checks_again(text: str, cluster: LocalCluster) -> None:
    with raw_jobs(cluster, token_of(cluster)) as stub:
        with pytest.raises(SpecError):
            call(stub.Submit, jobs_pb2.SubmitRequest(spec_json=text))


def test_a_bundle_that_was_never_uploaded_is_not_awaited(cluster: LocalCluster) -> None:
    request = jobs_pb2.SubmitRequest(spec_json=json.dumps(spec()), bundle_sha256="0" * 64)
    with raw_jobs(cluster, token_of(cluster)) as stub, pytest.raises(NotFoundError):
        call(stub.Submit, request)


# ---- who may ask, and whom ----


class raw_jobs:  # noqa: N801 - reads as a statement
    """The master's service without the client library; `token` None: no token."""

    def __init__(self, cluster: LocalCluster, token: str | None) -> None:
        address = f"unix:{runtime_dir(cluster.state_dir)}/master.sock"
        self.channel = grpc.insecure_channel(address) if token is None else open_channel(address, Access(token=token))

    def __enter__(self) -> Any:
        return jobs_pb2_grpc.JobsStub(self.channel)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def token_of(cluster: LocalCluster) -> str:
    return (cluster.state_dir / "token").read_text().strip()


def call(method: Any, request: Any) -> Any:
    try:
        return method(request, timeout=20)
    except grpc.RpcError as failure:
        raise error_of(failure) from None


@pytest.mark.parametrize("token", [None, "", "wrong", "x" * 10_000])
def test_a_call_without_the_right_token_changes_nothing(token: str | None, cluster: LocalCluster) -> None:
    with raw_jobs(cluster, token) as stub:
        with pytest.raises(AuthError):
            call(stub.List, jobs_pb2.ListRequest())
        with pytest.raises(AuthError):
            call(stub.Submit, jobs_pb2.SubmitRequest(spec_json=json.dumps(spec())))
        header = jobs_pb2.BundleHeader(sha256="0" * 64, size_bytes=1)
        with pytest.raises(AuthError):
            call(stub.UploadBundle, iter([jobs_pb2.UploadBundleRequest(header=header)]))


def test_psctl_without_a_good_token_exits_4(cluster: LocalCluster, tmp_path: Path) -> None:
    address = f"unix:{runtime_dir(cluster.state_dir)}/master.sock"
    wrong, open_to_all = tmp_path / "wrong", tmp_path / "open"
    wrong.write_text("nonsense\n")
    wrong.chmod(0o600)
    open_to_all.write_text(token_of(cluster))
    open_to_all.chmod(0o644)
    for file in (wrong, open_to_all, tmp_path / "missing"):
        done = cluster.psctl("--address", address, "--token-file", str(file), "list", expect=4)
        assert (done.stdout, "PS-1005" in done.stderr) == ("", True), file


def test_psctl_without_a_cluster_exits_3(cluster: LocalCluster, tmp_path: Path) -> None:
    done = cluster.psctl("--state-dir", str(tmp_path), "list", expect=3)
    assert (done.stdout, "PS-3001" in done.stderr, "psctl up" in done.stderr) == ("", True, True)
    assert list(tmp_path.iterdir()) == []
    with socket.socket() as taken:  # bound but not listening: nothing answers
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = cluster.psctl("--address", address, "--token-file", str(cluster.state_dir / "token"), "list", expect=3)
    assert "PS-3001" in done.stderr


# ---- daemons that cannot start ----


def daemon(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PS_")}
    command = [str(Path(sys.executable).parent / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.rstrip().rpartition("\n")[2]


def test_the_master_reports_a_port_in_use(cluster: LocalCluster, tmp_path: Path) -> None:
    token = str(cluster.state_dir / "token")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flags in (("--listen", address), ("--listen", f"unix:{tmp_path}/s", "--metrics-listen", address)):
            done = daemon("psmaster", "--state-dir", str(tmp_path / "m"), "--token-file", token, *flags)
            assert done.returncode == 1
            assert last_line(done).startswith("PS-4001: ")
            assert address in last_line(done)


def test_a_socket_and_a_state_directory_that_are_in_use(cluster: LocalCluster, tmp_path: Path) -> None:
    token = str(cluster.state_dir / "token")
    address = f"unix:{runtime_dir(cluster.state_dir)}/master.sock"
    done = daemon("psmaster", "--state-dir", str(tmp_path / "m"), "--token-file", token, "--listen", address)
    assert (done.returncode, last_line(done)[:9]) == (1, "PS-4001: ")
    taken = str(cluster.state_dir / "master")
    done = daemon("psmaster", "--state-dir", taken, "--token-file", token, "--listen", f"unix:{tmp_path}/s")
    assert (done.returncode, last_line(done)[:9]) == (1, "PS-4002: ")
    assert "another master" in last_line(done)
    flags = ["--node-id", "worker-9", "--master", address, "--token-file", token]
    done = daemon("psworker", *flags, "--state-dir", str(cluster.state_dir / "worker-0"))
    assert (done.returncode, last_line(done)[:9]) == (1, "PS-1004: ")


@pytest.mark.parametrize("name", ["psmaster", "psworker", "psserver"])
def test_a_state_directory_that_cannot_be_written(name: str, cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--state-dir", str(tmp_path / "file" / "state"), "--token-file", str(cluster.state_dir / "token")]
    if name == "psmaster":
        flags += ["--listen", f"unix:{tmp_path}/s"]
    else:
        flags += ["--node-id", "n", "--master", f"unix:{tmp_path}/s"]
    done = daemon(name, *flags)
    assert (done.returncode, last_line(done)[:9]) == (1, "PS-4002: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- bundles ----


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> Bundle:
    """A bundle that `pack` would not make."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    return Bundle(data=data, sha256=hashlib.sha256(data).hexdigest(), files=())


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.slow
def test_an_archive_that_leads_out_of_its_directory_is_never_unpacked(cluster: LocalCluster, tmp_path: Path) -> None:
    """The agent refuses it before any process of the job starts."""
    outside = tmp_path / "outside"
    wrong = {
        "up": archive((tarfile.TarInfo("fine.py"), b"1"), (tarfile.TarInfo("../../evil"), b"1")),
        "absolute": archive((tarfile.TarInfo(str(outside)), b"1")),
        "link": archive((link("here", str(tmp_path), tarfile.SYMTYPE), b""), (tarfile.TarInfo("here/outside"), b"1")),
        "hard": archive((link("token", str(cluster.state_dir / "token"), tarfile.LNKTYPE), b"")),
        "torn": Bundle(data=b"\x1f\x8bnot", sha256=hashlib.sha256(b"\x1f\x8bnot").hexdigest(), files=()),
    }
    task = {"entrypoint": "fine:Task"}
    with cluster.client() as client:
        jobs = [client.submit(parse_spec(spec(name=name, task=task)), bundle) for name, bundle in wrong.items()]
        for job in jobs:
            found = client.wait(job, "failed", 100)
            assert found.error is not None
            assert found.error.code == "PS-1002", found.error
            assert client.delete(job) == job
    assert list(tmp_path.iterdir()) == []
    left = [path for path in cluster.state_dir.rglob("*") if path.name in ("evil", "fine.py", "here")]
    assert left == []
    assert list((cluster.state_dir / "worker-0" / "bundles").iterdir()) == []
    assert list((cluster.state_dir / "master" / "bundles").iterdir()) == []


def test_an_upload_that_is_not_what_it_says_is_refused(cluster: LocalCluster) -> None:
    good = archive((tarfile.TarInfo("fine.py"), b"1"))
    with cluster.client() as client:
        for wrong in (
            Bundle(data=good.data, sha256="0" * 64, files=()),
            Bundle(data=good.data, sha256="../../evil", files=()),
            Bundle(data=bytes((64 << 20) + 1), sha256="0" * 64, files=()),
        ):
            with pytest.raises(BundleError):
                client.submit(parse_spec(spec()), wrong)
    header = jobs_pb2.UploadBundleRequest(header=jobs_pb2.BundleHeader(sha256=good.sha256, size_bytes=1))
    more = jobs_pb2.UploadBundleRequest(data=good.data)
    with raw_jobs(cluster, token_of(cluster)) as stub:
        for messages in ([header, more], [more], [header], []):
            with pytest.raises(PsError) as caught:
                call(stub.UploadBundle, iter(messages))
            assert caught.value.code == BundleError.code


def test_a_directory_that_cannot_be_a_bundle(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("class Mine: pass\n")
    (tmp_path / "spec.json").write_text(json.dumps(spec(task={"entrypoint": "task:Mine"})))
    with (tmp_path / "weights.bin").open("wb") as sparse:
        sparse.truncate(65 << 20)
    done = cluster.psctl("submit", str(tmp_path / "spec.json"), expect=1)
    assert "PS-1002" in done.stderr
    assert "weights.bin (65.0 MiB)" in done.stderr
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "shortcut").symlink_to("/etc/passwd")
    done = cluster.psctl("submit", str(tmp_path / "spec.json"), expect=1)
    assert "PS-1002: shortcut is a link" in done.stderr


# ---- disks ----


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", str(place)], check=True)
        yield place


def fill(place: Path) -> Path:
    """Fill the disk; the file that fills it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_job_resumes_with_space(
    cluster: LocalCluster, tmp_path: Path, disk: Path
) -> None:
    directory = tmp_path / "job"
    directory.mkdir()
    stored = spec(durability={"every_steps": 2, "store": str(disk)})
    held, gate = held_spec(stored, directory, free=10)  # one step of seven microbatches, after three of the preflight
    job = cluster.submit(held, directory)
    cluster.wait(job, "step=1")
    filler = fill(disk)
    gate.unlink()
    with cluster.client() as client:
        found = client.wait(job, "failed", 100)
    assert found.error is not None
    assert found.error.code == "PS-4002"
    assert f"last step, {STEPS}," in found.error.cause
    assert "No space left on device" in found.error.cause
    warnings = [event.message for event in found.events if event.warning]
    assert any("step 2" in message and "No space left" in message for message in warnings), warnings
    assert found.parameters_sha256 is None
    assert [path.name for path in disk.rglob(".*")] == []
    filler.unlink()
    cluster.psctl("resume", job)
    cluster.wait(job, "succeeded")
    assert cluster.describe(job)["parameters_sha256"] == train_plainly(spec()).digest
    cluster.psctl("delete", job)
    assert list(disk.iterdir()) == []
