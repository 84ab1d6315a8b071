# A stranger needs two: `make demo` and `make test`. Each sets up its own virtual environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-real parts check bench proto proto-check clean
help:            ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(STAMP): pyproject.toml
	@echo "installing into $(VENV), about a minute (needs a package index)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sidecar,otel,dev]'
	@touch $@

demo: $(STAMP)   ## the main job in one command, on the embedded identity and token service
	@$(BIN)/spanlock demo $(ARGS)

test: $(STAMP)   ## everything that needs only Python
	$(BIN)/pytest $(ARGS)

parts: $(STAMP)  ## installs the real servers (SPIRE, Keycloak) into a cache outside the tree
	bash tests/real/parts.sh

test-real: parts ## the main job on real SPIRE and Keycloak; fails, not skips, when one is missing
	$(BIN)/pytest -m real tests/real $(ARGS)

check: $(STAMP) proto-check ## ruff, mypy --strict (tests too), import-linter, generated code current
	$(BIN)/ruff check sidecar tests
	$(BIN)/ruff format --check sidecar tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## the ratio table against HAProxy and Go; BENCH_JSON=FILE writes it as JSON too
	$(BIN)/python -m tests.bench $(if $(BENCH_JSON),--json $(BENCH_JSON))

PROTOC = $(BIN)/python -m grpc_tools.protoc -Isidecar/wire=proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/spanlock/v1/*.proto
proto: $(STAMP)  ## generates sidecar/wire from proto/
	$(call PROTOC,.)
	@touch sidecar/wire/spanlock/__init__.py sidecar/wire/spanlock/v1/__init__.py

proto-check: $(STAMP)
	@rm -rf build/proto && mkdir -p build/proto && $(call PROTOC,build/proto)
	@diff -r -x __init__.py -x __pycache__ -x '*.pyc' build/proto/sidecar/wire sidecar/wire || (echo "generated code is stale: run make proto" && false)

clean:           ## removes what make made here
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
