"""Within which workflow? `registry` (open, join, renew, close, expire), `traceparent`, `config`."""
