"""Every metric and log field name: `logging` (what is not per flow), `metrics` (what is counted), `tracing` (the sidecar's
own spans), `config` (the `telemetry:` section)."""
