# `make` lists the targets. Every target sets up what it needs: a virtual environment in .venv with the package in it.

PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nanoghost needs Python 3.11 or newer"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

setup: .venv/installed  ## install the package and what it needs into .venv

speedrun: .venv/installed  ## the whole pipeline: from an empty folder to a chat
	$(BIN)/nanoghost speedrun

chat: .venv/installed  ## talk to the model finished last
	$(BIN)/nanoghost chat

test: .venv/installed  ## run the tests
	$(BIN)/ruff check --quiet nanoghost tests
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

parity: .venv/installed  ## compare models with transformers, peft and llama.cpp (installs them, builds one: minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	$(BIN)/python -m pytest -q -rs tests/test_parity.py tests/test_llama_cpp.py tests/test_model.py tests/test_lora.py

soak: .venv/installed  ## kill a toy run 200 times: nothing may be lost (minutes)
	$(BIN)/python -m tests.support.soak 200

page: .venv/installed  ## try the chat page in a real browser, and take pictures of all its states (skipped where chromium and its driver are not installed)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[page]'
	$(BIN)/python -m pytest -q -rs tests/test_page.py
	$(BIN)/python -m tests.support.page_screenshots pictures

api: .venv/installed  ## let lm-eval and schemathesis try the API (installs them; minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[api]'
	$(BIN)/python -m pytest -q -rs tests/test_lm_eval.py tests/test_schemathesis.py

load: .venv/installed  ## many clients at once, some of them bad, and the engine killed under them (adopts SmolLM2; eight minutes)
	$(BIN)/nanoghost show smollm2 > /dev/null 2>&1 || $(BIN)/nanoghost adopt smollm2
	$(BIN)/nanoghost bench load smollm2

lines: .venv/installed  ## count what one reads from speedrun.py to the chat
	@$(BIN)/python -m tests.support.count_lines

clean:  ## remove the virtual environment and caches (models stay in the home folder)
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup speedrun chat test parity soak page api load lines clean
