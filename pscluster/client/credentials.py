"""What a client shows of itself: the token of a cluster, or the user's certificate, renewed before it expires.

`cryptography` is loaded where a certificate is used, and only there."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pscluster import rpc
from pscluster.client.exclusive import exclusive
from pscluster.errors import AuthError, CallerError, PsError, StateError, StorageError
from pscluster.settings import LocatedCluster

if TYPE_CHECKING:
    from pscluster.client.members import Members
    from pscluster.security.credentials import Credentials

USER_ROLES = ("user", "admin")


def join_as_user(text: str, name: str) -> tuple[Credentials, str]:
    """The credentials that a join token gives to the user `name`, and the master's address. Blocks; raises AuthError,
    UnreachableError."""
    from pscluster.security.join_token import JoinToken
    from pscluster.security.joining import join

    token = JoinToken.parse(text)
    if token.role not in USER_ROLES:
        raise AuthError(
            f"this join token is for a {token.role}, not for a user",
            action="make one with `psctl token create --role user`",
            details={"field": "role"},
        )
    if not token.master:
        raise AuthError("the join token does not say where the master listens", details={"field": "master"})
    return join(token, name, rpc.PROTOCOL), token.master


def access_to(located: LocatedCluster) -> rpc.Access:
    """The token or certificate for a cluster. Blocks. Raises AuthError when it is missing, open to others or
    expired."""
    if located.credentials_dir is None:
        return rpc.Access(token=rpc.read_token(located.token_file))
    from pscluster.security.credentials import Credentials, CredentialSource

    found = Credentials.load(located.credentials_dir)
    expires = datetime.fromtimestamp(found.not_after_s, UTC)
    if expires < datetime.now(UTC):
        raise AuthError(
            f"the certificate of {found.identity.name} in {located.credentials_dir} expired on {expires:%Y-%m-%d}",
            action="ask an admin for a join token (psctl token create --role user), then remove the context and add "
            "it again with --join",
            details={"field": "expired"},
        )
    return rpc.Access(source=CredentialSource(found))


def renew_when_due(members: Members, access: rpc.Access, located: LocatedCluster, now_s: float) -> None:
    """Renew the user's certificate after two thirds of its life, in memory and on disk. Two processes do not renew at
    once. Until it expires, a failure is a warning: the next call tries again."""
    if access.source is None or located.credentials_dir is None or now_s < access.source.get().renew_at_s:
        return
    try:
        access.source.replace(_renewed(members, located.credentials_dir, now_s))
    except StateError:
        return  # another process renews it now
    except (PsError, OSError) as error:  # the certificate is still good for the call that is to be made
        expires = datetime.fromtimestamp(access.source.get().not_after_s, UTC)
        warnings.warn(
            f"the certificate in {located.credentials_dir} was not renewed and expires on {expires:%Y-%m-%d}: {error}",
            stacklevel=2,
        )


def _renewed(members: Members, directory: Path, now_s: float) -> Credentials:
    from pscluster.security.credentials import Credentials, new_request

    with exclusive(directory / "lock", wait_s=0.0):
        stored = Credentials.load(directory)
        if now_s < stored.renew_at_s:  # another process has renewed it
            return stored
        key_pem, csr_pem = new_request(stored.identity.name)
        made = stored.renewed(key_pem, *members.renew(csr_pem))
        made.save(directory)
        return made


def read_join_text(given: str) -> str:
    """A join token as given on a command line: its text, or @FILE. Raises CallerError, StorageError."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).expanduser().read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise CallerError(f"{given[1:]} is not a join token") from None
    except OSError as error:
        raise StorageError(f"cannot read {given[1:]}: {error.strerror}") from None
