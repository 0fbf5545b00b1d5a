# Two commands do everything: `make demo` and `make test`. `make` alone lists the rest.

# The interpreter that makes .venv; another one: make BASE_PYTHON=python3.12 test
BASE_PYTHON = python3
BIN = .venv/bin
READY = .venv/.installed

# The folder that `make lab` copies the course to; another one: make LAB=~/my_lab lab
LAB = lab
# Copy alone: make LAB_OPTIONS=--no-open lab; further options of JupyterLab stand after --:
# make LAB_OPTIONS="-- --no-browser --port=9000" lab
LAB_OPTIONS =

.PHONY: help demo test check lab gpu export readme clean lint

help:
	@echo "make demo     install into .venv; the checks, a mistake, then a small GPT-2 is trained"
	@echo "              (a BERT, afterwards: .venv/bin/megatron-edu demo --model bert)"
	@echo "make test     install into .venv, then all checks"
	@echo "make check    install into .venv, then what a small change breaks first, in about two minutes"
	@echo "make lab      install into .venv, then open a copy of the course in JupyterLab, in lab/"
	@echo "              (after a git pull, too: what you wrote stays; another folder: LAB=~/my_lab)"
	@echo "make gpu      install into .venv, then check and time what this machine's GPUs allow"
	@echo "make export   write megatron_edu/ from the notebooks"
	@echo "make readme   write README.md from nbs/index.ipynb"
	@echo "make clean    strip the notebooks of what changes from run to run"
	@echo "make lint     ruff alone"

$(READY): settings.ini setup.py constraints.txt
	@set -e; start=$$(date +%s); \
	python=; \
	for candidate in $(BASE_PYTHON) python3.13 python3.12 python3.11 python3.10; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "$(BASE_PYTHON) is $$($(BASE_PYTHON) --version 2>&1); Python 3.10 or newer is needed."; \
	    echo "Install one, or name it: make BASE_PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	    exit 1; \
	fi; \
	echo "== install: $$($$python --version) and all packages of constraints.txt, into .venv"; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then $$python -m venv --clear .venv; fi; \
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt; \
	touch $(READY); \
	echo "== install: done in $$(($$(date +%s) - start)) s"

demo: $(READY)
	@start=$$(date +%s); echo "== demo: megatron-edu demo"; \
	$(BIN)/megatron-edu demo && echo "== demo: done in $$(($$(date +%s) - start)) s"

test: $(READY)
	@$(BIN)/python tools/checks.py

check: $(READY)
	@$(BIN)/python tools/checks.py library clean lint front_page quick_tests

lab: $(READY)
	@$(BIN)/python tools/lab.py --to "$(LAB)" $(LAB_OPTIONS)

gpu: $(READY)
	@PYTHONPATH=. $(BIN)/python tools/gpu_check.py

export: $(READY)
	@$(BIN)/nbdev_export && echo "megatron_edu/ written from nbs/"

readme: $(READY)
	@$(BIN)/python tools/readme.py

clean: $(READY)
	@$(BIN)/nbdev_clean && echo "nbs/ cleaned"

lint: $(READY)
	@$(BIN)/python tools/checks.py lint
