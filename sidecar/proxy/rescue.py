"""How a refusal looks to the agent: one table from reason to status, one body. The only place that knows both."""

import json

from sidecar.errors import EXPLANATIONS, Reason, SpanlockError

STATUS: dict[Reason, int] = {
    Reason.MALFORMED_REQUEST: 400,
    Reason.REQUEST_TOO_LARGE: 431,
    Reason.METHOD_REFUSED: 405,
    Reason.UPGRADE_REFUSED: 400,
    Reason.EARLY_DATA: 400,
    Reason.AUTHORITY_MISMATCH: 403,
    Reason.CROSS_SITE: 403,
    Reason.AMBIGUOUS_PATH: 400,
    Reason.FOREIGN_CREDENTIAL: 400,
    Reason.UNKNOWN_TOOL: 403,
    Reason.CLEARTEXT_REFUSED: 403,
    Reason.REQUEST_TIMEOUT: 408,
    Reason.CLIENT_GONE: 499,
    Reason.UNKNOWN_CALLER: 403,
    Reason.HANDLE_INVALID: 407,
    Reason.NO_WORKFLOW: 403,
    Reason.WORKFLOW_CLOSED: 403,
    Reason.WORKFLOW_UNKNOWN: 404,
    Reason.TOO_MANY_WORKFLOWS: 429,
    Reason.TOO_MANY_CONNECTIONS: 503,
    Reason.TOO_MANY_LEASES: 503,
    Reason.INVALID_ARGUMENT: 400,
    Reason.POLICY_DENIED: 403,
    Reason.POLICY_ERROR: 403,
    Reason.EXPORT_REFUSED: 403,
    Reason.NO_IDENTITY: 503,
    Reason.SVID_EXPIRED: 503,
    Reason.SPIRE_UNAVAILABLE: 503,
    Reason.ISSUER_UNAVAILABLE: 503,
    Reason.ISSUER_REFUSED: 502,
    Reason.ISSUER_MALFORMED: 502,
    Reason.SECRET_UNAVAILABLE: 503,
    Reason.CREDENTIAL_UNUSABLE: 502,
    Reason.LEASE_GONE: 503,
    Reason.USES_EXHAUSTED: 429,
    Reason.DNS_FAILED: 502,
    Reason.ADDRESS_REFUSED: 403,
    Reason.UPSTREAM_UNREACHABLE: 502,
    Reason.UPSTREAM_TLS: 502,
    Reason.UPSTREAM_TIMEOUT: 504,
    Reason.UPSTREAM_MALFORMED: 502,
    Reason.UPSTREAM_CLOSED: 502,
    Reason.CONFIG_INVALID: 500,
    Reason.POLICY_INVALID: 500,
    Reason.DRAINING: 503,
    Reason.INTERNAL: 500,
}

_PHRASES = {
    400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 407: "Proxy Authentication Required",
    408: "Request Timeout", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 499: "Client Closed Request",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


def response(error: SpanlockError, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """The whole answer for `error`: problem+json (RFC 9457) with the stable reason and the fix."""
    status = STATUS[error.reason]
    body = json.dumps(
        {
            "type": f"urn:spanlock:reason:{error.reason}",
            "title": EXPLANATIONS[error.reason].meaning,
            "status": status,
            "reason": error.reason,
            "detail": error.detail,
            "fix": EXPLANATIONS[error.reason].fix,
        }
    ).encode()
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        "content-type: application/problem+json",
        f"content-length: {len(body)}",
        f"x-spanlock-reason: {error.reason}",
        "cache-control: no-store",
    ]
    if status == 407:
        lines.append('proxy-authenticate: Basic realm="spanlock workflow"')
    if status == 503:
        lines.append("retry-after: 1")
    lines.append("connection: keep-alive" if keep_alive else "connection: close")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    return head if head_only else head + body
