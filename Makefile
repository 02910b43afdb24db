# make demo | test | test-slow | test-browser | test-package | test-gpu | test-matrix | test-ecosystem | modes | docs |
# make paper | diagnosis | tuning | held-out | findings | bench | clean
#
# Everything runs in .venv, which is made on first use and brought up to date whenever pyproject.toml, constraints.txt or
# the compiled part change. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One thread per process: the test workers share the cores among themselves, and sums do not
# depend on how many threads a machine offers.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: demo test test-slow test-browser test-package test-gpu test-matrix test-ecosystem modes docs paper diagnosis
.PHONY: tuning held-out findings bench clean setup

PAPER := linear langevin ntk power_laws images sweep
REAL := finite_width initial_weights real_images noisy_sgd

setup: $(STAMP)

# torch comes first and pinned, so that nothing that asks for "some torch" can choose another one.
$(STAMP): pyproject.toml constraints.txt setup.py lightning_speedlimit/trajectory/rows.c
	@command -v $(PYTHON) >/dev/null 2>&1 || \
		{ echo "make: no '$(PYTHON)' here; wanted Python >= 3.10: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); wanted Python >= 3.10: make PYTHON=/path/to/python3"; exit 1; }
	@rm -f $@
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[report,test,docs]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/compare_optimizers.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p lightning_speedlimit
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not browser and not package" tests

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu" tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" --without-compiled tests/trajectory

# The page of a comparison in a real browser: /usr/bin/chromium and chromedriver, as Debian's packages chromium and
# chromium-driver install them. Without these the tests are skipped, and say so.
test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser tests

# The sdist and the wheel: built, installed in a clean environment around the libraries of .venv, and used from there.
test-package: $(STAMP)
	$(BIN)/python -m pytest -m package tests

# What needs a GPU: the tests, and the figures of what measuring costs there, in a file that carries the card's name.
# Meant to take 4 minutes; longer and less noisy: make test-gpu GPU_ROUNDS=12
GPU_ROUNDS ?= 3
CARD = import torch; print(torch.cuda.get_device_name().replace(" ", "-").replace("/", "-") if torch.cuda.is_available() else "")

test-gpu: $(STAMP)
	@card=$$($(BIN)/python -c '$(CARD)') || exit 1; \
	if [ -z "$$card" ]; then echo "make test-gpu: PyTorch sees no GPU here; nothing was tested"; exit 0; fi; \
	$(BIN)/python -m pytest -m gpu tests && \
	$(BIN)/python benchmarks/overhead.py --device cuda --rounds $(GPU_ROUNDS) --cases a b c d --operations --memory \
		--output "benchmarks/overhead-$$card.json"

# A part of the tests with the oldest and the newest versions, and with both of Lightning's packages, each in an
# environment of its own in .matrix (a gigabyte or two each). One alone: make test-matrix MATRIX=oldest
MATRIX ?= oldest newest both
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.13
PYTHON_BOTH ?= $(PYTHON)
PYTHON_oldest := $(PYTHON_OLDEST)
PYTHON_newest := $(PYTHON_NEWEST)
PYTHON_both := $(PYTHON_BOTH)

test-matrix: $(STAMP)
	@status=0; $(foreach name,$(MATRIX),$(BIN)/python tests/matrix/run.py $(name) --python $(PYTHON_$(name)) || status=1;) exit $$status
	$(BIN)/python docs/make_modes.py

# Hugging Face's Trainer, Accelerate, PEFT, schedulefree, pytorch_optimizer and timm, as they are, in environments of
# their own in .ecosystem (300 MB each) around the torch of .venv. One alone: make test-ecosystem ECOSYSTEM=optimizers
ECOSYSTEM ?=

test-ecosystem: $(STAMP)
	$(BIN)/python tests/ecosystem/run.py $(ECOSYSTEM)
	$(BIN)/python docs/make_modes.py

# docs/modes.md, from the tests that say which way of training they show. What needs a GPU is left out where there is
# none; pytest --modes docs/modes.json adds it elsewhere.
modes: $(STAMP)
	rm -f docs/modes.json
	$(BIN)/python -m pytest -n 2 --dist loadfile -m mode --modes docs/modes.json tests
	$(BIN)/python docs/make_modes.py

# The site, in docs/_build/html: a warning is an error, and the gallery's scripts are run.
docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

# Figures and numbers of docs/paper, computed anew; those on real images, less what their result files have already, with
# make paper DATA=folder with cifar10/, mnist/ and fashion-mnist/ as they are published.
paper: $(STAMP)
	@set -e; for name in $(PAPER); do $(BIN)/python examples/paper/$$name.py --output docs/paper; done
	@set -e; for name in $(REAL); do \
		if [ -n "$(DATA)" ]; then $(BIN)/python examples/paper/$$name.py --data "$(DATA)" --output docs/paper; \
		else echo "skipped: $$name, which needs real images: make paper DATA=folder with cifar10, mnist, fashion-mnist"; fi; \
	done

# What docs/diagnosis.md rests on, computed anew: about a quarter of an hour.
diagnosis: $(STAMP)
	$(BIN)/python examples/diagnosis/truth.py --output docs
	$(BIN)/python examples/diagnosis/mended.py --output docs

# What docs/tuning.md rests on: 25 minutes, less what docs/tuning.json has already. make tuning DATA=folder with
# mnist/ and fashion-mnist/ as they are published.
tuning: $(STAMP)
	$(BIN)/python examples/tuning/sweep.py --data "$(DATA)" --seeds 0 1 2 --output docs
	$(BIN)/python examples/tuning/headroom.py --data "$(DATA)" --output docs
	$(BIN)/python examples/tuning/shown.py --output docs

# The advice, followed on tasks that it was not made on: half an hour, less what docs/held_out.json has already.
# make held-out DATA=folder with mnist/ and cifar10/ as they are published.
held-out: $(STAMP)
	$(BIN)/python examples/tuning/held_out.py --data "$(DATA)" --output docs

# What docs/findings.md rests on: hours on one core, less what docs/findings has already; stopped, it goes on where it
# was. make findings DATA=folder with cifar10/, mnist/ and fashion-mnist/ as published. One alone: FINDINGS=decay
FINDINGS ?= interval noise_and_batch warm_up decay frontier lazy_or_feature compute_optimal size real_size

findings: $(STAMP)
	@set -e; at=0; for name in $(FINDINGS); do at=$$((at + 1)); echo "== $$at of $(words $(FINDINGS)): $$name"; \
		case $$name in size) folder=docs/paper;; *) folder=docs/findings;; esac; \
		$(BIN)/python examples/findings/$$name.py --data "$(DATA)" --output $$folder; done

bench: $(STAMP)
	$(BIN)/python benchmarks/overhead.py --cases a b c d --operations --memory
	$(BIN)/python benchmarks/transport.py

clean:
	rm -rf $(VENV) .matrix .ecosystem docs/_build docs/gallery_built build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lightning_speedlimit tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
