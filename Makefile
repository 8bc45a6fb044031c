# `make` lists the targets. Each target installs what it needs into the virtual environment .venv.

PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nanoghost needs Python 3.11 or newer"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

setup: .venv/installed  ## install the package and its dependencies into .venv

speedrun: .venv/installed  ## run the whole pipeline: from an empty folder to a chat model
	$(BIN)/nanoghost speedrun

chat: .venv/installed  ## chat with the model that was finished last
	$(BIN)/nanoghost chat

test: .venv/installed  ## run the tests
	$(BIN)/ruff check --quiet nanoghost tests
	$(BIN)/ruff format --quiet --check nanoghost tests
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

parity: .venv/installed  ## compare with transformers, peft and llama.cpp (installs them, compiles llama.cpp, fetches a vocabulary: minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	$(BIN)/python -m tests.support.qwen_vocabulary
	$(BIN)/python -m pytest -q -rs tests/test_parity.py tests/test_parity_prompts.py tests/test_config_defaults.py tests/test_llama_cpp.py tests/test_model.py tests/test_lora.py

soak: .venv/installed  ## kill a toy run 200 times and check that nothing is lost (minutes)
	$(BIN)/python -m tests.support.soak 200

page: .venv/installed  ## test the chat page in Chromium and take screenshots (skipped if Chromium or its driver is missing)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[page]'
	$(BIN)/python -m pytest -q -rs tests/page
	$(BIN)/python -m tests.support.page_screenshots pictures

api: .venv/installed  ## test the API with lm-eval and schemathesis (installs them; minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[api]'
	$(BIN)/python -m pytest -q -rs tests/test_lm_eval.py tests/test_schemathesis.py

load: .venv/installed  ## load test: many clients, some misbehaving, engine killed (imports SmolLM2; eight minutes)
	$(BIN)/nanoghost show smollm2 > /dev/null 2>&1 || $(BIN)/nanoghost adopt smollm2
	$(BIN)/nanoghost bench load smollm2

lines: .venv/installed  ## count the lines of code that a default run loads, and all of them
	@$(BIN)/python -m tests.support.count_lines

clean:  ## remove the virtual environment and caches (models stay in the home folder)
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup speedrun chat test parity soak page api load lines clean
