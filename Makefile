# make demo, make test: each sets up the virtual environment first if necessary.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TIMM := $(VENV)/timm-sources

.PHONY: demo test test-more lint benchmark benchmark-robustness

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/l2r2 demo -o demo

# timm's tests are in its source distribution, not in the wheel; without it they are skipped.
$(TIMM): $(INSTALLED)
	@rm -rf $(TIMM) && mkdir -p $(TIMM)
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("timm"))'); \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d $(TIMM) timm==$$version \
	&& tar -xzf $(TIMM)/timm-$$version.tar.gz -C $(TIMM) --strip-components=1 \
	|| echo "timm's sources cannot be fetched; its own tests are skipped"

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

# One thread per worker: threads of several workers wait for each other on few cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2

test: lint
	@$(PYTEST)

# timm's own suite on the smallest model of every family; minutes.
.PHONY: test-timm
test-timm: $(INSTALLED) $(TIMM)
	@L2R2_TIMM_CHECKOUT=$(CURDIR)/$(TIMM) $(PYTEST) -m timm_suite tests/contract

# What takes longer: the Triton kernels in the interpreter and compiled for sm_90, timm's own suite, tutorials, whole trainings.
test-more: $(INSTALLED) $(TIMM)
	@L2R2_TIMM_CHECKOUT=$(CURDIR)/$(TIMM) $(PYTEST) -m "interpreter or timm_suite or slow"

.PHONY: docs
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict && echo "wrote build/site/index.html"

# Checkpoints that may be published from here, with their model cards; a few minutes on a CPU.
.PHONY: weights
weights: $(INSTALLED)
	@$(BIN)/python benchmarks/release.py -o weights

benchmark: $(INSTALLED)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q benchmarks/speed -p no:xdist
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/speed/packed_vit.py

# make benchmark-robustness DATA=folder that contains fod_a_shift, eth80 and scenes; takes hours on a CPU; the same command continues
benchmark-robustness: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness/background_shift.py fod_a_shift $(DATA)/fod_a_shift
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness/background_shift.py composites $(DATA)/eth80 $(DATA)/scenes
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness/localizers.py fod_a_shift $(DATA)/fod_a_shift
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness/localizers.py composites $(DATA)/eth80 $(DATA)/scenes
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness/masking.py $(DATA)/eth80 $(DATA)/scenes
