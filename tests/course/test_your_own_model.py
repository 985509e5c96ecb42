"""Notebook 12b: the directory holds our trained model, the recorder sees what was selected, the picture marks it."""

import contextlib
import pathlib
import re

import pytest
import torch
from conftest import NEEDS_PYTHON_311, OLD_PYTHON

from dsa_course.your_own_model import recording
from dsa_course.your_own_model.live import SHOWN, byte_places, live_layers
from dsa_course.your_own_model.memory import tensors_made
from dsa_ref.nn.model import load_small_model
from notebooks.maintain.learner import SOURCE

pytestmark = pytest.mark.skipif(OLD_PYTHON, reason=NEEDS_PYTHON_311)

TEXT = pathlib.Path(contextlib.__file__).read_text(encoding="utf-8")[:200]
TOKENS = torch.tensor(list(TEXT.encode()))


@pytest.fixture
def written(tmp_path):
    """A function that writes a small model and returns what transformers loads: (model, tokenizer)."""
    import transformers

    from dsa_course.your_own_model.convert import write_checkpoint

    def write(model):
        write_checkpoint(model, tmp_path / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
        )
        return loaded.requires_grad_(False), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")

    return write


def apart(theirs, ours):
    """The largest difference of their logits from ours without FP8, and ours with as few keys as theirs."""
    return float((theirs(TOKENS[None]).logits[0] - ours(TOKENS)).abs().max())


def test_transformers_computes_our_trained_model(written):
    ours = load_small_model(index_fp8=False)
    theirs, _ = written(load_small_model())
    assert apart(theirs, ours) < 1e-4
    assert apart(theirs, load_small_model(index_fp8=False, index_topk=32)) > 0.1


@pytest.mark.parametrize(
    ("one", "other"), [("attention_norm", "mlp_norm"), ("gate_proj", "up_proj")], ids=["norms", "feed-forward"]
)
def test_a_weight_under_another_s_name_is_noticed(written, monkeypatch, one, other):
    """Of the same shape, so that nothing but the numbers can tell."""
    from dsa_course.your_own_model import convert

    swapped = dict(convert.NAMES)
    first, second = f"layers.{{}}.{one}.", f"layers.{{}}.{other}."
    swapped[first], swapped[second] = convert.NAMES[second], convert.NAMES[first]
    monkeypatch.setattr(convert, "NAMES", swapped)
    theirs, _ = written(load_small_model())
    assert apart(theirs, load_small_model(index_fp8=False)) > 0.1


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    from dsa_course.your_own_model import convert

    model = load_small_model()
    with pytest.raises(ValueError, match="config must be without YaRN, got rope_factor 40"):
        convert.write_checkpoint(load_small_model(rope_factor=40.0, max_seq_len=8192), tmp_path)
    model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="name must begin as one of embed., .*, got 'layers.0.extra.weight'"):
        convert.write_checkpoint(model, tmp_path)
    monkeypatch.setitem(convert.NAMES, "norm.", "model.last_norm.")
    with pytest.raises(ValueError, match="DeepseekV32ForCausalLM, got model.last_norm.weight, model.norm.weight"):
        convert.write_checkpoint(load_small_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_has_a_token_a_byte(written):
    _, tokenizer = written(load_small_model())
    text = "".join(map(chr, range(1000))) + "☃ 𝛼\r\n\t  end"
    given = tokenizer(text, return_offsets_mapping=True)
    assert given["input_ids"] == list(text.encode()) and tokenizer.decode(given["input_ids"]) == text
    assert set(given["input_ids"]) >= set(range(128))
    for token, (first, past) in zip(given["input_ids"], given["offset_mapping"], strict=True):
        assert past == first + 1 and token in text[first].encode()
    padded = tokenizer(["a", "abc"], padding=True)
    assert padded["input_ids"][0] == [255, 255, 97] and padded["attention_mask"][0] == [0, 0, 1]


@pytest.fixture
def recorded(written):
    """(model, its steps on TEXT), sparse."""
    from dsa_ref.integrations.transformers import make_sparse

    model = make_sparse(written(load_small_model())[0], ops=recording)
    with recording.steps() as steps:
        model(TOKENS[None])
    return model, steps


def test_what_is_recorded_is_what_the_layers_selected(recorded):
    model, steps = recorded
    ours = []
    load_small_model(index_fp8=False)(TOKENS, record=ours)
    assert len(steps) == len(ours) == 4
    for mine, other in zip(steps, ours, strict=True):
        same = mine["indices"].sort().values == other["indices"].sort().values
        assert same.float().mean() > 0.999  # near-ties
    model(TOKENS[None])
    assert len(steps) == 4  # closed
    with recording.steps() as outer, recording.steps() as inner:
        model(TOKENS[None, :70])
    assert len(outer) == len(inner) == 4 and [len(step["indices"]) for step in inner] == [70] * 4


def test_the_picture_of_tokens_that_are_no_bytes(recorded):
    """Three characters a token, one of two bytes, and one token that stands for nothing."""
    _, steps = recorded
    text = "é" + "x" * (3 * len(TEXT) - 4)
    spans = [(0, 0), *((3 * t, 3 * t + 3) for t in range(len(TEXT) - 1))]
    assert byte_places(text, spans)[:3] == [(0, 0), (0, 4), (4, 7)]
    figure = live_layers(text, spans, steps, 0.1, token=150, layer=2)
    chosen = steps[2]["indices"][150]
    assert torch.equal(figure.data["chosen"], chosen) and figure.data["before"] == int((chosen == 0).sum())
    assert "layer 2, token 150: 64 of 151 tokens selected" in figure.alt
    assert float(figure.data["weights"].sum()) > 0


def test_of_a_long_text_the_end_is_shown(recorded):
    _, steps = recorded
    text = "0123456789" * len(TEXT)
    spans = [(10 * t, 10 * t + 10) for t in range(len(TEXT))]
    first = len(TEXT) - SHOWN // 10
    figure = live_layers(text, spans, steps, 0.1, token=199, layer=0)
    before = int((steps[0]["indices"][199] < first).sum())
    assert 0 < before < 64 and figure.data["before"] == before and f", {before} of them before" in figure.alt
    assert figure._controls["token"].min == first


def test_steps_of_something_else_are_refused(recorded):
    _, steps = recorded
    spans = [(t, t + 1) for t in range(len(TEXT))]
    with pytest.raises(ValueError, match="got none: has the text more than index_topk tokens"):
        live_layers(TEXT, spans, [], 0.1, token=150, layer=0)
    with pytest.raises(ValueError, match="steps must be of one pass over all 199 tokens, got one of 200"):
        live_layers(TEXT[1:], spans[1:], steps, 0.1, token=150, layer=0)


def test_the_tests_that_the_page_names_are_there():
    page = next(SOURCE.glob("12b_*.ipynb")).read_text(encoding="utf-8")
    named = re.findall(r"\[`(test_\w+)`\]\((\S+?\.py)\)", page)
    assert len(named) >= 10
    for test, file in named:
        assert f"\ndef {test}(" in (SOURCE / file).read_text(encoding="utf-8"), test


def test_tensors_that_are_made():
    """New memory counts, once for each kind, whether real or of shapes alone; views and changes in place do not."""
    for device in ("cpu", "meta"):
        x = torch.ones(100, 10, device=device)

        def work(x=x):
            y = x[:50].T  # views
            x.add_(1)
            return (y @ x[:50]).half(), y @ x[:50]

        assert tensors_made(work) == [(400, (10, 10), torch.float32), (200, (10, 10), torch.float16)]
