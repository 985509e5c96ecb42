"""A long context read chunk by chunk, decoded from, and checked on the way: a million tokens on a GPU, 64K on a CPU.

`python -m dsa_ref.long_context` is the command line of `read_long_context`.
"""

from .memory import bytes_needed, check_memory
from .run import read_long_context
from .show import Show
from .spot_check import errors_of_row, rows_to_check

__all__ = ["Show", "bytes_needed", "check_memory", "errors_of_row", "read_long_context", "rows_to_check"]
