"""The SPIFFE Workload API, spoken with grpc.aio. Translates gRPC's errors here; nothing above sees them.

The `spiffe` package's own client is threaded, raises when the socket file is not there yet, and ends for good on a clean
end of stream; its types, parsers and generated code are used (SPIFFE_Workload_API.md, SPIFFE_Workload_Endpoint.md).
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from spiffe import X509Svid
from spiffe._proto import workload_pb2, workload_pb2_grpc
from spiffe.errors import PySpiffeError

from sidecar.errors import IdentityError, Reason
from sidecar.secret import Secret
from sidecar.tasks import told_to_end

_SECURITY_HEADER = (("workload.spiffe.io", "true"),)
_MAX_MESSAGE = 16 * 1024 * 1024
"""Bytes: many federated bundles pass gRPC's default of 4 MiB."""
_JWT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class HeldSvid:
    """What is kept of an X509-SVID. Its private key is not: nothing here needs it."""

    spiffe_id: str
    hint: str
    expires_at: float
    """Wall seconds."""


class WorkloadApi:
    """One channel to the SPIRE agent. `aclose` ends it; `reopen` makes a new one after an outage."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel | None = None

    def _stub(self) -> Any:
        if self._channel is None:
            target = self.address.removeprefix("tcp://")
            options = [
                ("grpc.max_receive_message_length", _MAX_MESSAGE),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.enable_http_proxy", 0),
            ]
            self._channel = grpc.aio.insecure_channel(target, options=options)
        return workload_pb2_grpc.SpiffeWorkloadAPIStub(self._channel)  # type: ignore[no-untyped-call]

    async def reopen(self) -> None:
        """Drops the channel: SPIRE attests whoever opened it, and an old one may point at an agent that is gone."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def x509_svids(self) -> AsyncIterator[list[HeldSvid]]:
        """Each message is the full state. Ends when the stream does; raises `IdentityError`."""
        stream = self._stub().FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=_SECURITY_HEADER)
        try:
            async for message in stream:
                yield [_held(svid) for svid in message.svids]
        except grpc.aio.AioRpcError as error:
            raise self._told(error) from None
        finally:
            stream.cancel()

    async def jwt_svid(self, spiffe_id: str, audience: str) -> Secret:
        """A fresh JWT-SVID from the SPIRE agent (which may hand out a cached one). Raises `IdentityError`."""
        request = workload_pb2.JWTSVIDRequest(audience=[audience], spiffe_id=spiffe_id)
        try:
            answer = await self._stub().FetchJWTSVID(request, metadata=_SECURITY_HEADER, timeout=_JWT_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise self._told(error) from None
        except asyncio.CancelledError:
            if told_to_end():
                raise
            # `reopen` closed the channel under this call: the stream beside it had ended.
            raise IdentityError(Reason.SPIRE_UNAVAILABLE, "the connection to the SPIFFE Workload API ended") from None
        for svid in answer.svids:
            if svid.spiffe_id == spiffe_id:
                return Secret(svid.svid)
        raise IdentityError(Reason.NO_IDENTITY, f"SPIRE issued no JWT-SVID for {spiffe_id}")

    def _told(self, error: grpc.aio.AioRpcError) -> IdentityError:
        """gRPC's error in our words, with the address: a wrong one is what most often is wrong."""
        match error.code():
            case grpc.StatusCode.PERMISSION_DENIED:
                return IdentityError(
                    Reason.NO_IDENTITY, "SPIRE: no identity issued; check the registration entry and selectors"
                )
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.UNIMPLEMENTED:
                what = f"{self.address} does not speak the SPIFFE Workload API"
                return IdentityError(Reason.SPIRE_UNAVAILABLE, what)
            case code:
                why = _unreachable(self.address, code)
                return IdentityError(
                    Reason.SPIRE_UNAVAILABLE, f"the SPIFFE Workload API does not answer at {self.address} ({why})"
                )

    async def aclose(self) -> None:
        """Ends the channel."""
        await self.reopen()


def _held(svid: Any) -> HeldSvid:
    try:
        parsed = X509Svid.parse_raw(svid.x509_svid, svid.x509_svid_key)
    except PySpiffeError:
        raise IdentityError(Reason.NO_IDENTITY, "SPIRE sent an X509-SVID that is not valid") from None
    return HeldSvid(str(parsed.spiffe_id), svid.hint, parsed.leaf.not_valid_after_utc.timestamp())


def _unreachable(address: str, code: grpc.StatusCode) -> str:
    """gRPC says `unavailable` of everything: what can be seen of the socket from here is said instead."""
    path = address.removeprefix("unix://")
    if path != address:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return "it is not a socket"
        except OSError as error:
            return str(error.strerror)
        if not os.access(path, os.R_OK | os.W_OK):
            return f"uid {os.geteuid()} may not open it"
    return str(code.name).lower()
