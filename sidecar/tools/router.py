"""Which tool a call is for, by exact authority or by name, and the one canonical path that is both matched and sent (D7)."""

import re
from collections.abc import Iterable

from sidecar.errors import CallerError, Reason
from sidecar.model.policy import DELIMITERS, without_parameters
from sidecar.model.tool import Authority, Route, Tool

_MEMO, _MEMO_TARGET = 4096, 1024
"""Routes remembered, and the longest target of one; they come from the agent, so the memo is emptied when full."""
_PLAIN = r"[A-Za-z0-9\-._~!$&'()*+,=:@/]"
_TAIL = "%[89AB][0-9A-F]"
_ESCAPES = (
    DELIMITERS,
    "%(?:2[023]|3[CEF]|5[BDE]|60|7[BCD])",  # of ASCII: space "#<>?[]^`{|}, which cannot stand as they are
    "%C2%[AB][0-9A-F]",  # from here on UTF-8 (RFC 3629), without the controls U+0080 to U+009F
    f"%(?:C[3-9A-F]|D[0-9A-F]){_TAIL}",
    f"%E0%[AB][0-9A-F]{_TAIL}",
    f"%(?:E[1-9A-CEF]{_TAIL}|ED%[89][0-9A-F]){_TAIL}",
    f"%(?:F0%[9AB][0-9A-F]|F[123]{_TAIL}|F4%8[0-9A-F]){_TAIL}{_TAIL}",
)
_SPELT = re.compile(f"(?:{_PLAIN}++|{'|'.join(_ESCAPES)})*+".encode())
_SPELT_WITH_PARAMETERS = re.compile(f"(?:(?:{_PLAIN}|;)++|{'|'.join(_ESCAPES)})*+".encode())
_AMBIGUOUS = re.compile(r"//|/\.{1,2}(?:/|$)")


def _letters(word: str) -> str:
    """A pattern of `word` in a query, where any letter may be escaped."""
    return "".join(f"(?:{letter}|%{ord(letter):02x}|%{ord(letter.upper()):02x})" for letter in word)


_OTHER = "(?:[^0-9a-z%&;=]|%(?:[012][0-9a-f]|3[a-f]|40|5[b-f]|60|7[b-f]))"
"""No letter or digit: servers make one character of many of these, and cut them off at the ends."""
_NAMES = [
    f"{_letters('access')}{_OTHER}{_letters('token')}",
    f"{_letters('client')}{_OTHER}{_letters('secret')}",
    f"{_letters('api')}{_OTHER}?{_letters('key')}",
]
_CREDENTIAL = re.compile(f"(?i)(?:^|[&;]){_OTHER}*+(?=[ac%])(?:{'|'.join(_NAMES)}){_OTHER}*+(?:[=&;]|$)".encode())


class Router:
    """Compiled from the configured tools; a reload makes a new one. Look-ups do not grow with the number of tools."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools: tuple[Tool, ...] = tuple(tools)
        self._by_name = {tool.name: tool for tool in self.tools}
        self._by_segment = {tool.name.encode(): tool for tool in self.tools}
        self._by_authority = {(tool.authority, tool.scheme): tool for tool in self.tools}
        self._memo: dict[tuple[str, bytes], Route] = {}

    def by_name(self, name: str) -> Tool:
        """Raises `CallerError` (unknown_tool)."""
        tool = self._by_name.get(name)
        if tool is None:
            raise CallerError(Reason.UNKNOWN_TOOL, "no tool of this name is configured")
        return tool

    def by_segment(self, segment: bytes) -> Tool:
        """The tool that the first segment of a base URL names. Raises `CallerError` (unknown_tool)."""
        tool = self._by_segment.get(segment)
        if tool is None:
            raise CallerError(Reason.UNKNOWN_TOOL, "the first path segment is not the name of a configured tool")
        return tool

    def by_authority(self, authority: Authority, scheme: str) -> Tool:
        """Exact host and port; no patterns (H8). Raises `CallerError` (unknown_tool)."""
        tool = self._by_authority.get((authority, scheme))
        if tool is None:
            raise CallerError(Reason.UNKNOWN_TOOL, f"{scheme}://{authority} is not a configured tool")
        return tool

    def require(self, tool: Tool) -> None:
        """Raises `CallerError` (unknown_tool) for a tool that a reload has changed or removed since the call found it."""
        if self._by_name.get(tool.name) is not tool:
            raise CallerError(Reason.UNKNOWN_TOOL, f"tool {tool.name} was changed or removed meanwhile; call again")

    def route(self, tool: Tool, target: bytes) -> Route:
        """The route of `target` (path and query) at `tool`.

        Raises `CallerError` (unknown_tool, ambiguous_path, foreign_credential).
        """
        key = (tool.name, target)
        route = self._memo.get(key)
        if route is None or route.tool is not tool:
            self.require(tool)
            refuse_credentials(target)
            route = Route(tool, canonical_path(target, tool.allow_semicolons), target)
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            if len(target) <= _MEMO_TARGET:
                self._memo[key] = route
        return route


def canonical_path(target: bytes, allow_semicolons: bool = False) -> str:
    """The path of `target`, which is refused unless everybody must read it in one way.

    Letters, digits and `-._~` are not escaped (so `/%61dmin` passes no rule on `/admin`), escapes are valid UTF-8 in upper-case
    hex, and slashes, backslashes, dots, percent signs, `;` and controls are never escaped. Other delimiters may be: policy is
    asked about each way to read them (`model.policy.readings`).
    Dot segments and doubled slashes are refused too, and with `allow_semicolons` also those that come about when parameters
    are cut off (`/..;x/admin`). All this is refused rather than rewritten, so that policy sees exactly the bytes that are
    sent. The query is the tool's business: policy does not see it. Raises `CallerError` (ambiguous_path).
    """
    path = target.partition(b"?")[0]
    if path == b"*":
        return "*"
    if not path.startswith(b"/") or b"#" in target:
        raise CallerError(Reason.AMBIGUOUS_PATH, "the target is not a path")
    spelt = (_SPELT_WITH_PARAMETERS if allow_semicolons else _SPELT).fullmatch(path)
    text = path.decode("ascii") if spelt else ""
    if not spelt or _AMBIGUOUS.search(text) or (";" in text and _AMBIGUOUS.search(without_parameters(text))):
        raise CallerError(Reason.AMBIGUOUS_PATH, "the path can be read in two ways; send the canonical one")
    return text


def refuse_credentials(target: bytes) -> None:
    """Refuses a query that names a credential: the tool gets ours in a header, and two would be for it to choose from (P8).

    RFC 6750 says that one request uses one method only. What is refused is `access_token`, `client_secret`, `api_key` and
    `apikey`, as lenient servers read them; `key` and `token` mean other things too often.
    Raises `CallerError` (foreign_credential).
    """
    if _CREDENTIAL.search(target.partition(b"?")[2]):
        raise CallerError(
            Reason.FOREIGN_CREDENTIAL, "the query has a credential; the tool gets its credential in a header"
        )
