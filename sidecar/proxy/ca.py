"""The ephemeral certificate authority of interception: P-256, in memory only, gone with the process (L2).

It may sign only for the hosts of configured tools: its certificate is name-constrained to them, and `leaf` refuses others.
A leaf's TLS context costs about 2 ms to build, so contexts are kept in a bounded LRU; all leaves share one key.
"""

import datetime
import os
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sidecar.clock import Clock
from sidecar.errors import CallerError, Reason

MAX_CONTEXTS = 512
_CA_LIFE = datetime.timedelta(days=3650)
"""Longer than any process: it ends with ours, and agents cannot be given another while they run."""
_LEAF_LIFE = datetime.timedelta(days=90)
_LEAF_USED = 45 * 86400.0
"""Seconds after which a leaf is made anew."""
_SKEW = datetime.timedelta(minutes=5)


class CertificateAuthority:
    """Signs server certificates for configured hosts. One an app; hosts that a reload adds need a restart."""

    def __init__(self, hosts: Iterable[str], clock: Clock) -> None:
        self._hosts = frozenset(hosts)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._clock = clock
        self._certificate = self._self_signed()
        self._lock = threading.Lock()  # contexts are built in the loop's thread pool
        self._contexts: OrderedDict[str, tuple[ssl.SSLContext, float]] = OrderedDict()
        """With the monotonic seconds at which each was made."""
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        """What agents must trust. Public."""
        self.fingerprint = self._certificate.fingerprint(hashes.SHA256()).hex()

    def _builder(
        self, name: str, issuer: str, key: ec.EllipticCurvePublicKey, life: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.fromtimestamp(self._clock.now(), tz=datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + life)
        )

    def _self_signed(self) -> x509.Certificate:
        name = "Spanlock ephemeral interception CA"
        public = self._key.public_key()
        builder = (
            self._builder(name, name, public, _CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificate_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if self._hosts:
            builder = builder.add_extension(
                x509.NameConstraints(
                    permitted_subtrees=[_constraint(h) for h in sorted(self._hosts)], excluded_subtrees=None
                ),
                critical=True,
            )
        return builder.sign(self._key, hashes.SHA256())

    def require(self, host: str) -> None:
        """Raises `CallerError` (unknown_tool) for a host that this CA is not constrained to."""
        if host not in self._hosts:
            raise CallerError(Reason.UNKNOWN_TOOL, f"{host} was configured after the start: restart to intercept it")

    def leaf(self, host: str) -> ssl.SSLContext:
        """The server context for `host`. Raises `CallerError` (unknown_tool) for a host that is no tool's.

        The SNI callback only compares: the CONNECT name has picked the leaf, and another or a missing name in the
        ClientHello ends the handshake (H1, H6). For an address it may be missing: clients send no name then (RFC 6066).
        """
        self.require(host)
        with self._lock:
            now = self._clock.monotonic()
            context, made_at = self._contexts.get(host, (None, 0.0))
            if context is None or now - made_at > _LEAF_USED:
                context = self._context(host)
                self._contexts[host] = (context, now)
            self._contexts.move_to_end(host)
            if len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        return context

    def _context(self, host: str) -> ssl.SSLContext:
        name = _general_name(host)
        # OpenSSL takes a common name that looks like a host for one, and an address is in no permitted domain.
        common = f"address {host}" if isinstance(name, x509.IPAddress) else host[:64]
        certificate = (
            self._builder(common, "Spanlock ephemeral interception CA", self._leaf_key.public_key(), _LEAF_LIFE)
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.sni_callback = _compare_sni(host)
        self._load(context, certificate)
        return context

    def _load(self, context: ssl.SSLContext, certificate: x509.Certificate) -> None:
        """`load_cert_chain` takes only files: a memory file that no other process can name serves."""
        pem = certificate.public_bytes(serialization.Encoding.PEM) + self._leaf_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)


def _compare_sni(host: str) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]:
    by_address = isinstance(_general_name(host), x509.IPAddress)

    def compare(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> int | None:
        agrees = by_address if name is None else name.lower().rstrip(".") == host
        return None if agrees else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    return compare


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _constraint(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_network(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, certificate_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=certificate_sign, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
