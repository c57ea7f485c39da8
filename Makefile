.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-containers bench chaos check k8s-check fmt docs lock clean

PYTHON := .venv/bin/python
# Each of the many processes would compile all of our code anew.
unexport PYTHONDONTWRITEBYTECODE
# More words for the command behind a target: make test ARGS="-k lease -x"
ARGS :=

SERVICES := gateway allocator reaper csp-syncer
OURS := sandbox-broker $(SERVICES:%=sandbox-broker-%) csp-simulator devstack k8s-check brokerctl
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock"

help: ## This list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: setup ## Everything on this machine, in the foreground, until Ctrl-C
	@$(PYTHON) -m devstack

demo: setup ## The same, with class days at 100 times their speed: something to see for every command and dashboard
	@$(PYTHON) -m devstack.demo

test: setup ## Every test, on real PostgreSQL and RabbitMQ; ARGS="-k lease" for some of them
	@$(PYTHON) -m pytest -n 5 --dist loadfile --no-loadscope-reorder $(ARGS)

test-containers: setup ## The images, docker-compose.yml and what else needs a Docker engine; images by PYTHON_IMAGE and the like
	@$(PYTHON) -m pytest tests/containers $(ARGS)

bench: setup ## How fast it is, beside what one would write instead; ARGS="ours baseline" for some scenarios
	@$(PYTHON) -m bench $(ARGS)

chaos: setup ## Every kind of fault on a broker of its own, and a judge; SEED=… repeats a round, LONG=1 is an hour
	@$(PYTHON) -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(LONG),--minutes 60) $(ARGS)

check: setup ## Lint, format, types, import rules, manifests, the Dockerfile, known vulnerabilities, and whether locked requirements and generated pages are current
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PYTHON) -m devstack.locks
	@$(PYTHON) -m devstack.audit
	@$(PYTHON) -m gateway.api.error_page | diff docs/errors.md - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m devstack.metrics_page | diff docs/metrics.md - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m sandbox_broker.contract.asyncapi | diff docs/asyncapi.json - || { echo "run make docs" >&2; exit 1; }
	@$(PYTHON) -m k8s_check
	@if [ -x .venv/bin/hadolint ]; then .venv/bin/hadolint Dockerfile; fi

k8s-check: setup ## Whether the Kubernetes manifests are valid, safe, and say what the code says; ARGS="--crds FILE" for operators
	@$(PYTHON) -m k8s_check $(ARGS)

fmt: setup ## Format, and repair what the linter can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

docs: setup ## Renew the pages that are made from the code, and Kubernetes' copy of the alerts
	@$(PYTHON) -m gateway.api.error_page >docs/errors.md
	@$(PYTHON) -m devstack.metrics_page >docs/metrics.md
	@$(PYTHON) -m sandbox_broker.contract.asyncapi >docs/asyncapi.json
	@$(PYTHON) -m k8s_check.monitoring <deploy/prometheus/alerts.yml >deploy/k8s/components/prometheus-operator/rules.yaml

lock: setup ## Renew requirements/*.txt from the pyproject files; ARGS=--upgrade takes newer versions
	@for service in $(SERVICES); do \
		$(COMPILE) $(ARGS) --no-emit-package sandbox-broker \
			-o requirements/$$service.txt services/$$service/pyproject.toml || exit 1; \
	done
	@$(COMPILE) $(ARGS) $(OURS:%=--no-emit-package %) --group dev -o requirements/dev.txt pyproject.toml

clean: ## Remove the virtual environment, caches, and the local accounts and tokens of make run
	@rm -rf .venv .devstack .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Part of every other target. Does nothing while the requirements are the ones that were installed.
setup:
	@sh tools/devstack/setup.sh
