# Everything installs into .venv; the marker file says which extras are in.
# PyPI's PyTorch for Linux comes with CUDA's libraries, several GB. The build for CPUs alone:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test fuzz lint bench gallery-picture clean

demo: .venv/run
	$(BIN)/cspd-run generate --num-images 16 --method cspd --baseline --out out/demo --overwrite

# In two processes; the tests of a file stay together, because they share what takes long to build, and
# the longest files begin (tests/conftest.py).
test: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Hostile input in full, 10,000 cases at least; `make test` runs a few hundred of them.
fuzz: .venv/dev
	mkdir -p out
	CSPD_FUZZ=full CSPD_FUZZ_COUNTS=out/fuzz.json $(BIN)/python -m pytest tests/fuzz

# mypy reads the package through a folder of links, because cspd.* maps to top-level folders.
lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/cspd
	for part in engines export runtime tools demo_pair; do ln -sfn ../../../$$part build/types/cspd/$$part; done
	for file in __init__.py __main__.py py.typed; do ln -sfn ../../../api/$$file build/types/cspd/$$file; done
	MYPYPATH=build/types $(BIN)/mypy -p cspd

# An hour on two idle cores, nearly all of it for 1,000 images behind every score; resumes where it was interrupted.
# BENCH_IMAGES=200: 14 minutes, with intervals more than twice as wide.
BENCH_IMAGES ?= 1000
THREADS ?= 0
bench: .venv/report
	$(BIN)/cspd-run bench --images $(BENCH_IMAGES) --batch-size 1 --batch-size 8 --batch-size 16 --threads $(THREADS) --out out/bench
	$(BIN)/cspd-run evaluate --method target --method cspd --num-images $(BENCH_IMAGES) --batch-size 8 --threads $(THREADS) --out out/evaluate
	$(BIN)/cspd-export parity --out out/parity.json
	$(BIN)/cspd-run report out/bench out/evaluate out/parity.json --out out/report.html --plots out/plots --markdown out/report.md

# docs/evidence/gallery.png shows times: take it on an idle machine, while cspd-run serve runs.
gallery-picture: .venv/dev
	$(BIN)/python tests/runtime/serve/gallery_picture.py docs/evidence/gallery.png

clean:
	rm -rf .venv build out

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu]'
	touch $@

.venv/report: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,export,report]'
	touch .venv/run $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,rtx,export,test,dev]'
	touch .venv/run $@
