"""The interception CA over a long life: leaves are renewed in time, and the CA outlives any process."""

import asyncio
import datetime
import ipaddress
import socket
import ssl

import pytest
from cryptography import x509

from sidecar.clock import SystemClock
from sidecar.proxy.ca import CertificateAuthority
from tests.fakes.clock import FakeClock
from tests.stage import client, opened, port_of, ready_stage, tunnel


def shaken(context: ssl.SSLContext, ca_pem: str, name: str) -> ssl.SSLObject:
    """A client that has verified the certificate for `name`, by a real handshake in memory."""
    trust = ssl.create_default_context(cadata=ca_pem)
    trust.verify_flags &= ~ssl.VERIFY_X509_STRICT
    ins, outs = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(ins, outs, server_hostname=name)
    server = context.wrap_bio(outs, ins, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    return client


def leaf_of(context: ssl.SSLContext, ca_pem: str) -> x509.Certificate:
    """The certificate that a client gets and verifies."""
    client = shaken(context, ca_pem, "api.x.com")
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


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::1"])
def test_an_address_needs_no_server_name(host: str) -> None:
    """TLS clients send none for an IP literal (RFC 6066 has no room for it); the certificate is verified for it."""
    authority = CertificateAuthority([host, "api.x.com"], SystemClock())
    assert shaken(authority.leaf(host), authority.pem, host).getpeercert() is not None
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        shaken(authority.leaf("api.x.com"), authority.pem, host)
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        shaken(authority.leaf(host), authority.pem, "api.x.com")


def test_l2_the_ca_cannot_vouch_for_a_host_outside_the_policy() -> None:
    """Whoever got at its key could sign anything, and a client that trusts it would still not believe it."""
    authority = CertificateAuthority(["api.x.com", "203.0.113.7"], SystemClock())
    root = x509.load_pem_x509_certificate(authority.pem.encode())
    constraints = root.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical and constraints.value.permitted_subtrees == [
        x509.IPAddress(ipaddress.ip_network("203.0.113.7")), x509.DNSName("api.x.com"),
    ]  # fmt: skip
    assert shaken(authority.leaf("api.x.com"), authority.pem, "api.x.com").getpeercert() is not None
    for stranger in ("evil.test", "x.com", "203.0.113.8"):
        forged = authority._context(stranger)
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            shaken(forged, authority.pem, stranger)


async def test_a_tool_that_is_named_by_an_address_is_intercepted() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    seen: list[bytes] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = (
        f"- {{{{name: literal, url: 'https://127.0.0.1:{port}', issuer: demo-issuer, audience: tool-search, "
        'allow_networks: [127.0.0.0/8], ca_file: "{dir}/tools-ca.pem"}}\n'
    )
    async with ready_stage(more=more, policy_for=("literal",)) as stage:
        tool = await asyncio.start_server(serve, "127.0.0.1", port, ssl=stage.pki.server_context("127.0.0.1"))
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            answer = await agent.get(f"https://127.0.0.1:{port}/x")
        assert (answer.status_code, answer.text) == (200, "ok")
        assert seen[0].startswith(b"GET /x ") and b"authorization: Bearer ey" in seen[0]
        stage.search.host, stage.search.port = "127.0.0.1", port
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with tunnel(stage, port_of(workflow.proxy_url), stage.search, sni="reports.tool.test"):
                pass
        tool.close()
