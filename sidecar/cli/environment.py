"""The environment of a command run by `exec`: every runtime's proxy and trust variables, inherited ones overridden (N9)."""

from collections.abc import Mapping
from pathlib import Path

_BUNDLES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO", "DENO_CERT", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "NIX_SSL_CERT_FILE", "HTTPLIB2_CA_CERTS",
)  # fmt: skip
"""Variables that replace a runtime's trust store: they get the system's roots and ours."""
_DROPPED = ("ALL_PROXY", "all_proxy", "SSL_CERT_DIR", "NO_PROXY", "no_proxy", "GRPC_ENABLE_FORK_SUPPORT")


def build(inherited: Mapping[str, str], proxy_url: str, bundle: Path, traceparent: str, otlp: str) -> dict[str, str]:
    """`inherited` with ours on top. `otlp`: the sidecar's receiver (http://localhost:PORT), or empty.

    Nothing but that receiver is ever excepted from the proxy.
    """
    environment = {k: v for k, v in inherited.items() if k not in _DROPPED and not k.startswith("OTEL_EXPORTER_OTLP_")}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        environment[name] = proxy_url
    for name in _BUNDLES:
        environment[name] = str(bundle)
    environment["NODE_EXTRA_CA_CERTS"] = str(bundle.parent / "ca.pem")
    environment["NODE_USE_ENV_PROXY"] = "1"
    environment["TRACEPARENT"] = traceparent
    if otlp:
        environment["NO_PROXY"] = environment["no_proxy"] = otlp.removeprefix("http://")
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = otlp
        environment["OTEL_EXPORTER_OTLP_PROTOCOL"] = "http/protobuf"
    return environment
