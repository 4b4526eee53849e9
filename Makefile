# Each command sets itself up: it makes a .venv in this folder with pinned versions.
#
#   make test        style, types, tests, kernels without a GPU, comparison with the real peers
#   make quick       what finds most faults in a minute
#   make demo        train the README's anomaly detector, stock and with this package
#   make lint        style and types only
#   make slow        what `make test` leaves out: more executed kernels, planted faults
#   make ecosystem   anomalib, FrEIA, Lightning and exporters as PyPI ships them
#   make oldest      the oldest supported versions; `make newest`: the newest that pip finds
#   make triton-3.6  the kernels with Triton 3.6
#   make package     build the wheel, check it, use it in an empty environment
#   make docs        the documentation: docs/build/index.html
#   make bench       the benchmarks; BENCH_ARGS="--workloads fastflow-wrn50 --record";
#                    BENCH_ARGS=main compares with that commit
#   make libraries   our block against other flow libraries; LIBRARIES_ARGS="--record"
#   make report      tables and plots of what was recorded
#   make gpu         everything on a machine with a GPU, into OUT=out/gpu
#   make clean       remove environments, caches, and what was built
#
# PYTHON=... names the interpreter that makes .venv. DEMO_ARGS, SLOW_ARGS, ECOSYSTEM_ARGS,
# BENCH_ARGS, LIBRARIES_ARGS and REPORT_ARGS are passed on. WORKERS=... sets the number of
# test processes.

PYTHON ?= python3
DEMO_ARGS ?=
SLOW_ARGS ?=
ECOSYSTEM_ARGS ?=
BENCH_ARGS ?=
LIBRARIES_ARGS ?=
REPORT_ARGS ?=
OUT ?= out/gpu
VENV := .venv/.stamp

.PHONY: help demo test quick slow ecosystem lint bench libraries report package docs
.PHONY: oldest newest triton-3.6 gpu clean
.DEFAULT_GOAL := test

help:
	@sed -n '/^[^#]/q;/^$$/q;s/^# \{0,1\}//p' Makefile

demo: $(VENV)
	@.venv/bin/python -m bench.demo $(DEMO_ARGS)

test: $(VENV)
	@PYTHON=.venv/bin/python ci/test.sh

quick: $(VENV)
	@PYTHON=.venv/bin/python ci/quick.sh

slow: $(VENV)
	@PYTHON=.venv/bin/python ci/slow.sh $(SLOW_ARGS)

ecosystem: $(VENV)
	@ci/ecosystem.sh $(ECOSYSTEM_ARGS)

lint: $(VENV)
	@PYTHON=.venv/bin/python ci/lint.sh

bench: $(VENV)
	@.venv/bin/python -m bench compare $(BENCH_ARGS)

libraries: $(VENV)
	@ci/libraries.sh $(LIBRARIES_ARGS)

report: $(VENV)
	@.venv/bin/python -m bench report $(REPORT_ARGS)

package: $(VENV)
	@ci/package.sh

docs: $(VENV)
	@ci/docs.sh

triton-3.6: $(VENV)
oldest newest triton-3.6:
	@PYTHON=$(PYTHON) ci/versions.sh $@

# Uses the torch and Triton of the GPU machine, not .venv.
gpu:
	@PYTHON=$(PYTHON) ci/gpu.sh $(OUT)

$(VENV): pyproject.toml constraints.txt ci/exporters.txt ci/peers.txt ci/triton.txt ci/venv.sh
	@PYTHON=$(PYTHON) ci/venv.sh
	@touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -rf build dist out docs/build docs/generated *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
