# `make` alone prints what can be made. Works with GNU make 3.81 (macOS) and later.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

# ---- variables: on the command line (make table2 PROFILE=smoke) or in the environment -----------
PROFILE ?= auto
SEEDS ?=
DEVICE ?= auto
DATA ?=
LABEL ?=
ROWS ?=
JOBS ?=
OUT ?= $(or $(value CLL_OUTPUTS),outputs)
FRESH ?=
PARAMS ?= params/table2/cifar10-4C3F-CLL.yaml
PYTHON ?=
VENV ?=
LOCKED ?=
WORKERS ?= 2
RUNS ?=
COLAB ?= .colab
NOTEBOOKS ?= notebooks
REFERENCES := tests/nb_refs

# a value as one word of the shell, whatever it holds
sh = '$(subst ','\'',$(1))'

# ---- paths and values that make cannot pass on are refused before anything is done ---------------
PATHS := OUT PARAMS VENV NOTEBOOKS COLAB
RUN := PROFILE SEEDS DEVICE DATA LABEL ROWS JOBS OUT FRESH PARAMS
VARIABLES := $(sort $(RUN) $(PATHS) PYTHON LOCKED WORKERS RUNS ITEMS)
# "command" line, "environment" or "file"
set_in = $(firstword $(origin $(1)))
DOLLAR := $$
$(foreach v,$(VARIABLES) CLL_OUTPUTS,$(if $(filter command environment,$(call set_in,$(v))),$(if $(findstring $(DOLLAR),$(value $(v))),\
  $(error $(v)=$(value $(v)) cannot be used: make reads a variable where a $(DOLLAR) stands; use a path or text without))))
# Targets are named after these paths, and make has no quotes for them.
UNFIT := ' " ` % : ; = \# * ? ! ~ & | < > ( ) [ ] { } \ #
unfit = $(strip $(if $(filter-out $(words _$(1)_),1),a blank) $(foreach c,$(UNFIT),$(findstring $(c),$(1))))
$(foreach v,$(PATHS),$(if $(call unfit,$($(v))),\
  $(error $(v)=$($(v)) cannot be used: make takes no path with $(call unfit,$($(v))) in it; link it by a plain name (ln -s) and give that)))
# without a folder, results would lie in /; a dash starts an option
$(foreach v,OUT NOTEBOOKS COLAB,$(if $(filter-out -%,$($(v))),,\
  $(error $(v)=$($(v)) names no folder: leave it out, or write one)))
ifneq ($(findstring :,$(CURDIR)),)
$(error $(CURDIR) cannot be used: Python takes no folder with : in its path; rename it)
endif

PROFILES := smoke quick paper
ifneq ($(words $(PROFILE)) $(filter auto $(PROFILES),$(PROFILE)),1 $(strip $(PROFILE)))
$(error PROFILE=$(PROFILE) is not a profile: choose smoke, quick or paper)
endif
ifneq ($(words $(DEVICE)) $(filter auto cpu cuda,$(DEVICE)),1 $(strip $(DEVICE)))
$(error DEVICE=$(DEVICE) is not a device: choose auto, cpu or cuda)
endif

ITEMS := $(sort $(basename $(notdir $(wildcard $(NOTEBOOKS)/*.ipynb))))
ifneq ($(strip $(foreach item,$(ITEMS),$(call unfit,$(item)))),)
$(error ITEMS=$(ITEMS) are no names of notebooks: write names with blanks between, such as figure1 figure4)
endif
ifneq ($(filter-out 1,$(LOCKED)),)
$(error LOCKED=$(LOCKED) is not known: write 1, or leave it out)
endif
GOALS := $(or $(MAKECMDGOALS),help)

# ---- what each target reads; tools/parameters.py knows what a notebook does ---------------------
READS_help := $(VARIABLES)
READS_install :=
READS_lock :=
READS_all := $(RUN) ITEMS
READS_report := PROFILE OUT
READS_smoke-systems := SEEDS DEVICE DATA LABEL JOBS OUT FRESH
READS_test := WORKERS
READS_test-notebooks := WORKERS
READS_refs :=
READS_badges :=
READS_colab := ITEMS JOBS COLAB
READS_lint :=
READS_lab :=
READS_bench := OUT
READS_house :=
READS_collect := PROFILE OUT RUNS
READS_reference :=
READS_clean := PROFILE
$(foreach item,$(ITEMS),$(eval READS_$(item) := $(RUN)))
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(call set_in,$(v))),$(v)))
COMMON := PYTHON VENV LOCKED NOTEBOOKS SHARED
unread = $(if $(filter file,$(origin READS_$(1))),$(filter-out $(READS_$(1)) $(COMMON),$(filter $(VARIABLES),$(GIVEN))))
# What stands on the command line is meant for the targets there. What stands in the environment, and
# what `all` hands on (SHARED), is for many.
ifeq ($(SHARED),)
$(foreach goal,$(GOALS),$(foreach v,$(call unread,$(goal)),\
  $(error $(goal) does not read $(v): leave it out ($(goal) reads $(strip $(READS_$(goal)) PYTHON VENV LOCKED)))))
$(foreach v,$(filter-out $(VARIABLES) $(COMMON) SHELL MAKE%,$(GIVEN)),\
  $(warning $(v) is none of the variables of `make help`: it reaches the environment alone))
endif
# what a goal needs from pyproject.toml, beyond the base dependencies: an optional group
NEED := $(if $(filter test test-notebooks lint refs colab,$(GOALS)),test,$(if $(filter lab install lock,$(GOALS)),all,run))

# ---- which Python: PYTHON=, else the active one if it has everything, else .venv ----------------
# LOCKED: .venv, whatever is active
CHECK = tools/environment.py missing $(NEED)
VENV_FOLDER := $(or $(VENV),.venv)
ACTIVE :=
ENVIRONMENT :=
ifeq ($(PYTHON),)
  ifeq ($(VENV)$(LOCKED)$(filter-out help clean,$(GOALS)),)
    # help and clean need no packages: do not spend time on looking for them
    ACTIVE := $(shell command -v python || command -v python3)
  else ifeq ($(VENV)$(LOCKED),)
    ACTIVE := $(shell for p in python python3; do \
      if $$p $(CHECK) >/dev/null 2>&1; then command -v $$p; break; fi; done)
  endif
  override PYTHON := $(or $(ACTIVE),$(VENV_FOLDER)/bin/python)
endif
ifeq ($(PYTHON),$(VENV_FOLDER)/bin/python)
  ENVIRONMENT := $(VENV_FOLDER)/$(if $(LOCKED),.locked,.installed)
else ifneq ($(LOCKED),)
  $(error LOCKED=$(LOCKED) is for $(VENV_FOLDER), not for PYTHON=$(PYTHON): leave one of them out)
else ifeq ($(ACTIVE),)
  ENVIRONMENT := has-packages
endif
# a path may hold blanks; what is no file may be a command with arguments
ifneq ($(call unfit,$(PYTHON)),)
  ifneq ($(shell test -f $(call sh,$(PYTHON)) && echo file),)
    override PYTHON := $(call sh,$(PYTHON))
  else ifeq ($(shell sh -n -c $(call sh,$(PYTHON)) 2>/dev/null && echo command),)
    $(error PYTHON=$(PYTHON) is neither a file nor a command)
  endif
endif

# ---- profile: with a CUDA device the published schedule, without one a short one ----------------
AUTO :=
ifeq ($(PROFILE),auto)
  AUTO := --auto
  override PROFILE := $(or $(shell $(PYTHON) tools/environment.py profile 2>/dev/null \
    || python3 tools/environment.py profile 2>/dev/null),quick)
endif
RESULTS := $(OUT)/$(PROFILE)

# The package of this checkout and the kernel of this Python, whatever else is installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
ifneq ($(FRESH),)
# runs that finished before this moment count as not done
export CLL_FRESH := $(shell date +%s)
endif

# ---- help ---------------------------------------------------------------------------------------
.PHONY: help
help:
	@echo 'usage: make TARGET [VARIABLE=value ...]'
	@echo
	@echo 'Experiments, one per notebook; the report is $(RESULTS)/<target>/<target>.html'
	@for i in $(ITEMS); do printf '  %-19s ' $$i; \
	  sed -n 's/^ *"# \(.*\)"\(,\)*$$/\1/p' $(NOTEBOOKS)/$$i.ipynb | head -n 1 | sed 's/\\n$$//; s/\\"/"/g'; done
	@printf '  %-19s %s\n' all 'all of them, one after the other, and the report'
	@echo
	@echo 'Work on the code'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r t h; do printf '  %-19s %s\n' "$$t" "$$h"; done
	@echo
	@echo 'Variables'
	@printf '  %-44s %s\n' \
	  'PROFILE=$(PROFILE)$(if $(AUTO), (automatic))' 'smoke: seconds; quick: minutes; paper: as published' \
	  $(call sh,SEEDS=$(SEEDS)) '1,2,3 or 1-9; empty: those of the profile' \
	  $(call sh,DEVICE=$(DEVICE)) 'auto, cpu or cuda' \
	  $(call sh,DATA=$(DATA)) 'npz:FILE or folder:FOLDER instead of the data of the experiment' \
	  $(call sh,LABEL=$(LABEL)) 'name of that data in tables and captions' \
	  $(call sh,ROWS=$(ROWS)) 'for table1, table2: row ids such as T2-05,T2-07; empty: all' \
	  $(call sh,JOBS=$(JOBS)) 'CPU threads; empty: as many as PyTorch chooses' \
	  $(call sh,OUT=$(OUT)) 'folder for results' \
	  $(call sh,FRESH=$(FRESH)) '1: run again what is already finished' \
	  $(call sh,PARAMS=$(PARAMS)) 'for train: the parameters of the run' \
	  $(call sh,PYTHON=$(PYTHON)) 'the Python in use; if the active one lacks a package, .venv is made' \
	  $(call sh,VENV=$(VENV)) 'FOLDER: use and make this environment, whatever is active' \
	  $(call sh,LOCKED=$(LOCKED)) '1: make .venv, or VENV, with the versions of constraints.txt, and use it' \
	  $(call sh,WORKERS=$(WORKERS)) 'processes that run the tests'
	@echo
	@echo 'On the command line they are for the targets there, which refuse what they do not read; in the'
	@echo 'environment they are for those that read them.'
	@echo 'A finished target is not run again unless its notebook or a variable changed; an interrupted'
	@echo 'one resumes when the command is repeated. -j runs targets side by side (PROFILE=smoke only:'
	@echo 'they would share the cores or the GPU), -k goes on after a failure.'

# ---- the environment ----------------------------------------------------------------------------
.PHONY: install lock has-packages FORCE
FORCE:

install: | $(ENVIRONMENT)  ## create .venv, unless the active Python has everything
	@echo $(call sh,install: $(PYTHON) has everything)

lock: | $(ENVIRONMENT)  ## write constraints.txt, for LOCKED=1: the versions that this Python has
	@$(PYTHON) tools/environment.py lock

has-packages:
	@lacking=$$($(PYTHON) $(CHECK) 2>&1) || { echo $(call sh,FAILED: $(PYTHON) lacks) "$$(echo $$lacking | tail -c 300); install them there, or leave PYTHON= out to get .venv" >&2; exit 1; }

# The stamps are written last: an interrupted installation is repaired by the next make. Locked
# versions are within the open bounds too, so that they have both stamps.
$(VENV_FOLDER)/.locked: constraints.txt
$(VENV_FOLDER)/.installed $(VENV_FOLDER)/.locked: pyproject.toml
	@if test -z '$(VENV)$(LOCKED)' -a -n "$$VIRTUAL_ENV$$CONDA_PREFIX"; then \
	  echo "left alone: $${VIRTUAL_ENV:-$$CONDA_PREFIX}, which lacks $$(python $(CHECK) 2>&1 | tail -c 300)"; fi
	@if ! $(@D)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  found=; for p in python3 python3.13 python3.12 python3.11 python; do \
	    if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then found=$$p; break; fi; done; \
	  test -n "$$found" || { echo 'FAILED: no Python 3.11 to 3.13 with venv found; install one (or: conda env create -f environment.yml) and repeat' >&2; exit 1; }; \
	  echo "making $(@D) with $$($$found --version)"; \
	  $$found -m venv --clear $(@D) > /dev/null || { echo 'FAILED: $(@D) could not be made' >&2; exit 1; }; fi
	@echo 'installing into $(@D), once; PyTorch is large, this takes some minutes (progress: $(@D)/install.log)'
	@$(if $(LOCKED),,if test -e $(@D)/.locked; then echo '$(@D) leaves the versions of constraints.txt; LOCKED=1 takes them again'; fi;) \
	  rm -f $(@D)/.installed $(@D)/.locked
	@began=$$(date +%s); \
	  $(@D)/bin/python -m pip install --disable-pip-version-check $(if $(LOCKED),-c constraints.txt) -e '.[all]' > $(@D)/install.log 2>&1 \
	  && echo "installed in $$(($$(date +%s) - began)) s" \
	  || { echo "FAILED: $$(grep ERROR $(@D)/install.log | head -n 1) (full log: $(@D)/install.log; repeat the command to resume)" >&2; exit 1; }
	@touch $(@D)/.installed $@

# ---- experiments --------------------------------------------------------------------------------
ASKED := $(if $(SHARED),,$(filter $(RUN),$(GIVEN)))
# Rewritten only when a value changed, so that SEEDS=1-3 runs again and a repeat does not.
$(RESULTS)/%/params.yaml: FORCE | $(ENVIRONMENT)
	@$(PYTHON) tools/parameters.py $(NOTEBOOKS)/$*.ipynb $@ --profile $(PROFILE) --device $(DEVICE) \
	  --seeds $(call sh,$(SEEDS)) --data $(call sh,$(DATA)) --label $(call sh,$(LABEL)) --rows $(call sh,$(ROWS)) \
	  --params-file '$(if $(filter train,$*)$(filter PARAMS,$(ASKED)),$(PARAMS))' --asked '$(ASKED)' \
	  --outputs $(call sh,$(if $(filter-out outputs,$(OUT)),$(abspath $(OUT))))

# Results depend on the notebook and its parameters, not on cll/*.py: an edited comment must not
# cost days on a GPU. cll itself skips runs that are finished and resumes those that are not, so
# that depending on every parameter file costs seconds and forgets none.
PARAMETER_FILES := $(wildcard params/*.yaml params/*/*.yaml $(PARAMS) $(dir $(PARAMS))*.yaml)
define NOTEBOOK
.PHONY: $(1)
$(1): $$(RESULTS)/$(1)/$(1).html
	$$(if $$(RAN_$(1)),@:,@echo '$(1): up to date: $$< (FRESH=1 runs it again)')
$$(RESULTS)/$(1)/$(1).ipynb: $$(NOTEBOOKS)/$(1).ipynb $$(RESULTS)/$(1)/params.yaml $$(PARAMETER_FILES) $$(if $$(FRESH),FORCE)
	$$(eval RAN_$(1) := yes)@$$(PYTHON) tools/execute.py $$< $$(@D) --params $$(@D)/params.yaml --jobs $$(call sh,$$(JOBS)) $$(AUTO)
$$(RESULTS)/$(1)/$(1).html: $$(RESULTS)/$(1)/$(1).ipynb
	@test $$@ -nt $$< || { rm -f $$< && echo 'FAILED $(1): the report was removed; repeat the command' >&2 && exit 1; }
endef
$(foreach item,$(ITEMS),$(eval $(call NOTEBOOK,$(item))))

.PHONY: all report smoke-systems
# Small networks gain nothing from a second thread: smoke runs a notebook per core, on one thread each.
CORES = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
SIDE_BY_SIDE = $(if $(filter smoke,$(PROFILE)),-j $(CORES) JOBS=$(or $(JOBS),1))
# claims.ipynb reads what the others judged, so it comes last
all: | $(ENVIRONMENT)
	@$(MAKE) --no-print-directory SHARED=1 $(if $(findstring j,$(filter-out --%,$(MAKEFLAGS))),,$(SIDE_BY_SIDE)) \
	  $(filter-out claims,$(ITEMS))
	@$(MAKE) --no-print-directory SHARED=1 claims
	@$(MAKE) --no-print-directory SHARED=1 report

$(RESULTS)/claims/claims.ipynb: $(filter-out $(RESULTS)/claims/%,$(wildcard $(RESULTS)/*/claims*.csv))

report: | $(ENVIRONMENT)  ## a web page of all that has finished in the profile: report/index.html
	@$(PYTHON) tools/report.py $(RESULTS)

# Local-Lip-B, GloRo, SOC, CPL and SLL with CLL on the same networks; GloRo-TRADES, LBDN
smoke-systems:  ## train and certify every system of tables 1 and 2 once, at smoke size
	@$(MAKE) --no-print-directory table1 PROFILE=smoke ROWS=T1-02,T1-09
	@$(MAKE) --no-print-directory table2 PROFILE=smoke \
	  ROWS=T2-01,T2-03,T2-05,T2-06,T2-07,T2-08,T2-09,T2-10,T2-11

# ---- work on the code ---------------------------------------------------------------------------
.PHONY: test test-notebooks refs badges colab lint lab bench house collect reference clean
# one CPU thread each: with several, the workers would wait for each other
test test-notebooks refs: export OMP_NUM_THREADS := 1
test test-notebooks refs: export TQDM_DISABLE := 1
PYTEST := -m pytest -q -n $(call sh,$(WORKERS)) --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 600

test: lint  ## all tests: style, units, properties, and every notebook
	@$(PYTHON) $(PYTEST) tests

test-notebooks: | $(ENVIRONMENT)  ## the notebooks alone: form, and a run compared with tests/nb_refs
	@$(PYTHON) $(PYTEST) tests/test_notebooks.py $(REFERENCES)

refs: | $(ENVIRONMENT)  ## rewrite tests/nb_refs after a notebook changed; review its diff
	@$(PYTHON) tools/redraw.py --smoke

badges: | $(ENVIRONMENT)  ## write the public address of pyproject.toml into notebooks and CITATION.cff
	@$(PYTHON) tools/badges.py

# an environment with what Colab has; nothing of the kit is installed there
$(COLAB)/.installed: tests/colab.txt
	@python3.13 -c '' 2>/dev/null || { echo 'FAILED colab: no python3.13, which Colab runs; install it (or: uv python install 3.13) and put it on PATH' >&2; exit 1; }
	@echo 'installing into $(@D) what Colab has, once (progress: $(@D)/install.log)'
	@python3.13 -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check -r $< > $(@D)/install.log 2>&1 \
	  || { echo "FAILED colab: $$(grep ERROR $(@D)/install.log | head -n 1) (full log: $(@D)/install.log)" >&2; exit 1; }
	@touch $@

colab: $(COLAB)/.installed | $(ENVIRONMENT)  ## run notebooks as Google Colab does, on its versions; ITEMS="quickstart figure1": these
	@COLAB_PYTHON=$(abspath $(COLAB)/bin/python) $(if $(JOBS),OMP_NUM_THREADS=$(call sh,$(JOBS))) $(PYTHON) -m pytest -v \
	  $(foreach item,$(ITEMS),'tests/test_colab.py::test_a_notebook_runs_as_on_colab_and_prints_no_warning[$(item)]')

lint: | $(ENVIRONMENT)  ## style and common mistakes (ruff)
	@$(PYTHON) -m ruff check --quiet .

lab: | $(ENVIRONMENT)  ## open the notebooks in JupyterLab
	@$(PYTHON) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $$(test $$(id -u) = 0 && echo --allow-root)

bench: | $(ENVIRONMENT)  ## how fast: against a plain baseline, then the step of every system
	@$(PYTHON) benchmarks/table.py --into '$(OUT)/bench'
	@echo
	@$(PYTHON) benchmarks/systems.py

house: | $(ENVIRONMENT)  ## the house in figures: sizes, functions, which way imports run
	@$(PYTHON) tools/house.py

collect: | $(ENVIRONMENT)  ## check finished runs of a profile and copy them to outputs/reference; RUNS="*4C3F*": these
	@$(PYTHON) tools/collect.py $(RESULTS) $(foreach run,$(RUNS),$(call sh,$(run)))

reference: | $(ENVIRONMENT)  ## redraw tables and figures from the committed runs, without training
	@$(PYTHON) tools/redraw.py

clean:  ## delete caches and smoke results; PROFILE=quick or paper deletes those, nothing else
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf outputs/$(if $(AUTO),smoke,$(PROFILE))
	@echo 'deleted caches and outputs/$(if $(AUTO),smoke,$(PROFILE)); kept outputs/reference (committed results), other profiles and .venv'
