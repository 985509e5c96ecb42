"""Generation through paged caches: the text is the one that the model gives without caches, whatever else is in the
batch; prefixes are stored once; seeds, stop texts and streaming."""

import os
import types

import pytest
import rungs
import torch

import dsa_ref
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model
from dsa_ref.nn.generate import choose, complete, generate

RUNGS = pytest.mark.rungs("reference", "kernels")
CODE = b"def read_lines(path):\n    with open(path) as file:\n"
PROMPTS = [b"x", b"import os, sys\nimport ", b"class Reader:\n    def __init__(self, ", CODE + b"        return "]


def model_of(ops=dsa_ref, device="cpu", **fields):
    """The shipped model, with k = 8, below all lengths but the first few."""
    return load_small_model(ops=ops, **{"index_topk": 8, **fields}).to(device)


@pytest.fixture(scope="module")
def model():
    return model_of()


def uncached(model, prompt, tokens):
    """Greedy, the model run anew on the whole text for every byte."""
    device, text = next(model.parameters()).device, prompt
    for _ in range(tokens):
        text += bytes([int(model(torch.tensor(list(text), device=device))[-1].argmax())])
    return text[len(prompt) :]


@pytest.mark.rungs("loops", "reference", "kernels")
def test_cached_equals_uncached(ops, device):
    """Byte for byte, for a batch of different lengths: each byte is what one pass over the whole text puts there."""
    model, slow = model_of(ops, device), ops is not dsa_ref and (ops is rungs.LOOPS or device == "cpu")
    prompts, tokens = (PROMPTS[:2], 4) if slow else (PROMPTS, 30)
    written = complete(model, prompts, tokens, chunk=16, page_size=8)
    for prompt, text in zip(prompts, written, strict=True):
        assert len(text) == tokens
        logits = model(torch.tensor(list(prompt + text[:-1]), device=device))
        assert text == bytes(logits[len(prompt) - 1 :].argmax(dim=1).tolist())


def test_the_selection_matters(model):
    """With k = 8 the text is another than with k = 64, and both are what the model writes without caches."""
    wider = model_of(index_topk=64)
    narrow, wide = uncached(model, CODE, 30), uncached(wider, CODE, 30)
    assert narrow != wide
    assert complete(model, [CODE], 30, chunk=7) == [narrow] and complete(wider, [CODE], 30, page_size=5) == [wide]


def test_fp8_rows(device):
    """Latents in FP8 change the logits a little: the text goes its own way at some byte, not at the first."""
    model = model_of(device=device)
    (text,), (fp8,) = (complete(model, [CODE], 30, fp8=value) for value in (False, True))
    assert len(fp8) == 30 and fp8[:4] == text[:4]
    caches = generate(model, [CODE], 1, fp8=True).caches
    assert {(cache.kv_pages.dtype, cache.kv_pages.shape[2]) for cache in caches} == {(torch.uint8, 64 + 4 + 2 * 16)}


@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_a_batch_equals_each_prompt_alone(model, temperature):
    options = {"tokens": 15, "temperature": temperature, "seed": 5, "samples": 2}
    together = complete(model, PROMPTS, **options)
    alone = [text for prompt in PROMPTS for text in complete(model, [prompt], **options)]
    assert together == alone
    assert together == complete(model, PROMPTS, **options, chunk=5, page_size=3)


def test_seeds(model):
    def texts(seed, samples=2, temperature=1.0):
        return complete(model, PROMPTS[1:2], 10, temperature=temperature, seed=seed, samples=samples)

    assert texts(1) == texts(1) and texts(1)[0] != texts(1)[1]
    assert texts(1, 3)[:2] == texts(1) and texts(1, 1) == texts(1)[:1]
    assert not set(texts(1)) & set(texts(2)) and texts(None) != texts(None)
    assert set(texts(1, temperature=0.0)) == {uncached(model, PROMPTS[1], 10)}
    state = torch.get_rng_state()
    texts(1)
    assert torch.equal(state, torch.get_rng_state())


def test_choose_draws_by_the_softmax():
    logits, generator = torch.tensor([1.0, 3.0, 2.0, -40.0]), torch.Generator().manual_seed(0)
    for temperature, top_k, top_p, kept in (
        (1.0, None, 1.0, [0, 1, 2, 3]), (2.0, None, 1.0, [0, 1, 2, 3]), (1.0, 2, 1.0, [1, 2]), (1.0, 9, 0.8, [1, 2]),
        (1.0, None, 0.5, [1]), (1e-300, None, 1.0, [1]), (5e-324, 4, 1.0, [1]),
    ):  # fmt: skip
        drawn = torch.tensor([choose(logits, generator, temperature, top_k, top_p) for _ in range(2000)])
        wanted = torch.full((4,), -torch.inf, dtype=torch.float64)
        wanted[kept] = logits[kept].double() / max(temperature, 1e-9)
        assert (drawn.bincount(minlength=4) / 2000 - wanted.softmax(0)).abs().max() < 0.04
    assert choose(torch.tensor([1.0, 2.0, 2.0])) == 1
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits must be finite"):
            choose(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"logits": torch.zeros(2, 5)}, ValueError, r"logits must have shape \[V\], got \[2, 5\]"),
        ({"logits": torch.zeros(0)}, ValueError, r"logits must have shape \[V\] with V > 0"),
        ({"logits": [1.0, 2.0]}, TypeError, "logits must be a torch.Tensor"),
        ({"logits": torch.zeros(5, dtype=torch.int64)}, TypeError, "logits must have dtype float64"),
        ({"logits": torch.tensor([0.0, torch.nan])}, ValueError, "logits must be finite"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be at least 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 1, got -1"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
        ({"top_p": 2.0}, ValueError, "top_p must be above 0 and at most 1, got 2.0"),
    ],
)
def test_choose_refuses_what_generate_refuses(given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        choose(**{"logits": torch.zeros(5), "temperature": 1.0} | given)


def pieces_of(model, prompts, tokens, **options):
    found = list(generate(model, prompts, tokens, **options))
    assert [piece.finish_reason is not None for piece in found].count(True) == len(prompts) * options.get("samples", 1)
    return found


@pytest.fixture(scope="module")
def greedy(model):
    """What the model writes after PROMPTS[2], 30 bytes, and a place in it where three bytes come for the first time."""
    text = uncached(model, PROMPTS[2], 30)
    at = next(at for at in range(6, 25) if text.find(text[at : at + 3]) == at and len(set(text[at : at + 3])) == 3)
    return text, at


def test_stop_texts(model, greedy):
    """A stop text over several bytes is left out, and nothing of it is shown before."""
    text, at = greedy
    stop = text[at : at + 3]
    pieces = pieces_of(model, PROMPTS[2:3], 30, stop=[b"\0", stop])
    assert b"".join(piece.data for piece in pieces) == text[:at] and pieces[-1].finish_reason == "stop"
    for given in (stop, stop.decode(), [stop.decode(), b"\0" + stop], [text[at + 1 : at + 3], stop]):
        assert complete(model, PROMPTS[2:3], 30, stop=given)[0] == text[:at]  # of two that come at once, the longer
    assert complete(model, PROMPTS[2:3], at + 3, stop=stop) == [text[:at]]
    assert complete(model, PROMPTS[2:3], 30, stop=text[:1]) == [b""]


def test_what_begins_like_a_stop_text_is_shown_late(model, greedy):
    text, at = greedy
    false = text[at : at + 3] + b"\0"
    pieces = pieces_of(model, PROMPTS[2:3], 30, stop=false)
    assert b"".join(piece.data for piece in pieces) == text and max(len(piece.data) for piece in pieces) >= 3
    pieces = pieces_of(model, PROMPTS[2:3], at + 2, stop=false)
    assert [piece.data for piece in pieces[-2:]] == [text[at - 1 : at], text[at : at + 2]]
    assert b"".join(piece.data for piece in pieces) == text[: at + 2] and pieces[-1].finish_reason == "length"


def test_pieces_come_in_rounds(model):
    """A byte for each unfinished sequence, in the order of prompts and samples; one that ends drops out."""
    found = pieces_of(model, PROMPTS[:2], 12, samples=2)
    assert [(piece.prompt, piece.sample) for piece in found] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 12
    assert all(len(piece.data) == 1 for piece in found)
    assert [piece.finish_reason for piece in found] == [None] * 44 + ["length"] * 4

    first, second = complete(model, PROMPTS[1:3], 12)
    at = next(at for at, byte in enumerate(second) if byte not in first)
    found = pieces_of(model, PROMPTS[1:3], 12, stop=second[at : at + 1])
    assert [piece.prompt for piece in found] == [0, 1] * (at + 1) + [0] * (11 - at)
    assert [piece.finish_reason for piece in found if piece.prompt == 1] == [None] * at + ["stop"]


def test_pieces_come_while_the_model_works(model):
    generation = generate(model, [CODE], 30)
    assert generation.read == generation.written == 0
    next(generation)
    assert (generation.read, generation.written) == (len(CODE), 1)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    next(generation)
    assert generation.written == 2
    with torch.inference_mode():
        assert next(generation).data
    assert b"".join(piece.data for piece in generation) == uncached(model, CODE, 30)[3:]


def pages_held(generation):
    return generation.table.pages - generation.table.free_pages


def test_a_prefix_is_stored_once(model):
    """Prompt of 2.5 pages of 16, three samples: 2 pages for all, then pages of their own; all are free at the end."""
    prompt = CODE[:40]
    generation = generate(model, [prompt], 24, samples=3, page_size=16, chunk=16, temperature=1.0, seed=0)
    held = []
    for piece in generation:
        if piece.sample == 2:
            held.append(pages_held(generation))
    assert generation.table.pages == 2 + 3 * 2  # 40 + 23 tokens are 4 pages
    assert held == [3] + [2 + 3] * 8 + [2 + 3 * 2] * 14 + [0]
    assert generation.read == generation.to_read == 40


def test_what_prompts_have_in_common_is_stored_once(model):
    """Whole pages of 8 that two prompts begin with; equal prompts share all. The text is the same as alone."""
    prompts = [CODE[:30], CODE[:20] + b"other", CODE[:30], CODE[:16], CODE[:7]]
    options = {"tokens": 6, "page_size": 8, "chunk": 8}
    generation = generate(model, prompts, **options)
    texts = [b""] * 5
    for piece in generation:
        texts[piece.prompt] += piece.data
        if generation.written == 5:
            assert pages_held(generation) == 4 + 2 + 0 + 1 + 1
    assert texts == [complete(model, [prompt], **options)[0] for prompt in prompts]
    assert generation.to_read == generation.read == 30 + (25 - 16) + (16 - 8) + 7
    assert generation.table.pages == 5 + (4 - 2) + (5 - 3) + (3 - 1) + 2
    assert pages_held(generation) == 0


def test_a_finished_sequence_gives_its_pages_back(model):
    first, second = complete(model, PROMPTS[1:3], 12)
    at = next(at for at, byte in enumerate(second) if byte not in first)
    generation = generate(model, PROMPTS[1:3], 12, stop=second[at : at + 1], page_size=4)
    held = {piece.finish_reason: pages_held(generation) for piece in generation}
    assert held == {None: held[None], "stop": -(-(len(PROMPTS[1]) + at) // 4), "length": 0}


def speculate(model, prompt, tokens, draft, fp8=False):
    """(the greedy text, the steps that it took): three guesses of draft(text so far) are verified by one step of four
    tokens, and those behind the first wrong one are taken back."""
    device = next(model.parameters()).device
    table, caches = model.new_paged_caches(10, 1, page_size=8, fp8=fp8)
    row, steps = table.new(), 0
    logits = model(torch.tensor(list(prompt), device=device), caches=[cache.sequence(row) for cache in caches])
    written = bytes([int(logits[-1].argmax())])
    while len(written) < tokens:
        guesses, before = draft(written), table.length(row)
        newest = torch.tensor([list(written[-1:] + guesses)], device=device)
        best = bytes(model.decode(newest, table, caches, [row])[0].argmax(dim=1).tolist())
        assert table.length(row) == before + 4
        right = len(os.path.commonprefix((best, guesses)))
        written += best[: right + 1]  # the first wrong guess is replaced by what should have stood there
        table.truncate(row, before + 1 + right)
        assert table.length(row) == len(prompt) + len(written) - 1
        steps += 1
    return written[:tokens], steps


@RUNGS
def test_rejected_guesses_are_taken_back(ops, device):
    """Speculative decoding gives the greedy text for any guesses, in fewer steps for good ones."""
    model, prompt, compiled = model_of(ops, device), PROMPTS[1], ops is dsa_ref or device != "cpu"
    tokens, places = (20, range(4)) if compiled else (4, (1,))
    for fp8 in (False, True) if compiled else (True,):
        greedy = complete(model, [prompt], tokens, fp8=fp8)[0]
        for wrong in places:

            def draft(written, greedy=greedy, wrong=wrong):
                """The next three bytes of the greedy text, but for one."""
                guesses = bytearray((greedy + bytes(4))[len(written) : len(written) + 3])
                guesses[wrong : wrong + 1] = bytes(byte ^ 1 for byte in guesses[wrong : wrong + 1])
                return bytes(guesses)

            text, steps = speculate(model, prompt, tokens, draft, fp8)
            assert (text, steps) == (greedy, -(-(tokens - 1) // (wrong + 1)))


@pytest.mark.gpu
@pytest.mark.rungs("kernels")
def test_captured_steps_write_the_same(ops, device):
    model, options = model_of(ops, device), {"temperature": 0.7, "seed": 1, "samples": 2}
    stop = complete(model, PROMPTS, 20, **options)[2][5:7]
    eager, captured = (complete(model, PROMPTS, 20, **options, stop=stop, captured=value) for value in (False, True))
    assert eager == captured and len(set(map(len, eager))) > 1


def test_max_seq_len():
    """The model reads max_seq_len bytes; the byte after them is the last."""
    model = model_of(max_seq_len=48)
    for length, written in ((44, 5), (48, 1)):
        *_, last = generate(model, [CODE[:length]], 9)
        assert last.finish_reason == "max_seq_len"
        assert complete(model, [CODE[:length]], 9) == [uncached(model, CODE[:length], written)]
    *_, last = generate(model, [CODE[:44]], 5)
    assert last.finish_reason == "length"


def test_progress(model):
    calls = []
    list(generate(model, [CODE, CODE[:40]], 2, chunk=20, page_size=16, progress=lambda *call: calls.append(call)))
    assert calls == [(20, 59), (40, 59), (51, 59), (59, 59)]


BAD = [
    ("model", {"model": None}, TypeError, "a SmallModel, got NoneType"),
    ("prompts", {"prompts": b"abc"}, TypeError, "a list of bytes, got bytes"),
    ("prompts", {"prompts": [b"abc", "abc"]}, TypeError, r"bytes, got str in prompts\[1\]"),
    ("prompts", {"prompts": []}, ValueError, "at least one, got none"),
    ("prompts", {"prompts": [b"abc", b""]}, ValueError, r"from 1 to max_seq_len = 8192 bytes, got 0 in prompts\[1\]"),
    ("prompts", {"prompts": [b"a" * 8193]}, ValueError, "max_seq_len = 8192 bytes, got 8193"),
    ("tokens", {"tokens": 0}, ValueError, "at least 1, got 0"),
    ("tokens", {"tokens": 2.0}, TypeError, "an int, got float"),
    ("samples", {"samples": True}, TypeError, "an int, got bool"),
    ("chunk", {"chunk": -1}, ValueError, "at least 1, got -1"),
    ("page_size", {"page_size": 0}, ValueError, "at least 1, got 0"),
    ("temperature", {"temperature": -0.1}, ValueError, "at least 0 and finite, got -0.1"),
    ("temperature", {"temperature": float("nan")}, ValueError, "finite, got nan"),
    ("temperature", {"temperature": float("inf")}, ValueError, "finite, got inf"),
    ("temperature", {"temperature": "hot"}, TypeError, "a number, got str"),
    ("top_p", {"top_p": 0.0}, ValueError, "above 0 and at most 1, got 0.0"),
    ("top_k", {"top_k": 0}, ValueError, "at least 1, got 0"),
    ("seed", {"seed": -1}, ValueError, r"in \[0, \d+\], got -1"),
    ("seed", {"seed": 1.5}, TypeError, "an int, got float"),
    ("stop", {"stop": 10}, TypeError, "bytes, a str or a list of these, got int"),
    ("stop", {"stop": [b"a", 10]}, TypeError, "got list of bytes, int"),
    ("stop", {"stop": [b"a", ""]}, ValueError, "at least one byte, got an empty one"),
    ("stop", {"stop": "\udcff"}, ValueError, r"texts that UTF-8 can write, got '\\udcff': pass bytes"),
    ("captured", {"captured": 1}, TypeError, "a bool, got 1"),
    ("fp8", {"fp8": 1}, TypeError, "a bool, got 1"),
    ("progress", {"progress": 1}, TypeError, "a function of two ints or None, got int"),
]


@pytest.mark.parametrize("name, given, error, wanted", BAD)
def test_bad_input_is_refused_before_any_work(name, given, error, wanted, model, monkeypatch):
    monkeypatch.setattr(SmallModel, "forward", None)
    with pytest.raises(error, match=f"^{name} must .*{wanted}"):
        generate(**{"model": model, "prompts": [b"abc"], "tokens": 3, **given})


def test_models_that_cannot_generate(model):
    with pytest.raises(ValueError, match="captured must be False but for dsa_kernels on a CUDA device, got dsa_ref on"):
        generate(model, [b"a"], 1, captured=True)
    with pytest.raises(ValueError, match="model must have a vocab_size of 256, .* got 300"):
        generate(SmallModel(ModelConfig(n_layers=1, vocab_size=300, attention=dsa_ref.TINY)), [b"a"], 1)
    with pytest.raises(ValueError, match="config must have index_fp8 = True"):
        generate(model_of(index_fp8=False), [b"a"], 1)
    four = ("rope", "rotate_quantize", "lightning_select", "sparse_attention")
    few = types.SimpleNamespace(**{name: getattr(dsa_ref, name) for name in four})
    with pytest.raises(TypeError, match="model must have ops with paged_select, paged_sparse_attention to decode"):
        generate(model_of(few), [b"a"], 1)
