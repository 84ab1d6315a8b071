"""A credential as a header's value: rendered once at issue, checked so that it can carry nothing else along (P6). Pure."""

import re

from sidecar.errors import IssuerError, Reason
from sidecar.model.tool import Tool
from sidecar.secret import Secret

_VISIBLE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,16384}[\x21-\x7e])?")


def render(tool: Tool, value: Secret) -> bytes:
    """The full header value. Raises `IssuerError` (credential_unusable) for control, non-ASCII or overlong values."""
    text = value.reveal()
    if not _VISIBLE.fullmatch(text):
        raise IssuerError(
            Reason.CREDENTIAL_UNUSABLE, f"the credential for tool {tool.name} has characters that no header may carry"
        )
    return (tool.prefix + text).encode("ascii")
