#!/usr/bin/env bash
# The registration entries that separate the sidecar from the agent beside it. Pod-level selectors (namespace, service
# account) are the same for every container of a pod: only the container's name and image, or the uid, tell them apart.
set -euo pipefail
parent=${1:?usage: spire-entries.sh PARENT_SPIFFE_ID [kubernetes|uid]}

case ${2:-kubernetes} in
  kubernetes)
    spire-server entry create -parentID "$parent" -spiffeID spiffe://example.org/agent \
      -selector k8s:ns:agents -selector k8s:sa:researcher \
      -selector k8s:container-name:spanlock -selector k8s:container-image:spanlock:0.1.0 \
      -jwtSVIDTTL 300 -x509SVIDTTL 3600 ;;
  uid)
    spire-server entry create -parentID "$parent" -spiffeID spiffe://example.org/agent \
      -selector unix:uid:2102 -jwtSVIDTTL 300 -x509SVIDTTL 3600 ;;
esac
