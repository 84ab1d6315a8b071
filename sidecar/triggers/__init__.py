"""What can only take access away: `otlp` (ended spans), `grpc_door`, `turns` and `spans` (its bounds), `config` (`otlp:`)."""
