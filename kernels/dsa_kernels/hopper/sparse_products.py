"""Steps of the two computing warpgroups of `sparse_attention` and `paged_sparse_attention`: softmax and products.

`sparse_attention` draws when `left` and `right` do what. OUTPUT is the layout of their accumulators.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .sparse_shared import next_turn
from .sparse_tiles import (
    LN_2,
    ROWS,
    Softmax,
    as_operand,
    exp2,
    masked,
    multiply_quarter,
    multiply_rope,
    nothing_yet,
    opaque_zero,
    raised,
    rescale,
)


@gluon.jit
def left_step(
    state, logits, shared, bit, zero, turn, scale,
    GROUPED: gl.constexpr, LAST: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Softmax of block 0, P0 · V0 and P1 · V1 for columns 0 to 255, and unless LAST the next step's logits."""
    q, k0, k1 = shared.q, shared.k0, shared.k1
    logits = masked(logits, scale, k0.valid, bit, GROUPED)
    m0 = raised(state.m, gl.max(logits, 1))
    shared.left_max.send(m0)
    factor = exp2(state.m - m0)
    p = exp2(logits - m0[:, None])
    total = state.total * factor + gl.sum(p, 1)
    acc = rescale(state.acc, factor, OUTPUT)
    p0v0 = warpgroup_mma(as_operand(p, OUTPUT), k0.left.columns.index(zero), acc, is_async=True)

    # While that runs: what is relative to m0 becomes relative to m, the maximum after both blocks.
    m = shared.right_max.receive(turn, ROWS)
    factor = exp2(m0 - m)
    total = total * factor
    shared.p0.write(p * factor[:, None])
    shared.p0.release_full()
    acc = warpgroup_mma_wait(0, deps=(p0v0,))
    k0.left.release_free()

    shared.p1.acquire_full(turn)
    acc = rescale(acc, factor, OUTPUT)
    p1v1 = warpgroup_mma(shared.p1.operand.index(zero), k1.left.columns.index(zero), acc, is_async=True)
    if LAST:
        acc = warpgroup_mma_wait(0, deps=(p1v1,))
        k1.left.release_free()
        return Softmax(m=m, total=total, acc=acc), logits  # which nobody reads
    else:
        turn = next_turn(turn)
        s = multiply_quarter(None, q.left, k0.left, turn, zero)
        acc = warpgroup_mma_wait(2, deps=(p1v1,))  # all but the two products of the line above
        k1.left.release_free()
        s = multiply_quarter(s, q.right, k0.right, turn, zero)
        s = multiply_rope(s, q.rope, k0.rope, zero)
        return Softmax(m=m, total=total, acc=acc), warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def left_steps(shared, bit, number, steps, turn, scale, GROUPED: gl.constexpr, OUTPUT: gl.constexpr):
    """The steps of tile `number`: what has become of the softmax, and the turn of the step that follows."""
    q, k0 = shared.q, shared.k0
    state = nothing_yet(OUTPUT)
    zero = opaque_zero(number)
    s = multiply_quarter(None, q.left, k0.left, turn, zero)
    s = multiply_quarter(s, q.right, k0.right, turn, zero)
    s = multiply_rope(s, q.rope, k0.rope, zero)
    s = warpgroup_mma_wait(0, deps=(s,))
    for step in range(steps - 1):
        state, s = left_step(state, s, shared, bit, opaque_zero(step), turn, scale, GROUPED, False, OUTPUT)
        turn = next_turn(turn)
    q.release_free()
    state, s = left_step(state, s, shared, bit, zero, turn, scale, GROUPED, True, OUTPUT)
    return state, next_turn(turn)


@gluon.jit
def right_step(state, shared, bit, zero, last, turn, scale, GROUPED: gl.constexpr, OUTPUT: gl.constexpr):
    """Logits and softmax of block 1, P1 · V1 and P0 · V0 for columns 256 to 511. last: is it the tile's last step?"""
    q, k0, k1 = shared.q, shared.k0, shared.k1
    s = multiply_quarter(None, q.right, k1.right, turn, zero)
    s = multiply_rope(s, q.rope, k1.rope, zero)
    s = multiply_quarter(s, q.left, k1.left, turn, zero)
    logits = warpgroup_mma_wait(0, deps=(s,))
    q.release_free(pred=last)

    logits = masked(logits, scale, k1.valid, bit, GROUPED)
    largest = gl.max(logits, 1)
    m = raised(shared.left_max.receive(turn, ROWS), largest)
    shared.right_max.send(m)
    factor = exp2(state.m - m)
    p = exp2(logits - m[:, None])
    total = state.total * factor + gl.sum(p, 1)
    acc = rescale(state.acc, factor, OUTPUT)
    shared.p1.write(p)
    p1v1 = warpgroup_mma(as_operand(p, OUTPUT), k1.right.columns.index(zero), acc, is_async=True)
    shared.p1.release_full()

    shared.p0.acquire_full(turn)
    p0v0 = warpgroup_mma(shared.p0.operand.index(zero), k0.right.columns.index(zero), p1v1, is_async=True)
    p0v0 = warpgroup_mma_wait(1, deps=(p0v0,))
    k1.right.release_free()
    acc = warpgroup_mma_wait(0, deps=(p0v0,))
    k0.right.release_free()
    return Softmax(m=m, total=total, acc=acc)


@gluon.jit
def right_steps(shared, bit, steps, turn, scale, GROUPED: gl.constexpr, OUTPUT: gl.constexpr):
    """As `left_steps`."""
    state = nothing_yet(OUTPUT)
    for step in range(steps):
        last = step == steps - 1
        state = right_step(state, shared, bit, opaque_zero(step), last, turn, scale, GROUPED, OUTPUT)
        turn = next_turn(turn)
    return state, turn


@gluon.jit
def sum_of_both(state, mine, other, turn):
    """The rows' sums of probabilities over both blocks. mine, other: this warpgroup's message and the other's."""
    mine.send(state.total)
    return state.total + other.receive(turn, ROWS)


@gluon.jit
def store_lse(state, total, lse_ptr, row0, n_rows, r):
    """Store the natural log-sum-exp of the rows there are. r: 0 to 63."""
    lse = (state.m + gl.log2(gl.where(total == 0.0, 1.0, total))) * LN_2
    gl.store(lse_ptr + row0 + r, gl.where(total == 0.0, float("-inf"), lse), mask=r < n_rows)
