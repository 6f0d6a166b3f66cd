# Each target sets up everything it needs; a second call reuses it.
PYTHON ?= python3
FLM_DATA ?= ../shared/data
# Where the CPU build of torch is found if the configured indexes lack it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' requirements/cpu.txt)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/ready
EXTRAS := $(VENV)/extras
DOCS := $(VENV)/docs
# -qq shows errors alone; warnings about the index addresses of this machine, one for each package, would hide them.
# Compiling all 12,000 files of the packages takes longer than their installation. Python compiles what it imports.
PIP = $(BIN)/pip install -qq --no-compile
# Some images set this. Python would then compile what it imports anew in every process.
unexport PYTHONDONTWRITEBYTECODE
# README.md must work without the extras: in .venv while it has none, else in an environment of its own.
BASE := $(if $(wildcard $(EXTRAS)),.venv-base,$(VENV))
CODE = flm_torchrec launch tests tools examples
# Tests that run without the extras.
IN_BASE = tests/training
# The site: built where the extras are not, with requirements/docs.txt alone.
SITE = tests/test_site.py
# These begin first, so that no process is left with a long file at the end. After them each folder and file is named, not
# `tests`: pytest takes what is in a folder that is named in the folder's order.
LONGEST = tests/tools tests/distributed tests/export tests/launch tests/test_notebooks.py tests/test_extending.py
OTHERS = $(filter-out tests/__pycache__ $(LONGEST) $(IN_BASE) $(SITE),$(patsubst %/,%,$(wildcard tests/*/)) \
	$(wildcard tests/test_*.py))
# A CUDA driver decides which build of torch and fbgemm can load.
DRIVER := $(shell (ldconfig -p 2>/dev/null | grep -q libcuda.so.1 || command -v nvidia-smi >/dev/null 2>&1) && echo gpu || echo cpu)

.PHONY: help venv extras train test test-slow docs check check-base test-base lint format beauty ml-100k clean

help:
	@echo "make train    set up, then prepare, pretrain, evaluate, export and recommend on synthetic data"
	@echo "make test     set up, then style, types, the commands of README.md and all tests"
	@echo "make test-slow  the slow tests besides: tools of studies, plans on repeat, further variants"
	@echo "make beauty   the same as train on Amazon Beauty in FLM_DATA/beauty  (FLM_DATA=$(FLM_DATA))"
	@echo "make ml-100k  the same on MovieLens 100K in FLM_DATA/ml-100k"
	@echo "make check-base  the commands of README.md and the site alone, without the extras; make lint: style and types alone"
	@echo "make check T=tests/model/test_model.py   one file of tests; make format formats the code"
	@echo "make docs     the documentation as a site in site/; dead links fail (make test builds it too)"
	@echo "make extras   set up the optional parts too: Spark, Kafka, vector databases (make test does this itself)"
	@echo "make venv     set up only; make clean removes .venv and caches, keeps data and runs"

venv: $(STAMP)

$(STAMP): requirements/base.txt requirements/$(DRIVER).txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; call make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
ifeq ($(DRIVER),gpu)
	$(PIP) torch==$(TORCH)
else
	@# The default index gives Linux a CUDA build of torch, which does not load without its libraries.
	if $(BIN)/pip index versions torch 2>/dev/null | grep -qF '$(TORCH)+cpu'; \
		then $(PIP) --no-deps torch==$(TORCH); \
		else $(PIP) --no-deps torch==$(TORCH) --extra-index-url $(TORCH_CPU_INDEX); fi
endif
	$(PIP) --no-deps -r requirements/$(DRIVER).txt
	$(PIP) --no-deps --no-build-isolation --editable .
	$(BIN)/python -W ignore -c 'import torchrec, flm_torchrec.training.trainer, flm_torchrec.serve.app'
	touch $@

extras: $(EXTRAS)

$(EXTRAS): $(STAMP) requirements/extras.txt requirements/docs.txt
	$(PIP) --no-deps -r requirements/extras.txt -r requirements/docs.txt
	touch $(DOCS) $@

$(DOCS): $(STAMP) requirements/docs.txt
	$(PIP) --no-deps -r requirements/docs.txt
	touch $@

# $(call job,NAME,SOURCE,INPUT OPTIONS,USER)
define job
	$(BIN)/flm prepare --source $(2) $(3) --output data/$(1) --overwrite
	$(BIN)/flm train --config configs/$(subst -,_,$(1)).yaml
	$(BIN)/flm evaluate --run runs/$(1)
	$(BIN)/flm export --run runs/$(1) --output exports/$(1) --overwrite
	$(BIN)/flm recommend --export exports/$(1) --user $(4) -k 10
endef

train: $(STAMP)
	$(call job,synthetic,synthetic,,u0)

beauty: $(STAMP)
	$(call job,beauty,amazon-s3rec,--input $(FLM_DATA)/beauty,1)

ml-100k: $(STAMP)
	$(call job,ml-100k,movielens-100k,--input $(FLM_DATA)/ml-100k,196)

lint: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python tools/measure.py

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# One file of tests: make check T=tests/model/test_model.py
check: $(STAMP)
	$(BIN)/pytest $(T)

# A new user's first hour: README.md as it is typed after make venv, then the documentation. The tests of the optional parts
# skip themselves where the extras are not installed.
check-base:
	$(MAKE) VENV=$(BASE) venv
	$(BASE)/bin/pytest tests/test_packaging.py tests/test_versions.py
	OMP_NUM_THREADS=1 $(BASE)/bin/python tools/check_readme.py
	$(MAKE) VENV=$(BASE) $(BASE)/docs
	OMP_NUM_THREADS=1 $(BASE)/bin/pytest $(SITE)

# Style, types, and the tests of what every user has, without the extras.
test-base: lint
	$(MAKE) VENV=$(BASE) venv
	OMP_NUM_THREADS=1 $(BASE)/bin/pytest -n 2 --dist loadfile $(IN_BASE)

# The commands of README.md, one at a time, run beside the base tests, two files at a time. Then five processes run a file
# of the other tests each: with three, the two cores wait a third of the time for ranks and servers that start or end.
test: $(STAMP)
	$(MAKE) VENV=$(BASE) venv
	$(MAKE) --jobs=2 --output-sync=target check-base test-base
	$(MAKE) extras
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 5 --dist loadfile --no-loadscope-reorder -m "not slow" \
		$(LONGEST) $(OTHERS)

test-slow: $(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

# NO_MKDOCS_2_WARNING: mkdocs-material announces its successor at each build.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf site $(VENV) .venv-base .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
