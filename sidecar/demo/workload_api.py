"""An embedded SPIFFE Workload API: real gRPC on a real socket, real SVIDs from a CA in memory."""

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from joserfc import jwt
from joserfc.jwk import ECKey
from spiffe._proto import workload_pb2, workload_pb2_grpc


class DemoSpire(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """`entries` are SPIFFE IDs of one trust domain; whoever asks gets them all. `start` and `stop` may alternate."""

    def __init__(self, entries: Sequence[str], svid_seconds: float = 3600.0, jwt_seconds: float = 300.0) -> None:
        self.entries = list(entries)
        self.svid_seconds = svid_seconds
        self.jwt_seconds = jwt_seconds
        self.minted = 0
        """X509-SVIDs so far."""
        self.failure: grpc.StatusCode | None = None
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._jwt_key = ECKey.generate_key("P-256", {"kid": "demo-1"})
        self._ca = self._certificate(None, self._key.public_key(), ca=True)
        self._changed = asyncio.Condition()
        self._generation = 0
        self._ending = 0
        self._server: Any = None

    async def start(self, socket: str) -> None:
        """Listens on `socket` (a path)."""
        self._server = grpc.aio.server()
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(f"unix:{socket}")
        await self._server.start()

    async def stop(self) -> None:
        """As a SPIRE agent that is killed."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def update(self, entries: Sequence[str] | None = None) -> None:
        """Rotates every SVID; with `entries`, changes what is registered."""
        if entries is not None:
            self.entries = list(entries)
        async with self._changed:
            self._generation += 1
            self._changed.notify_all()

    async def end_streams(self) -> None:
        """Ends every stream cleanly."""
        async with self._changed:
            self._ending += 1
            self._changed.notify_all()

    def jwks(self) -> dict[str, Any]:
        """The JWT bundle: what issuers verify JWT-SVIDs with."""
        return {"keys": [self._jwt_key.as_dict(private=False)]}

    # -- the API ------------------------------------------------------------------------------------------------

    async def _admit(self, context: Any) -> None:
        if ("workload.spiffe.io", "true") not in [(k, v) for k, v in context.invocation_metadata()]:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        if self.failure is not None:
            await context.abort(self.failure, "told to fail")
        if not self.entries:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[Any]:
        ending = self._ending
        while True:
            await self._admit(context)
            generation = self._generation
            yield self._x509_response()
            async with self._changed:
                while self._generation == generation and self._ending == ending:
                    await self._changed.wait()
            if self._ending != ending:
                return

    async def FetchJWTSVID(self, request: Any, context: Any) -> Any:
        await self._admit(context)
        if not request.audience:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")
        wanted = [e for e in self.entries if request.spiffe_id in ("", e)]
        if not wanted:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        svids = [workload_pb2.JWTSVID(spiffe_id=e, svid=self.jwt_svid(e, list(request.audience))) for e in wanted]
        return workload_pb2.JWTSVIDResponse(svids=svids)

    def jwt_svid(self, spiffe_id: str, audience: list[str]) -> str:
        """A JWT-SVID (JWT-SVID.md): no `iss`, no `jti`, as SPIRE's by default."""
        now = int(time.time())
        claims = {"sub": spiffe_id, "aud": audience, "iat": now, "exp": now + int(self.jwt_seconds)}
        return jwt.encode({"alg": "ES256", "kid": "demo-1", "typ": "JWT"}, claims, self._jwt_key, algorithms=["ES256"])

    def _x509_response(self) -> Any:
        response = workload_pb2.X509SVIDResponse()
        bundle = self._ca.public_bytes(serialization.Encoding.DER)
        for entry in self.entries:
            key = ec.generate_private_key(ec.SECP256R1())
            leaf = self._certificate(entry, key.public_key(), ca=False)
            self.minted += 1
            response.svids.add(
                spiffe_id=entry,
                x509_svid=leaf.public_bytes(serialization.Encoding.DER),
                x509_svid_key=key.private_bytes(
                    serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
                bundle=bundle,
            )
        return response

    def _certificate(self, spiffe_id: str | None, key: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Demo SPIRE")])
        life = datetime.timedelta(days=1) if ca else datetime.timedelta(seconds=self.svid_seconds)
        uri = spiffe_id or "spiffe://demo.spanlock.test"
        usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
        return (
            x509.CertificateBuilder()
            .subject_name(issuer)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
