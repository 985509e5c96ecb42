"""One rung of the ladder: a version of a step, with what was expected of it."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Version:
    """One rung. Its prediction was made before it was measured; where none was made, `because` says so.

    what: what it does, in a sentence; predicted: (number, unit), the unit "ms" or the case's own ("TFLOP/s", "TB/s");
    because: what the prediction rests on; kept: whether it, or what it taught, is in the kernel that runs today;
    case: the shape it is measured on, default the step's in LADDER_CASES; call: the function, where it is no `variant`
    of the public one.
    """

    what: str
    predicted: tuple[float, str]
    because: str
    kept: bool = True
    case: str | None = None
    call: Callable | None = None
