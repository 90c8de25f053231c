# Every command a contributor or the CI needs. `make` alone lists them.

PYTHON ?= python3
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env demo test test-gpu test-faults test-oldest matrix style docs wheel bench bench-gpu study-gpu lock clean

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/.installed  ## make .venv at the versions of constraints.txt

.venv/.installed: constraints.txt
.venv-oldest/.installed: constraints-oldest.txt

# An environment is installed again when pyproject.toml or its constraints change, and only then. torch goes first and by
# itself: a machine without a GPU wants the CPU build that its own pip settings offer (a wheel folder, an extra index),
# and at any other version than the pinned one pip would fetch gigabytes of CUDA packages with it.
%/.installed: pyproject.toml
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install -c $(filter constraints%,$^) torch
	$*/bin/python -m pip install -c $(filter constraints%,$^) -e '.[dev]'
	touch $@

# The site has an environment of its own, without the library and its torch: its pages and docstrings are read as text.
# Its tools need Python 3.11 or newer.
.venv-docs/.installed: constraints-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -r constraints-docs.txt
	touch $@

demo: .venv/.installed  ## fine-tune a tiny model with and without DIPNet; results in runs/demo
	.venv/bin/python recipes/demo.py

# One thread a worker: the workers already use the cores.
test test-gpu test-faults test-oldest matrix: export OMP_NUM_THREADS = 1

test: .venv/.installed  ## the tests: CPU, no downloads (JOBS=n workers)
	.venv/bin/python -m pytest -n $(JOBS) tests

test-gpu: .venv/.installed  ## the tests that need a CUDA device
	.venv/bin/python -m pytest -m gpu tests

test-faults: .venv/.installed  ## the programs killed at random moments and with full disks
	.venv/bin/python -m pytest -m faults tests/faults

matrix: .venv/.installed  ## every property of every model and kind of site (about an hour on two cores, resumable)
	.venv/bin/python tests/matrix/run.py --jobs $(JOBS)

test-oldest: .venv-oldest/.installed  ## the tests at the oldest supported versions (Python 3.10 to 3.12)
	.venv-oldest/bin/python -m pytest -n $(JOBS) tests

style: .venv/.installed  ## lint, format, types, spelling: checks only
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/codespell

docs: .venv-docs/.installed  ## the documentation site, in build/site; a broken link fails
	.venv-docs/bin/mkdocs build --strict

# In dist/, where only the wheel can be imported: first without any extra, then with those that the examples need.
wheel:  ## build the wheel, install it in .venv-wheel and run the README's examples there
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -c constraints.txt torch pytest
	.venv-wheel/bin/python -m pip wheel --no-deps -w dist .
	.venv-wheel/bin/python -m pip install -c constraints.txt dist/*.whl
	cd dist && ../.venv-wheel/bin/python -c "from dipnet_hf import DipConfig, DipTrainer, dip_loss, get_dip_model, predict"
	.venv-wheel/bin/python -m pip install -c constraints.txt "$$(echo dist/*.whl)[diagnostics,trl]"
	mkdir -p dist/tests
	cp -r README.md docs dist
	cp tests/test_readme.py tests/tiny_models.py dist/tests
	cd dist && ../.venv-wheel/bin/python -m pytest -c /dev/null --rootdir . -rs tests

bench: .venv/.installed  ## every benchmark, on this machine (about an hour on two cores)
	for name in step step_profile loss projection instructions padding scaling ensemble gradient_variance regularizers; do .venv/bin/python benchmarks/$$name.py || exit; done

bench-gpu: .venv/.installed  ## the benchmarks that have a GPU's targets: no network, about 8 minutes
	.venv/bin/python benchmarks/projection.py
	.venv/bin/python benchmarks/loss.py
	.venv/bin/python benchmarks/paper_models.py
	.venv/bin/python benchmarks/step.py --rounds 3
	.venv/bin/python benchmarks/ensemble.py --samples 8 --rounds 2

# The runs share the card: under NVIDIA's MPS (nvidia-cuda-mps-control -d) in half of the time. The model is that of
# runs/models, and a second call goes on where the first one stopped.
study-gpu: export OMP_NUM_THREADS = 1
study-gpu: .venv/.installed  ## SmolLM2's study, whose cells run for an hour on one GPU: no network, nine minutes of it
	.venv/bin/python recipes/study.py recipes/configs/study-smollm2-svamp.yaml --jobs 10 --budget 9m

# Resolves pyproject.toml for all supported Pythons at once; a pin that still holds is kept, delete its line to renew it.
# What torch brings along for CUDA is left out: that is for the chosen build of torch to say. Triton is pinned to what
# torch 2.13.0 for CUDA asks for. The oldest set is resolved for Python 3.10, so that its pins are one list. In it torch stays at the current version: its lower bound is the one
# transformers states, and is not tested here.
UV_COMPILE = uv pip compile pyproject.toml - --extra dev --python-version 3.10 --no-annotate --quiet \
	--custom-compile-command "make lock"
DROP_CUDA = sed -i.bak -E '/^(cuda|nvidia)[a-z0-9-]*==/d'

lock:  ## resolve the constraints files again (needs uv)
	printf 'torch==2.13.0\ntriton==3.7.1\n' | $(UV_COMPILE) --universal -o constraints.txt
	$(DROP_CUDA) constraints.txt && rm constraints.txt.bak
	printf 'torch==2.13.0\ntriton==3.7.1\ntokenizers==0.23.1\n' | $(UV_COMPILE) --resolution lowest-direct -o constraints-oldest.txt
	$(DROP_CUDA) constraints-oldest.txt && rm constraints-oldest.txt.bak
	grep '^docs = ' pyproject.toml | grep -o '"[^"]*"' | tr -d '"' | uv pip compile - --universal --python-version 3.11 \
		--no-annotate --quiet --custom-compile-command "make lock" -o constraints-docs.txt

clean:  ## remove build products and caches; keeps runs/ and the environments
	rm -rf build dist .venv-wheel *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
