# make demo   the embedded example: a trained VMamba scored, rewritten, measured and exported (about a minute)
# make test   the tests; make lint checks style and types
#
# Both create .venv first. TORCH is what pip is asked for before anything else; a plain torch brings several GB of CUDA
# libraries on Linux, so on a machine without a GPU give it PyTorch's CPU wheel index as well:
#     make test TORCH="torch==2.13.0 --index-url <PyTorch's CPU index, see pytorch.org>"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Two processes of one thread each: more threads on few cores only wait for one another. Who is done takes tests of the other.
PYTEST_ARGS ?= -n 2 --dist worksteal

bin   := $(VENV)/bin
stamp := $(VENV)/.installed

.PHONY: demo test lint install clean

demo: install
	$(bin)/python examples/quickstart.py

test: install
	OMP_NUM_THREADS=1 $(bin)/python -m pytest $(PYTEST_ARGS)

lint: install
	$(bin)/ruff check .
# For mypy, which reads pyproject's [tool.mypy]: the passes under the name that they are installed by.
	mkdir -p build/typing/vmeanba_fx && ln -sfn ../../../passes build/typing/vmeanba_fx/passes
	$(bin)/mypy

install: $(stamp)

$(stamp): pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet $(TORCH)
	$(bin)/python -m pip install --quiet -e ".[test,examples]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
