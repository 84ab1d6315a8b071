"""What a valid configuration allows and its operator should know: said by `check`, and by the daemon when it starts."""

import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from sidecar.config.schema import Settings
from sidecar.credentials.config import StaticConfig
from sidecar.identity.callers import Callers, isolation
from sidecar.model.caller import Isolation
from sidecar.policy.load import LoadedPolicy
from sidecar.proxy.egress import stays_here
from sidecar.tools.names import embeds_ip


def warnings(settings: Settings, policy: LoadedPolicy) -> list[str]:
    """One line each, with the key. Looks at the files that are named, as this user on this machine."""
    parts = (_spiffe(settings), _agents(settings), _issuers(settings), _tools(settings), _policy(settings, policy))
    return [line for part in parts for line in part]


def _spiffe(settings: Settings) -> Iterator[str]:
    path = settings.spiffe.socket.removeprefix("unix://")
    if path != settings.spiffe.socket:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                yield f"spiffe.socket: {path} is not a socket: there is no identity, and calls fail"
        except OSError as error:
            yield f"spiffe.socket: {path}: {error.strerror}: there is no identity, and calls fail, until it is there"


def _agents(settings: Settings) -> Iterator[str]:
    agents = [agent.build() for agent in settings.agents]
    for uid, names in Callers(agents).shared_uids():
        yield f"agents: {', '.join(sorted(names))} share uid {uid}: their calls must carry workflow handles"
    for agent in agents:
        if isolation(agent, os.getuid()) == Isolation.SAME_UID:
            yield (
                f"agents: {agent.name} runs as the sidecar's own uid (isolation same-uid): "
                "it can fetch the same SVID and read the sidecar's sockets"
            )
        elif os.geteuid() != 0 and agent.gid is None:
            yield (
                f"agents: {agent.name}: its socket is open to the sidecar's group {os.getegid()}, and uid {agent.uid} must "
                "be in it; set gid to a group that both are in"
            )


def _issuers(settings: Settings) -> Iterator[str]:
    for index, issuer in enumerate(settings.issuers):
        key = f"issuers[{index}]"
        if isinstance(issuer, StaticConfig):
            if issuer.secret_file is not None:
                yield from _secret(f"{key}.secret_file", issuer.secret_file)
            elif issuer.secret_env not in os.environ:
                yield f"{key}.secret_env: the variable {issuer.secret_env} is not set here"
        elif issuer.ca_file is not None:
            yield from _bundle(f"{key}.ca_file", issuer.ca_file)


def _tools(settings: Settings) -> Iterator[str]:
    for index, tool in enumerate(settings.tools):
        key, noun = f"tools[{index}]", tool.build()
        if noun.scheme == "http" and not stays_here(noun):
            yield f"{key}: {tool.name} is plain http: its credential can be read on the way"
        if tool.export:
            yield f"{key}: {tool.name} exports its real token to the agent"
        if (address := embeds_ip(noun.authority.host)) is not None:
            yield f"{key}: {noun.authority.host} is the address {address} spelt as a name"
        if tool.ca_file is not None:
            yield from _bundle(f"{key}.ca_file", tool.ca_file)
        if tool.introspection is not None:
            yield from _secret(f"{key}.introspection.secret_file", tool.introspection.secret_file)


def _policy(settings: Settings, policy: LoadedPolicy) -> Iterator[str]:
    """Names that are nobody's: such a policy permits nothing, or forbids nothing."""
    if not policy.obligations:
        yield "policy.files: there is no policy in them: everything is denied"
    tools = {tool.name for tool in settings.tools}
    known = {"Spanlock::Agent": {agent.name for agent in settings.agents}, "Spanlock::Tool": tools}
    for kind, name in sorted(policy.named):
        if kind in known and name not in known[kind]:
            word = kind.rpartition(":")[2]
            yield f'policy: {kind}::"{name}" is no {word.lower()} of this configuration'
    if not all(tool.scopes for tool in settings.tools):
        return  # one that has none configured gets those of policy
    scopes = {scope for tool in settings.tools for scope in tool.scopes}
    for obligation in policy.obligations.values():
        for scope in sorted((obligation.scopes or frozenset()) - scopes):
            yield f"policy: {obligation.id}: @scopes: {scope} is a scope of no tool"


def _bundle(key: str, path: str) -> Iterator[str]:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        yield f"{key}: {path} is not PEM certificates: calls that need it fail"
    except OSError as error:
        yield f"{key}: {path}: {error.strerror}: calls that need it fail"


def _secret(key: str, path: str) -> Iterator[str]:
    try:
        mode = Path(path).stat().st_mode
        if not os.access(path, os.R_OK):
            yield f"{key}: {path}: Permission denied: calls that need it fail"
        elif mode & stat.S_IROTH:
            yield f"{key}: {path} can be read by every user of this machine; chmod o-r"
    except OSError as error:
        yield f"{key}: {path}: {error.strerror}: calls that need it fail"
