# make demo   train the anomaly detector of the README with the stock block and with this package, side by side
# make test   style, tests, kernels without a GPU, and the comparison with FrEIA and anomalib
# make bench  the benchmarks, e.g. make bench BENCH_ARGS="--workloads fastflow-wrn50 --record" (options: bench/conftest.py); make report
# make lint | gpu | clean
# Each does its own set-up: a .venv in this folder with pinned versions. PYTHON=... names the interpreter to make it with.

PYTHON ?= python3
DEMO_ARGS ?=
BENCH_ARGS ?=
REPORT_ARGS ?=
OUT ?= out/gpu
VENV := .venv/.stamp

.PHONY: demo test lint bench report gpu clean
.DEFAULT_GOAL := test

demo: $(VENV)
	@PYTHON=.venv/bin/python ci/demo.sh $(DEMO_ARGS)

test: $(VENV)
	@PYTHON=.venv/bin/python ci/test.sh

lint: $(VENV)
	@PYTHON=.venv/bin/python ci/lint.sh

bench: $(VENV)
	@PYTHON=.venv/bin/python ci/bench.sh $(BENCH_ARGS)

report: $(VENV)
	@.venv/bin/python -m bench.report $(REPORT_ARGS)

# Not in the .venv: with the torch and the Triton that the GPU machine has.
gpu:
	@PYTHON=$(PYTHON) ci/gpu.sh $(OUT)

$(VENV): pyproject.toml constraints.txt ci/peers.txt ci/triton.txt ci/venv.sh
	@PYTHON=$(PYTHON) ci/venv.sh
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .benchmarks build dist out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
