#!/usr/bin/env bash
# Installs the real servers that `make test-real` runs against, into a cache outside the tree:
# SPIRE 1.13.3 (built from its Go modules, 10-15 min the first time), Keycloak 26.7.3 (its Maven distribution) and Node 24
# (a client that `exec` must serve). Idempotent: what is there is left alone. Needs go, java 17 or later, mvn, npm and unzip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SPANLOCK_PARTS:-$HOME/.cache/spanlock-parts}
mkdir -p "$cache/bin" "$cache/src"
say() { echo "parts: $*" >&2; }

need() {
  command -v "$1" >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $2"
    apt-get update -qq && apt-get install -y -qq "$2" >/dev/null && return
  fi
  say "$1 is missing: install $2"; exit 1
}
need unzip unzip
need java openjdk-17-jre-headless
need mvn maven
command -v go >/dev/null || { say "go is missing: install Go 1.26 or later"; exit 1; }

if [ ! -x "$cache/bin/spire-server" ] || [ ! -x "$cache/bin/spire-agent" ]; then
  say "building SPIRE (10-15 minutes the first time)"
  rm -rf "$cache/src/spire" && mkdir -p "$cache/src/spire" && cp "$here"/spire/go.mod "$here"/spire/go.sum "$cache/src/spire/"
  (cd "$cache/src/spire" && GOBIN="$cache/bin" GOFLAGS="-buildvcs=false -p=2" \
    go install github.com/spiffe/spire/cmd/spire-server github.com/spiffe/spire/cmd/spire-agent)
fi

version=26.7.3
keycloak="$cache/keycloak-$version"
features=spiffe,client-auth-federated
if [ ! -f "$keycloak/.built" ]; then
  say "fetching Keycloak $version"
  mvn -B -q dependency:get -Dartifact="org.keycloak:keycloak-quarkus-dist:$version:zip" -Dtransitive=false
  repository=$(mvn -B -q help:evaluate -Dexpression=settings.localRepository -DforceStdout | sed 's/\x1b\[[0-9;]*m//g')
  rm -rf "$keycloak"
  unzip -q "$repository/org/keycloak/keycloak-quarkus-dist/$version/keycloak-quarkus-dist-$version.zip" -d "$cache"
  say "building Keycloak's optimized image (half a minute)"
  "$keycloak/bin/kc.sh" build --db=dev-mem --features=$features --health-enabled=true --cache=local >/dev/null
  touch "$keycloak/.built"
fi
node=24
if [ ! -x "$cache/node-$node/node_modules/node/bin/node" ]; then
  say "fetching Node $node"
  need npm npm
  npm install --silent --no-audit --no-fund --prefix "$cache/node-$node" "node@$node" >/dev/null
fi
say "ready in $cache"
