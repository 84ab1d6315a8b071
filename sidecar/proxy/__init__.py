"""Front door 1: the agent's HTTP calls, explicit (absolute form, CONNECT) or reverse (base URL).

Read in this order: `listener` (accept, who is calling), `downstream` (the agent's connection), `http1` and `framing`
(strict HTTP/1.1), `flow` (THE REQUEST, top to bottom), `plane` (what every flow needs), `driver` (no Task until it must
wait), `destination` (the names agree), `binding` (which workflow), `pool` and `egress` (resolve, pin, dial, verify),
`inject` (theirs off, ours on), `upstream` (the tool's connection), `outbox` (what a step writes leaves together), `rescue`
(how a refusal looks), `ca` (the certificates of interception), `config` (the `listeners:` and `limits:` sections).
"""
