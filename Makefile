# PYTHON is only used to make the environment; FAMILY picks the checkpoint family of the demo; NB picks notebooks.
PYTHON ?= python3
EXTRAS ?= dev,tensorboard,qlora
VENV := .venv/.installed
PY := .venv/bin/python

# DeepSpeed compiles with the ninja that pip has put here.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: .venv demo test test-all notebooks readme export shots

.venv: $(VENV)

$(VENV): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install $(if $(CI),-q) -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: .venv
	$(PY) -m minicpmv_nb.demo $(if $(FAMILY),--family $(FAMILY))

test: .venv
	$(PY) tools/check.py all

test-all: test
	$(PY) -m pytest -q tests -m slow

# Run the notebooks and keep what they show: all of them, or `make notebooks NB=nbs/03_slicing.ipynb`.
notebooks: export
	$(PY) tools/run_notebooks.py $(NB)
	$(PY) -c 'from nbdev.clean import nbdev_clean; nbdev_clean()'

# Click through the workbench in a real browser (Chromium), and keep the photographs that the pages show.
shots: .venv
	mkdir -p nbs/images
	SHOTS=nbs/images $(PY) -m pytest -q tests/test_browser.py -m slow

readme: .venv
	$(PY) tools/readme.py

# Notebooks to package, and notebooks as git should see them.
export: .venv
	$(PY) -c 'from nbdev.doclinks import nbdev_export; nbdev_export()'
	$(PY) -c 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()'
	$(PY) -c 'from nbdev.clean import nbdev_clean; nbdev_clean()'
