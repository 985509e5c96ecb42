"""A long context in small: what is read, checked, refused, and what the command says of it."""

import dataclasses
import json
import sys
import types

import pytest
import torch

import dsa_ref
from dsa_ref import TINY, records
from dsa_ref.long_context import __main__ as command
from dsa_ref.long_context import bytes_needed, check_memory, memory, read_long_context, rows_to_check, run, subject
from dsa_ref.nn import LayerCache, load_small_model
from dsa_ref.testing import Failed, window_selection
from dsa_ref.training.corpus import load_corpus

CPU = torch.device("cpu")


def read(ops=dsa_ref, tokens=40, **options):
    return read_long_context(TINY, tokens, 16, ops, "cpu", **{"decode": 2} | options)


def with_step(name, step):
    """The reference with one step replaced."""
    return types.SimpleNamespace(**{key: getattr(dsa_ref, key) for key in dsa_ref.__all__} | {name: step})


def test_the_rows_that_are_checked():
    rows = rows_to_check(1 << 20, 4096, 3, seed=0)
    for n in range(21):
        end = 1 << n
        assert end - 1 in rows and (n < 6 or 2 <= sum(end // 2 <= row < end for row in rows) <= 3), n
    assert len({row // 4096 for row in rows}) == 9  # the chunks that are run again: those that end at powers of two
    assert rows == sorted(rows) == rows_to_check(1 << 20, 4096, 3, seed=0) != rows_to_check(1 << 20, 4096, 3, seed=1)
    assert rows_to_check(100, 16, 1, 0) == [0, 1, 3, 7, 15, 31, 63, 99] and rows_to_check(100, 16, 0, 0) == []
    for i, name in enumerate(("tokens", "chunk", "rows", "seed")):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            rows_to_check(*(-1 if j == i else 4 for j in range(4)))


def test_a_layer_reads_decodes_and_is_right():
    events = []
    result = read(progress=lambda event, what: events.append(event))
    assert [(part["first"], part["end"]) for part in result["chunks"]] == [(0, 16), (16, 32), (32, 40)]
    assert events == ["needs", "chunk", "chunk", "chunk", "decoding"]
    assert result["checked"]["positions"][-2:] == [39, 41]  # the last token that was read, and the last decoded
    assert {0, 1, 3, 7, 15, 31} < set(result["checked"]["positions"])
    assert max(result["checked"]["errors"].values()) < 1e-4 and result["decode"]["captured"] is False
    assert list(result["peak_bytes"]) == ([] if sys.platform == "win32" else ["chunks", "checks", "decode"])
    json.dumps(result)
    unchecked = read(check=0, decode=0)
    assert unchecked["checked"] is unchecked["decode"] is unchecked["page_bytes"] is None


def test_the_kernels_are_right(device):
    kernels = pytest.importorskip("dsa_kernels")
    result = read_long_context(TINY, 12, 12, kernels, device, decode=1, check=1)
    assert result["checked"]["positions"] == [0, 1, 3, 7, 11, 12] and result["ops"] == "dsa_kernels"


def wrong_selection(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    last = torch.arange(len(k_idx) - len(q_idx) + 1, len(k_idx) + 1, dtype=torch.int32)
    return window_selection(k, torch.zeros_like(last), last)


def one_key_less(*arguments, **named):
    indices = dsa_ref.lightning_select(*arguments, **named)
    return torch.where(indices == indices.amax(1, keepdim=True), -1, indices).sort(dim=1, descending=True).values


def wrong_scale(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, 1.1 * scale, v_dim)


def no_last_key(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(
        q, kv, torch.where(indices == indices.amax(1, keepdim=True), -1, indices), scale, v_dim
    )


def a_row_of_nan(*arguments):
    out, lse = dsa_ref.sparse_attention(*arguments)
    out[-1] = torch.nan
    return out, lse


def wrong_mha(q, k, v, scale, indices=None, start=None):
    return dsa_ref.mha_attention(q, k, v, 1.2 * scale, indices, start)


def later_queries(q, w, positions, *rest):
    return dsa_ref.index_queries(q, w, positions + 1, *rest)


def later_latents(kv_pages, slots, rows, weight, eps, positions, freqs):
    return dsa_ref.append_latents(kv_pages, slots, rows, weight, eps, positions + 1, freqs)


def later_index(index_pages, slots, k, weight, bias, eps, positions, *rest):
    return dsa_ref.append_index(index_pages, slots, k, weight, bias, eps, positions + 1, *rest)


def nan_latents(kv_pages, slots, rows, *rest):
    rows = rows.clone()
    rows[0] = torch.nan
    return dsa_ref.append_latents(kv_pages, slots, rows, *rest)


def racing():
    calls = iter(range(1000))

    def attention(*arguments):
        out, lse = dsa_ref.sparse_attention(*arguments)
        return out * (2 - next(calls) % 2), lse

    return attention


def newest_slots(q_idx, index_pages, w, k, page_table, lengths):
    indices = window_selection(k, torch.zeros_like(lengths), lengths)[:, None]
    return indices, dsa_ref.decode.slots_of(indices, page_table, 64)


def wrong_paged(q, kv_pages, slots, scale, *rest):
    return dsa_ref.paged_sparse_attention(q, kv_pages, slots, 1.1 * scale, *rest)


WRONG = [
    ("lightning_select", wrong_selection, "scores", "position 15"),
    ("lightning_select", one_key_less, "count", "position 0"),
    ("sparse_attention", wrong_scale, "output", "position 1,"),
    ("sparse_attention", no_last_key, "output", "position 0"),
    ("sparse_attention", a_row_of_nan, "finite", "position 15"),
    ("sparse_attention", racing(), "repeatable", "position 0"),
    ("index_queries", later_queries, "vectors", "position 0"),
    ("append_latents", later_latents, "keys", "position 0"),
    ("append_latents", nan_latents, "finite", "position 0"),
    ("append_index", later_index, "keys", "position 0"),
    ("paged_select", newest_slots, "scores", "position 41"),
    ("paged_sparse_attention", wrong_paged, "output", "position 41"),
]


@pytest.mark.parametrize("name, step, broken, where", WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_a_wrong_row_is_found(name, step, broken, where):
    with pytest.raises(Failed, match=f": {where}") as failure:
        read(with_step(name, step), check=1)
    assert failure.value.property == broken


def test_a_wrong_row_in_mha_mode_is_found():
    config = dataclasses.replace(TINY, index_topk=64)  # more keys than TINY's 8, for which MHA mode does not pay
    with pytest.raises(Failed, match="output: position 1,"):
        read_long_context(config, 64, 64, with_step("mha_attention", wrong_mha), "cpu", decode=0, check=1)


def test_the_bytes_that_it_needs():
    """The parts that are kept are counted as they are."""
    sizes = subject.sizes_of("v32", 1 << 20, CPU)
    needed = bytes_needed(sizes, 4096, 1024, 64, 2, reference=True, cuda=False)
    cache = LayerCache(sizes.config, 4096, sizes.dtype)
    assert needed["cache"] == cache.kv.nbytes + cache.index_pages.nbytes
    table = dsa_ref.PageTable(65, 1, 4160)
    pages = dsa_ref.PagedCache(table, sizes.config, sizes.dtype)
    assert needed["pages"] == pages.kv_pages.nbytes + pages.index_pages.nbytes
    phases = {name: needed[name] for name in ("chunks", "checks", "decode")}
    assert needed["total"] == max(phases.values()) and min(phases.values()) > needed["weights"] + needed["cache"]
    less = bytes_needed(sizes, 4096, 1024, 0, 0, reference=True, cuda=False)
    assert less["pages"] == 0 and not {"checks", "decode", "warm"} & less.keys()
    assert "warm" in bytes_needed(sizes, 4096, 1024, 0, 0, reference=False, cuda=True)


def test_a_million_tokens_take_what_was_measured():
    """The record's peaks lie below what the command asks for, by less than half; all of it is below 20 GiB."""
    record = records.read("long_context_h200.json")
    sizes = dataclasses.replace(subject.sizes_of("v32", 1 << 20, CPU), dtype=torch.bfloat16)
    needed = bytes_needed(sizes, record["tokens"], record["chunk"], record["decode"]["tokens"], 2, False, True)
    assert needed["pages"] == ((1 << 20) + 64) * (656 + 132)  # FP8 rows
    for phase in ("warm", "chunks", "checks"):
        assert 0.5 < record["peak_bytes"][phase] / needed[phase] < 1, phase
    assert needed["total"] < 20 << 30


def test_what_does_not_fit_is_refused_before_anything_is_made(monkeypatch):
    needed = bytes_needed(subject.sizes_of("v32", 1 << 20, CPU), 4096, 1024, 64, 2, reference=True, cuda=False)
    check_memory(needed, needed["total"], CPU)
    check_memory(needed, None, CPU)  # nobody knows
    with pytest.raises(
        ValueError, match=r"must fit the memory of cpu: they need 1\.\d\d GiB \(kept: weights 0.75, cache"
    ):
        check_memory(needed, needed["total"] - 1, CPU)

    def nothing(*_):
        raise AssertionError("work began")

    monkeypatch.setattr(run, "bytes_free", lambda device: 1 << 20)
    monkeypatch.setattr(run, "make_subject", nothing)
    told = []
    with pytest.raises(ValueError, match=r"tokens and chunk must fit the memory .* got 0.00 GiB free"):
        read(progress=lambda event, what: told.append((event, what["free"])))
    assert told == [("needs", 1 << 20)]


def test_the_bytes_that_are_free(tmp_path):
    """As Linux says; a container's limit counts, where there is one."""
    (tmp_path / "proc").mkdir()
    assert memory.bytes_free(CPU, tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:   50 kB\n")
    assert memory.bytes_free(CPU, tmp_path) == 50 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("2000\n")
    for limit, free in (("max\n", 50 * 1024), ("10000\n", 8000), ("1000\n", 0), ("1000000\n", 50 * 1024)):
        (group / "memory.max").write_text(limit)
        assert memory.bytes_free(CPU, tmp_path) == free


def test_the_small_model_reads_text(monkeypatch):
    """All its layers, on the files that training left out; without YaRN, however long the text is."""
    sizes = subject.sizes_of("small", 1 << 16, CPU)
    assert sizes.config.max_seq_len == 1 << 16 and not sizes.config.yarn and sizes.layers == 4
    what = subject.make_subject(sizes, 100, dsa_ref, CPU, 0)
    text = load_corpus()[1][:100].long()
    assert what.given(10, 100).equal(text[10:])
    caches = [LayerCache(sizes.config, 100) for _ in what.layers]
    logits = what.forward(text, torch.arange(100), caches, None)
    assert logits.equal(load_small_model(max_seq_len=1 << 16)(text))
    monkeypatch.setattr(subject, "load_corpus", lambda: (text[:60].byte(), text[:30].byte()))
    with pytest.raises(ValueError, match="tokens must leave 100 within the 90 bytes of text"):
        read_long_context("small", 98, device="cpu", decode=2)


def test_a_layer_gets_new_numbers_in_each_chunk():
    what = subject.make_subject(subject.sizes_of(TINY, 64, CPU), 64, dsa_ref, CPU, 3)
    assert not what.given(0, 16).equal(what.given(16, 32)) and what.given(16, 32).equal(what.given(16, 32))


BAD = [
    ({"tokens": 0}, ValueError, "tokens must be at least 1"),
    ({"decode": -1}, ValueError, "decode must be at least 0"),
    ({"check": 1.5}, TypeError, "check must be an int"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
]


@pytest.mark.parametrize("given, error, reason", BAD)
def test_bad_arguments(given, error, reason):
    with pytest.raises(error, match=reason):
        read(**given)


def test_bad_sizes():
    for sizes, error in (("large", ValueError), (3, TypeError)):
        with pytest.raises(error, match="sizes must be 'v32', 'small' or a DSAConfig, got"):
            read_long_context(sizes, 8, 8, device="cpu")
    with pytest.raises(ValueError, match="sizes must have index_fp8 = True"):
        read_long_context(dataclasses.replace(TINY, index_fp8=False), 8, 8, device="cpu")


def test_the_command_shows_a_table_and_keeps_a_record(tmp_path, capsys):
    log = tmp_path / "log.json"
    given = ["--tokens", "80", "--chunk", "32", "--decode", "2", "--check", "1", "--device", "cpu", "--log", str(log)]
    command.main([*given, "--progress"])
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["position", "32", "64", "80"]
    assert out.startswith("needs 0.") and "decode: " in out and "checked against the reference: 9 rows" in out
    assert "\r[############                  ] 32 of 80 tokens" in err and "\r[####" not in out
    record = json.loads(log.read_text())
    assert record["tokens"] == 80 and len(record["chunks"]) == 3 and record["sizes"] == "small"
    assert record["provenance"]["command"].startswith("python -m dsa_ref.long_context --tokens 80")


def test_the_command_fails_in_a_sentence(tmp_path, capsys, monkeypatch):
    """A wrong row, a lack of memory, and an end by the keyboard; no record is begun."""
    log = tmp_path / "log.json"

    def stopped(raised):
        def fail(*_, **__):
            raise raised

        monkeypatch.setattr(command, "read_long_context", fail)
        with pytest.raises(SystemExit) as end:
            command.main(["--log", str(log)])
        assert list(tmp_path.iterdir()) == []
        return end.value.code, capsys.readouterr().err

    code, _ = stopped(Failed("position 7", "a cause", "output"))
    assert code == "python -m dsa_ref.long_context: wrong: output: position 7. Likely cause: a cause."
    code, err = stopped(ValueError("tokens must be fewer"))
    assert code == 2 and "error: tokens must be fewer" in err
    code, _ = stopped(MemoryError("none"))
    assert code == "python -m dsa_ref.long_context: error: memory ran out though enough was free at the start: none"
    assert stopped(KeyboardInterrupt())[0] == 130
