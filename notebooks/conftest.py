"""Where there is no Triton (macOS, Windows), nbval leaves out the notebooks that write Triton kernels, and says so."""

import importlib.util

WRITE_KERNELS = ("08_", "09_", "10_")

collect_ignore_glob = [] if importlib.util.find_spec("triton") else [f"*{number}*.ipynb" for number in WRITE_KERNELS]


def pytest_report_header():
    if collect_ignore_glob:
        return f"left out, since Triton cannot be imported here: notebooks {', '.join(collect_ignore_glob)}"
