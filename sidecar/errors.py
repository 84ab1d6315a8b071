"""Every way in which Spanlock says no: one exception family by whose fault it is, one stable reason each.

The reason is the same word in the response body, the `x-spanlock-reason` header, the audit record, the metric
label and `spanlock explain`. No HTTP or gRPC in here: `proxy/rescue.py` and `control/rescue.py` each own one
table from reason to status, and a test asserts that every reason has its row.
"""

from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """Stable words that users may match on. Never renamed, never reused."""

    # The caller's request
    MALFORMED_REQUEST = "malformed_request"
    REQUEST_TOO_LARGE = "request_too_large"
    METHOD_REFUSED = "method_refused"
    UPGRADE_REFUSED = "upgrade_refused"
    EARLY_DATA = "early_data"
    AUTHORITY_MISMATCH = "authority_mismatch"
    CROSS_SITE = "cross_site"
    AMBIGUOUS_PATH = "ambiguous_path"
    FOREIGN_CREDENTIAL = "foreign_credential"
    UNKNOWN_TOOL = "unknown_tool"
    CLEARTEXT_REFUSED = "cleartext_refused"
    REQUEST_TIMEOUT = "request_timeout"
    CLIENT_GONE = "client_gone"
    # Who and within which workflow
    UNKNOWN_CALLER = "unknown_caller"
    HANDLE_INVALID = "handle_invalid"
    NO_WORKFLOW = "no_workflow"
    WORKFLOW_CLOSED = "workflow_closed"
    WORKFLOW_UNKNOWN = "workflow_unknown"
    TOO_MANY_WORKFLOWS = "too_many_workflows"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    TOO_MANY_LEASES = "too_many_leases"
    INVALID_ARGUMENT = "invalid_argument"
    # Policy
    POLICY_DENIED = "policy_denied"
    POLICY_ERROR = "policy_error"
    EXPORT_REFUSED = "export_refused"
    # Identity
    NO_IDENTITY = "no_identity"
    SVID_EXPIRED = "svid_expired"
    SPIRE_UNAVAILABLE = "spire_unavailable"
    # Issuer and lease
    ISSUER_UNAVAILABLE = "issuer_unavailable"
    ISSUER_REFUSED = "issuer_refused"
    ISSUER_MALFORMED = "issuer_malformed"
    SECRET_UNAVAILABLE = "secret_unavailable"
    CREDENTIAL_UNUSABLE = "credential_unusable"
    LEASE_GONE = "lease_gone"
    USES_EXHAUSTED = "uses_exhausted"
    # Upstream
    DNS_FAILED = "dns_failed"
    ADDRESS_REFUSED = "address_refused"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_TLS = "upstream_tls"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    UPSTREAM_MALFORMED = "upstream_malformed"
    UPSTREAM_CLOSED = "upstream_closed"
    # Ourselves
    CONFIG_INVALID = "config_invalid"
    POLICY_INVALID = "policy_invalid"
    DRAINING = "draining"
    INTERNAL = "internal_error"


class SpanlockError(Exception):
    """Base of every refusal. `detail` is one sentence for the user: what happened and, where it can, the fix.

    Never holds a secret value, a token, or text that a foreign server sent.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CallerError(SpanlockError):
    """The agent's request cannot be served as it is."""


class Denied(SpanlockError):
    """Policy said no, or could not say yes."""


class IdentityError(SpanlockError):
    """There is no unexpired identity for this agent."""


class IssuerError(SpanlockError):
    """The credential's issuer refused, failed, or answered nonsense."""


class AnswerLost(IssuerError):
    """The request may have reached the issuer and its answer was never seen: a credential may exist that nobody holds."""


class UpstreamError(SpanlockError):
    """The tool could not be reached safely, or broke the protocol."""


class ConfigError(SpanlockError):
    """The operator's configuration or policy is wrong; `detail` names the key and the fix."""


class Explanation(NamedTuple):
    """What `spanlock explain` prints."""

    meaning: str
    fix: str


EXPLANATIONS: dict[Reason, Explanation] = {
    Reason.MALFORMED_REQUEST: Explanation(
        "The request breaks HTTP/1.1 in a way that two parsers could read differently.",
        "Send one Host, one framing (Content-Length or chunked), no folded headers, CRLF line ends.",
    ),
    Reason.REQUEST_TOO_LARGE: Explanation(
        "The request's head is over the limit.",
        "Send fewer or shorter headers (limit 64 KiB, 128 fields).",
    ),
    Reason.METHOD_REFUSED: Explanation(
        "The method is refused here: TRACE and TRACK echo credentials, CONNECT inside a tunnel hides the destination.",
        "Use another method; tunnel once, to the tool itself.",
    ),
    Reason.UPGRADE_REFUSED: Explanation(
        "Protocol upgrades (h2c, WebSocket) and HTTP/2 without negotiation are refused on this listener.",
        "Speak HTTP/1.1 to the proxy.",
    ),
    Reason.EARLY_DATA: Explanation(
        "Bytes followed CONNECT before the proxy answered it.", "Wait for the 200 before the TLS handshake."
    ),
    Reason.AUTHORITY_MISMATCH: Explanation(
        "CONNECT target, TLS server name and Host do not name one destination.",
        "Send the same name in all of them. If the client is unmodified, something is trying to redirect a credential.",
    ),
    Reason.CROSS_SITE: Explanation(
        "A web page of another site sent this to the base-URL listener by way of a browser here.",
        "Call from a program, without an Origin or Sec-Fetch-Site of another site.",
    ),
    Reason.AMBIGUOUS_PATH: Explanation(
        "The path could be read in two ways (dot segments, doubled slashes, ';', an escape that is not needed or not UTF-8).",
        "Send the canonical path: letters, digits and -._~ as they are, what else is escaped as UTF-8 in upper-case hex "
        "(%C3%A9), and never a slash, backslash, dot, percent sign, ';' or control escaped.",
    ),
    Reason.FOREIGN_CREDENTIAL: Explanation(
        "The query has a credential of the agent's own beside the one that is injected.",
        "Leave access_token, client_secret, api_key and apikey out of the query; the sidecar sends the credential.",
    ),
    Reason.UNKNOWN_TOOL: Explanation(
        "The destination is not a configured tool, and there is no passthrough.",
        "Add it under `tools:` in spanlock.yaml, with its policy, and reload.",
    ),
    Reason.CLEARTEXT_REFUSED: Explanation(
        "A credential would have travelled over plain http to a host that is not this machine.",
        "Use https, or set `allow_cleartext: true` on the tool if the path to it is protected.",
    ),
    Reason.REQUEST_TIMEOUT: Explanation(
        "The request's head or body did not arrive in time, or its answer was not read.", "Send and read faster."
    ),
    Reason.CLIENT_GONE: Explanation(
        "The agent closed its connection before the answer was complete.", "Nothing to do."
    ),
    Reason.UNKNOWN_CALLER: Explanation(
        "The connecting process's uid belongs to no declared agent.", "Declare the agent's `uid` in spanlock.yaml."
    ),
    Reason.HANDLE_INVALID: Explanation(
        "A handle was presented that is unknown, closed, or bound to another caller or tool.",
        "Open a workflow and use its own handle; a handle dies with its workflow.",
    ),
    Reason.NO_WORKFLOW: Explanation(
        "The call belongs to no open workflow of this caller.",
        "Run under `spanlock exec`, use `sidecar.client.workflow.workflow()`, or send the workflow's handle or traceparent.",
    ),
    Reason.WORKFLOW_CLOSED: Explanation(
        "The workflow ended; its credentials are dropped.", "Open a new workflow for new work."
    ),
    Reason.WORKFLOW_UNKNOWN: Explanation(
        "No such workflow belongs to this agent.", "Check the id with `spanlock workflows`."
    ),
    Reason.TOO_MANY_WORKFLOWS: Explanation(
        "The limit of open workflows is reached.",
        "Close finished workflows, or raise `workflows.max_open` or `workflows.max_open_per_agent`.",
    ),
    Reason.TOO_MANY_CONNECTIONS: Explanation(
        "The limit of open connections is reached.", "Close idle connections, or raise `limits.connections`."
    ),
    Reason.TOO_MANY_LEASES: Explanation(
        "The limit of leases is reached.", "Close finished workflows, or raise `credentials.max_leases`."
    ),
    Reason.INVALID_ARGUMENT: Explanation("A field of the call is missing or malformed.", "The detail names the field."),
    Reason.POLICY_DENIED: Explanation(
        "No policy permits this, or one forbids it. The default is deny.",
        "Add or widen a Cedar policy; the audit record names agent, action, tool and the policies that decided.",
    ),
    Reason.POLICY_ERROR: Explanation(
        "A policy failed while it was evaluated; any error denies.", "Fix the policy; `spanlock check` validates it."
    ),
    Reason.EXPORT_REFUSED: Explanation(
        "The tool does not allow the real token to leave the sidecar.",
        "Use the handle that Exchange returns, or set `export: true` on the tool.",
    ),
    Reason.NO_IDENTITY: Explanation(
        "SPIRE issues no identity for this agent.",
        "Check the registration entry and its selectors; see `spanlock status`.",
    ),
    Reason.SVID_EXPIRED: Explanation(
        "The agent's SVID has expired and could not be renewed.", "Check the SPIRE agent and the registration entry."
    ),
    Reason.SPIRE_UNAVAILABLE: Explanation(
        "The SPIFFE Workload API does not answer and no usable SVID is held.",
        "Check the SPIRE agent and `spiffe.socket`.",
    ),
    Reason.ISSUER_UNAVAILABLE: Explanation(
        "The token service could not be reached, or answered with a server error.",
        "Check the issuer; calls recover by themselves.",
    ),
    Reason.ISSUER_REFUSED: Explanation(
        "The token service refused the exchange.", "Check client registration, audience and scopes at the issuer."
    ),
    Reason.ISSUER_MALFORMED: Explanation(
        "The token service's answer is not what RFC 8693 requires; nothing of it was used.",
        "Check the issuer's configuration.",
    ),
    Reason.SECRET_UNAVAILABLE: Explanation(
        "The static secret's file or variable is missing, empty or malformed.",
        "Fix `secret_file` or `secret_env` of the issuer.",
    ),
    Reason.CREDENTIAL_UNUSABLE: Explanation(
        "The credential expires too soon, or its value cannot be carried in a header safely.",
        "Check the issuer's token lifetime.",
    ),
    Reason.LEASE_GONE: Explanation(
        "The lease was dropped, withdrawn or released while the call was on its way.",
        "Try again; a new lease is decided afresh.",
    ),
    Reason.USES_EXHAUSTED: Explanation(
        "The workflow has used this tool as often as it may.", "Raise `max_uses` of the tool, or open a new workflow."
    ),
    Reason.DNS_FAILED: Explanation("The tool's name did not resolve.", "Check DNS, or set the tool's `address`."),
    Reason.ADDRESS_REFUSED: Explanation(
        "The tool's name resolves to an address that is not public, or to the sidecar itself.",
        "If that is intended, list the network under the tool's `allow_networks`.",
    ),
    Reason.UPSTREAM_UNREACHABLE: Explanation(
        "The tool refused or dropped the connection.", "Check that the tool is up."
    ),
    Reason.UPSTREAM_TLS: Explanation(
        "The tool's certificate is not valid for its name.",
        "Fix the certificate, or set the tool's `ca_file`. It cannot be switched off.",
    ),
    Reason.UPSTREAM_TIMEOUT: Explanation(
        "The tool did not connect or answer in time.", "Raise the tool's `timeouts`, or check it."
    ),
    Reason.UPSTREAM_MALFORMED: Explanation("The tool's answer breaks HTTP/1.1.", "Check the tool."),
    Reason.UPSTREAM_CLOSED: Explanation(
        "The tool closed the connection before its answer was complete.", "Check the tool."
    ),
    Reason.CONFIG_INVALID: Explanation(
        "The configuration is not valid.", "`spanlock check` names the key and the fix."
    ),
    Reason.POLICY_INVALID: Explanation("The policy is not valid.", "`spanlock check` names the policy and the fix."),
    Reason.DRAINING: Explanation("The sidecar is shutting down.", "Try again after its restart."),
    Reason.INTERNAL: Explanation(
        "A bug in Spanlock; the call was refused.", "Report it with the log line of this flow."
    ),
}
