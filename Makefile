# One command each for newcomers and for CI; `make` alone lists them.
#
# Settings, given as `make test NAME=value`:
#   PYTHON          the interpreter (3.10 or newer) that makes the environment      [python3]
#   VENV            the environment's folder                                        [.venv]
#   PYTEST_ARGS     more arguments for pytest, such as `-k merge -x`
#   UV_ARGS         more arguments for uv in `make lock`
#   LOWEST_PYTHON   the interpreter of the oldest versions in `make test-matrix`     [PYTHON]
#   HIGHEST_PYTHON  that of the newest                                              [PYTHON]
#   RELEASE_PYTHONS interpreters that `make release-check` installs the wheel into  [PYTHON]
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, …) are honoured.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
UV_ARGS ?=
LOWEST_PYTHON ?= $(PYTHON)
HIGHEST_PYTHON ?= $(PYTHON)
RELEASE_PYTHONS ?= $(PYTHON)
# What depends on other libraries' versions and takes minutes.
MATRIX_TESTS ?= $(addprefix tests/,adapters artifacts backbone data injection interop layers modules planning storage training)

ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

CHECK_VERSION = import sys; v = sys.version.split()[0]; sys.version_info >= (3, 10) or sys.exit( \
  "error: %s is Python %s, but 3.10 or newer is needed: make PYTHON=python3.12 (or where yours is)" % (sys.executable, v))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-matrix peft-tests docs release-check lint format lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(STAMP) ## fetch a real model and real data, fine-tune, evaluate, report
	@$(BIN)/python examples/quickstart/run.py

test: $(STAMP) ## run the whole test suite
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile $(PYTEST_ARGS)

# The oldest versions of what pyproject.toml names, and the newest of all.
test-matrix: $(STAMP) ## run the fast half of the suite on the oldest and on the newest versions that pyproject.toml allows
	@$(PIP) install --quiet uv
	@for set in lowest-direct:$(LOWEST_PYTHON) highest:$(HIGHEST_PYTHON); do \
	  name=.venv-$${set%%:*}; echo "== $$name" && \
	  $(BIN)/uv venv --quiet --clear --python "$${set#*:}" $$name && \
	  $(BIN)/uv pip install --quiet --python $$name --resolution $${set%%:*} --editable '.[data,images,peft,quickstart]' \
	    'pytest>=8.0' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100' && \
	  $$name/bin/python -m pytest -q -m "not slow" -n auto --dist loadfile $(PYTEST_ARGS) $(MATRIX_TESTS) || exit 1; \
	done

peft-tests: $(STAMP) ## run PEFT's own tests of its methods on GenLoRA, from its source distribution
	$(BIN)/python tests/peft_suite.py

docs: $(STAMP) ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# An installed wheel has nothing of the repository: its commands and configurations must be in it. The bill of materials
# names no folder of this machine, so what pip notes of where the wheel lay is removed before.
release-check: $(STAMP) ## build sdist and wheel, check them, and try the wheel in empty environments
	@$(PIP) install --quiet build twine uv
	rm -rf dist && $(BIN)/python -m build --outdir dist . >/dev/null && $(BIN)/twine check --strict dist/*
	@set -e; for python in $(RELEASE_PYTHONS); do \
	  echo "== $$python"; $(BIN)/uv venv --quiet --clear --python "$$python" .venv-release; \
	  $(BIN)/uv pip install --quiet --python .venv-release "$$(echo dist/*.whl)[completion,data]"; \
	  cd dist; genlora=../.venv-release/bin/genlora; $$genlora --version; \
	  $$genlora data --help >/dev/null; $$genlora completion bash >/dev/null; $$genlora plan --model llama-8b >/dev/null; \
	  $$genlora fit --config genlora:quickstart --config genlora:strategy/ddp --print_config >/dev/null; cd ..; \
	  find .venv-release -name direct_url.json -delete; \
	  $(BIN)/uv tool run --quiet --from cyclonedx-bom cyclonedx-py environment --pyproject pyproject.toml \
	    --mc-type library --output-reproducible --output-file dist/sbom.json .venv-release; \
	  if grep -n 'file:' dist/sbom.json; then exit 1; fi; \
	done; ls dist

lint: $(STAMP) ## run what else CI runs: ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv keeps the versions that the file has, as far as they fit. What torch brings for CUDA is left to torch's own metadata.
lock: $(STAMP) ## bring requirements.lock in line with pyproject.toml (UV_ARGS=--upgrade: newer releases)
	@$(PIP) install --quiet uv
	@cp requirements.lock requirements.lock.partial
	@$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --all-extras --no-annotate --no-header \
	  --quiet --output-file requirements.lock.partial $(UV_ARGS) >/dev/null
	@{ grep '^#' requirements.lock; grep -vE '^(nvidia-|cuda-|triton=)' requirements.lock.partial; } >requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm requirements.lock.partial

clean: ## remove caches and build outputs; .venv, data and runs stay
	rm -rf build dist .peft-tests .venv-lowest-direct .venv-highest .venv-release .venv-browser site .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp is made last, so that a failed set-up is tried again, and is older than a changed lock or pyproject.toml.
# A terminal shows pip's progress (torch alone can be gigabytes); a log gets one line.
$(STAMP): requirements.lock pyproject.toml
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_VERSION)'
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi
	@$(BIN)/python -c '$(CHECK_VERSION)'
	@echo "Installing requirements.lock into $(VENV) (once; a minute or more)"
	@if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; $(PIP) install $$quiet -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
