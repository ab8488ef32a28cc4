"""A member's private key, its certificate and the authority's, in memory and in a directory of its own."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pscluster.errors import AuthError, StorageError
from pscluster.security.identity import Identity

KEY, CERTIFICATE, AUTHORITY = "key.pem", "certificate.pem", "authority.pem"
BACKDATED_S = 300.0
"""A certificate begins this long before it is made, so that a member whose clock is behind accepts it."""
RENEW_AT = 2 / 3  # of a certificate's life


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """PEM texts. Raises AuthError when the certificate does not parse. The key is never shown."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)

    @cached_property
    def _certificate(self) -> x509.Certificate:
        return parse_certificate(self.certificate_pem)

    @cached_property
    def identity(self) -> Identity:
        return identity_in(self._certificate)

    @property
    def serial(self) -> str:
        """As `serial_of`."""
        return serial_of(self._certificate)

    @property
    def not_before_s(self) -> float:
        """Unix time."""
        return self._certificate.not_valid_before_utc.timestamp()

    @property
    def not_after_s(self) -> float:
        """Unix time."""
        return self._certificate.not_valid_after_utc.timestamp()

    @property
    def renew_at_s(self) -> float:
        """Unix time at which a new certificate should be asked for: after two thirds of its life."""
        made_s = self.not_before_s + BACKDATED_S
        return made_s + (self.not_after_s - made_s) * RENEW_AT

    def renewed(self, key_pem: bytes, certificate_pem: bytes, authority_pem: bytes) -> Credentials:
        """What the master made of a request of this member. Raises AuthError when it is another member's."""
        made = Credentials(key_pem=key_pem, certificate_pem=certificate_pem, authority_pem=authority_pem)
        if made.identity != self.identity:
            raise AuthError(f"the master renewed {self.identity.uri} as {made.identity.uri}")
        return made

    def save(self, directory: Path) -> None:
        """Write the three files, mode 0600, into a directory of mode 0700. A reader finds the old or the new files: a
        key without its certificate is never left. Blocks. Raises StorageError."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            # One file first: what is read must belong together.
            write_private(directory / KEY, self.key_pem + self.certificate_pem)
            write_private(directory / CERTIFICATE, self.certificate_pem)
            write_private(directory / AUTHORITY, self.authority_pem)
        except OSError as error:
            raise StorageError(f"cannot write credentials in {directory}: {error.strerror}") from None

    @classmethod
    def load(cls, directory: Path) -> Credentials:
        """What `save` wrote. Blocks. Raises AuthError when there is none, it is open to others, or does not parse."""
        try:
            mode = (directory / KEY).stat().st_mode
            bundle, authority = (directory / KEY).read_bytes(), (directory / AUTHORITY).read_bytes()
        except FileNotFoundError:
            raise AuthError(f"no credentials in {directory}", action="join the cluster with --join TOKEN") from None
        except OSError as error:
            raise AuthError(f"cannot read the credentials in {directory}: {error.strerror}") from None
        if mode & 0o077:
            raise AuthError(f"others may read {directory / KEY}", action=f"chmod 600 {directory / KEY}")
        key, separator, certificate = bundle.partition(b"-----BEGIN CERTIFICATE-----")
        found = cls(key_pem=key, certificate_pem=separator + certificate, authority_pem=authority)
        _ = found.identity
        return found


class CredentialSource:
    """The newest credentials of a process; any thread may read and replace them."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()

    def get(self) -> Credentials:
        with self._lock:
            return self._credentials

    def replace(self, credentials: Credentials) -> None:
        """From now on `get` returns these; what was connected with the old ones stays connected."""
        with self._lock:
            self._credentials = credentials


def new_request(name: str, key_pem: bytes = b"") -> tuple[bytes, bytes]:
    """A private key, made here unless it is given, and a request for a certificate, as PEM. `name` is for people: the
    authority decides on the identity. Raises AuthError for a key that does not parse."""
    key = _parse_key(key_pem) if key_pem else ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return pem_of_key(key), request.public_bytes(serialization.Encoding.PEM)


def _parse_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except ValueError as error:
        raise AuthError(f"a private key does not parse: {error}", details={"field": "key"}) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthError("a private key is not of the kind that members have", details={"field": "key"})
    return key


def pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def parse_certificate(pem: bytes) -> x509.Certificate:
    """Raises AuthError."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise AuthError(f"a certificate does not parse: {error}", details={"field": "certificate"}) from None


def serial_of(certificate: x509.Certificate) -> str:
    """A certificate's serial number in hex digits, as revocations name it."""
    return f"{certificate.serial_number:x}"


def identity_in(certificate: x509.Certificate) -> Identity:
    """The identity of a certificate that was verified. Raises AuthError when it has none, or more than one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        uris = []
    if len(uris) != 1:
        raise AuthError("a certificate without the identity of a member", details={"field": "uri"})
    return Identity.parse(uris[0])


def write_private(path: Path, data: bytes) -> None:
    """Replace a file of mode 0600 at once, durably. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
