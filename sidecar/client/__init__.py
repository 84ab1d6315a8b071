"""What an agent imports: `workflow` (`sidecar.client.workflow.workflow()`, sync and async), `otel`
(`sidecar.client.otel.SpanlockSpanProcessor`, which opens and closes with a root span), `trust` (the sidecar's CA beside the
system's roots), `sockets` (where the agent's socket is), `stream` (the call that holds a workflow open), `summary` (its end in
one line). Needs grpcio and protobuf, no more."""
