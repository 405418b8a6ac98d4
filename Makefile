# `make app` opens a page that explains photographs, `make demo` explains those that ship, `make test` runs the tests.
# The first call makes the environment: some minutes, and about 6 GB where torch comes with CUDA.

VENV ?= .venv
# The first of these that is new enough makes the environment.
PYTHON ?= python3.11 python3

.PHONY: app demo test check docs web clean

app: $(VENV)/.installed
	$(VENV)/bin/bcoskit app --open

demo: $(VENV)/.installed
	$(VENV)/bin/bcoskit explain src/bcoskit/assets/photographs --top 2 --out demo/out

# Several processes share the tests: threads that have nothing to do must not keep a core busy.
test: export HF_HUB_OFFLINE = 1
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Pages to read offline: site/index.html. Warnings are errors (`strict` in mkdocs.yml; `--quiet` would hide them from it).
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed
	$(VENV)/bin/mkdocs build

# What the page in examples/browser needs: onnxruntime for browsers.
web: examples/browser/vendor/ort.wasm.min.mjs

examples/browser/vendor/ort.wasm.min.mjs:
	cd examples/browser && npm pack --silent onnxruntime-web@1.30.0
	mkdir -p examples/browser/vendor
	tar -xzf examples/browser/onnxruntime-web-1.30.0.tgz -C examples/browser/vendor --strip-components=2 --touch \
		package/dist/ort-wasm-simd-threaded.mjs package/dist/ort-wasm-simd-threaded.wasm package/dist/ort.wasm.min.mjs
	rm examples/browser/onnxruntime-web-1.30.0.tgz

clean:
	rm -rf demo/out dist site .hypothesis .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "bcoskit needs Python 3.11 or newer, and none of these is: $(PYTHON). Name one: make PYTHON=/path/to/python" >&2; \
	exit 1
	$(VENV)/bin/python -m pip install -q -U 'pip>=25.1'
	@# Python compiles what it imports; to compile all of the packages now would take two minutes more.
	$(VENV)/bin/python -m pip install --no-compile -c constraints.txt -e '.[all]' --group dev --group docs
	@touch $@
