"""Who may become a member, and who is one: join tokens and certificates. Pure; time is an argument.

A token is known by the digest of its secret. A certificate is recorded when it is signed, and kept until it has expired
for an hour: until then a member whose clock is behind would still accept it if it was revoked. Nothing is kept longer,
and there are limits to how much there can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from pscluster.errors import AuthError, CallerError, NotFoundError, StateError
from pscluster.security.identity import JOINABLE, Role

MAX_TOKENS = 1_000
MAX_CERTIFICATES = 20_000  # at which nobody joins; who has joined still renews
MAX_OF_ONE = 16  # certificates of one name that are valid at once: it has renewed them far more often than needed
REPLACE_S = 3600.0  # after the newest of so many, one is revoked for another: their member never got them
MAX_TTL_S = 366 * 24 * 3600.0
KEEP_S = 3600.0  # after the end of a certificate, by which clocks may differ
_ID_DIGITS = 12
_RESERVED = frozenset({"local", "master"})  # the holder of the token; the master
_KINDS = (frozenset({Role.WORKER, Role.SERVER}), frozenset({Role.USER, Role.ADMIN}))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRecord:
    """A join token. `digest`: hex SHA-256 of its secret. Times are Unix times. `uses_left` None: any number."""

    digest: str
    role: Role
    created_s: float
    expires_s: float
    uses_left: int | None = None

    @property
    def token_id(self) -> str:
        return self.digest[:_ID_DIGITS]


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateRecord:
    """A certificate that was signed for a node or a person. `key_sha256`: of its public key. Times are Unix times."""

    serial: str
    role: Role
    name: str
    key_sha256: str
    issued_s: float
    expires_s: float
    revoked: bool = False


@dataclass(frozen=True, kw_only=True)
class AccessRecords:
    """Tokens by digest, certificates by serial; both oldest first."""

    tokens: Mapping[str, TokenRecord] = field(default_factory=dict)
    certificates: Mapping[str, CertificateRecord] = field(default_factory=dict)

    @cached_property
    def revoked_serials(self) -> tuple[str, ...]:
        """The certificates that every daemon must refuse, in order."""
        return tuple(sorted(serial for serial, one in self.certificates.items() if one.revoked))

    @cached_property
    def prune_at_s(self) -> float:
        """The Unix time at which the first of them is dropped."""
        ends_s = [token.expires_s for token in self.tokens.values()]
        ends_s += [one.expires_s + KEEP_S for one in self.certificates.values()]
        return min(ends_s, default=math.inf)


def add_token(access: AccessRecords, token: TokenRecord, now_s: float) -> AccessRecords:
    """With a new token. Raises CallerError for a role or a lifetime that none can have, StateError when there are too
    many."""
    if token.role not in JOINABLE:
        raise CallerError(f"nobody can join as a {token.role}", action=f"choose {', '.join(JOINABLE)}")
    if not 1 <= token.expires_s - now_s <= MAX_TTL_S + 1:
        raise CallerError("a join token lives between a second and a year", action="choose another --ttl")
    if len(access.tokens) >= MAX_TOKENS:
        raise StateError(f"there are {MAX_TOKENS} join tokens", action="wait until some have expired")
    return replace(access, tokens={**access.tokens, token.digest: token})


def revoke_token(access: AccessRecords, token_id: str) -> AccessRecords:
    """With a token of no more use. Repeating it changes nothing. Raises NotFoundError."""
    named = [token for token in access.tokens.values() if token.token_id == token_id]
    if not named:
        raise NotFoundError(f"there is no join token {token_id[:80]!r}", action="see `psctl token list`")
    useless = {token.digest: replace(token, uses_left=0) for token in named}
    return replace(access, tokens={**access.tokens, **useless})


def usable_tokens(access: AccessRecords, now_s: float) -> list[TokenRecord]:
    """The tokens that somebody could still join with, oldest first."""
    return [token for token in access.tokens.values() if token.expires_s > now_s and token.uses_left != 0]


def role_of_token(access: AccessRecords, digest: str, now_s: float) -> Role:
    """What the holder of a token's secret may become; of one that is used up, what it became, for a join that is
    repeated since its answer was lost. Raises AuthError."""
    return _usable(access, digest, now_s, repeats=True).role


def join(access: AccessRecords, digest: str, made: CertificateRecord, now_s: float) -> AccessRecords:
    """With a certificate that was made for the holder of a token, and the token used once more, unless the key has such
    a certificate already. Raises AuthError for a token that is unknown, expired or used up; StateError for a name that
    another key holds."""
    held_keys = {(held.key_sha256, held.role) for held in live_certificates(access, made.name, now_s)}
    repeats = (made.key_sha256, made.role) in held_keys
    token = _usable(access, digest, now_s, repeats=repeats)
    if token.role is not made.role:
        raise AuthError(f"the join token is for a {token.role}, not a {made.role}", details={"missing": "role"})
    if made.name in _RESERVED:
        raise StateError(f"the name {made.name!r} is reserved", action="choose another name")
    kind = next(kind for kind in _KINDS if made.role in kind)
    for held in live_certificates(access, made.name, now_s):
        if held.role in kind and (held.key_sha256, held.role) != (made.key_sha256, made.role):
            raise StateError(
                f"a {held.role} {made.name!r} has joined already",
                action=f"choose another name; or, if that one is gone for good, psctl certs revoke {made.name}",
                details={"name": made.name, "role": held.role},
            )
    used = token if repeats or token.uses_left is None else replace(token, uses_left=token.uses_left - 1)
    return add_certificate(replace(access, tokens={**access.tokens, digest: used}), made, now_s)


def renew(access: AccessRecords, serial: str, made: CertificateRecord, now_s: float) -> AccessRecords:
    """With a certificate that was made for the holder of another, `serial`. Raises AuthError when that was revoked
    meanwhile; StateError when it has renewed too often."""
    held = access.certificates.get(serial)
    if held is not None and held.revoked:
        raise AuthError(
            f"the certificate of {made.role} {made.name} was revoked",
            action="join again with a new token: psctl token create",
            details={"missing": "valid certificate", "reason": "revoked"},
        )
    # Neither what others joined with nor answers that got lost may keep a member from renewing: it would end.
    own = [one for one in live_certificates(access, made.name, now_s) if one.role is made.role]
    if len(own) >= MAX_OF_ONE and now_s - own[-1].issued_s >= REPLACE_S:
        unused = next(one for one in own if one.serial != serial)
        access = replace(access, certificates={**access.certificates, unused.serial: replace(unused, revoked=True)})
    return _add(access, made, now_s)


def add_certificate(access: AccessRecords, made: CertificateRecord, now_s: float) -> AccessRecords:
    """With one more certificate. Raises StateError when there are too many, or too many of this name."""
    if len(access.certificates) >= MAX_CERTIFICATES:
        raise StateError(f"there are {MAX_CERTIFICATES} certificates", action="wait until some have expired")
    return _add(access, made, now_s)


def _add(access: AccessRecords, made: CertificateRecord, now_s: float) -> AccessRecords:
    if sum(1 for held in live_certificates(access, made.name, now_s) if held.role is made.role) >= MAX_OF_ONE:
        raise StateError(
            f"the {made.role} {made.name!r} has {MAX_OF_ONE} valid certificates", action="use the newest one"
        )
    return replace(access, certificates={**access.certificates, made.serial: made})


def revoke_certificates(
    access: AccessRecords, name: str, role: Role | None
) -> tuple[AccessRecords, tuple[CertificateRecord, ...]]:
    """With all certificates of a name refused, of one role or of all; and these. The tokens by which it may have joined
    are of no more use, or it would come back at once, under any name. Repeating it changes nothing. Raises
    NotFoundError when the name has none."""
    named = [one for one in access.certificates.values() if one.name == name and role in (None, one.role)]
    if not named:
        what = f"there is no certificate of {name[:80]!r}"
        raise NotFoundError(what + (f" as a {role}" if role else ""), action="see `psctl certs list`")
    refused = {one.serial: replace(one, revoked=True) for one in named}
    newest_s = {one.role: one.issued_s for one in sorted(named, key=lambda one: one.issued_s)}
    # A certificate's time is in whole seconds.
    known = [one for one in access.tokens.values() if one.created_s <= newest_s.get(one.role, -math.inf) + 1]
    tokens = {**access.tokens, **{one.digest: replace(one, uses_left=0) for one in known}}
    changed = replace(access, tokens=tokens, certificates={**access.certificates, **refused})
    return changed, tuple(refused.values())


def live_certificates(access: AccessRecords, name: str, now_s: float) -> list[CertificateRecord]:
    """The certificates of a name that are valid now."""
    return [
        one for one in access.certificates.values() if one.name == name and one.expires_s > now_s and not one.revoked
    ]


def prune_access(access: AccessRecords, now_s: float) -> AccessRecords:
    """Without what has expired; the same object when nothing has."""
    if now_s < access.prune_at_s:
        return access
    return AccessRecords(
        tokens={key: one for key, one in access.tokens.items() if one.expires_s > now_s},
        certificates={key: one for key, one in access.certificates.items() if one.expires_s + KEEP_S > now_s},
    )


def _usable(access: AccessRecords, digest: str, now_s: float, *, repeats: bool) -> TokenRecord:
    token = access.tokens.get(digest)
    reason = "unknown"
    if token is not None:
        useless = token.uses_left == 0 and not repeats
        reason = "expired" if token.expires_s <= now_s else "used up or revoked" if useless else ""
    if token is None or reason:
        raise AuthError(
            f"the join token is {reason}",
            action="make a new one on the master's host: psctl token create",
            details={"missing": "join token", "reason": reason},
        )
    return token
