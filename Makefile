# make demo      fine-tune a small language model on real text and print what came of it (about six minutes on two cores)
# make qlora     the same task on a base in four bits, beside LoRA in 32 (about eight minutes on two cores)
# make tutorial  six methods on that task, one table (about nine minutes on two cores)
# make test      lint, type check, tests
# make docs      the documents as a site, into build/site, strictly (two minutes)
# make bench     the benchmarks, into benchmarks/RESULTS.md (hours); to compare with another library:
#                make bench REFERENCE=/path/to/its/environment/bin/python
#                with ROUNDS=1 REPEATS=5 it takes an hour instead of several, and ranges are wider
#
# Each target first builds .venv, once. To use another PyTorch than the pinned one:
#   make demo TORCH=torch==2.8.0
# or, to take the one that PYTHON has already:
#   make demo TORCH= VENVFLAGS=--system-site-packages

PYTHON    ?= python3
TORCH     ?= torch==2.13.0
VENVFLAGS ?=
JOBS      ?= 2
REFERENCE ?=
ROUNDS    ?= 3
REPEATS   ?= 45

VENV  := .venv
RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/.clients
DOCS    := $(VENV)/.docs

.DEFAULT_GOAL := help
.PHONY: help install demo qlora tutorial test lint docs bench clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# PyTorch comes first and pinned: left to the dependencies, pip might fetch a build for hardware that is not there.
$(STAMP): pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENVFLAGS) $(VENV)
	$(if $(strip $(TORCH)),$(RUN) -m pip install --quiet $(TORCH))
	$(RUN) -m pip install --quiet --editable ".[dev,demo]"
	touch $@

# The libraries whose use of this one is tested. PyTorch is named again, so that none of them brings another.
$(CLIENTS): $(STAMP)
	$(RUN) -m pip install --quiet $(TORCH) --editable ".[clients]"
	touch $@

$(DOCS): $(STAMP)
	$(RUN) -m pip install --quiet $(TORCH) --editable ".[docs]"
	touch $@

demo: $(STAMP)
	$(RUN) examples/sentiment.py $(ARGS)

qlora: $(STAMP)
	$(RUN) examples/qlora.py $(ARGS)

tutorial: $(STAMP)
	$(RUN) examples/tutorial.py $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The worker processes share the cores, so each computes with one thread.
test: lint $(CLIENTS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) $(ARGS)

docs: $(DOCS)
	$(RUN) docs/build_methods.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: BENCH = $(if $(REFERENCE),--reference-python $(REFERENCE))
bench: $(STAMP)
	$(RUN) benchmarks/run.py $(BENCH) --rounds $(ROUNDS)
	$(RUN) benchmarks/parts.py $(BENCH) --write
	$(RUN) benchmarks/trainer.py $(BENCH) --steps 3 --write
	$(RUN) benchmarks/methods.py $(BENCH) --repeats $(REPEATS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache examples/.cache examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
