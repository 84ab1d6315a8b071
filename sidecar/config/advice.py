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
from sidecar.proxy.egress import stays_here
from sidecar.tools.names import embeds_ip


def warnings(settings: Settings) -> list[str]:
    """One line each, with the key. Looks at the files that are named, as this user on this machine."""
    return [*_agents(settings), *_issuers(settings), *_tools(settings)]


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
