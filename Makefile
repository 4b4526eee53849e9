# make demo   train the anomaly detector of the README with the stock block and with this package, side by side
# make test   style, tests, kernels without a GPU, and the comparison with FrEIA and anomalib
# make ecosystem  anomalib, FrEIA, Lightning and exporters as PyPI ships them (an environment of their own)
# make bench  the benchmarks, e.g. make bench BENCH_ARGS="--workloads fastflow-wrn50 --record", or BENCH_ARGS=main (against that commit); make report
# make package | docs   the wheel, built and used in an empty environment; the documentation, docs/build/index.html
# make slow   the tests that `make test` leaves out: more kernels executed, faults planted in them, benchmarks from end to end
# make oldest | newest | triton-3.6  a part of the tests on the oldest supported versions, on the newest that can be had, and the kernels
#             with Triton 3.6 (an environment of its own each)
# make lint | gpu | clean
# Each does its own set-up: a .venv in this folder with pinned versions. PYTHON=... names the interpreter to make it with.

PYTHON ?= python3
DEMO_ARGS ?=
SLOW_ARGS ?=
ECOSYSTEM_ARGS ?=
BENCH_ARGS ?=
REPORT_ARGS ?=
OUT ?= out/gpu
VENV := .venv/.stamp

.PHONY: demo test slow ecosystem lint bench report package docs oldest newest triton-3.6 gpu clean
.DEFAULT_GOAL := test

demo: $(VENV)
	@.venv/bin/python -m bench.demo $(DEMO_ARGS)

test: $(VENV)
	@PYTHON=.venv/bin/python ci/test.sh

slow: $(VENV)
	@PYTHON=.venv/bin/python ci/slow.sh $(SLOW_ARGS)

ecosystem:
	@PYTHON=$(PYTHON) ci/ecosystem.sh $(ECOSYSTEM_ARGS)

lint: $(VENV)
	@PYTHON=.venv/bin/python ci/lint.sh

bench: $(VENV)
	@.venv/bin/python -m bench compare $(BENCH_ARGS)

report: $(VENV)
	@.venv/bin/python -m bench report $(REPORT_ARGS)

package: $(VENV)
	@ci/package.sh

docs: $(VENV)
	@ci/docs.sh

oldest newest triton-3.6:
	@PYTHON=$(PYTHON) ci/versions.sh $@

# Not in the .venv: with the torch and the Triton that the GPU machine has.
gpu:
	@PYTHON=$(PYTHON) ci/gpu.sh $(OUT)

$(VENV): pyproject.toml constraints.txt ci/exporters.txt ci/peers.txt ci/triton.txt ci/venv.sh
	@PYTHON=$(PYTHON) ci/venv.sh
	@touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks build dist out docs/build docs/generated *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
