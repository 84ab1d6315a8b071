"""What an agent imports: `sidecar.client.workflow.workflow()` (sync and async), `sidecar.client.otel.SpanlockSpanProcessor`.
Needs grpcio and protobuf, no more."""
