.DEFAULT_GOAL := help
.PHONY: help setup run demo screenshots test test-fast test-versions test-containers bench chaos check k8s-check fmt docs lock clean

PYTHON := .venv/bin/python
# Without bytecode files, each of the many processes would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE
# Additional arguments of the command behind a target: make test ARGS="-k lease -x"
ARGS :=

SERVICES := gateway allocator reaper csp-syncer provisioner console
OURS := sandbox-broker $(SERVICES:%=sandbox-broker-%) csp-simulator devstack k8s-check brokerctl
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock"

help: ## List all targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: setup ## Run the whole broker on this machine until Ctrl-C; CLUSTER=1 starts three RabbitMQ nodes and two PostgreSQL servers
	@$(PYTHON) -m devstack

demo: setup ## Like run, with simulated class days at 100 times their speed, for brokerctl and the dashboards
	@$(PYTHON) -m devstack.demo

screenshots: setup ## Renew the pictures of the console in docs/images, with a running broker of its own
	@$(PYTHON) -m pytest -q tests/integration/screenshots.py

test: setup ## Run all tests with real PostgreSQL and RabbitMQ; ARGS="-k lease" selects tests
	@$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## Run the tests that need no server; ARGS="-k lease" selects tests
	@$(PYTHON) -m pytest --lane fast -n 2 --dist loadfile $(ARGS)

test-versions: setup ## Run the tests that need servers with the oldest and the newest PostgreSQL and RabbitMQ, from Debian's packages
	@$(PYTHON) -m devstack.versions $(ARGS)

test-containers: setup ## Run the tests with a Docker engine: images and docker-compose.yml; PYTHON_IMAGE etc. select base images
	@$(PYTHON) -m pytest tests/containers $(ARGS)

bench: setup ## Run the benchmarks against a baseline implementation; ARGS="ours baseline" selects scenarios
	@$(PYTHON) -m bench $(ARGS)

chaos: setup ## Inject faults into a separate broker and check its guarantees; SEED=… repeats a round, LONG=1 runs an hour
	@$(PYTHON) -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(LONG),--minutes 60) $(ARGS)

check: setup ## Check style, types, import rules, manifests, Dockerfile, vulnerabilities, lock files and generated pages
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PYTHON) -m devstack.locks
	@$(PYTHON) -m devstack.audit
	@$(PYTHON) -m gateway.api.error_page | diff docs/errors.md - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m gateway.api.role_table docs/security.md --check
	@$(PYTHON) -m devstack.metrics_page | diff docs/metrics.md - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m sandbox_broker.contract.asyncapi | diff docs/asyncapi.json - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m k8s_check
	@if [ -x .venv/bin/hadolint ]; then .venv/bin/hadolint Dockerfile; fi

k8s-check: setup ## Check the Kubernetes manifests: schema, security, consistency with the code; ARGS="--crds FILE" adds CRDs
	@$(PYTHON) -m k8s_check $(ARGS)

fmt: setup ## Format the code and apply fixes of the linter
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

docs: setup ## Regenerate the pages generated from the code, and the alerts for Kubernetes
	@$(PYTHON) -m gateway.api.error_page >docs/errors.md
	@$(PYTHON) -m gateway.api.role_table docs/security.md
	@$(PYTHON) -m devstack.metrics_page >docs/metrics.md
	@$(PYTHON) -m sandbox_broker.contract.asyncapi >docs/asyncapi.json
	@$(PYTHON) -m k8s_check.monitoring <deploy/prometheus/alerts.yml >deploy/k8s/components/prometheus-operator/rules.yaml

lock: setup ## Regenerate requirements/*.txt from the pyproject files; ARGS=--upgrade allows newer versions
	@for service in $(SERVICES); do \
		$(COMPILE) $(ARGS) --no-emit-package sandbox-broker \
			-o requirements/$$service.txt services/$$service/pyproject.toml || exit 1; \
	done
	@$(COMPILE) $(ARGS) -o requirements/npm.txt requirements/npm.in
	@$(COMPILE) $(ARGS) $(OURS:%=--no-emit-package %) --group dev -o requirements/dev.txt pyproject.toml

clean: ## Remove the virtual environment, caches, and the local accounts and tokens of make run
	@rm -rf .venv .devstack .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Prerequisite of the other targets. Does nothing if the requirements have not changed since the last installation.
setup:
	@sh tools/devstack/setup.sh
