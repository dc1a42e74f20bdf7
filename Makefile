# Targets for users: make venv | check | test-fast | test | test-ray | test-browser | chaos | demo. Each first installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Tests and demos start hundreds of processes; without cached bytecode, each compiles the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv check check-install test test-fast test-ray test-browser chaos demo vendor docs docs-reference docs-images lock clean

venv: $(STAMP)

# Reinstalls only when the locked versions or the project's metadata change. Compiles bytecode during installation: where
# Python cannot write bytecode, every process of a test or demo would otherwise spend 5 s compiling torch and Ray.
$(STAMP): requirements.lock pyproject.toml
	@echo "Installing packages to .venv (about 7.5 GB the first time, some minutes without output)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Fails if the newest permitted versions do not resolve on a supported Python or platform. Reads metadata only.
check-install: venv
	$(BIN)/python .ci/check_install.py

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

# For the edit loop: without Ray, server processes and slow files (tests/README.md).
test-fast: venv
	$(PYTEST) -m "not ray and not server and not slow and not chaos and not gpu"

test: venv
	$(PYTEST) -m "not ray and not chaos"

# Whole programs on one shared Ray cluster. In one process, since each test keeps both cores of a small machine busy.
test-ray: venv
	$(BIN)/python -m pytest -m "ray and not chaos"

# The console in Chromium. Installs Chromium and npm with apt-get if they are missing, which needs root.
test-browser: venv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints requirements.lock --group browser
	PYTHON=$(BIN)/python .ci/browser_tools
	AMD_AXE=build/axe $(BIN)/python -m pytest tests/browser

chaos: venv
	$(BIN)/python -m pytest -m chaos

demo: venv
	$(BIN)/amd demo

# Copies the console's pinned libraries from the npm registry; they are committed, so only a new version needs this.
vendor: venv
	$(BIN)/python .ci/vendor.py

# Reference pages, generated from the code; tests/test_docs.py fails if they are stale.
docs-reference: venv
	$(BIN)/python docs/generate.py

# The pictures of the console in docs/images. Needs what test-browser installs; the first run trains a student for minutes.
docs-images: venv
	$(BIN)/python -m tests.support.browser.screenshots

# A searchable site in build/docs. Fails on broken links.
docs: docs-reference
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints requirements.lock --group docs
	$(BIN)/python docs/build_site.py
	$(BIN)/zensical build --clean --strict

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-emit-index-url --no-annotate

# All locks share one set of versions, so the images contain subsets of what the tests use. Universal: environment markers
# let the same lock install on every supported Python and platform.
lock:
	$(COMPILE) --extra dev pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraints requirements.lock --extra huggingface --extra mlflow --extra onnx --extra umap pyproject.toml \
		--output-file deploy/docker/ray-node.lock
	$(COMPILE) --constraints requirements.lock --group pyproject.toml:control-plane \
		--output-file deploy/docker/control-plane.lock

clean:
	rm -rf .venv .cache build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
