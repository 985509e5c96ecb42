"""The small GPT: causal, the same with and without caches, whole or packed, saved and loaded; and it learns."""

import dataclasses

import pytest
import torch
from inputs import assert_close, packed

import dsa_ref
from dsa_ref import TINY
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model
from dsa_ref.nn.model import save_small_model

RUNGS = pytest.mark.rungs("reference", "kernels")


def make_model(ops=dsa_ref, device="cpu", **attention):
    """Two layers on TINY; fp64 on the reference, so that no selection hangs on the order of a sum."""
    torch.manual_seed(0)
    config = ModelConfig(n_layers=2, hidden_dim=96, attention=dataclasses.replace(TINY, **attention))
    model = SmallModel(config, ops).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    return model.to(device=device, dtype=torch.float64 if ops is dsa_ref else torch.float32)


def text(count, device="cpu", seed=0):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


@RUNGS
def test_cached_equals_uncached(ops, device):
    """Three times as many tokens as k = 8, so that the selection matters; one by one after a prompt of 18."""
    model, tokens = make_model(ops, device), text(24, device)
    whole = model(tokens)
    assert whole.shape == (24, 256) and whole.dtype == torch.float32
    caches = model.new_caches(24)
    parts = [model(tokens[:18], caches=caches)] + [model(tokens[t : t + 1], caches=caches) for t in range(18, 24)]
    assert [cache.length for cache in caches] == [24, 24]
    assert_close(torch.cat(parts), whole, 1e-4)
    assert (model(tokens, attention="dense") - whole)[8:].abs().max() > 1e-2


@pytest.mark.rungs("kernels")
def test_equals_the_reference(ops, device):
    tokens = text(24, device)
    assert_close(make_model(ops, device)(tokens), make_model(dsa_ref, device).float()(tokens), 1e-4)


def test_causal(device):
    model, tokens = make_model(device=device), text(30, device)
    before = model(tokens)
    tokens[17] = (tokens[17] + 1) % 256
    after = model(tokens)
    assert torch.equal(before[:17], after[:17]) and (before[17:] != after[17:]).any(dim=1).all()


def test_packed_equals_separate(device):
    model, tokens = make_model(device=device), text(30, device)
    whole = model(tokens, packed(11, 19, device=device)[2])
    assert_close(whole, torch.cat((model(tokens[:11]), model(tokens[11:]))), 1e-6)


def test_record_has_one_step_a_layer(device):
    record = []
    make_model(device=device)(text(12, device), record=record)
    assert [step["indices"].shape for step in record] == [(12, 8)] * 2
    assert not torch.equal(record[0]["kv"], record[1]["kv"])


def test_save_and_load(device, tmp_path):
    """bf16 on disk: the loaded model is the rounded one, and DSAConfig fields may be replaced on loading."""
    model, tokens = make_model().float(), text(30)
    save_small_model(model, tmp_path / "model.safetensors")
    loaded = load_small_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config and not any(p.requires_grad for p in loaded.parameters())
    rounded = model.bfloat16().float()
    assert torch.equal(loaded(tokens), rounded(tokens))
    wider = load_small_model(tmp_path / "model.safetensors", index_topk=30)
    assert_close(wider(tokens), rounded(tokens, attention="dense"), 1e-5)
    with pytest.raises(TypeError, match="no_such_field"):
        load_small_model(tmp_path / "model.safetensors", no_such_field=1)
    with pytest.raises(FileNotFoundError):
        load_small_model(tmp_path / "absent.safetensors")


def test_learns(device):
    """Two sequences by heart in 60 steps: the loss falls from ln 256 to almost nothing, and the indexer stays put."""
    torch.manual_seed(0)
    config = ModelConfig(n_layers=1, hidden_dim=96, attention=TINY)
    model = SmallModel(config).to(device)
    index_weights = [p.clone() for p in model.layers[0].self_attn.indexer.parameters()]
    tokens, positions = text(48, device), packed(24, 24, device=device)[2]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        logits = model(tokens, positions)[:-1]
        keep = positions[1:] > 0
        loss = torch.nn.functional.cross_entropy(logits[keep], tokens[1:][keep])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.545, abs=0.3) and losses[-1] < 0.1
    assert all(
        torch.equal(a, b) for a, b in zip(index_weights, model.layers[0].self_attn.indexer.parameters(), strict=True)
    )


def test_bad_input(device):
    model = make_model(device=device)
    with pytest.raises(ValueError, match="tokens must"):
        model(text(10, device)[None])
    with pytest.raises(TypeError, match="tokens must"):
        model(text(10, device).int())
    with pytest.raises(ValueError, match="positions must"):
        model(text(10, device), torch.arange(1, 11, device=device))
