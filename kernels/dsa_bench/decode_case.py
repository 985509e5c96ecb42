"""What a case of a decode step is."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class DecodeCase:
    """One shape of one step. ours: {name: callable}, the production path first; peers: likewise.

    check(result, is_ours) returns a note or raises `checks.Wrong`. unit: "TFLOP/s" or "TB/s", of `work` FLOPs or bytes;
    ceiling: the measured ceiling that it compares with, if any. against: another case of the step, whose time this
    one's is divided by. as_they_are: see `measure.time_decode`. restore: gives back inputs that a call of ours may
    spoil. profiled: a call whose kernels are listed one by one.
    """

    work: float
    unit: str
    ceiling: str | None
    ours: dict
    check: Callable
    peers: dict
    facts: dict = dataclasses.field(default_factory=dict)
    against: str | None = None
    as_they_are: dict = dataclasses.field(default_factory=dict)
    restore: Callable | None = None
    profiled: Callable | None = None
