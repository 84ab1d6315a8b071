"""Every metric and log field name: `logging` (what is not per flow), `metrics`, `tracing`."""
