# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINUTES ?= 15
WORKERS ?= 2
# OpenMP threads that spin while waiting collapse beside a busy neighbour.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: serve test test-ray check bench bench-serving bench-scaling bench-drift fmt model dashboards image-test soak fuzz clean

serve: $(VENV)/.serve
	$(BIN)/oodgate serve

# Triton's client brings greenlets, under which Python 3.11 at times fails to compile: it gets a process of its own.
GREENLETS := tests/e2e/test_oip_clients.py

test: $(VENV)/.dev
	# In the order of the folders: files that wait for servers do not come last, when nothing is left to run beside them.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore $(GREENLETS)
	$(BIN)/python -m pytest $(GREENLETS)

# oodgate on a real Ray, serving and fitting; Ray has an environment of its own, with the libraries of the other behind it.
RAY := build/ray-venv
test-ray: $(RAY)/.ready
	$(RAY)/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider tests/ray

bench-scaling: $(RAY)/.ready
	$(BIN)/python -m benchmarks.scaling.stages
	$(BIN)/python -m benchmarks.scaling.index
	for network in resnet20 resnet56 embedded; do $(BIN)/python -m benchmarks.scaling.recall --network $$network || exit 1; done
	$(RAY)/bin/python -m benchmarks.scaling.replicas
	$(BIN)/python -m benchmarks.scaling.table

$(RAY)/.ready: deploy/ray/requirements.txt $(VENV)/.dev
	$(BIN)/python -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -r deploy/ray/requirements.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz-shared.pth
	touch $@

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py
	$(BIN)/python -m tests.dependencies

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cifar10.report
	$(BIN)/python -m benchmarks.cifar10.over_http
	$(BIN)/python -m benchmarks.score_cost
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.heat
	$(BIN)/python -m benchmarks.readme

# Every server on every workload, three times, interleaved: some hours. Needs wrk, and a machine that does nothing else.
# BENCH_FLAGS='--seconds 4' makes it shorter.
bench-serving: $(VENV)/.dev
	for workload in N B A C D; do $(BIN)/python -m benchmarks.serving.run --workload $$workload $(BENCH_FLAGS) || exit 1; done
	for workload in N B A; do $(BIN)/python -m benchmarks.serving.experiments --workload $$workload $(BENCH_FLAGS) || exit 1; done
	$(BIN)/python -m benchmarks.serving.cost --workload N
	$(BIN)/python -m benchmarks.serving.cost --workload N --concurrency 1
	$(BIN)/python -m benchmarks.serving.cost --workload B --precision auto
	$(BIN)/python -m benchmarks.serving.table

bench-drift: $(VENV)/.dev
	$(BIN)/python -m benchmarks.drift.simulate
	$(BIN)/python -m benchmarks.drift.replay
	$(BIN)/python -m benchmarks.drift.table

# The long forms of the fault tests; docs/reliability.md shows what they found.
soak: $(VENV)/.dev
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.faults.fuzz

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Train and fit the embedded default model again.
model: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cifar10.train --out build/cifar10
	$(BIN)/python -m benchmarks.cifar10.fit --weights build/cifar10/weights.safetensors

# Write deploy/grafana/dashboards/ from deploy/grafana/source/.
dashboards: $(VENV)/.dev
	$(BIN)/python -m deploy.grafana.source

# Build the container image with buildah and get a verdict from it. Needs root, buildah and debootstrap.
image-test:
	deploy/image/test.sh

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins every package, so that two installs a month apart are the same.
$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.serve

clean:
	rm -rf $(VENV) build dist
