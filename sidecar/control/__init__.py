"""Front door 2: gRPC, and probes.

Read in this order: `run_dir` (the sockets' directories, ours alone), `sockets` (one an agent, one for the operator: who may
connect), `workflows_service` (open, hold, renew, close), `token_exchange_service` (RFC 8693 in its own words), `admin_service`
(the operator's), `status` (readiness, and the whole picture), `convert` (nouns → messages), `rescue` (reason → status),
`unreadable` (messages that are no protobuf), `serving` (grpc.health.v1), `health`
(probes and metrics over HTTP).
"""
