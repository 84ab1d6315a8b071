"""Front door 2: gRPC. `sockets` (one an agent: `workflows_service`, `token_exchange_service`; the operator's:
`admin_service`), `rescue` (reason → status), `convert` (nouns → messages), `health` (probes and metrics)."""
