"""What can only take access away: `otlp` (ended spans), `config` (the `otlp:` section)."""
