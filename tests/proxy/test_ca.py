"""The interception CA over a long life: leaves are renewed in time, and the CA outlives any process."""

import datetime
import ssl

from cryptography import x509

from sidecar.proxy.ca import CertificateAuthority
from tests.fakes.clock import FakeClock


def leaf_of(context: ssl.SSLContext, ca_pem: str) -> x509.Certificate:
    """The certificate that a client gets, verified by a real handshake in memory."""
    trust = ssl.create_default_context(cadata=ca_pem)
    trust.verify_flags &= ~ssl.VERIFY_X509_STRICT
    ins, outs = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(ins, outs, server_hostname="api.x.com")
    server = context.wrap_bio(outs, ins, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    der = client.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


async def test_a_leaf_is_made_anew_long_before_it_expires() -> None:
    clock = FakeClock(now=datetime.datetime.now(datetime.UTC).timestamp())
    authority = CertificateAuthority(["api.x.com"], clock)
    first = authority.leaf("api.x.com")
    certificate = leaf_of(first, authority.pem)
    await clock.advance(40 * 86400)
    assert authority.leaf("api.x.com") is first, "kept: making one costs 2 ms"
    await clock.advance(10 * 86400)
    assert authority.leaf("api.x.com") is not first
    assert certificate.not_valid_after_utc.timestamp() > clock.now()
    root = x509.load_pem_x509_certificate(authority.pem.encode())
    assert root.not_valid_after_utc.timestamp() > clock.now() + 5 * 365 * 86400
