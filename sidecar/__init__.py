"""Spanlock: credentials for AI agents that live exactly as long as the work they are for.

This page is the architecture. Each block is a level: imports point down, and what stands in one block does not import each
other (`make check`). The last block stands apart.

    cli/            one file a verb; `demo` tells the story, `stage` is the embedded world that it plays in

    app.py          the only file that knows everybody: builds, starts, reloads, drains

    config/         the root schema collects each package's section; load and validate whole

    proxy/          front door 1: the agent's HTTP calls, explicit (absolute form, CONNECT) or reverse (base URL)
    control/        front door 2: gRPC: Workflows and TokenExchange on each agent's socket, Admin on the operator's; probes
    triggers/       front door 3: what can only take access away: ended spans by OTLP

    identity/       who?                     SVIDs from the SPIFFE Workload API; whose connection is it
    workflows/      within which workflow?   open, join, renew, close, expire; knows the live flows and cuts them
    tools/          which tool?              exact destinations, one canonical path
    policy/         may it?                  Cedar; the only maker of `Permit`
    credentials/    with which credential?   broker, renewer, revoker, handles, exchangers/ (one file a kind)
    audit/          what happened?           one record a flow, a lease event, a workflow event

    ports.py        the Protocols: where siblings meet, or two real implementations exist
    site.py         a small bounded HTTP server, for probes and spans

    telemetry/      every metric and log field name; redaction; the sidecar's own spans

    model/          nouns and state tables: data without I/O

    clock.py errors.py secret.py tasks.py backoff.py machine.py section.py address.py

    wire/           generated protobuf code, never edited

    client/         what an agent imports: workflow(), the OpenTelemetry SpanProcessor
    demo/           an embedded Workload API, token service and tools: real protocols
    __main__.py     the console script: finds `cli/`, or says that only the library is installed

The way of a request is one function, `proxy/flow.py: Flow.serve`: accept → who is calling → the names agree → which workflow
→ which tool → permit → resolve, pin, dial, verify → lease → inject → upstream → stream back → audit. It is one coroutine,
driven without a Task until it must really wait (`proxy/driver.py`).

The way of a credential is `credentials/broker.py` over the table in `model/lease.py`: SVID → exchanger → lease → injected →
renewed → dropped → revoked; `minting.py` is its one exchange, `ending.py` what follows a drop. A drop is synchronous and
total; what was minted is reachable to the revoker alone, until the issuer has taken it back or it has expired. A close that
meets an exchange in flight is a transition of its own.

News travels up by callbacks that `app.py` wires: nothing below knows who listens.
"""

__version__ = "0.1.0"
