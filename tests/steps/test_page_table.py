"""Whose pages: random operations against a dict of token lists, and what is refused with nothing changed."""

import numpy as np
import pytest
import torch
from inputs import E4M3

import dsa_ref
from dsa_ref import TINY, PagedCache, PageTable

PAGES, SEQUENCES, LONGEST, PAGE = 9, 4, 23, 4


def tokens_as_rows(tokens):
    """What a layer would write for these tokens, whole numbers: kv, k_idx, k_scale."""
    numbers = torch.tensor(tokens, dtype=torch.float32)
    values = (numbers % 16)[:, None].expand(-1, TINY.index_head_dim).to(E4M3)
    return numbers[:, None].expand(-1, TINY.latent_dim).contiguous(), values, numbers


def new_table(caches=2, pages=PAGES, **sizes):
    table = PageTable(pages, SEQUENCES, LONGEST, PAGE)
    return table, [PagedCache(table, TINY) for _ in range(caches)]


def poison_what_nobody_holds(table, caches):
    held = {page for row in table.table.tolist() for page in row if page >= 0}
    nobodys = [page for page in range(table.pages) if page not in held]
    for cache in caches:
        cache.kv_pages[nobodys], cache.index_pages[nobodys] = torch.nan, 0xFF


def state(table, caches):
    """All that a refused call must leave alone."""
    pools = [
        pool.view(torch.uint8).flatten().tolist() for cache in caches for pool in (cache.kv_pages, cache.index_pages)
    ]
    return table.table.tolist(), table.lengths.tolist(), table.free_pages, pools, [list(c.filled) for c in caches]


def check(table, caches, model):
    """The device's and the host's view are the model's, page by page and token by token."""
    rows, lengths = table.table.tolist(), table.lengths.tolist()
    held = set()
    for sequence in range(SEQUENCES):
        tokens, pages = model.get(sequence, []), [page for page in rows[sequence] if page >= 0]
        assert lengths[sequence] == len(tokens)
        assert rows[sequence] == pages + [-1] * (len(rows[sequence]) - len(pages))  # -1 only at the end
        assert len(set(pages)) == len(pages) >= -(-len(tokens) // PAGE)
        held |= set(pages)
        if sequence not in model:
            assert not pages
            continue
        assert table.length(sequence) == len(tokens)
        slots = [rows[sequence][s // PAGE] * PAGE + s % PAGE for s in range(len(tokens))]
        assert table.slots(sequence, 0, len(tokens)).tolist() == slots
        for cache in caches:
            for got, wanted in zip(cache.rows(sequence), tokens_as_rows(tokens), strict=True):
                assert torch.equal(got.float(), wanted.float())
    assert table.free_pages == table.pages - len(held)


def append(table, caches, sequence, tokens, how):
    """By hand, by batch, or each layer through its adapter."""
    rows, length = tokens_as_rows(tokens), table.length(sequence)
    if how == "adapter":
        for cache in caches:
            cache.sequence(sequence).append(*rows)
        return
    if how == "batch" and tokens:
        slots = table.batch([sequence], len(tokens)).slots
    else:
        table.reserve(sequence, len(tokens))
        slots = table.slots(sequence, length, length + len(tokens))
    for cache in caches:
        cache.write(slots, *rows)
    table.advance([sequence], len(tokens))


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_against_a_dict_of_lists(seed):
    """Shared pages, copies on write, a pool that is full half of the time, and free pages full of NaN."""
    rng, (table, caches) = np.random.default_rng(seed), new_table()
    model, refused, clock = {}, 0, 0
    for _ in range(250):
        poison_what_nobody_holds(table, caches)
        before = state(table, caches)
        action = rng.choice(["new", "append", "append", "append", "truncate", "fork", "free", "reserve"])
        sequence = int(rng.choice(list(model))) if model else None
        try:
            if action == "new" or sequence is None:
                fresh = table.new()
                assert fresh not in model
                model[fresh] = []
            elif action == "append":
                tokens = [clock + i for i in range(int(rng.integers(0, 7)))]
                clock += len(tokens)
                append(table, caches, sequence, tokens, rng.choice(["hand", "batch", "adapter"]))
                model[sequence] = model[sequence] + tokens
            elif action == "truncate":
                kept = int(rng.integers(0, len(model[sequence]) + 1))
                table.truncate(sequence, kept)
                model[sequence] = model[sequence][:kept]
                assert (table.table[sequence] >= 0).sum() == -(-kept // PAGE)
            elif action == "fork":
                other, free = table.fork(sequence), table.free_pages
                assert other not in model and free == before[2]  # nothing is copied yet
                model[other] = list(model[sequence])
            elif action == "free":
                table.free(sequence)
                del model[sequence]
            else:
                table.reserve(sequence, int(rng.integers(0, 4)))
        except ValueError:
            refused += 1
            assert state(table, caches) == before
            held = sum(page >= 0 for page in set(sum(before[0], [])))
            assert len(model) == SEQUENCES or held > PAGES // 2 or max(map(len, model.values())) > LONGEST - 7
        check(table, caches, model)
    assert refused > 5 and clock > 100
    for sequence in list(model):
        table.free(sequence)
    assert table.free_pages == PAGES and (table.table == -1).all() and (table.lengths == 0).all()


def test_a_shared_page_is_copied_by_the_first_who_writes():
    """Whole pages stay shared; the last holder of a page writes where it is."""
    table, caches = new_table()
    first = table.new()
    append(table, caches, first, list(range(6)), "hand")
    second = table.fork(first)
    third = table.fork(first)
    assert table.free_pages == PAGES - 2
    append(table, caches, second, [10], "hand")
    append(table, caches, first, [20], "hand")
    assert table.free_pages == PAGES - 4
    append(table, caches, third, [30], "hand")
    assert table.free_pages == PAGES - 4  # nobody else holds its second page any more
    assert len({int(table.table[sequence, 0]) for sequence in (first, second, third)}) == 1
    assert len({int(table.table[sequence, 1]) for sequence in (first, second, third)}) == 3
    model = {first: [*range(6), 20], second: [*range(6), 10], third: [*range(6), 30]}
    check(table, caches, model)
    fourth = table.fork(first)
    table.truncate(fourth, 2)
    append(table, caches, fourth, [40], "hand")  # into the middle of a page that three others hold
    check(table, caches, model | {fourth: [0, 1, 40]})


def test_tokens_in_a_page_that_others_hold_must_be_reserved_too():
    table, caches = new_table()
    first = table.new()
    append(table, caches, first, [1, 2], "hand")
    second = table.fork(first)
    with pytest.raises(ValueError, match="tokens must be reserved before, got 1 for sequence 1"):
        table.advance([second], 1)
    assert table.lengths.tolist() == [2, 2, 0, 0]


def test_a_batch_of_forks_takes_no_more_pages_than_it_needs():
    """Two who share a page, both in the batch: one copies, the other keeps it. With one free page that must do."""
    table, caches = new_table(pages=2)
    first = table.new()
    append(table, caches, first, [1, 2], "hand")
    second = table.fork(first)
    batch = table.batch([second, first], 2)
    assert table.free_pages == 0 and len(set(batch.slots.tolist())) == 4
    assert batch.lengths.tolist() == [4, 4] and batch.positions.tolist() == [[2, 3], [2, 3]]
    assert table.lengths.tolist() == [2, 2, 0, 0]  # not before `advance`
    for cache in caches:
        cache.write(batch.slots, *tokens_as_rows([3, 4, 5, 6]))
    table.advance([second, first], 2)
    check(table, caches, {first: [1, 2, 5, 6], second: [1, 2, 3, 4]})


def test_addresses_never_change():
    """A captured step reads `table` and `lengths` where they were."""
    table, caches = new_table()
    addresses = table.table.data_ptr(), table.lengths.data_ptr()
    sequence = table.new()
    append(table, caches, sequence, list(range(9)), "batch")
    table.free(table.fork(sequence))
    table.truncate(sequence, 3)
    assert addresses == (table.table.data_ptr(), table.lengths.data_ptr())
    assert table.table.dtype == table.lengths.dtype == torch.int32


def test_a_table_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        table, caches = new_table()
        sequence = table.new()
        append(table, caches, sequence, [1], "hand")
    append(table, caches, sequence, [2], "adapter")
    check(table, caches, {sequence: [1, 2]})


def full_pool():
    """Sequence 0 with 22 tokens, 1 with 8 on the first two pages of sequence 0, 2 with 8 of its own; one page free."""
    table, caches = new_table()
    first = table.new()
    append(table, caches, first, list(range(22)), "hand")
    table.truncate(table.fork(first), 8)
    append(table, caches, table.new(), list(range(8)), "hand")
    assert table.free_pages == 1
    return table, caches


REFUSED = [  # a call of a table, error, message
    (
        lambda t: t.reserve(2, 5),
        ValueError,
        "tokens must fit the pages that are free, 1 of 9, got 5 in sequence 2, which",
    ),
    (lambda t: t.reserve(0, 2), ValueError, "tokens must fit max_length = 23, got 22 held and 2 more"),
    (lambda t: t.reserve(3, 1), ValueError, "sequence must be one that new or fork gave and free did not end, got 3"),
    (lambda t: t.reserve(4, 1), ValueError, r"sequence must be in \[0, 3\], got 4"),
    (lambda t: t.reserve(-1, 1), ValueError, r"sequence must be in \[0, 3\], got -1"),
    (lambda t: t.reserve(True, 1), TypeError, "sequence must be an int"),
    (lambda t: t.reserve(2, -1), ValueError, "tokens must be at least 0, got -1"),
    (lambda t: t.reserve(2, 1.0), TypeError, "tokens must be an int, got float 1.0"),
    (lambda t: t.advance([2], 1), ValueError, "tokens must be reserved before, got 1 for sequence 2"),
    (lambda t: t.advance([0, 2], 1), ValueError, "tokens must be reserved before, got 1 for sequence 2"),
    (lambda t: t.advance([2, 2], 0), ValueError, r"sequences must be distinct, got \[2, 2\]"),
    (lambda t: t.advance(2, 0), TypeError, "sequences must be a list of ints, got int"),
    (lambda t: t.batch([1, 2], 4), ValueError, "tokens must fit the pages that are free, 1 of 9, got 4 in each of 2"),
    (lambda t: t.batch([2, 0], 2), ValueError, "tokens must fit max_length"),
    (lambda t: t.batch([], 1), ValueError, "sequences must name at least one"),
    (lambda t: t.batch([1], 0), ValueError, "tokens must be at least 1, got 0"),
    (lambda t: t.truncate(2, 9), ValueError, r"length must be in \[0, 8\], got 9"),
    (lambda t: t.truncate(2, -1), ValueError, r"length must be in \[0, 8\], got -1"),
    (lambda t: t.slots(2, 0, 9), ValueError, r"last must be in \[0, 8\], got 9"),
    (lambda t: t.slots(2, 3, 2), ValueError, r"first must be in \[0, 2\], got 3"),
    (lambda t: t.length(3), ValueError, "sequence must be one that"),
    (lambda t: t.free(3), ValueError, "sequence must be one that"),
    (lambda t: t.fork(3), ValueError, "sequence must be one that"),
    (lambda t: t.check_batch(None), TypeError, "batch must be a Batch, got NoneType"),
    (lambda t: t.check_batch(new_table()[0]), TypeError, "batch must be a Batch, got PageTable"),
    (lambda t: PagedCache(t, TINY), ValueError, "table must have no sequences yet"),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_what_is_refused_changes_nothing(call, error, message):
    table, caches = full_pool()
    before = state(table, caches)
    with pytest.raises(error, match=message):
        call(table)
    assert state(table, caches) == before
    table.reserve(2, 4)  # the one page is still there
    assert table.free_pages == 0


def lose_by_truncating(table, sequence, other):
    table.truncate(sequence, 5)


def lose_by_ending(table, sequence, other):
    """Another sequence of the same number and length."""
    table.free(sequence)
    assert table.new() == sequence
    table.reserve(sequence, 5)
    table.advance([sequence], 5)


def lose_by_copying(table, sequence, other):
    """The page that the batch would write to stays with the fork."""
    table.fork(sequence)
    table.reserve(sequence, 3)


@pytest.mark.parametrize("lose", (lose_by_truncating, lose_by_ending, lose_by_copying))
def test_a_batch_from_before_pages_were_lost_is_refused(lose):
    """Its slots are another sequence's by now, though this one is as long as before and has pages again."""
    table, _ = new_table()
    sequence, other = table.new(), table.new()
    table.reserve(sequence, 5)
    table.advance([sequence], 5)
    old = table.batch([sequence], 4)
    table.check_batch(old)
    table.reserve(sequence, 9)  # more pages take nothing away
    table.check_batch(old)
    lose(table, sequence, other)
    theirs = table.batch([other], 4).slots
    new = table.batch([sequence], 4)
    assert not torch.equal(new.slots, old.slots) or not set(theirs.tolist()) & set(old.slots.tolist())
    with pytest.raises(ValueError, match=f"batch must be made after sequence {sequence} gave pages back"):
        table.check_batch(old)
    table.check_batch(new)


def test_no_sequence_is_left():
    table, caches = full_pool()
    table.new()
    before = state(table, caches)
    for call in (table.new, lambda: table.fork(0)):
        with pytest.raises(ValueError, match="sequences must leave one free .* got all 4 in use"):
            call()
    assert state(table, caches) == before


@pytest.mark.parametrize("name", ("pages", "sequences", "max_length", "page_size"))
@pytest.mark.parametrize("value, error", [(0, ValueError), (2.0, TypeError), (True, TypeError), (10**30, ValueError)])
def test_sizes(name, value, error):
    sizes = {"pages": 2, "sequences": 1, "max_length": 8, "page_size": 4}
    with pytest.raises(error, match=rf"{name} must be"):
        dsa_ref.PageTable(**sizes | {name: value})
    with pytest.raises(ValueError, match=r"pages must hold fewer than 2\^31 tokens"):
        dsa_ref.PageTable(**sizes | {"pages": 1 << 29})
    for name in ("sequences", "max_length"):  # lengths and page tables are int32
        with pytest.raises(ValueError, match=rf"{name} must be in \[1, 2147483647\], got 2147483648"):
            dsa_ref.PageTable(**sizes | {name: 1 << 31})
