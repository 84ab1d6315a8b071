#!/usr/bin/env bash
# The registration entries that separate the sidecar from the agent beside it. Pod-level selectors (namespace, service
# account) are the same for every container of a pod: only the container's name and image, or the uid, tell them apart.
set -euo pipefail
usage() {
  cat >&2 <<'END'
usage: spire-entries.sh PARENT_SPIFFE_ID [kubernetes|uid]
What is registered, by variables: SPIFFE_ID (spiffe://example.org/agent); kubernetes: NAMESPACE (agents), SERVICE_ACCOUNT
(researcher), CONTAINER (spanlock), IMAGE (spanlock:0.1.0); uid: SIDECAR_UID (2102), which is the sidecar's, never the agent's.
END
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$1" ] || usage

case ${2:-kubernetes} in
  kubernetes)
    selectors=(
      -selector "k8s:ns:${NAMESPACE:-agents}" -selector "k8s:sa:${SERVICE_ACCOUNT:-researcher}"
      -selector "k8s:container-name:${CONTAINER:-spanlock}" -selector "k8s:container-image:${IMAGE:-spanlock:0.1.0}"
    ) ;;
  uid)
    selectors=(-selector "unix:uid:${SIDECAR_UID:-2102}") ;;
  *)
    usage ;;
esac
exec spire-server entry create -parentID "$1" -spiffeID "${SPIFFE_ID:-spiffe://example.org/agent}" "${selectors[@]}" \
  -jwtSVIDTTL 300 -x509SVIDTTL 3600
