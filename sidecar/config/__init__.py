"""`schema` (each package's section, and what must hold between them), `load` (reads and checks a file), `advice` (what is
allowed and should be known), `json_schema` (for editors)."""
