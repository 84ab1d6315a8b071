"""Within which workflow? `registry` (open, join, renew, close, expire), `roll`
(what was open, for the start after a crash), `config` (the `workflows:` section)."""
