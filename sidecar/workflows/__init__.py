"""Within which workflow? `registry` (open, join, renew, close, expire), `traceparent` (which trace a call is of), `roll`
(what was open, for the start after a crash), `config` (the `workflows:` section)."""
