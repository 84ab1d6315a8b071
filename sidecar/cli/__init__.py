"""The commands. `main` finds them, one file a verb: `demo` (in the embedded world that `stage` builds), `run`, `exec` (with
the variables of `environment`), `check`, `explain`, and those that ask a running sidecar through `operator`: `status`,
`workflows`, `leases`, `revoke`."""
