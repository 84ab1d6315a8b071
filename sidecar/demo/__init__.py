"""What a demonstration needs and a laptop lacks: `workload_api` (SPIRE's part), `token_service` (the issuer's), `tools`
(two upstreams), `pki` (their certificates), `agent` (what calls them). Real protocols on real sockets; the sidecar cannot
tell the difference."""
