# The two commands of the README are `make chat` and `make test`; each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
# Where PyTorch's builds for the CPU are: the package index gives the CUDA build, of gigabytes.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: chat serve test test-gpu check format bench-cpu clean

chat: $(DEMO)
ifdef PROMPT
	@$(BIN)/nybble chat demo -- "$$PROMPT"
else
	@$(BIN)/nybble chat demo
endif
export PROMPT

serve: $(DEMO) $(VENV)/.serve
	@$(BIN)/nybble serve demo --open

test: $(DEMO) $(VENV)/.dev
	$(BIN)/pytest --cov=nybble --cov-report=term:skip-covered --cov-fail-under=90

# On a machine with a GPU and its own torch; PYTHON=python3 takes that one.
test-gpu:
	$(PYTHON) -m pytest tests/gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/cpu/test_layers.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: $(DEMO)
	$(BIN)/python benchmarks/cpu.py

# A stamp is written last, so that an interrupted set-up is simply run again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "nybble needs Python 3.11 or later: run make PYTHON=python3.12, say."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.serve: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $@

$(DEMO): $(READY)
	$(BIN)/nybble pull demo > /dev/null
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
