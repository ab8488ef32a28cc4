"""The cluster's certificate authority: a key that signs what its members are. Kept on the master's host alone."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pscluster.errors import AuthError, StateError, StorageError
from pscluster.security.credentials import (
    BACKDATED_S,
    Credentials,
    new_request,
    parse_certificate,
    pem_of_key,
    write_private,
)
from pscluster.security.identity import LISTENING, Identity, dns_name_of

CERTIFICATE, KEY = "ca.pem", "ca.key"
CLUSTER_ID = "cluster-id"
_CA_LIFE = datetime.timedelta(days=3650)
_BACKDATED = datetime.timedelta(seconds=BACKDATED_S)


class Authority:
    """Signs certificates. Holds the key; safe to use from several threads."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, cluster_id: str) -> None:
        self._key = key
        self._certificate = certificate
        self.cluster_id = cluster_id
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.sha256 = sha256_of(certificate)

    @classmethod
    def create(cls, directory: Path, cluster_id: str) -> Authority:
        """Make a new authority, valid for ten years, and store it: mode 0600 in a directory of mode 0700. Blocks.
        Raises StateError when there is one, StorageError."""
        if (directory / CERTIFICATE).exists() or (directory / KEY).exists():
            raise StateError(
                f"{directory} has a certificate authority already",
                action="keep it: every member's certificate would be void with another",
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pscluster {cluster_id}")])
        now = datetime.datetime.now(datetime.UTC)
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + _CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        made = cls(key, certificate, cluster_id)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            write_private(directory / KEY, pem_of_key(key))
            write_private(directory / CERTIFICATE, made.certificate_pem)
        except OSError as error:
            raise StorageError(f"cannot write in {directory}: {error.strerror}") from None
        return made

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """What `create` stored. Blocks. Raises AuthError when it is missing, open to others, or damaged."""
        try:
            mode = (directory / KEY).stat().st_mode
            key_pem, certificate_pem = (directory / KEY).read_bytes(), (directory / CERTIFICATE).read_bytes()
        except OSError as error:
            raise AuthError(f"cannot read the certificate authority in {directory}: {error.strerror}") from None
        if mode & 0o077:
            raise AuthError(f"others may read {directory / KEY}", action=f"chmod 600 {directory / KEY}")
        certificate = parse_certificate(certificate_pem)
        try:
            key = serialization.load_pem_private_key(key_pem, None)
        except ValueError as error:
            raise AuthError(f"{directory / KEY} does not parse: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise AuthError(f"{directory / KEY} is not the key of {CERTIFICATE}")
        name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        return cls(key, certificate, name.removeprefix("pscluster "))

    def sign(self, csr_pem: bytes, identity: Identity, lifetime_s: float) -> bytes:
        """A certificate, as PEM, for the public key of a request; nothing else of the request is used. Raises AuthError
        when the request does not parse, is not signed by its key, or asks for a key other than P-256."""
        try:
            request = x509.load_pem_x509_csr(csr_pem)
            valid = request.is_signature_valid
            key = request.public_key()
        except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise AuthError(f"a certificate request does not parse: {error}", details={"field": "csr"}) from None
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != ec.SECP256R1.name:
            raise AuthError("a certificate request must be signed by its P-256 key", details={"field": "csr"})
        return self._signed(key, identity, lifetime_s)

    def issue(self, identity: Identity, lifetime_s: float) -> Credentials:
        """A new key with its certificate."""
        key_pem, csr_pem = new_request(identity.name)
        return Credentials(
            key_pem=key_pem,
            certificate_pem=self.sign(csr_pem, identity, lifetime_s),
            authority_pem=self.certificate_pem,
        )

    def _signed(self, key: ec.EllipticCurvePublicKey, identity: Identity, lifetime_s: float) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        names += [x509.DNSName(dns_name_of(identity.role))] if identity.role in LISTENING else []
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + datetime.timedelta(seconds=lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def sha256_of(certificate: x509.Certificate) -> str:
    """Hex digest of a certificate's DER form, as join tokens carry it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def cluster_id_of(state_dir: Path) -> str:
    """The id of the cluster of a master's state directory, made and stored at the first call. Blocks. Raises
    StorageError."""
    path = state_dir / CLUSTER_ID
    try:
        if path.exists():
            return path.read_text(encoding="ascii").strip()
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = secrets.token_hex(8)
        write_private(path, f"{made}\n".encode())
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read or write {path}: {error}") from None
    return made
