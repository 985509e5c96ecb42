"""What a model's step refuses before anything is reserved or written: tokens, sequences, batches that are stale."""

import pytest
import torch
from inputs import assert_same_bits

from dsa_ref import TINY, DSALayer, PagedCache, PageTable
from dsa_ref.nn import ModelConfig, SmallModel

VOCABULARY = 100


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SmallModel(ModelConfig(2, 96, VOCABULARY, TINY)).requires_grad_(False)


def state(table, caches):
    pools = [pool.clone() for cache in caches for pool in (cache.kv_pages.view(torch.uint8), cache.index_pages)]
    return table.table.clone(), table.lengths.clone(), *pools, torch.tensor([table.free_pages])


REFUSED = [  # tokens, sequences (None: the right ones), error, message
    (
        torch.tensor([[0], [VOCABULARY]]),
        None,
        ValueError,
        r"tokens must lie in \[0, vocab_size\) = .*, got 100",
    ),
    (torch.tensor([[3], [-1]]), None, ValueError, r"tokens must lie in \[0, vocab_size\) = \[0, 100\), got -1"),
    (torch.zeros(2, 1, dtype=torch.int64, device="meta"), None, ValueError, "tokens must be on cpu like .*, got meta"),
    (torch.zeros(2, 1), None, TypeError, "tokens must have dtype int64, got float32"),
    (torch.zeros(2, 1, dtype=torch.int64), 2, TypeError, "sequences must be a list of ints, got int"),
    (torch.zeros(2, 1, dtype=torch.int64), "01", TypeError, "sequences must be a list of ints, got str"),
    (torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 1]), TypeError, "sequences must be a list of ints, got Te"),
    (torch.zeros(2, 1, dtype=torch.int64), [0, True], TypeError, "sequence must be an int, got bool True"),
]


@pytest.mark.parametrize("tokens, sequences, error, message", REFUSED)
def test_a_refused_step_reserves_and_writes_nothing(model, tokens, sequences, error, message):
    table, caches = model.new_paged_caches(8, 3, 40, 4)
    rows = [table.new(), table.new()]
    model.decode(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), table, caches, rows)  # both pages are full
    before = state(table, caches)
    with pytest.raises(error, match=message):
        model.decode(tokens, table, caches, rows if sequences is None else sequences)
    for was, now in zip(before, state(table, caches), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("token", (-1, VOCABULARY))
def test_tokens_outside_of_the_vocabulary(model, token):
    caches = model.new_caches(8)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, vocab_size\)"):
        model(torch.tensor([1, token, 2]), caches=caches)
    assert caches[0].length == 0
    with pytest.raises(ValueError, match="tokens must be on cpu like the model's weights, got meta"):
        model(torch.zeros(3, dtype=torch.int64, device="meta"))


@torch.no_grad()
def test_a_stale_batch_does_not_write_into_another_sequence_s_page():
    torch.manual_seed(0)
    layer = DSALayer(TINY).requires_grad_(False)
    table = PageTable(4, 2, 16, 4)
    cache = PagedCache(table, TINY)
    a, b = table.new(), table.new()
    old = table.batch([a], 2)
    table.truncate(a, 0)  # its page is free again, and b takes it
    layer.decode(torch.randn(1, 2, TINY.dim), cache, table.batch([b], 2))
    table.advance([b], 2)
    wanted = [part.clone() for part in cache.rows(b)]
    new = table.batch([a], 2)  # as many tokens as in the old one, on another page
    with pytest.raises(ValueError, match=f"batch must be made after sequence {a} gave pages back"):
        layer.decode(torch.randn(1, 2, TINY.dim), cache, old)
    layer.decode(torch.randn(1, 2, TINY.dim), cache, new)
    for got, part in zip(cache.rows(b), wanted, strict=True):
        assert_same_bits(got, part)


@torch.no_grad()
@pytest.mark.parametrize("fp8", (False, True))
def test_a_paged_cache_takes_no_row_that_is_not_finite(fp8):
    """The index keys are finite: the KV row alone is not."""
    torch.manual_seed(0)
    layer = DSALayer(TINY).requires_grad_(False)
    layer.kv_a_proj_with_mqa.weight[-1].fill_(torch.inf)  # a column that RoPE turns
    table = PageTable(4, 1, 16, 4)
    cache = PagedCache(table, TINY, fp8=fp8)
    sequence = table.new()
    with pytest.raises(ValueError, match="kv must be finite, got NaN or infinity in the rows of new tokens"):
        layer(torch.randn(3, TINY.dim), torch.arange(3), cache.sequence(sequence))
    assert (cache.filled[sequence], table.length(sequence), table.free_pages) == (0, 0, 4)
    assert not cache.kv_pages.any()


def test_caches_are_all_of_the_tables_in_their_order(model):
    """`advance` counts for every cache in the pages: one that the step does not fill would hold rows of nobody."""
    table, caches = model.new_paged_caches(8, 3, 40, 4)
    other, others = model.new_paged_caches(8, 3, 40, 4)
    a, b, c = table.new(), table.new(), other.new()
    message = (
        "caches must be all 2 in the pages of table, in the order in which they were made, got 2, or another order"
    )
    text, step = torch.tensor([1, 2, 3]), torch.tensor([[1]])
    with pytest.raises(ValueError, match=message):
        model.decode(step, table, caches[::-1], [a])
    with pytest.raises(ValueError, match=message):
        model(text, caches=[cache.sequence(a) for cache in caches[::-1]])
    for mixed in (
        [caches[0].sequence(a), caches[1].sequence(b)],
        [caches[0].sequence(a), others[1].sequence(c)],
        [caches[0].sequence(a), model.new_caches(4)[1]],
    ):
        with pytest.raises(ValueError, match="caches must be of one sequence of one table, or all LayerCaches"):
            model(text, caches=mixed)
    third = PageTable(8, 3, 40, 4)
    drafts = [PagedCache(third, TINY) for _ in range(4)]  # two models in one table
    d = third.new()
    message = "caches must be all 4 in the pages of table"
    with pytest.raises(ValueError, match=message):
        model.decode(step, third, drafts[:2], [d])
    with pytest.raises(ValueError, match=message):
        model(text, caches=[cache.sequence(d) for cache in drafts[:2]])
    assert [t.free_pages for t in (table, other, third)] == [8, 8, 8]
    assert not any(cache.kv_pages.any() for cache in (*caches, *others, *drafts))
    model(text, caches=[cache.sequence(a) for cache in caches])
    model.decode(step, table, caches, [a])
    assert table.length(a) == 4
