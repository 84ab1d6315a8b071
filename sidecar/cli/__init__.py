"""The commands. `main` finds them, one file a verb: `demo` (in the embedded world that `stage` builds, with the `proof` of the
end and the trial by a `foreign_uid`), `run`, `check`, `explain`, and those that ask a running sidecar through `operator`:
`status`, `workflows`, `leases`, `revoke`; and `exec`: its `signals`, its `stdio`, the `shim` that becomes each process it
starts, the `embedded` sidecar, and for the command the variables of `environment` and the `terminal`."""
