"""The card at the top of every notebook: what it runs on, and a clear word where something is missing."""

import importlib.metadata
import importlib.util
import platform

import torch


def check_env(triton=False, models=False):
    """Print Python, versions and device. triton, models: whether this notebook needs Triton, or transformers.

    Raises: RuntimeError with the remedy where one is needed and missing, or what the course draws with.
    """
    if missing := [name for name in ("ipywidgets", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise RuntimeError(
            f"The notebooks draw with {' and '.join(missing)}, which cannot be imported here: run `make lab`, or "
            "`pip install -e '.[course]'` in the project's folder."
        )
    if models:
        try:
            importlib.import_module("dsa_ref.integrations.transformers")  # it says what it needs, and what is here
        except ImportError as error:
            raise RuntimeError(
                "This notebook loads a model with transformers: run `%pip install 'transformers>=5.23'` in a cell, and "
                f"restart the kernel. ({error})"
            ) from error
    has_triton = importlib.util.find_spec("triton") is not None
    print(f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {importlib.metadata.version('numpy')}")
    if models:
        print(f"transformers {importlib.metadata.version('transformers')}")
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}")
    else:
        print("No GPU here, and none is needed.")
    if has_triton:
        interpreted = "interpreted on the CPU: slow, with the same results"
        where = "compiled for the GPU" if torch.cuda.is_available() else interpreted
        print(f"Triton {importlib.metadata.version('triton')}, {where}")
    elif triton:
        raise RuntimeError(
            "This notebook writes Triton kernels, and Triton exists for Linux only: use WSL on Windows, or a hosted "
            "notebook such as Colab. Only notebooks 08 to 10 need it; all others run here."
        )
    else:
        print("No Triton here (it exists for Linux only): cells that compare with the kernels say so and go on.")
