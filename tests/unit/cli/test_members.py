"""certs, token and context: the verbs of who may talk to a cluster."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from pscluster.cli import access
from pscluster.cli.main import psctl
from pscluster.client import credentials as client_credentials
from pscluster.security.authority import Authority
from pscluster.security.credentials import Credentials
from pscluster.security.identity import Identity, Role
from pscluster.v1 import access_pb2
from tests.unit.cli.conftest import Psctl
from tests.unit.cli.fake_master import FakeMaster, Serving

CLUSTER_ID = "0123456789abcdef"


def certificate(name: str, role: str = "worker", **changes: object) -> access_pb2.Certificate:
    now = time.time()
    fields = {"serial": "ab12", "role": role, "name": name, "issued_s": now - 3600, "expires_s": now + 7259}
    return access_pb2.Certificate(**{**fields, **changes})  # type: ignore[arg-type]


# --- certs ---


def test_certs_init_makes_an_authority_and_never_overwrites_it(run_alone: Psctl, tmp_path: Path) -> None:
    state = tmp_path / "master"
    result = run_alone("certs", "init", "--state-dir", str(state))
    assert result.exit_code == 0, result.stderr
    made = Authority.load(state / "certs")
    assert result.stdout == made.cluster_id + "\n" == (state / "cluster-id").read_text()
    for name in ("certs/ca.key", "token"):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
    again = run_alone("certs", "init", "--state-dir", str(state))
    assert (again.exit_code, again.stdout) == (1, "")
    assert "PS-1004" in again.stderr
    assert Authority.load(state / "certs").sha256 == made.sha256


def test_what_certs_init_says_to_type_next_parses(tmp_path: Path) -> None:
    typed = [line.split() for line in access.next_steps(tmp_path, "ab" * 32) if line.startswith("  ")]
    assert [words[0] for words in typed] == ["psmaster", "psctl", "psctl"]
    for words in typed[1:]:
        assert CliRunner().invoke(psctl, [*words[1:], "--help"]).exit_code == 0


def test_certs_list(run: Psctl, fake: FakeMaster) -> None:
    assert run("certs", "list").stdout == ""
    fake.certificates = [certificate("worker-0"), certificate("ada", "user", revoked=True)]
    lines = [line.split() for line in run("certs", "list", "-o", "wide").stdout.splitlines()]
    assert lines[0] == ["NAME", "ROLE", "AGE", "EXPIRES-IN", "STATE", "SERIAL"]
    assert lines[1] == ["worker-0", "worker", "1h", "2h", "valid", "ab12"]
    assert lines[2][:2] + lines[2][4:5] == ["ada", "user", "revoked"]
    found = json.loads(run("certs", "list", "-o", "json").stdout)
    assert [(item["name"], item["revoked"]) for item in found["items"]] == [("worker-0", False), ("ada", True)]


def test_certs_revoke(run: Psctl, fake: FakeMaster) -> None:
    fake.certificates = [certificate("ada", "user"), certificate("ada", "worker"), certificate("bob", "user")]
    result = run("certs", "revoke", "ada", "--role", "user")  # no terminal: nothing is asked
    assert (result.exit_code, result.stdout) == (0, "ada\n")
    assert [item.revoked for item in fake.certificates] == [True, False, False]
    assert run("certs", "revoke", "ada", "--role", "user").exit_code == 102
    assert run("certs", "revoke", "nobody").exit_code == 102


@pytest.mark.parametrize(
    ("options", "reply", "revoked"), [([], "n\n", False), ([], "y\n", True), (["--yes"], "", True)]
)
def test_certs_revoke_asks_on_a_terminal(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, options: list[str], reply: str, revoked: bool
) -> None:
    serving.fake.certificates = [certificate("ada", "user")]
    monkeypatch.setattr(access, "stdin_is_terminal", lambda: True)
    result = CliRunner().invoke(psctl, [*serving.arguments, "certs", "revoke", "ada", *options], input=reply)
    assert (result.exit_code == 0) is revoked
    assert serving.fake.certificates[0].revoked is revoked


# --- token ---


def test_token_create_prints_the_token_alone(run: Psctl, fake: FakeMaster) -> None:
    result = run("token", "create", "--role", "worker", "--ttl", "7d", "--uses", "3")
    assert (result.exit_code, result.stdout) == (0, "psj1-abc\n")
    assert "psworker" in result.stderr
    assert "psj1-abc" not in result.stderr
    (asked,) = fake.tokens_created
    assert (asked.role, asked.ttl_s, asked.uses) == ("worker", 7 * 86400.0, 3)
    run("token", "create", "--role", "user")
    assert (fake.tokens_created[1].ttl_s, fake.tokens_created[1].uses) == (86400.0, 0)


@pytest.mark.parametrize(
    "arguments", [[], ["--role", "master"], ["--role", "user", "--ttl", "soon"], ["--role", "user", "--uses", "0"]]
)
def test_token_create_refuses_wrong_usage(run: Psctl, fake: FakeMaster, arguments: list[str]) -> None:
    assert run("token", "create", *arguments).exit_code == 2
    assert fake.tokens_created == []


def test_token_list_and_revoke(run: Psctl, fake: FakeMaster) -> None:
    now = time.time()
    times = {"created_s": now - 3 * 3600, "expires_s": now + 3659}  # whole hours for a minute to come
    fake.tokens = [
        access_pb2.Token(token_id="01", role="worker", **times),
        access_pb2.Token(token_id="02", role="user", uses_left=1, limited=True, **times),
    ]
    lines = [line.split() for line in run("token", "list").stdout.splitlines()]
    assert lines[1:] == [["01", "worker", "3h", "1h", "any"], ["02", "user", "3h", "1h", "1"]]
    assert run("token", "revoke", "01").stdout == "01\n"
    assert fake.tokens_revoked == ["01"]


# --- context ---


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """A master that takes every join; the joins that it took."""
    authority = Authority.create(tmp_path / "authority", CLUSTER_ID)
    taken: list[tuple[str, str]] = []

    def join_as_user(text: str, name: str) -> tuple[Credentials, str]:
        taken.append((text.strip(), name))
        identity = Identity(cluster_id=CLUSTER_ID, role=Role.USER, name=name)
        return authority.issue(identity, 86400.0), "10.0.0.5:7070"

    monkeypatch.setattr(client_credentials, "join_as_user", join_as_user)
    return taken


def test_context_add_joins_and_keeps_the_key_private(
    run_alone: Psctl, joins: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("psj1-x\n")
    result = run_alone("context", "add", "lab", "--join", f"@{tmp_path / 'token'}", "--user", "ada")
    assert (result.exit_code, result.stdout) == (0, "lab\n"), result.stderr
    assert joins == [("psj1-x", "ada")]
    directory = tmp_path / "home" / ".config" / "pscluster" / "contexts" / "lab"
    assert Credentials.load(directory).identity.name == "ada"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    again = run_alone("context", "add", "lab", "--join", "psj1-y")
    assert (again.exit_code, len(joins)) == (1, 1)  # a token is not used up in vain


def test_contexts_are_listed_selected_shown_and_removed(run_alone: Psctl, joins: list[tuple[str, str]]) -> None:
    run_alone("context", "add", "lab", "--join", "psj1-x", "--user", "ada")
    run_alone("context", "add", "box", "--address", "box:7070", "--token-file", "/t")
    assert run_alone("context", "use", "lab").stdout == "lab\n"
    found = json.loads(run_alone("context", "list", "-o", "json").stdout)["items"]
    assert [(item["name"], item["current"], item["user"]) for item in found] == [
        ("local", False, None), ("box", False, None), ("lab", True, "ada")
    ]  # fmt: skip
    shown = json.loads(run_alone("context", "show", "-o", "json").stdout)
    assert (shown["name"], shown["role"], shown["address"]) == ("lab", "user", "10.0.0.5:7070")
    assert shown["problem"] is None and shown["expires_s"] > time.time()
    assert run_alone("context", "remove", "lab").exit_code == 0
    assert json.loads(run_alone("context", "show", "-o", "json").stdout)["name"] == "local"
    assert run_alone("context", "use", "lab").exit_code == 102
    assert run_alone("--context", "lab", "list").exit_code == 102
    assert len(joins) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["lab"], 2),
        (["lab", "--address", "a:1"], 2),
        (["lab", "--address", "a", "--token-file", "/t"], 2),
        (["lab", "--join", "psj1-x", "--address", "a:1"], 2),
        (["a/b", "--join", "psj1-x"], 2),
        (["lab", "--join", "@/nowhere"], 1),
        (["lab", "--join", "no-token"], 4),
    ],
)
def test_context_add_refuses(run_alone: Psctl, arguments: list[str], code: int) -> None:
    result = run_alone("context", "add", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")


def test_the_selected_context_is_the_cluster_of_every_verb(
    run_alone: Psctl, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = ["context", "add", "box", "--address", serving.address, "--token-file", str(serving.token_file)]
    assert run_alone(*added).exit_code == 0
    assert run_alone("list").exit_code == 3
    assert run_alone("--context", "box", "list").exit_code == 0
    assert run_alone("list", "--context", "box").exit_code == 0
    monkeypatch.setenv("PS_CONTEXT", "box")
    assert run_alone("list").exit_code == 0
    monkeypatch.delenv("PS_CONTEXT")
    run_alone("context", "use", "box")
    assert run_alone("list").exit_code == 0
    refused = run_alone("up")
    assert (refused.exit_code, "--context local" in refused.stderr) == (2, True)


def test_a_shell_completes_contexts_and_the_verbs_of_groups(run_alone: Psctl) -> None:
    run_alone("context", "add", "lab", "--address", "lab:1", "--token-file", "/t")

    def completed(*words: str) -> list[str]:
        complete = ShellComplete(psctl, {}, "psctl", "_PSCTL_COMPLETE")
        return [item.value for item in complete.get_completions(list(words), "")]

    assert completed("--context") == ["lab", "local"]
    assert completed("context", "use") == completed("list", "--context") == ["lab", "local"]
    assert completed("certs") == ["init", "list", "revoke"]
    assert completed("token", "create", "--role") == ["worker", "server", "user", "admin"]
