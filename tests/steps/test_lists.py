"""Index lists: each key once, and what is not in them costs nothing, however large k is."""

import pytest
import torch
from inputs import assert_close, assert_same_bits, index_inputs, normal, random_indices
from torch.utils._python_dispatch import TorchDispatchMode

import dsa_ref
from dsa_ref import blocks

T, S = 48, 48
Q_IDX, K_IDX, W, _ = index_inputs(normal, T, S, 3, 16)
Q, KV = normal(T, 4, 24, seed=1), normal(S, 24, seed=2)
HEADS = (normal(S, 4, 24, seed=3), normal(S, 4, 16, seed=4))
USERS = {
    "sparse_attention": lambda indices: dsa_ref.sparse_attention(Q, KV, indices, 0.2, 16),
    "mha_attention": lambda indices: dsa_ref.mha_attention(Q, *HEADS, 0.2, indices),
    "indexer_loss": lambda indices: dsa_ref.indexer_loss(Q_IDX, K_IDX, W, Q, KV, 0.2, indices),
}
MAKERS = {
    "select_topk": lambda k: dsa_ref.select_topk(normal(T, S), k),
    "lightning_select": lambda k: dsa_ref.lightning_select(Q_IDX, K_IDX, W, k),
}


class Work(TorchDispatchMode):
    """Counts the numbers that torch's functions write."""

    written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and "alias" not in str(function._schema) and not x._is_view():
                self.written += x.numel()
        return out


def work(function, *args):
    with Work() as counter:
        function(*args)
    return counter.written


@pytest.mark.parametrize("user", USERS)
def test_work_follows_the_keys_that_are_there(user):
    """64 times the places, no more keys: the lists are looked at a few times, and nothing is done for each place."""
    short = dsa_ref.select_topk(normal(T, S), S)
    long = torch.nn.functional.pad(short, (0, 63 * S), value=-1)
    assert work(USERS[user], long) <= work(USERS[user], short) + 4 * long.numel()
    for a, b in zip(flat(USERS[user](long)), flat(USERS[user](short)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_selection_costs_its_own_size_beyond_the_keys(maker):
    assert work(MAKERS[maker], 64 * S) <= work(MAKERS[maker], S) + 2 * T * 64 * S
    assert torch.equal(MAKERS[maker](64 * S)[:, :S], MAKERS[maker](S)) and (MAKERS[maker](64 * S)[:, S:] == -1).all()


@pytest.mark.parametrize("user", USERS)
def test_one_long_list_does_not_make_the_others_long(user, small_blocks):
    """Blocks are cut by what their own rows hold."""
    indices = torch.full((T, S), -1, dtype=torch.int32)
    indices[:, 0] = 0
    short = work(USERS[user], indices[:, :1])
    indices[7] = torch.arange(S)
    assert work(USERS[user], indices) <= 2.5 * short


def flat(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("user", USERS)
def test_minus_one_may_stand_anywhere(user, small_blocks):
    indices = random_indices(T, S, 9)
    tidy = torch.full_like(indices, -1)
    for t, row in enumerate(indices):
        kept = row[row >= 0]
        tidy[t, : len(kept)] = kept
    for a, b in zip(flat(USERS[user](indices)), flat(USERS[user](tidy)), strict=True):
        assert_close(a, b, 1e-6)


def test_blocks_of_lists_hold_each_list_once():
    indices = random_indices(30, 20, 12)
    seen = []
    for rows, lists in blocks.list_blocks(indices, per_index=1 << 19):
        assert lists.shape[0] == rows.stop - rows.start
        assert lists.shape[0] == 1 or lists.numel() <= 32
        seen += [[s for s in row if s >= 0] for row in lists.tolist()]
    assert seen == [[s for s in row if s >= 0] for row in indices.tolist()]
    assert [lists.shape for _, lists in blocks.list_blocks(indices[:0], 1)] == [(0, 1)]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("row", ([1, 1, 0], [4, 2, 4], [3, -1, 3], [5, 6, 6], [-1, 9, 9]))
def test_a_key_named_twice_is_refused(user, row):
    """Where it counts twice in a sum and once in a mask, there is no one answer."""
    indices = torch.full((T, 3), -1, dtype=torch.int32)
    indices[20] = torch.tensor(row)
    twice = max(row, key=row.count) if -1 not in row else max(row)
    with pytest.raises(ValueError, match=f"indices must be distinct within a row, got {twice} twice in row 20"):
        USERS[user](indices)


@pytest.mark.rungs("reference", "kernels")
def test_both_packages_refuse_a_key_named_twice(ops):
    indices = torch.tensor([[2, 0, -1], [3, 1, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="distinct within a row, got 3 twice in row 1"):
        ops.sparse_attention(normal(2, 2, 32), normal(5, 32), indices, 0.2, 16)


@pytest.mark.parametrize("row", ([7, -1, 3], [0, 1, 2], [2, 1, 0], [-1, -1, -1], [-1, -1, 8], [5, -1, -1]))
def test_other_lists_are_not_refused(row):
    for user in USERS.values():
        user(torch.tensor([row] * T, dtype=torch.int32))


def test_loops_count_a_key_once():
    """They check nothing, and take S_t for the set that it is."""
    q, kv, once, twice = normal(1, 2, 6).numpy(), normal(4, 6, seed=1).numpy(), [[0, 1]], [[1, 1, 0]]
    for a, b in zip(*(dsa_ref.sparse_attention_loops(q, kv, x, 0.3, 4) for x in (once, twice)), strict=True):
        assert (a == b).all()
    indexer = [x.numpy() for x in index_inputs(normal, 1, 4, 2, 8)[:3]]
    assert dsa_ref.indexer_loss_loops(*indexer, q, kv, 0.3, once) == dsa_ref.indexer_loss_loops(
        *indexer, q, kv, 0.3, twice
    )


@pytest.mark.parametrize("stage", ("warm-up", "sparse"))
def test_the_loss_keeps_no_block_of_heads_for_the_backward_pass(stage):
    """A number or two for each pair are kept, none for each pair and head."""
    kept = 0

    def keep(x):
        nonlocal kept
        kept += x.numel()
        return x

    indices = None if stage == "warm-up" else dsa_ref.select_topk(normal(T, S), S)
    q_idx, k_idx, w, _ = index_inputs(normal, T, S, 16, 8)
    leaves = [x.requires_grad_() for x in (q_idx, k_idx, w)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = dsa_ref.indexer_loss(*leaves, Q, KV, 0.2, indices)
    assert kept <= 3 * T * S + 3 * sum(x.numel() for x in leaves)
    loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves)
