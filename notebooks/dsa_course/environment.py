"""The card at the top of every notebook: what it runs on, and a clear word where something is missing."""

import importlib.metadata
import importlib.util
import platform

import torch


def check_env(triton=False):
    """Print Python, versions and device. triton: whether this notebook cannot do without Triton.

    Raises: RuntimeError with the remedy where Triton is needed and missing, or what the course draws with.
    """
    if missing := [name for name in ("ipywidgets", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise RuntimeError(
            f"The notebooks draw with {' and '.join(missing)}, which cannot be imported here: run `make lab`, or "
            "`pip install -e '.[course]'` in the project's folder."
        )
    has_triton = importlib.util.find_spec("triton") is not None
    print(f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {importlib.metadata.version('numpy')}")
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
