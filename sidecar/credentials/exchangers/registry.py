"""From configuration to exchanger: the one place that knows every kind."""

from sidecar.clock import Clock
from sidecar.credentials.config import StaticConfig, TokenExchangeConfig
from sidecar.credentials.exchangers.static import StaticExchanger
from sidecar.credentials.exchangers.token_exchange import TokenExchanger
from sidecar.ports import Exchanger, SvidSource


def build_exchanger(config: TokenExchangeConfig | StaticConfig, svids: SvidSource, clock: Clock) -> Exchanger:
    """An exchanger for one entry of `issuers:`; no I/O yet. The caller closes it."""
    match config:
        case TokenExchangeConfig():
            return TokenExchanger(config, svids, clock)
        case StaticConfig():
            return StaticExchanger(config, svids, clock)
