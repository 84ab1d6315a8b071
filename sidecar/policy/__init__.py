"""May it? `load` (Cedar files, schema and annotations, validated), `decider` (the only maker of `Permit`), `config` (the
`policy:` section)."""
