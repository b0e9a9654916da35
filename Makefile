# `make book` and `make test` are all that is needed; the first of them also makes .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing here needs a model hub, but a chapter's full profile; offline, a library that would ask one says so at once.
PROFILE ?= small
ifneq ($(PROFILE),full)
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE
endif

# Drawn and downloaded sets go here; a chapter that is run by hand uses ~/.cache/loupe unless this is set.
LOUPE_DATA ?= $(CURDIR)/data
export LOUPE_DATA

.DEFAULT_GOAL := help
.PHONY: help book pdf test environments results paper bench fieldguide weights address chapter clean

help:
	@echo "make book        run the chapters (small profile) and build the pages in book/_build/html"
	@echo "                 one chapter: CHAPTER=06; in its full profile: CHAPTER=05 PROFILE=full SET='OUT=runs/05'"
	@echo "make pdf         print the built pages into book/_build/the-loupe.pdf (needs Chromium)"
	@echo "make test        test the package, and every chapter against its committed outputs"
	@echo "make environments  test the wheel in an empty environment, the lowest versions, Colab's (gigabytes, 40 minutes)"
	@echo "make results     train and record what data/results does not hold yet (hours; one grid: GRID=reach)"
	@echo "make paper       the paper's experiment on CUB, for a card: ARM='bare loupe' SEEDS=5 PART=3/16 TABLE=core"
	@echo "make bench       measure the gate's cost, the trainer, the loader, explanations, growth, intervals (20 minutes)"
	@echo "make fieldguide  write a set of field-guide birds into data/fieldguide"
	@echo "make weights     pretrain swin_micro again (about an hour on two cores): LABELS=attributes or LABELS=species"
	@echo "make address     write this repository's address into the book: URL=https://github.com/OWNER/NAME"
	@echo "make chapter     start a chapter: NAME=20_shadows TITLE='Birds and their shadows'"
	@echo "make clean       remove the built pages and the caches (.venv and data/ stay)"
	@echo "Another Python: make book PYTHON=python3.12"

book: $(INSTALLED)
	@$(BIN)/python scripts/publish/build_book.py $(CHAPTER) --profile $(PROFILE) $(if $(SET),--set $(SET))

pdf: $(INSTALLED)
	@$(BIN)/python scripts/publish/build_pdf.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval tests book -n 2 --dist loadfile --no-loadscope-reorder

environments: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[environments]'
	LOUPE_ENVIRONMENTS=1 $(BIN)/python -m pytest tests/test_environments.py

results: $(INSTALLED)
	$(BIN)/python scripts/record/record_results.py $(GRID)

# TABLE, ARM, BACKBONE, SEEDS and PART narrow it, as in ARM="bare 'lambda 0'"; OPTIONS are any others of `loupe reproduce`.
# It asks the model hub.
paper: export HF_HUB_OFFLINE = 0
paper: $(INSTALLED)
	$(BIN)/loupe reproduce $(if $(TABLE),--table $(TABLE)) $(if $(ARM),--arm $(ARM)) \
		$(if $(BACKBONE),--backbone $(BACKBONE)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(PART),--part $(PART)) $(OPTIONS)

bench: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@for name in gate launches training loader explanations growth coverage; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done

fieldguide: $(INSTALLED)
	$(BIN)/python -m loupe_core fieldguide data/fieldguide

weights: $(INSTALLED)
	$(BIN)/python scripts/record/pretrain.py $(if $(LABELS),--labels $(LABELS))

address: $(INSTALLED)
	@$(BIN)/python scripts/publish/address.py $(URL)

chapter: $(INSTALLED)
	@$(BIN)/python scripts/publish/new_chapter.py "$$NAME" "$$TITLE"

clean:
	rm -rf book/_build build .pytest_cache .hypothesis *.egg-info
	find book loupe_core loupe_lab scripts tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp is older than pyproject.toml after a change there, and only then is there anything to install.
TOO_OLD = $(PYTHON) is Python %d.%d and 3.11 or newer is needed: try make PYTHON=python3.12
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v < (3, 11) and sys.exit("loupe: $(TOO_OLD)" % v)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once, some minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book,test]'
	@touch $@
