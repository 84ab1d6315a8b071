"""Where a credential may travel to (N1, N2, N6)."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from sidecar.errors import Reason, UpstreamError
from sidecar.model.tool import Authority, Tool
from sidecar.proxy.egress import addresses, is_public

REFUSED = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "169.254.169.254",
    "169.254.170.2", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.9",
    "198.18.0.1", "192.0.0.192", "192.88.99.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
    "fec0::1", "3fff::1", "3fff:fff::1", "5f00::1", "100::1", "4000::1", "1fff::1", "64:ff9b:2::1", "fe00::1", "2001:2::1",
]  # fmt: skip
EMBEDDED = [
    "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::a00:1",
    "64:ff9b:1:7f00:0:100:808:808", "64:ff9b:1::8.8.8.8", "64:ff9b:1:ffff::1", "::ffff:0:7f00:1", "::ffff:0:a00:1", "::ffff:0:8.8.8.8",
    "2002:a00:1::", "2002:7f00:1::1", "2001:0:4136:e378:8000:63bf:f5ff:fffe", "2606:4700::5efe:10.0.0.1",
    "2606:4700::200:5efe:192.168.0.1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("text", REFUSED)
def test_n1_private_and_special_addresses_are_refused(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", EMBEDDED)
def test_n2_private_ipv4_inside_ipv6_is_refused(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_n1_global_addresses_are_allowed(text: str) -> None:
    assert is_public(ip_address(text))


def tool(**changes: object) -> Tool:
    return Tool(name="t", scheme="https", authority=Authority("tool.test", 443), issuer="i", **changes)  # type: ignore[arg-type]


async def answer(*texts: str, asked: list[str] | None = None, of: Tool | None = None) -> list[str]:
    async def resolve(host: str, port: int) -> list[str]:
        if asked is not None:
            asked.append(host)
        return list(texts)

    return await addresses(of or tool(), resolve)


@pytest.mark.parametrize("text", REFUSED + EMBEDDED)
async def test_n1_as_dns_answer(text: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        await answer(text)
    assert caught.value.reason is Reason.ADDRESS_REFUSED


async def test_n1_one_private_answer_among_public_ones_is_refused() -> None:
    with pytest.raises(UpstreamError):
        await answer("1.1.1.1", "10.0.0.1")
    assert await answer("1.1.1.1", "8.8.8.8") == ["1.1.1.1", "8.8.8.8"]


async def test_a_listed_network_is_allowed_for_its_tool_only() -> None:
    listed = tool(allow_networks=(ip_network("10.1.0.0/16"),))
    assert await answer("10.1.2.3", of=listed) == ["10.1.2.3"]
    assert await answer("::ffff:10.1.2.3", of=listed) == ["::ffff:10.1.2.3"]
    for other in ("10.2.2.3", "64:ff9b:1::a01:203", "::ffff:0:10.1.2.3"):
        with pytest.raises(UpstreamError):
            await answer(other, of=listed)
    local_nat64 = tool(allow_networks=(ip_network("64:ff9b:1::/48"),))
    assert await answer("64:ff9b:1::a01:203", of=local_nat64) == ["64:ff9b:1::a01:203"]


async def test_a_fixed_address_asks_no_resolver() -> None:
    asked: list[str] = []
    assert await answer("1.1.1.1", asked=asked, of=tool(address="127.0.0.1")) == ["127.0.0.1"]
    assert asked == []


async def test_h4_plain_http_is_dialled_on_this_machine_only() -> None:
    """By address, whatever the name promised."""
    plain = replace(tool(), scheme="http", authority=Authority("localhost", 80))
    far = replace(plain, allow_networks=(ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8")))
    for answers in (["1.1.1.1"], ["10.0.0.1"], ["127.0.0.1", "10.0.0.1"]):
        with pytest.raises(UpstreamError) as caught:
            await answer(*answers, of=far)
        assert caught.value.reason is Reason.CLEARTEXT_REFUSED
        assert await answer(*answers, of=replace(far, allow_cleartext=True)) == answers
    with pytest.raises(UpstreamError) as caught:
        await answer(of=replace(plain, address="203.0.113.7"))
    assert caught.value.reason is Reason.CLEARTEXT_REFUSED
    assert await answer(
        "127.0.0.1", "::1", of=replace(plain, allow_networks=(ip_network("127.0.0.0/8"), ip_network("::1/128")))
    )
    assert await answer(of=replace(plain, address="127.0.0.2")) == ["127.0.0.2"]
    assert await answer(of=replace(plain, address="203.0.113.7", allow_cleartext=True)) == ["203.0.113.7"]


async def test_names_that_do_not_resolve() -> None:
    with pytest.raises(UpstreamError) as caught:
        await answer()
    assert caught.value.reason is Reason.DNS_FAILED
