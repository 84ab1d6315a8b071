"""What happened? `log` (one record a flow, a lease event, a workflow event), `sinks` (where the lines go)."""
