"""Every async test runs on uvloop, as the daemon does."""

import asyncio
import warnings

import uvloop

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
