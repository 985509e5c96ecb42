"""Notebook 05: log-sum-exp, the running (m, l, acc), the whole loop, the merge of two parts. All on NumPy arrays."""

import itertools

import numpy as np
import torch

from dsa_ref.sparse_attention import masked_softmax, sparse_attention

from ..checking import FORGOTTEN, Check, expect, expect_close, expect_shape, normal, strided, tensor

log_sum_exp = Check("log_sum_exp")  # log_sum_exp(x [..., n]) -> [...]
online_update = Check("online_update")  # online_update(m, l, acc, logits, values) -> m, l, acc
block_attention = Check("block_attention")  # block_attention(q, kv, indices, scale, v_dim, block) -> out, lse
merge_parts = Check("merge_parts")  # merge_parts(out_a, lse_a, out_b, lse_b) -> out, lse

BASE_2 = "this is right but for the base: exp2 and log2 where exp and log are asked for"
EXACT = 1e-9  # float64 throughout
SMALL = "what is small counts too: drop nothing and round nothing"


def _array(*shape, seed):
    return normal(*shape, seed=seed, dtype=torch.float64).numpy()


def results(got, names):
    """The results by these names, as arrays."""
    names = names.split(", ")
    cause = FORGOTTEN if got is None else f"return {', '.join(names)}, in this order"
    right = isinstance(got, (tuple, list)) and len(got) == len(names)
    count = f" of {len(got)}" if isinstance(got, (tuple, list)) else ""
    expect(right, f"got {type(got).__name__}{count}, expected {', '.join(names)}", cause)
    return [tensor(x, name).numpy() for x, name in zip(got, names, strict=True)]


# --- log_sum_exp ---------------------------------------------------------------------------------------------------


def _lse(x):
    x = torch.from_numpy(np.append(x, np.full((*x.shape[:-1], 1), -np.inf), axis=-1))  # a row of length 0 is one, too
    return masked_softmax(x, x > -torch.inf)[1]


def _expect_lse(solution, x, cause):
    expected = _lse(x)
    places = " ".join("abc"[: expected.dim()])
    expect_close(solution(x), expected, EXACT, places, cause, {BASE_2: expected / np.log(2)})


@log_sum_exp.property("value")
def log_sum_exp_value(solution):
    for seed, shape in enumerate(((37,), (3, 5), (2, 3, 1), (1, 1), (4, 4), (3, 3, 3))):
        x = _array(*shape, seed=seed)
        for given in (x, strided(x)):
            _expect_lse(solution, given, "not log of the sum of exp over the last axis")
    steps = -2.0 * np.arange(9)  # the last term is e^-16 of the first
    _expect_lse(solution, steps, f"the largest logit is 0 here, the others are smaller: {SMALL}")


@log_sum_exp.property("large logits")
def log_sum_exp_large_logits(solution):
    small = _array(4, 7, seed=0)
    for x in (small + 1000, small - 1000, 1000 * small):
        _expect_lse(solution, x, "exp overflows at 710 and is 0 below -746: shift by the largest logit, add it again")


@log_sum_exp.property("each row's own largest")
def log_sum_exp_each_rows_own_largest(solution):
    for seed in range(2):
        x = _array(3, 5, seed=seed) + np.array([[1000.0], [0.0], [-1000.0]])
        for given in (x, np.stack((x, x - 2000.0))):
            _expect_lse(
                solution, given, "one maximum was used for more than one row: small rows vanish beside large ones"
            )


@log_sum_exp.property("empty rows")
def log_sum_exp_empty_rows(solution):
    for seed in range(2):
        x = _array(4, 6, seed=seed)
        x[0, 1:4] = -np.inf
        x[2] = -np.inf
        _expect_lse(solution, x, "a row of nothing but -inf gives -inf, and -inf minus -inf is NaN: subtract 0 there")
    _expect_lse(solution, np.zeros((3, 0)), "a row without a single logit gives -inf, the sum of nothing being 0")


# --- online_update -------------------------------------------------------------------------------------------------


def _blocks(seed, H, sizes, V, slope=0.0, shift=0.0):
    """Random blocks [(logits [H, B], values [B, V])], moved by `shift`, and by `slope` more from block to block."""
    found = []
    for i, B in enumerate(sizes):
        found.append((_array(H, B, seed=10 * seed + i) + slope * i + shift, _array(B, V, seed=10 * seed + i + 100)))
    return found


def _state(blocks):
    """(m, l, acc) of these blocks by their definition, in two passes."""
    logits = np.concatenate([logits for logits, _ in blocks], axis=1)
    values = np.concatenate([values for _, values in blocks])
    m = logits.max(axis=1)
    p = np.where(logits == -np.inf, 0.0, np.exp(logits - np.where(m == -np.inf, 0.0, m)[:, None]))
    return m, p.sum(axis=1), p @ values


def _start(H, V):
    return np.full(H, -np.inf), np.zeros(H), np.zeros((H, V))


def _run(solution, blocks):
    """The state after each block, handed on as the learner's own function left it."""
    names = ("m", "l", "acc")
    got = state = _start(blocks[0][0].shape[0], blocks[0][1].shape[1])
    for logits, values in blocks:
        old, before = got, state
        got = solution(*state, logits, values)
        state = results(got, "m, l, acc")
        shapes = (logits.shape[:1], logits.shape[:1], (len(logits), values.shape[1]))
        for name, new, shape in zip(names, state, shapes, strict=True):
            expect_shape(new, shape, torch.float64, name)
        cause = "return new arrays: a buffer that is used again changes the state that the caller still holds"
        for name, now, then in zip(names, old, before, strict=True):
            expect(np.array_equal(now, then), f"the {name} of the call before was changed by this one", cause)
        yield state


NO_RESCALE = "the old {} must be multiplied by exp(m - new_m) before the new block is added"
CASES = ((1, 3, (4, 4, 4), 2), (2, 1, (5, 1, 7), 3), (3, 4, (4, 4, 1), 4), (4, 2, (1, 3, 2), 1))  # seed, H, blocks, V


@online_update.property("one block")
def online_update_one_block(solution):
    for seed, H, sizes, V in CASES:
        blocks = [tuple(strided(x) for x in block) for block in _blocks(seed, H, sizes[:1], V)]
        m, l, acc = _state(blocks)  # noqa: E741 (l is the field's name for it)
        ((got_m, got_l, got_acc),) = _run(solution, blocks)
        expect_close(got_m, m, EXACT, "h", "m is the largest logit so far, each head its own")
        expect_close(got_l, l, EXACT, "h", "l is the sum of exp(logit - new_m), natural exp, over the block's keys")
        divided = {"acc was divided by l already: that comes once, after the last block": acc / l[:, None]}
        expect_close(got_acc, acc, EXACT, "h v", "acc is the sum of exp(logit - new_m) times the key's value", divided)


@online_update.property("running m")
def online_update_running_m(solution):
    for seed, H, sizes, V in CASES:
        for slope in (5.0, -5.0):
            blocks = _blocks(seed, H, sizes, V, slope)
            for i, (got, _, _) in enumerate(_run(solution, blocks)):
                m, last = _state(blocks[: i + 1])[0], _state(blocks[i : i + 1])[0]
                suspects = {"new_m is the maximum of the new block alone: the old m counts too": last}
                expect_close(
                    got, m, EXACT, "h", "m is the largest logit of all blocks so far, each head its own", suspects
                )


def _after_rising_blocks(solution, part, name):
    """The largest logit moves up with every block, so all that is old has to shrink."""
    for seed, H, sizes, V in CASES:
        blocks = _blocks(seed, H, sizes, V, slope=5.0)
        for i, got in enumerate(_run(solution, blocks)):
            expect_close(
                got[part], _state(blocks[: i + 1])[part], EXACT, "h v"[: 2 * part - 1], NO_RESCALE.format(name)
            )


@online_update.property("l rescaled")
def online_update_l_rescaled(solution):
    _after_rising_blocks(solution, 1, "l")


@online_update.property("acc rescaled")
def online_update_acc_rescaled(solution):
    _after_rising_blocks(solution, 2, "acc")


@online_update.property("any order")
def online_update_any_order(solution):
    cause = "right while m rises, wrong when an old m is the larger one: the new block is measured against new_m too"
    for seed, H, sizes, V in CASES:
        blocks = _blocks(seed, H, sizes, V, slope=3.0)
        expected = _state(blocks)
        for order in itertools.permutations(blocks):
            *_, got = _run(solution, list(order))
            for part, axes in enumerate(("h", "h", "h v")):
                expect_close(got[part], expected[part], EXACT, axes, cause)
        far = _blocks(seed, H, sizes[:2], V, slope=14.0)  # the lower block before the higher one, and after it
        for order in (far, far[::-1]):
            *_, got = _run(solution, order)
            for part, axes in enumerate(("h", "h", "h v")):
                expect_close(got[part], _state(far)[part], EXACT, axes, f"one block lies 14 lower: {SMALL}")


@online_update.property("large logits")
def online_update_large_logits(solution):
    cause = "exp of a bare number overflows at 710: take exp only of differences, m - new_m and logit - new_m"
    for seed, H, sizes, V in CASES:
        for slope, shift in ((3.0, 1000.0), (3.0, -1000.0), (1000.0, -1000.0)):
            blocks = _blocks(seed, H, sizes, V, slope, shift)
            *_, got = _run(solution, blocks)
            for part, axes in enumerate(("h", "h", "h v")):
                expect_close(got[part], _state(blocks)[part], EXACT, axes, cause)


@online_update.property("empty block")
def online_update_empty_block(solution):
    cause = "a block of -inf changes nothing: where new_m is -inf, subtract 0 instead, since -inf minus -inf is NaN"
    for seed, H, sizes, V in CASES:
        blocks = _blocks(seed, H, sizes, V)
        nothing = (np.full((H, 4), -np.inf), np.zeros((4, V)))
        partly = (blocks[1][0].copy(), blocks[1][1])
        partly[0][0] = -np.inf  # the first head finds nothing here, the others do
        for walk in ([blocks[0], nothing, blocks[1]], [nothing], [nothing, nothing, blocks[0]], [partly, blocks[2]]):
            for i, got in enumerate(_run(solution, walk)):
                expected = _state(walk[: i + 1])
                for part, axes in enumerate(("h", "h", "h v")):
                    expect_close(got[part], expected[part], EXACT, axes, cause)
                none = got[1][expected[1] == 0]
                what = f"no key so far: got l = {none.max(initial=0.0):g}, expected 0"
                expect(not none.any(), what, "exactly 0, by which a row without keys is known: exp(-inf) adds nothing")


# --- block_attention -----------------------------------------------------------------------------------------------


def query_row(seed, H=2, S=29, D=6, n=13, k=13):
    """One query's q [H, D], kv [S, D] and indices [k], of which the first n are real and distinct."""
    rng = np.random.default_rng(seed)
    indices = np.full(k, -1, dtype=np.int32)
    indices[:n] = rng.permutation(np.arange(1, S - 1))[:n]  # never the last row, where a stray -1 would land
    indices[n // 2] = 0  # a key like any other
    return _array(H, D, seed=seed), _array(S, D, seed=seed + 50), indices


def _expect_attention(solution, q, kv, indices, block, cause, scale=0.4, v_dim=4):
    out, lse = results(solution(q, kv, indices, scale, v_dim, block), "out, lse")
    row = (torch.from_numpy(q)[None], torch.from_numpy(kv), torch.from_numpy(indices)[None])
    expected_out, expected_lse = (x[0] for x in sparse_attention(*row, scale, v_dim))
    expect_shape(out, expected_out.shape, torch.float64, "out")
    expect_shape(lse, expected_lse.shape, torch.float64, "lse")
    padded = indices.clip(min=0) if (indices < 0).any() else None
    suspects = {}
    if padded is not None:
        for wraps, filled in (("-1 was taken for the last row of kv", indices), ("-1 was taken for row 0", padded)):
            rows = torch.from_numpy(kv[filled])
            everything = torch.arange(len(filled), dtype=torch.int32)[None]
            suspects[wraps] = sparse_attention(row[0], rows, everything, scale, v_dim)[0][0]
        zeros = torch.from_numpy(np.where((indices >= 0)[:, None], kv[indices], 0.0))
        zeros = sparse_attention(row[0], zeros, everything, scale, v_dim)[0][0]
        suspects["padding got a logit of 0, so exp(0 - m) was summed for it: its logit is -inf"] = zeros
    expect_close(out, expected_out, EXACT, "h v", cause, suspects)
    expect_close(lse, expected_lse, EXACT, "h", f"lse is m + log(l): {cause}", {BASE_2: expected_lse / np.log(2)})


@block_attention.property("one block")
def block_attention_one_block(solution):
    cause = "not the softmax of scale · q · kv over the selected rows' values"
    for seed, H, v_dim in ((0, 2, 4), (1, 4, 4), (2, 2, 1), (3, 2, 6)):
        _expect_attention(solution, *query_row(seed, H=H), 16, cause, scale=0.4 if seed < 3 else 1.3, v_dim=v_dim)
    cause = "wrong for arrays that are not contiguous, as after a transpose"
    _expect_attention(solution, *map(strided, query_row(4)), 16, cause)
    _expect_attention(solution, *query_row(5, n=1, k=1), 16, "one selected row: the softmax of a single logit is 1")
    q, kv, _ = query_row(6, S=70_000)
    indices = np.array([0, 127, 128, 255, 256, 32_767, 32_768, 65_535, 65_536, 69_999], dtype=np.int32)
    _expect_attention(solution, q, kv, indices, 16, "right in a short cache: do indices pass through 8 or 16 bits?")


@block_attention.property("any block size")
def block_attention_any_block_size(solution):
    for seed, H in ((1, 3), (2, 1)):
        for block in (13, 1, 4, 5, 12):
            cause = f"13 keys in blocks of {block}: the last, shorter block counts too, and old sums are rescaled"
            _expect_attention(solution, *query_row(seed, H=H), block, cause)
    row = query_row(3, S=400, n=300, k=300)
    _expect_attention(solution, *row, 1, "300 keys one by one: right for a few blocks alone")


@block_attention.property("large logits")
def block_attention_large_logits(solution):
    q, kv, indices = query_row(5)
    kv[:, 0], q[:, 0] = 1.0, (5000.0, -5000.0)  # adds 2000 to every logit of head 0, takes 2000 from those of head 1
    for block in (4, 16):
        cause = "exp overflows at 710 and is 0 below -746: measure each head against its own running maximum"
        _expect_attention(solution, q, kv, indices, block, cause)
    kv[indices, 0] = np.linspace(-1.0, 1.0, len(indices))
    cause = "right for small logits, wrong where they rise by hundreds: the maximum must move with every block"
    _expect_attention(solution, q, kv, indices, 4, cause)


@block_attention.property("padding")
def block_attention_padding(solution):
    for seed, n in ((1, 9), (2, 2)):
        for block in (4, 16):
            _expect_attention(
                solution, *query_row(seed, n=n), block, "-1 marks an empty place: no weight, no value, no key"
            )


@block_attention.property("empty blocks")
def block_attention_empty_blocks(solution):
    q, kv, indices = query_row(3, n=5)
    cause = "a block of padding changes nothing, and keys may follow it; where no key is at all: 0 and -inf"
    for row in (np.full_like(indices, -1), indices[::-1].copy()):  # nothing selected; padding first
        for block in (4, 16):
            _expect_attention(solution, q, kv, row, block, cause)


# --- merge ---------------------------------------------------------------------------------------------------------


def _parts(seed, H, V, sizes, shift=0.0, empty=()):
    """Two parts' (out, lse) and those of their union; in part i the heads empty[i] see nothing."""
    logits = [torch.from_numpy(_array(H, n, seed=seed + i) + shift) for i, n in enumerate(sizes)]
    values = [torch.from_numpy(_array(n, V, seed=seed + 10 + i)) for i, n in enumerate(sizes)]
    for i, heads in enumerate(empty):
        logits[i][list(heads)] = -torch.inf

    def attend(logits, values):
        weights, lse = masked_softmax(logits, logits > -torch.inf)
        return (weights @ values).numpy(), lse.numpy()

    whole = attend(torch.cat(logits, dim=1), torch.cat(values))
    return [attend(*part) for part in zip(logits, values, strict=True)], whole


def _expect_merged(solution, parts, whole, cause, only=None):
    (out_a, lse_a), (out_b, lse_b) = parts
    out, lse = results(solution(out_a, lse_a, out_b, lse_b), "out, lse")
    expect_shape(out, whole[0].shape, torch.float64, "out")
    expect_shape(lse, whole[1].shape, torch.float64, "lse")
    with np.errstate(all="ignore"):
        base_2 = np.log2(np.exp2(lse_a) + np.exp2(lse_b))
        wrong_lse = {
            BASE_2: base_2,
            "two log-sum-exps were added: it is their exp that adds up": lse_a + lse_b,
            "the larger lse was taken for the sum": np.maximum(lse_a, lse_b),
        }
        wrong_out = {
            "the plain mean of the parts: each counts by exp(lse), its share of the sum": (out_a + out_b) / 2,
            "weighted by lse itself, not by exp(lse)": (lse_a[:, None] * out_a + lse_b[:, None] * out_b)
            / (lse_a + lse_b)[:, None],
            BASE_2: np.exp2(lse_a - base_2)[:, None] * out_a + np.exp2(lse_b - base_2)[:, None] * out_b,
            "the weights of the two parts are swapped": np.exp(lse_b - whole[1])[:, None] * out_a
            + np.exp(lse_a - whole[1])[:, None] * out_b,
        }
    if only != "out":
        expect_close(lse, whole[1], EXACT, "h", cause, wrong_lse)
    if only != "lse":
        expect_close(out, whole[0], EXACT, "h v", cause, wrong_out)


MERGES = (
    (1, 3, 4, (5, 9)),
    (2, 1, 3, (1, 30)),
    (3, 1, 3, (6, 2)),
    (4, 4, 4, (6, 2)),
    (5, 2, 1, (3, 3)),
)  # seed, H, V, keys in each part


@merge_parts.property("lse")
def merge_parts_lse(solution):
    for case in MERGES:
        _expect_merged(solution, *_parts(*case), "the merged lse is log(exp(lse_a) + exp(lse_b))", only="lse")


@merge_parts.property("weights")
def merge_parts_weights(solution):
    for case in MERGES:
        _expect_merged(
            solution, *_parts(*case), "a part's weight is exp(lse_part - lse), each head its own", only="out"
        )
    parts, whole = _parts(*MERGES[0])
    parts, whole = [[strided(x) for x in part] for part in parts], [strided(x) for x in whole]
    _expect_merged(solution, parts, whole, "wrong for arrays that are not contiguous, as after a transpose")
    (out_a, lse), (out_b, _) = parts
    whole = (out_a + out_b) / 2, lse + np.log(2)
    _expect_merged(solution, [(out_a, lse), (out_b, lse)], whole, "equal lse: each part counts one half")
    for gap in (5.0, 10.0, 15.0, -5.0, -10.0, -15.0):
        share = 1 / (1 + np.exp(gap))  # of part a
        whole = share * out_a + (1 - share) * out_b, lse - np.log(share)
        _expect_merged(solution, [(out_a, lse), (out_b, lse + gap)], whole, f"lse_b - lse_a is {gap:g}: {SMALL}")


@merge_parts.property("large lse")
def merge_parts_large_lse(solution):
    for shift in (1000.0, -1000.0):
        for case in MERGES:
            cause = "exp(lse) overflows or vanishes: subtract the larger lse first, as in log_sum_exp"
            _expect_merged(solution, *_parts(*case, shift=shift), cause)
    heads = np.array([[1000.0], [0.0], [-1000.0]])
    _expect_merged(solution, *_parts(5, 3, 4, (5, 9), shift=heads), "each head subtracts the larger of its own two lse")
    (small, (out, lse)), _ = _parts(6, 3, 4, (5, 9))
    for parts in ([small, (out, lse + 2000.0)], [(out, lse + 2000.0), small]):
        cause = "one part far above the other, be it the first or the second: subtract the larger lse, not always one's"
        _expect_merged(solution, parts, (out, lse + 2000.0), cause)


@merge_parts.property("empty part")
def merge_parts_empty_part(solution):
    for empty in (((0,), ()), ((), (0,)), ((0, 1, 2), ())):
        cause = "a part that saw nothing has lse -inf and weight 0: the other part is the answer"
        _expect_merged(solution, *_parts(3, 3, 4, (5, 9), empty=empty), cause)


@merge_parts.property("both empty")
def merge_parts_both_empty(solution):
    for empty in (((1,), (1,)), ((0, 1, 2), (0, 1, 2))):
        cause = "where neither part saw a key the result is 0 and -inf: -inf minus -inf is NaN, so subtract 0 there"
        _expect_merged(solution, *_parts(4, 3, 4, (5, 9), empty=empty), cause)
