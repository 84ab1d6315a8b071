"""Who? `source` (the SVIDs of the declared agents, always current), `workload_api` (the SPIRE agent), `callers` and `peer`
(who is at the other end of a connection), `config` (the `spiffe:` and `agents:` sections)."""
