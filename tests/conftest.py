"""Every async test runs on uvloop, as the daemon does; gRPC's fork handlers are off, since tests start processes."""

import asyncio
import os
import warnings

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before gRPC is imported: its handlers crash now and then in the child

import pytest
import uvloop

from sidecar.telemetry.logging import configure

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


@pytest.fixture(autouse=True)
def logs() -> None:
    """Logs as the daemon writes them: the library's own default prints the local variables of a traceback."""
    configure("info", "console")
