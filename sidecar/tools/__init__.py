"""Which tool? `names` (one spelling for each destination), `config` (the `tools:` section), `router` (destination and path)."""
