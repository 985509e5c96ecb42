"""What nbval leaves out, and says so.

Notebooks that write Triton kernels where there is no Triton (macOS, Windows), and those that load models where there is
no transformers that is new enough (Python 3.10).
"""

import importlib.util
import sys

WRITE_KERNELS = ("08_", "09_", "10_")
LOAD_MODELS = ("12b_",)

_left_out = {
    "Triton cannot be imported here": () if importlib.util.find_spec("triton") else WRITE_KERNELS,
    "transformers 5.23 needs Python 3.11": LOAD_MODELS if sys.version_info < (3, 11) else (),
}
collect_ignore_glob = [f"*{number}*.ipynb" for numbers in _left_out.values() for number in numbers]


def pytest_report_header():
    return [f"left out, since {why}: notebooks {', '.join(which)}" for why, which in _left_out.items() if which]
