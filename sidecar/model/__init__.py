"""The nouns: data and state tables without I/O. Everything above speaks in these words: `caller` (who), `workflow` (within
what, and how it ends), `traceparent` (of which trace), `tool` (what for), `policy` (may it), `lease` (the table of a
credential's life), `audit` (what is recorded), `endings` (what its last words mean)."""
