"""What happened? `log` (one record a flow, a lease event, a workflow event), `sinks` (where the lines go), `schema` (what a
line is, for whoever reads them), `config` (the `audit:` section)."""
