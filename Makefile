# `make lab` opens the course, `make test` checks everything, `make help` lists the rest.
# Needs Python 3.10 to 3.14, make, and PyPI for the first run. Without make (Windows): see README.md.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/installed
LAB_ARGS ?=
BENCH_ARGS ?=

# This folder's own code, even after the folder was moved or copied, and nobody else's.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/notebooks
# Jupyter's kernel is the one in .venv, also where the user has a `python3` kernel of their own.
export JUPYTER_PREFER_ENV_PATH := 1

# Torch's CPU build: on Linux, PyPI's brings CUDA along, several GB. Used where no NVIDIA driver is found and it can be
# reached, unless a PIP_ variable of the user's says where packages come from.
CPU_TORCH := https://download.pytorch.org/whl/cpu

# Where the project lives on the web, for the site's buttons and links: make site REPOSITORY=https://github.com/owner/name
REPOSITORY ?=

.PHONY: help lab test test-grading test-browser test-site test-install course learner site api bench lint

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

lab: $(INSTALLED)  ## open JupyterLab on your copy of the course, in work/ (LAB_ARGS="--no-browser" and the like are passed on)
	$(VENV_PYTHON) -m notebooks.maintain.work
	$(VENV_PYTHON) -m jupyterlab --LabApp.default_url=/lab/tree/work/00_start_here.ipynb \
		--HTMLExporter.preprocessors=dsa_course.export.AltText $(LAB_ARGS)

# One thread a process: two processes run at once, and sums come out the same on every machine.
test test-grading test-browser test-site test-install course: export OMP_NUM_THREADS := 1

test: $(INSTALLED)  ## run the tests, then every notebook against its stored outputs
	$(VENV_PYTHON) -m pytest -n 2 --check-skips
	$(VENV_PYTHON) -m pytest --nbval --nbval-current-env --nbval-cell-timeout=120 -n 2 --dist loadscope notebooks/

test-grading: $(INSTALLED)  ## grade a solved and an unsolved notebook with nbgrader (installs it)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[grading]'
	$(VENV_PYTHON) -m pytest -m grading tests/course/test_grading.py

test-browser: $(INSTALLED)  ## move every notebook's slider in JupyterLab (needs Chromium, installs Playwright)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[browser]'
	$(VENV_PYTHON) -m pytest -m browser tests/course/test_browser.py

test-site: $(INSTALLED)  ## build the site and look at it (needs Chromium, and npm once; installs Playwright and Sphinx)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[browser,site]'
	$(VENV_PYTHON) -m pytest -m site tests/course/test_site.py

test-install: $(INSTALLED)  ## install our wheel beside Hugging Face's kernels in a new environment (needs PyPI)
	$(VENV_PYTHON) -m pytest -s -m install tests/test_install.py

course: $(INSTALLED)  ## execute every notebook, then make the learner edition and the README's picture
	$(VENV_PYTHON) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False \
		--ExecutePreprocessor.record_timing=False notebooks/solutions/*.ipynb
	$(VENV_PYTHON) -m notebooks.maintain.learner
	$(VENV_PYTHON) -m notebooks.maintain.pictures

learner: $(INSTALLED)  ## make the learner edition, notebooks/*.ipynb, from notebooks/solutions/
	$(VENV_PYTHON) -m notebooks.maintain.learner

site: $(INSTALLED)  ## build the course as a static site in build/site/html (needs npm once; installs Sphinx)
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[site]'
	$(VENV_PYTHON) -m notebooks.maintain.site --repository "$(REPOSITORY)"

api: $(INSTALLED)  ## make API.md from the docstrings
	$(VENV_PYTHON) -m notebooks.maintain.api

bench: $(INSTALLED)  ## measure every step on a GPU, beside the peers that are installed (BENCH_ARGS=...)
	$(VENV_PYTHON) -m dsa_bench --peers $(BENCH_ARGS)

lint: $(INSTALLED)  ## check style and formatting
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

# Written last, so a failed install is tried again.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 15) or sys.exit("Python 3.10 to 3.14 is needed (PYTHON=... names one), this is " + sys.version)'
	$(PYTHON) -m venv .venv
	@index=; \
	if [ "$$(uname -s)" != Linux ]; then why="PyPI's build for this system"; \
	elif [ -n "$$PIP_INDEX_URL$$PIP_EXTRA_INDEX_URL$$PIP_NO_INDEX" ]; then why="as your PIP_ variables say"; \
	elif command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]; then why="PyPI's build, for the NVIDIA driver here"; \
	elif $(VENV_PYTHON) -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' $(CPU_TORCH)/torch/ 2>/dev/null; \
	then why="the CPU build, since no NVIDIA driver is here"; index="--extra-index-url $(CPU_TORCH)"; \
	else why="PyPI's build: no NVIDIA driver is here, but $(CPU_TORCH) cannot be reached"; fi; \
	echo "torch: $$why"; \
	$(VENV_PYTHON) -m pip install --disable-pip-version-check $$index -r requirements.txt
	touch $@
