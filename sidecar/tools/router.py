"""Which tool a call is for, by exact authority or by name, and the one canonical path that is both matched and sent (D7)."""

import re
from collections.abc import Iterable

from sidecar.errors import CallerError, Reason
from sidecar.model.tool import Authority, Route, Tool

_MEMO, _MEMO_TARGET = 4096, 1024
"""Routes remembered, and the longest target of one; they come from the agent, so the memo is emptied when full."""
_PLAIN = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,=:@/%]*")
_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_AMBIGUOUS = re.compile(rb"(?i)%(?:2f|5c|2e|00|25|3b|0[0-9a-f]|1[0-9a-f]|7f)|//|/\.{1,2}(?:/|$)")


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
        """The route of `target` (path and query) at `tool`. Raises `CallerError` (unknown_tool, ambiguous_path)."""
        key = (tool.name, target)
        route = self._memo.get(key)
        if route is None or route.tool is not tool:
            self.require(tool)
            route = Route(tool, canonical_path(target, tool.allow_semicolons), target)
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            if len(target) <= _MEMO_TARGET:
                self._memo[key] = route
        return route


def canonical_path(target: bytes, allow_semicolons: bool = False) -> str:
    """The path of `target`, which is refused unless everybody must read it in one way.

    Dot segments, doubled slashes, encoded slashes, backslashes, dots, percent signs and controls are refused rather than
    rewritten, so that policy sees exactly the bytes that are sent. Raises `CallerError` (ambiguous_path).
    """
    path = target.partition(b"?")[0]
    if path == b"*":
        return "*"
    if not path.startswith(b"/") or b"#" in target:
        raise CallerError(Reason.AMBIGUOUS_PATH, "the target is not a path")
    plain = path.replace(b";", b"") if allow_semicolons else path
    if not _PLAIN.fullmatch(plain) or _ESCAPE.search(path) or _AMBIGUOUS.search(path):
        raise CallerError(Reason.AMBIGUOUS_PATH, "the path can be read in two ways; send the canonical one")
    return path.decode("ascii")
