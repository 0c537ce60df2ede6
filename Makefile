# make demo: train, sample, evaluate and report on real digits.  make test: every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format pictures bench bench-gpu faults soak ray slurm clean
.DELETE_ON_ERROR:

demo: .venv/installed
	scripts/demo.sh

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The pictures of the documentation, from the demo's run and from the code.
pictures: demo
	run=$$(ls -td outputs/digits/*/ | head -1) && mkdir -p docs/pictures && \
	  cp $$run/diagnostics/guidance_sweep/00001150-*/picture.png docs/pictures/guidance_sweep.png && \
	  cp $$run/pictures/sample_grid_00001150.png docs/pictures/samples.png
	$(BIN)/python scripts/draw_architecture.py
	$(BIN)/python scripts/draw_weightings.py
	$(BIN)/python scripts/draw_points.py
	scripts/draw_diagnostics.sh

# Training against a bare PyTorch loop, networks and samplers against diffusers, the importance sampler against a loop.
bench: .venv/installed
	$(BIN)/denoiselab bench part=training device=cpu output=docs/benchmarks/overhead_cpu.json
	$(BIN)/denoiselab bench part=networks device=cpu output=docs/benchmarks/networks_cpu.json
	$(BIN)/denoiselab bench part=sampling device=cpu output=docs/benchmarks/samplers_cpu.json
	$(BIN)/denoiselab bench part=importance device=cpu output=docs/benchmarks/importance_cpu.json
	$(BIN)/denoiselab bench part=launch device=cpu output=docs/benchmarks/launch_cpu.json

# Networks in bfloat16 against diffusers', and training at full size; on a machine with a GPU.
bench-gpu: .venv/installed
	$(BIN)/denoiselab bench part=[networks,gpu] output=docs/benchmarks/gpu.json

# Every fault that is injected, the slow ones too, and what came of them, in counts: half an hour.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "faults and not slurm and not ray"
	scripts/slurm/where_possible.sh $(MAKE) slurm

# Thousands of runs and one long one: is anything left behind, does anything grow?  An hour.
soak: .venv/installed
	$(BIN)/python scripts/soak.py --output docs/benchmarks/soak_cpu.json

# A study on a Ray cluster of this machine, with a run that is killed.
ray: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -m ray

# Studies through a SLURM cluster of one node, which is installed and started; needs root and apt-get.
slurm: .venv/installed
	scripts/slurm/install.sh
	OMP_NUM_THREADS=1 scripts/slurm/with.sh $(BIN)/pytest -n 0 -m slurm

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, $(PYTHON) is older; name another with make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
