"""May it? `text` (where each policy is, and how deep), `load` (Cedar files, schema and annotations, validated), `decider`
(the only maker of `Permit`), `config` (the `policy:` section)."""
