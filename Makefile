# `make quick` and `make test` work from a fresh clone: the environment is made on the way.
# Settings: make improvement PROFILE=offline DATA=/path/to/tiny-imagenet SEED=1
PYTHON ?= python3
PROFILE ?= full
PROTOCOL ?= holdout
SEED ?= 0
DATA ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

settings = profile='$(PROFILE)' protocol='$(PROTOCOL)' data_dir='$(DATA)' seed='$(SEED)'
run = $(PY) -m src.experiment $(1) --profile '$(PROFILE)' --protocol '$(PROTOCOL)' --seed '$(SEED)' \
	$(if $(DATA),--data '$(DATA)') $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help quick baseline improvement studies ablation audit analysis explain report paper slides \
	test slow torture mutants bench check format notebooks readme clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quick: $(READY)  ## Run both notebooks on embedded data: no GPU, no network, minutes on 2 cores
	@rm -rf runs/quick results/quick
	@$(PY) -m tools.execute Baseline results/quick profile=quick runs_dir=runs/quick
	@$(PY) -m tools.execute Improvement results/quick profile=quick runs_dir=runs/quick
	@$(PY) -m src.experiment summary --results results/quick

baseline: $(READY)  ## Run the baseline notebook (PROFILE=full PROTOCOL=holdout DATA= SEED=0)
	@$(PY) -m tools.execute Baseline results $(settings)

improvement: $(READY)  ## Run the improvement notebook (same settings)
	@$(PY) -m tools.execute Improvement results $(settings)

studies: $(READY)  ## Run the notebooks of the three other studies (PROFILE=quick DATA= PROTOCOL= SEED=)
	@for name in Animals40 DogBreeds20 FineGrained; do \
		$(PY) -m tools.execute $$name $(if $(filter quick,$(PROFILE)),results/quick runs_dir=runs/quick,results) $(settings) || exit 1; \
	done

ablation: $(READY)  ## Measure what each ingredient is worth (PROFILE=offline DATA= ARGS=)
	@$(call run,ablation)

audit: $(READY)  ## Look for copies among the images; ask what the pretrained weights know (same settings)
	@$(call run,audit)

analysis: $(READY)  ## Say what both arms get wrong, from their predictions (same settings)
	@$(call run,analysis)

explain: $(READY)  ## Show where both arms look; their runs must be finished (same settings)
	@$(call run,explain)

report: $(READY)  ## Write results/report.html, one page of everything under results/
	@$(PY) -m src.experiment report

paper: $(READY)  ## Compile paper/Final_Paper.pdf from results/
	@$(PY) -m tools.documents paper

slides: $(READY)  ## Compile presentation/Final_Presentation.pdf, and its Indonesian edition
	@$(PY) -m tools.documents slides

test: $(READY)  ## Run the test suite (ARGS= goes to pytest)
	@$(PY) -m pytest -n auto --dist loadfile $(ARGS)

slow: $(READY)  ## Run the slow tests (real data where TINY_IMAGENET_DIR names it)
	@$(PY) -m pytest -m slow $(ARGS)

torture: $(READY)  ## Try every fault in full and print what survived (an hour; ARGS= goes to pytest)
	@$(PY) -m tools.torture $(ARGS)

mutants: $(READY)  ## Break the code in one place after another: a test must fail each time (minutes; ARGS= goes on)
	@$(PY) -m tools.mutants $(ARGS)

bench: $(READY)  ## Time the conventional way against this one (quiet machine, an hour; ARGS= goes on)
	@$(PY) -m bench $(if $(DATA),--data '$(DATA)') $(ARGS)

check: $(READY)  ## Lint; thin notebooks; README names and numbers; results against their CSVs; sizes
	@$(PY) -m tools.check

format: $(READY)  ## Format the code and sort its imports
	@$(PY) -m ruff check --fix --quiet . && $(PY) -m ruff format --quiet .

notebooks: $(READY)  ## Strip outputs from the notebooks before a commit
	@$(PY) -m nbstripout notebook/*.ipynb notebook/studies/*.ipynb

readme: $(READY)  ## Write the README's tables anew from results/ and bench/results/
	@$(PY) -m tools.readme

clean:  ## Remove the environment, caches and quick outputs; runs/ and results/ stay
	rm -rf $(VENV) cache runs/quick results/quick .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1)."; \
		echo "Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "The environment could not be made; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (once; PyTorch is large) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
