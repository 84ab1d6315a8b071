"""With which credential? `broker` (lease, use, withdraw, close: the way of a credential), `renewer`, `revoker` (what the
issuer is told, and the truth about it), `handles` (what the agent sees), `exchangers/` (one file a kind), `config`."""
