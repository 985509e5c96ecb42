"""What every exercise's check is made of: named properties, tried in order, each of which can really fail.

    attention = Check("dense_attention")

    @attention.property("future hidden")
    def dense_attention_future_hidden(solution):
        got = solution(q, kv)
        expect_close(got, expected, 1e-6, "t h", "your query saw keys after its own position")

A notebook calls `checks.dense_attention(my_attention)`. The learner's function gets copies of its arguments, and memory
that holds NaN wherever it was asked for without a value, so nothing passes by luck.
"""

import contextlib
import inspect
import operator

import numpy as np
import torch

from dsa_ref.testing import Failed, poisoned

from .crashes import explain

GENERAL = ("runs", "inputs", "bounds")  # what any check may report: a crash, changed arguments, a write out of bounds
FORGOTTEN = "did you forget the return?"
NOT_WRITTEN = "a place was never written (fresh memory holds NaN here), inf - inf, 0 / 0, or a NaN that was taken in"


class NotWritten(NotImplementedError):
    """An untouched stub. It fails, for a grader, and is one line to a learner, who did nothing wrong yet."""

    def __str__(self):
        return "not written yet"

    def _render_traceback_(self):
        """What Jupyter shows."""
        return [f"✗ {self}"]


class Check:
    """The check of one exercise. `properties` maps each property's name to the function that tries it.

    Calling it with a solution prints the names of the properties that hold, or raises: Failed for the first one that
    does not, NotWritten for an untouched stub.
    """

    def __init__(self, name):
        self.name, self.properties = name, {}

    def property(self, name):
        """Decorator: `test(solution)` raises Failed, through the `expect` functions, where the property is broken."""

        def add(test):
            if name in self.properties:
                raise ValueError(f"name must be new in check {self.name!r}, got {name!r} again")
            self.properties[name] = test
            return test

        return add

    def __call__(self, solution):
        if not callable(solution):
            raise TypeError(f"solution must be your function, got {type(solution).__name__}")
        for name, test in self.properties.items():
            try:
                test(_guarded(solution))
            except NotImplementedError as error:
                if error.args:  # torch's own come with a text
                    raise
                raise NotWritten from None
            except Failed as failure:
                if failure.property not in (*self.properties, *GENERAL):
                    if failure.property:  # a word of `compare_selection`
                        failure.what = f"{failure.property}, {failure.what}"
                    failure.property = name
                raise failure from None
        print(f"✓ {self.name}: " + " · ".join(self.properties))


def _guarded(solution):
    """The learner's function on copies and in poisoned memory; its own errors become failures that show where."""
    if hasattr(solution, "__getitem__"):  # a Triton kernel, which `launching.launch` guards
        return solution

    def call(*args, **kwargs):
        given = {**dict(enumerate(args)), **kwargs}
        copies = {name: _copy(value) for name, value in given.items()}
        try:
            with poisoned():
                got = solution(*(copies[i] for i in range(len(args))), **{name: copies[name] for name in kwargs})
        except Failed:  # from what the check handed in, such as a made-up model
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) and not error.args:  # the stub
                raise
            raise crashed(error, _kinds(given)) from error
        for name, value in given.items():
            if not _same(value, copies[name]):
                name = _argument_name(solution, name)
                raise Failed(f"{name} was changed by the call", "work on a copy, or on new tensors", "inputs")
        return got

    return call


def crashed(error, given=""):
    """The failure that reports an error raised by the code under test, with the learner's own lines."""
    what, cause, shown = explain(error)
    failure = Failed(f"{what}{f' (called with {given})' if given else ''}", cause, "runs")
    failure.own = shown
    return failure


def expect(condition, what, cause):
    """Fail with `what` was got and expected, and the likely `cause`, unless the condition holds."""
    if not condition:
        raise Failed(what, cause)


def tensor(got, name="the result"):
    """`got`, a tensor or a NumPy array of plain numbers, as a tensor; Failed, in words, for anything else."""
    if got is None:
        raise Failed(f"{name}: got None, expected a tensor", FORGOTTEN)
    if not isinstance(got, (torch.Tensor, np.ndarray)):
        kind = type(got).__name__
        raise Failed(f"{name}: got {kind}, expected a tensor", f"return one tensor or NumPy array, and no {kind}")
    if isinstance(got, np.ndarray):
        plain = got.dtype.kind in "biuf" and got.dtype.itemsize <= 8
        got = np.array(got, order="C") if plain else got  # torch takes no negative strides
    else:
        plain = got.layout is torch.strided and not got.is_complex() and not got.is_meta
    if not plain:
        cause = "return plain numbers, of the dtype that the card names"
        raise Failed(f"{name}: got {type(got).__name__} of {got.dtype}, expected a tensor of numbers", cause)
    return torch.as_tensor(got).detach()


def expect_shape(got, shape, dtype=None, name="the result"):
    """A tensor or NumPy array of this shape, and of this dtype where one is given (float32 is float32 in both)."""
    given, got = got, tensor(got, name)
    if list(got.shape) != list(shape):
        raise Failed(f"{name}: got shape {list(got.shape)}, expected {list(shape)}", "the axes, their order or number")
    if dtype is None or got.dtype == dtype:
        return
    wanted, cause = str(dtype).removeprefix("torch."), "a missing or an unwanted conversion"
    if isinstance(given, np.ndarray):
        cause = f"NumPy makes float64 and int64 where nobody says otherwise: .astype(np.{wanted}) at the end"
        if not hasattr(np, wanted):
            cause = f"NumPy has no {wanted}: convert with torch.from_numpy(...).to({dtype})"
    raise Failed(f"{name}: got {str(got.dtype).removeprefix('torch.')}, expected {wanted}", cause)


def expect_number(got, what="the result"):
    """`got` as a float: a number of Python, NumPy or torch, or a tensor or array that holds just one."""
    single = got.item() if isinstance(got, np.ndarray) and got.size == 1 else got
    try:
        if not isinstance(single, (str, bytes)):
            return float(single)
    except (TypeError, ValueError, RuntimeError):  # float() of a group, of text, of complex numbers
        pass
    cause = FORGOTTEN if got is None else "return one plain number: no text, no group of numbers"
    raise Failed(f"{what}: got {_named(got)}, expected a number", cause)


def expect_int(got, what="the result"):
    """`got` as an int: of Python, NumPy or torch, but no float, which is exact up to 2^53 only."""
    with contextlib.suppress(TypeError):
        return operator.index(got)
    expect_number(got, what)
    cause = "a float, exact up to 2^53 only: compute with ints, // in place of /"
    raise Failed(f"{what}: got {_named(got)}, expected an int", cause)


def _named(got):
    """None, or a value with its type, as far as it is short."""
    text = " ".join(repr(got).split())
    kind = type(got).__name__
    return "None" if got is None else f"{kind} {text}" if len(text) <= 40 else kind


def expect_close(got, expected, tolerance, axes, cause, suspects=None):
    """|got - expected| <= tolerance · max(1, largest finite |expected|) everywhere; infinities match, NaN never does.

    axes: the names of the axes, such as "t s", to say where the first difference is. suspects: {cause: the answer that
    this mistake gives}: where got equals one of them, and that one is wrong here, its cause is reported instead.
    """
    expected = _float64(expected)
    if isinstance(got, (int, float, np.generic)):  # a single number needs no tensor around it
        got = np.asarray(got)
    expect_shape(got, expected.shape)
    got = _float64(got)
    bad = ~_near(got, expected, tolerance)
    if not bad.any():
        return
    for suspicion, answer in (suspects or {}).items():
        answer = _float64(answer)
        if answer.shape == got.shape and _near(got, answer, tolerance).all():
            cause = suspicion
            break
    else:
        if got[bad].isnan().all():
            cause = NOT_WRITTEN
        elif tolerance < 1e-3 and _near(got, expected, 1e-2).all():
            cause += "; all of it is right within 1 %, so perhaps something was rounded on the way"
    place = tuple(int(i) for i in bad.nonzero()[0])
    where = ", ".join(f"{axis}={i}" for axis, i in zip(axes.split(), place, strict=True))
    raise Failed(
        f"{where + ': ' if where else ''}{unequal(got[place], expected[place])} "
        f"({int(bad.sum())} of {bad.numel()} are wrong, first bad place named)",
        cause,
    )


def normal(*shape, seed, dtype=torch.float32):
    """Normal random numbers from a seed, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def whole(*shape, seed, largest=3, dtype=torch.float32):
    """Random whole numbers in [-largest, largest]: their sums are exact in any order, and ties are everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-largest, largest + 1, shape)).to(dtype)


def strided(x):
    """The same values with the axes in reverse order in memory, as after a transpose: not contiguous."""
    if isinstance(x, np.ndarray):
        return np.asfortranarray(x)
    axes = tuple(range(x.dim()))[::-1]
    return x.permute(axes).contiguous().permute(axes)


def spread(x):
    """x with other numbers (NaN, or the largest integer) between its own: a view whose last stride is 2."""
    between = torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max
    return torch.stack([x, torch.full_like(x, between)], dim=-1)[..., 0]


def _copy(value):
    if isinstance(value, torch.Tensor):  # with its strides, and with what lies between its numbers
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        memory = value.detach().untyped_storage().clone()
        copy.set_(memory, value.storage_offset(), value.shape, value.stride())
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy(order="K")
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _same(a, b):
    """Whether nothing changed in an argument: bit by bit in tensors and arrays, also those in a list or dict."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, (torch.Tensor, np.ndarray)):
        return a is b or bool(a == b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(x):
    """The tensor's numbers as integers of the same size, so that NaN equals itself and -0.0 differs from 0.0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().view(sizes[x.element_size()])


def _kinds(given):
    return ", ".join(map(_kind, given.values()))


def _kind(x):
    """A shape, the length of a dict, or the value itself where it is short."""
    if isinstance(x, (torch.Tensor, np.ndarray)):
        return f"{list(x.shape)}"
    if isinstance(x, dict):
        return f"a dict of {len(x)}"
    return repr(x) if len(repr(x)) <= 100 else type(x).__name__


def _argument_name(solution, name):
    if isinstance(name, str):
        return name
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return list(inspect.signature(solution).parameters)[name]
    return f"argument {name}"


def _float64(x):
    return torch.as_tensor(x).detach().cpu().double()


def _near(got, expected, tolerance):
    finite = expected[expected.isfinite()].abs()
    slack = tolerance * max(1.0, float(finite.max()) if finite.numel() else 1.0)
    return ((got - expected).abs() <= slack) | (got == expected)  # equal infinities


def unequal(got, expected):
    """`got 3.7605, expected 3.7604`: as many digits, from six up, as it takes to tell the two apart."""
    got, expected = float(got), float(expected)
    for digits in range(6, 18):
        first, second = (f"{x:.{digits}g}" for x in (got, expected))
        if first != second:
            break
    return f"got {first}, expected {second}"
