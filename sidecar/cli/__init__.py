"""The commands. `main` finds them, one file a verb: `demo` (in the embedded world that `stage` builds, with the `proof` of the
end and the trial by a `foreign_uid`), `run`, `exec` (with the variables of `environment`), `check`, `explain`, and those that
ask a running sidecar through `operator`: `status`, `workflows`, `leases`, `revoke`. `residual` puts a token's remaining life
into words."""
