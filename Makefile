# make demo     search, train and evaluate a robust architecture on real images (about 5 minutes on two cores)
# make test     everything that continuous integration runs; WORKERS=n: in n processes, 2 unless set, 0: in this one
# make bench    time the supernet of this machine into benchmarks/results/, and render the README's table
# make gpu      on a machine with a GPU: build, GPU tests, GPU benchmarks
# make resources   registers, shared memory and spills of every GPU kernel, compared with csrc/cuda/resources.json
#                  (to renew it: python scripts/kernel_resources.py --write)
# make planted  plant one error after another in the kernels: a test must turn red for each (20 to 30 minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP_FLAGS ?= -c constraints.txt
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test bench gpu resources sanitize planted lint clean

demo: $(VENV)/.installed
	BIN=$(BIN) bash scripts/demo.sh

test: $(VENV)/.tested
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.tested
	$(BIN)/python -m pytest benchmarks -q -s
	$(BIN)/python scripts/render_readme.py

gpu:
	PYTHON=$(PYTHON) bash scripts/gpu.sh

resources: $(VENV)/.installed
	$(BIN)/python scripts/kernel_resources.py --check

sanitize: $(VENV)/.tested
	BIN=$(BIN) bash scripts/sanitize.sh

planted: $(VENV)/.tested
	$(BIN)/python scripts/planted_errors.py

lint: $(VENV)/.tested
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info rnas/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# an editable install: the compiled part lands in rnas/, and a change of the Python files needs no new install
$(VENV)/.installed: $(SOURCES) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	touch $@

$(VENV)/.tested: $(SOURCES) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps torchattacks
	touch $(VENV)/.installed $@
