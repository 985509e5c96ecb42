"""Checkpoints of other people: a config.json beside them, layers that share a selection, other names."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from inputs import assert_close, assert_same_bits, normal
from safetensors.torch import save_file

from dsa_ref import TINY, DSAConfig, DSALayer, LayerCache, hadamard_loops, load_layer, quantize_loops, rope_loops
from dsa_ref.nn import ModelConfig, SmallModel, save_checkpoint

TINY_JSON = {
    "model_type": "glm_moe_dsa",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "index_topk_pattern": "FSF",
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}


def make_layers():
    config = DSAConfig.from_hf(TINY_JSON)
    layers = {i: DSALayer(config, indexer=config.has_indexer(i)).requires_grad_(False) for i in range(3)}
    for i, layer in layers.items():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 * i + n) * 0.3)
    return layers


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with three layers, of which the middle one shares the first one's selection."""
    save_checkpoint(tmp_path, make_layers(), fp8=False)
    (tmp_path / "config.json").write_text(json.dumps(TINY_JSON))
    return tmp_path


def test_a_directory_tells_its_own_config(checkpoint):
    x, positions, steps = normal(30, 64), torch.arange(30), []
    for i, layer in make_layers().items():
        loaded = load_layer(checkpoint, i, dtype=torch.float32)
        assert loaded.config == DSAConfig.from_hf(checkpoint) and loaded.config.index_rope == "interleaved"
        assert (loaded.indexer is None) == (i == 1)
        indices = steps[0]["indices"] if i == 1 else None
        wanted = layer(x, positions, record=steps, indices=indices)
        with torch.no_grad():
            assert_same_bits(loaded(x, positions, indices=indices), wanted)


def test_the_config_of_one_file_is_the_one_beside_it(checkpoint):
    (file,) = checkpoint.glob("*.safetensors")
    assert load_layer(file, 0).config == DSAConfig.from_hf(checkpoint)
    with pytest.raises(
        ValueError, match="config.index_rope must be 'interleaved', as .*config.json has it, got 'half'"
    ):
        load_layer(file, 0, dataclasses.replace(DSAConfig.from_hf(checkpoint), index_rope="half"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("index_rope", "half"),
        ("index_pattern", ""),
        ("rope_theta", 1e4),
        ("rope_factor", 40.0),  # YaRN, since max_seq_len exceeds original_seq_len
        ("index_topk", 16),
        ("norm_eps", 1e-5),
        ("dim", 128),
    ],
)
def test_a_config_that_disagrees_with_the_file_is_refused_by_field(checkpoint, field, value):
    config = dataclasses.replace(DSAConfig.from_hf(checkpoint), **{field: value})
    named = "yarn" if field == "rope_factor" else field
    with pytest.raises(ValueError, match=rf"config\.{named} must be .* as .*config.json has it, got"):
        load_layer(checkpoint, 0, config)


def test_what_the_file_does_not_say_may_be_chosen(checkpoint):
    config = dataclasses.replace(DSAConfig.from_hf(checkpoint), index_fp8=False, max_seq_len=100, mscale=0.5)
    assert load_layer(checkpoint, 0, config).config is config


def test_v32s_config_with_glms_weights_is_refused(checkpoint):
    """The case that names and shapes cannot tell: all sizes agree, and the indexer's RoPE does not."""
    config = dataclasses.replace(TINY, rope_theta=1e6)
    with pytest.raises(ValueError, match="config.index_rope"):
        load_layer(checkpoint, 0, dataclasses.replace(config, index_pattern="FSF"))


def test_a_config_must_come_from_somewhere(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config must be given where there is no config.json"):
        load_layer(checkpoint, 0)
    with pytest.raises(ValueError, match="config must be given with a state dict"):
        load_layer({}, 0)
    with pytest.raises(TypeError, match="config must be a DSAConfig or None, got dict"):
        load_layer({}, 0, TINY_JSON)
    (checkpoint / "config.json").write_text(json.dumps(TINY_JSON | {"model_type": "deepseek_v3"}))
    with pytest.raises(ValueError, match="model_type must be"):
        load_layer(checkpoint, 0, DSAConfig.from_hf(TINY_JSON))


def test_indexers_where_the_pattern_has_none_and_the_other_way_round(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(TINY_JSON | {"index_topk_pattern": "FFF"}))
    with pytest.raises(ValueError, match=r"none named .*layers.1.self_attn.indexer.* has S in config.index_pattern"):
        load_layer(checkpoint, 1)
    (checkpoint / "config.json").write_text(json.dumps(TINY_JSON | {"index_topk_pattern": "FSS"}))
    with pytest.raises(ValueError, match=r"unknown ones: model.layers.2.self_attn.indexer"):
        load_layer(checkpoint, 2)
    with pytest.raises(ValueError, match=r"layer_index must be in \[0, 3\), the layers of index_pattern, got 3"):
        load_layer(checkpoint, 3)


def state_dict(prefix, i=0):
    return {f"{prefix}layers.{i}.self_attn.{name}": x for name, x in make_layers()[i].state_dict().items()}


def test_names_with_and_without_the_model_before_them(tmp_path):
    config, wanted = DSAConfig.from_hf(TINY_JSON), make_layers()[0].state_dict()
    save_file(state_dict(""), tmp_path / "model.safetensors")
    for source in (state_dict("model."), state_dict(""), tmp_path, state_dict("model.") | {"lm_head.weight": 0}):
        for name, tensor in load_layer(source, 0, config, dtype=torch.float32).state_dict().items():
            assert_same_bits(tensor, wanted[name])
    with pytest.raises(ValueError, match="must name layer 0 once, got both"):
        load_layer(state_dict("") | state_dict("model."), 0, config)
    with pytest.raises(ValueError, match=r"must name tensors model.layers.0.* got text.model.layers.0"):
        load_layer(state_dict("text.model."), 0, config)
    with pytest.raises(TypeError, match="names of the state dict must be str, got 7"):
        load_layer(state_dict("model.") | {7: torch.ones(1)}, 0, config)


def test_other_arrangements_of_the_weights_are_refused():
    """Fused, split and transposed projections of other engines."""
    config, weights = DSAConfig.from_hf(TINY_JSON), state_dict("model.")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    with pytest.raises(ValueError, match=r"kv_b_proj.weight must have shape \[128, 32\] .* got \[32, 128\]"):
        load_layer(weights | {name: weights[name].T}, 0, config)
    split = {
        name.replace("kv_b", part): half for part, half in zip(("k_b", "v_b"), weights[name].chunk(2), strict=True)
    }
    with pytest.raises(ValueError, match="none named model.layers.0.self_attn.kv_b_proj.weight"):
        load_layer(split | {other: x for other, x in weights.items() if other != name}, 0, config)
    with pytest.raises(ValueError, match="unknown ones: .*q_a_proj.bias"):
        load_layer(weights | {"model.layers.0.self_attn.q_a_proj.bias": torch.ones(32)}, 0, config)


def test_weights_proj_in_fp32_stays_in_fp32():
    """transformers keeps it so, and the product is in fp32 anyway. The values here need more than bf16's 8 bits."""
    config, weights = DSAConfig.from_hf(TINY_JSON), state_dict("model.")
    name = "model.layers.0.self_attn.indexer.weights_proj.weight"
    loaded = load_layer(weights, 0, config)
    assert_same_bits(loaded.indexer.weights_proj.weight, weights[name])
    assert loaded.indexer.wk.weight.dtype == torch.bfloat16
    narrow = load_layer(weights | {name: weights[name].bfloat16()}, 0, config)
    assert_same_bits(narrow.indexer.weights_proj.weight, weights[name].bfloat16())
    x = normal(20, 64, dtype=torch.bfloat16)
    assert loaded(x, torch.arange(20)).isfinite().all()


@pytest.mark.rungs("reference", "kernels")
def test_fp8_after_the_interleaved_layout(ops, device):
    """The index keys are RoPE, rotation and FP8 in float64 loops, and both rungs' layers agree."""
    layer = make_layers()[0]
    assert layer.config.index_fp8 and layer.config.index_rope == "interleaved"
    x, positions, record = normal(30, 64, device=device), torch.arange(30, device=device), []
    run = DSALayer(layer.config, ops).requires_grad_(False)
    run.load_state_dict(layer.state_dict())
    out = run.to(device)(x, positions, record=record)
    k = layer.indexer.k_norm(layer.indexer.wk(x.cpu()))[:, None].double().numpy()
    turned = rope_loops(k, np.arange(30), layer.freqs.numpy(), "interleaved")
    values, scale = quantize_loops(hadamard_loops(turned[:, 0]))
    assert torch.equal(record[0]["k_scale"].cpu().double(), torch.from_numpy(scale))
    differing = record[0]["k_idx"].cpu().double() != torch.from_numpy(values)
    assert differing.float().mean() < 0.01  # fp32 against fp64, at a rounding boundary
    assert_close(out.cpu(), layer(x.cpu(), positions.cpu()), 1e-4)


def test_a_layer_says_which_indices_it_needs():
    full, sharing, _ = make_layers().values()
    x, positions, steps = normal(12, 64), torch.arange(12), []
    full(x, positions, record=steps)
    indices = steps[0]["indices"]
    out = sharing(x, positions, indices=indices, record=steps)
    assert out.shape == (12, 64) and steps[1]["indices"] is indices
    assert not {"q_idx", "k_idx", "w", "k_scale"} & steps[1].keys()
    sharing(x, positions, attention="dense")
    with pytest.raises(ValueError, match="indices must be given to a layer without an indexer"):
        sharing(x, positions)
    with pytest.raises(ValueError, match="indices must be None in a layer that has an indexer of its own"):
        full(x, positions, indices=indices)
    with pytest.raises(ValueError, match="indices must be None in a layer that attends to every key"):
        sharing(x, positions, attention="dense", indices=indices)
    with pytest.raises(ValueError, match=r"indices must have shape \[T, k\] with T = 12"):
        sharing(x, positions, indices=indices[:11])
    with pytest.raises(TypeError, match="indices must have dtype int32"):
        sharing(x, positions, indices=indices.long())
    for layer in (full, sharing):
        with pytest.raises((TypeError, ValueError), match="indices must be .* got list"):
            layer(x, positions, indices=[[0]])
    for wrong in (None, "no", 0):
        with pytest.raises(TypeError, match="indexer must be a bool"):
            DSALayer(TINY, indexer=wrong)
        with pytest.raises(TypeError, match="indexer must be a bool"):
            LayerCache(TINY, 4, indexer=wrong)
    future = indices.clone()
    future[4, 0] = 5
    with pytest.raises(ValueError, match="indices must hold keys that each row may see, or -1, got 5 in row 4"):
        sharing(x, positions, indices=future)
    other = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])  # row 4 begins a second sequence
    with pytest.raises(ValueError, match="got 0 in row 4"):
        sharing(x, other, indices=indices)


def test_caches_with_and_without_index_keys():
    full, sharing, _ = make_layers().values()
    x, positions, steps = normal(12, 64), torch.arange(12), []
    caches = [LayerCache(full.config, 12), LayerCache(full.config, 12, indexer=False)]
    assert caches[1].k_idx is None and caches[1].k_scale is None
    full(x, positions, caches[0], record=steps)
    out = sharing(x, positions, caches[1], indices=steps[0]["indices"])
    assert_same_bits(out, sharing(x, positions, indices=steps[0]["indices"]))
    assert caches[1].length == 12
    fresh = [LayerCache(full.config, 12, indexer=indexer) for indexer in (False, True)]
    with pytest.raises(ValueError, match="cache must be made with indexer=True"):
        full(x, positions, fresh[0])
    with pytest.raises(ValueError, match="cache must be made with indexer=False"):
        sharing(x, positions, fresh[1], indices=steps[0]["indices"])
    assert [cache.length for cache in fresh] == [0, 0]


def test_the_small_model_has_an_indexer_in_every_layer():
    config = dataclasses.replace(TINY, index_pattern="FS")
    with pytest.raises(ValueError, match="config.attention.index_pattern must be empty"):
        SmallModel(ModelConfig(n_layers=2, attention=config))
