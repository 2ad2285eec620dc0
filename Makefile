# gater: `make run` starts a gateway with an embedded store, `make test` runs every test. Both set themselves up.

VENV := .venv
BIN := $(VENV)/bin
# Flags of `gater start`; see docs/configuration.md. Loopback only, a cookie known to all: for development.
RUN := --name gater@127.0.0.1 --cookie gater --embedded gater-data --no-gossip
# More flags, added to the above: make run ARGS="--log-level debug"
ARGS :=
# One worker for each of the two cores the tests are made for; a file's tests stay together and share its nodes.
PYTEST := -n 2 --dist loadfile

.PHONY: help setup run test compile pure chaos soak bench fuzz flat lint format lock beam clean

help:
	@echo "make setup   make $(VENV), so that $(BIN)/gater runs"
	@echo "make run     set up and start a gateway with an embedded store: gater start $(RUN)"
	@echo "make test    set up (also erlang and elixir) and run every test; TESTS=... for some"
	@echo "make chaos   appends and subscriptions while nodes are killed, frozen and cut off: is anything lost or missed?"
	@echo "make compile compile what each message passes, which saves a third of the CPU (needs gcc and python3-dev); make pure undoes that"
	@echo "make soak    ten minutes (SOAK_SECONDS) of calls, links and monitors while connections are cut: does anything stay?"
	@echo "make bench   measure, side by side with others"
	@echo "make fuzz    fuzz what reads bytes of a peer, FUZZ_SECONDS (600) in all; make flat measures time per byte"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff put the sources in shape"
	@echo "make lock    pin the dependencies anew (needs uv)"
	@echo "make clean   remove $(VENV) and caches; the stores of gater-data stay"

setup: $(VENV)/.stamp-run

run: $(VENV)/.stamp-run
	exec $(BIN)/gater start $(RUN) $(ARGS)

TESTS := tests erlang_interop_tests
# With it set pytest would rewrite the assertions of every file anew in each worker.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.stamp-test beam
	$(BIN)/python -m pytest $(PYTEST) $(TESTS)

SUBSCRIPTIONS_ARGS :=
chaos: $(VENV)/.stamp-test beam
	$(BIN)/python -m erlang_interop_tests.chaos $(ARGS)
	$(BIN)/python -m erlang_interop_tests.chaos_subscriptions $(SUBSCRIPTIONS_ARGS)

compile: $(VENV)/.stamp-test
	GATER_COMPILE=1 $(BIN)/python setup.py --quiet build_ext --inplace

pure:
	find gater -name "*.so" -delete

SOAK_SECONDS := 600
soak: $(VENV)/.stamp-test beam
	$(BIN)/python -m erlang_interop_tests.soak --seconds $(SOAK_SECONDS) $(ARGS)

bench: $(VENV)/.stamp-bench beam
	$(BIN)/python -m bench $(ARGS)

FUZZ_SECONDS := 600
fuzz: $(VENV)/.stamp-fuzz
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

flat: $(VENV)/.stamp-test
	$(BIN)/python -m fuzz.flat $(ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict gater
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

beam:
	@.ci/setup beam

$(VENV)/.stamp-run: pyproject.toml requirements.lock .ci/setup
	.ci/setup venv
	@touch $@

$(VENV)/.stamp-test: pyproject.toml requirements-test.lock .ci/setup
	.ci/setup test
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-bench: $(VENV)/.stamp-test requirements-bench.lock
	.ci/setup bench
	@touch $@

$(VENV)/.stamp-fuzz: $(VENV)/.stamp-test requirements-fuzz.lock
	.ci/setup fuzz
	@touch $@

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock:
	echo "setuptools>=77" | $(COMPILE) --only-binary :all: pyproject.toml - -o requirements.lock
	echo "setuptools>=77" | $(COMPILE) --only-binary :all: --extra test --extra lint pyproject.toml - -o requirements-test.lock
	$(COMPILE) --extra bench -c requirements-test.lock pyproject.toml -o requirements-bench.lock
	$(COMPILE) --only-binary :all: --extra fuzz -c requirements-test.lock pyproject.toml -o requirements-fuzz.lock

clean: pure
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
