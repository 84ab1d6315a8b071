"""`schema` (each package's section, and what must hold between them), `strict_yaml` and `load` (read and check a file),
`obstacles` (what keeps a valid one from starting here), `advice` (what is allowed and should be known), `json_schema` (for
editors)."""
