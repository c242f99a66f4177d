# Everything a contributor or CI runs. Each target works from a clean checkout and needs only python3 (3.10 or later).
# PIP_FLAGS goes to pip, say to take torch's CPU build from an index that has it.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint smoke man screen clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.with-examples  ## train a small model on two workers, one of them slowed, under torchrun and under adarun
	@$(BIN)/python examples/demo.py

test: $(VENV)/.with-dev  ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.with-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

smoke: $(VENV)/.with-dev  ## run every benchmark for a few seconds: do they still work?
	@set -e; for name in slow_worker neighbour equal slow_network averaging overhead tune policies split status replay; do \
	  echo "benchmarks/$$name.py --smoke"; $(BIN)/python benchmarks/$$name.py --smoke; done

man: $(VENV)/.with-dev  ## write man/*.1 from the command line's own definition
	$(BIN)/python scripts/make_man.py

screen: $(VENV)/.with-dev  ## draw docs/status.svg, the picture in the README, from a running job
	@$(BIN)/python scripts/make_screen.py

clean:  ## remove the environment and what the tools cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamp says that the extra of this name is installed for these requirements: a second call starts at once.
$(VENV)/.with-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing adarun with the extra '$*' into $(VENV) (torch is large: minutes on the first call)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[$*]' || { \
	  echo "make: pip could not install adarun; its last lines above name the package." >&2; \
	  echo "make: it needs a package index. Behind a mirror set PIP_INDEX_URL, offline set PIP_FIND_LINKS and PIP_NO_INDEX=1." >&2; \
	  exit 1; }
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: '$(PYTHON)' is missing or older than 3.10. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv $(VENV)' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
