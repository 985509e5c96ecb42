"""Generation over a group: the bytes that one rank alone would write, on every rank."""

import re

import parallel_cases as cases
import pytest
import torch

from dsa_ref.nn.generate import choose

PROMPT = bytes(range(60, 97))
DRAWN = {"temperature": 1.3, "top_k": 40, "top_p": 0.9}


def alone(prompt, tokens, seed, fields=None, temperature=0.0, top_k=None, top_p=1.0, draws=0):
    """One call of the model for each byte, no cache."""
    model, generator = (
        cases.model_of(seed, **(fields or {})).requires_grad_(False),
        torch.Generator().manual_seed(draws),
    )
    text = list(prompt)
    while len(text) < len(prompt) + tokens and len(text) <= model.config.attention.max_seq_len:
        text.append(choose(model(torch.tensor(text))[-1], generator, temperature, top_k, top_p))
    return text[len(prompt) :]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bytes_are_those_of_one_rank(worlds, size):
    for prompt, tokens, sampling in ((PROMPT, 6, {}), (b"a", 9, {}), (PROMPT, 6, DRAWN)):
        wanted = alone(prompt, tokens, 5, draws=3, **sampling)
        found = worlds(size).run("bytes_after", prompt=prompt, tokens=tokens, seed=5, draws=3, **sampling)
        assert len(wanted) == tokens and found == [wanted] * size


def test_other_draws_give_other_bytes(worlds):
    one, other = (worlds(2).run("bytes_after", prompt=PROMPT, tokens=6, seed=5, draws=i, **DRAWN) for i in (3, 4))
    assert one != other


def test_a_wrong_merge_gives_other_bytes(worlds):
    found = worlds(3).run("bytes_after", prompt=PROMPT, tokens=8, seed=5, fault="merge by mean")
    assert found[0] != alone(PROMPT, 8, 5)


def test_it_ends_where_the_model_can_read_no_more(worlds):
    fields = {"max_seq_len": 40}
    found = worlds(2).run("bytes_after", prompt=PROMPT, tokens=9, seed=5, fields=fields)
    assert len(found[0]) == 4 and found == [alone(PROMPT, 9, 5, fields)] * 2


@pytest.mark.parametrize("changes, message", [
    ({"prompt": b""}, "prompt must have from 1 to max_seq_len = "),
    ({"prompt": "text"}, "prompt must be bytes, got str"),
    ({"tokens": 0}, "tokens must be "),
    ({"temperature": -1.0}, "temperature must be at least 0"),
    ({"vocab_size": 64}, "model must have a vocab_size of 256"),
    ({"other": b"another"}, "prompt must be the same on all ranks"),
    ({"other": b""}, "rank 1: prompt must have from 1 to max_seq_len = "),
])  # fmt: skip
def test_bad_input_is_refused_on_all_ranks(worlds, changes, message):
    world = worlds(2)
    for outcome in world.outcomes("bytes_after", **({"prompt": PROMPT, "tokens": 3, "seed": 5} | changes)):
        assert outcome.kind in ("ValueError", "TypeError") and re.search(message, outcome.message), outcome
    world.broken = True
