"""A Hugging Face config.json as a DSAConfig: what is read from it, and what is refused."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

from dsa_ref import TINY, V32, DSAConfig, rope_frequencies
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model
from dsa_ref.nn.model import SMALL_MODEL, save_small_model

V32_JSON = {  # the fields of DeepSeek-V3.2-Exp's own file that concern attention, and a few that do not
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
}
GLM_JSON = {  # a GLM-5.2 kind of file: shared selections, a long context without YaRN
    "attention_bias": False,
    "head_dim": 192,
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 3,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_topk_pattern": None,
    "indexer_rope_interleave": True,
    "kv_lora_rank": 512,
    "max_position_embeddings": 1048576,
    "model_type": "glm_moe_dsa",
    "num_attention_heads": 64,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "rope_scaling": None,
    "v_head_dim": 256,
}
GLM = DSAConfig(
    dim=6144,
    n_heads=64,
    q_lora_rank=2048,
    qk_nope_head_dim=192,
    v_head_dim=256,
    index_n_heads=32,
    rope_theta=8e6,
    max_seq_len=1048576,
    index_rope="interleaved",
    index_pattern="FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS",
)


def test_both_families():
    assert DSAConfig.from_hf(V32_JSON) == V32
    assert DSAConfig.from_hf(GLM_JSON) == GLM and not GLM.yarn
    assert GLM.softmax_scale == 256**-0.5
    assert rope_frequencies(GLM)[1] == pytest.approx(8e6 ** (-2 / 64), rel=1e-6)


@pytest.mark.parametrize("Config", [DeepseekV32Config, GlmMoeDsaConfig])
def test_what_a_file_lacks_is_what_transformers_takes(Config):
    whole, bare = Config().to_dict(), {"model_type": Config.model_type}
    assert DSAConfig.from_hf(bare) == DSAConfig.from_hf(whole)
    assert not DSAConfig.from_hf(bare).yarn  # a context beyond 4096 is not a wish for YaRN


def test_a_file_a_directory_and_a_mapping(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM_JSON))
    sources = GLM_JSON, tmp_path, str(tmp_path), tmp_path / "config.json"
    assert {DSAConfig.from_hf(source) for source in sources} == {GLM}


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({}, ""),
        ({"indexer_types": ["full"] * 4}, ""),
        ({"indexer_types": ["full", "shared", "shared", "full"]}, "FSSF"),
        ({"index_topk_pattern": "FSSF"}, "FSSF"),
        ({"index_topk_pattern": ["full", "shared", "full", "shared"]}, "FSFS"),
        ({"index_topk_freq": 2}, "FFSF"),  # the offset of a file without one is 2
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, "FSSF"),
        ({"index_topk_freq": 3, "index_skip_topk_offset": None}, "FFSS"),
        ({"index_topk_freq": None}, ""),
        ({"index_topk_freq": 2, "index_topk_pattern": "FFFF"}, ""),  # the pattern goes first
        ({"indexer_types": ["full", "full", "full", "shared"], "index_topk_pattern": "FSSS"}, "FFFS"),
    ],
)
def test_layers_that_share_as_transformers_reads_them(fields, pattern):
    got = DSAConfig.from_hf({"model_type": "glm_moe_dsa", "num_hidden_layers": 4} | fields)
    assert got.index_pattern == pattern
    present = {name: value for name, value in fields.items() if value is not None}
    theirs = GlmMoeDsaConfig(num_hidden_layers=4, **present).indexer_types
    assert [got.has_indexer(i) for i in range(4)] == [kind == "full" for kind in theirs]


def yarn(**fields):
    return {"rope_scaling": V32_JSON["rope_scaling"] | fields}


REFUSED = {
    "another model": (
        {"model_type": "deepseek_v3"},
        ValueError,
        "model_type must be .*deepseek_v32, glm.* 'deepseek_v3'",
    ),
    "no model_type": ({"model_type": None}, ValueError, "model_type must be .* got None"),
    "a list of model_types": ({"model_type": ["deepseek_v32"]}, ValueError, "model_type must be one of"),
    "a name that is no text": ({3: 4}, TypeError, "source must have str for its names, got 3"),
    "biases": ({"attention_bias": True}, ValueError, "attention_bias must be False"),
    "dropout": ({"attention_dropout": 0.1}, ValueError, "attention_dropout must be 0"),
    "grouped heads": ({"num_key_value_heads": 8}, ValueError, "num_key_value_heads must be 128 .* got 8"),
    "head width": ({"qk_head_dim": 256}, ValueError, "qk_head_dim must be 192 .* got 256"),
    "MLA's layout": ({"rope_interleave": False}, ValueError, "rope_interleave must be True"),
    "the indexer's layout": ({"indexer_rope_interleave": True}, ValueError, "indexer_rope_interleave must be False"),
    "half a head": ({"partial_rotary_factor": 0.5}, ValueError, "partial_rotary_factor must be 1"),
    "a softmax scale": ({"softmax_scale": 0.5}, ValueError, "softmax_scale is not known"),
    "no causal mask": ({"is_causal": False}, ValueError, "is_causal is not known"),
    "scaled queries": ({"query_scale": 2.0}, ValueError, "query_scale is not known"),
    "scaled keys": ({"key_multiplier": 2.0}, ValueError, "key_multiplier is not known"),
    "compressed keys": ({"compress_ratios": [4]}, ValueError, "compress_ratios is not known"),
    "a sliding window": ({"sliding_window": 4096}, ValueError, "sliding_window is not known"),
    "kinds of layers": ({"layer_types": ["full_attention"]}, ValueError, "layer_types must be indexed_attention"),
    "pooled keys": ({"index_kpool": 4}, ValueError, "index_kpool is not known"),
    "no RoPE": ({"mla_use_nope": True}, ValueError, "mla_use_nope is not known"),
    "linear attention": ({"linear_attn_config": {}}, ValueError, "linear_attn_config is not known"),
    "norms of heads": ({"use_qk_norm": False}, ValueError, "use_qk_norm is not known"),
    "sharing in V3.2": ({"index_topk_freq": 4}, ValueError, "index_topk_freq must give every layer"),
    "a null size": ({"index_topk": None}, TypeError, "index_topk must be an int, got None"),
    "no query latent": ({"q_lora_rank": None}, TypeError, "q_lora_rank must be an int, got None"),
    "a size as text": ({"hidden_size": "7168"}, TypeError, "hidden_size must be an int, got '7168'"),
    "a size as float": ({"max_position_embeddings": 4e3}, TypeError, "max_position_embeddings must be an int"),
    "no heads": ({"num_attention_heads": 0}, ValueError, "num_attention_heads must be at least 1"),
    "another RoPE": (yarn(type="linear"), ValueError, "rope_scaling.rope_type must be default or yarn, got 'linear'"),
    "two types": (yarn(rope_type="default"), ValueError, "rope_scaling.type must agree with rope_type = 'default'"),
    "no RoPE object": ({"rope_scaling": False}, TypeError, "rope_scaling must be an object, got False"),
    "no object": ({"rope_scaling": "yarn"}, TypeError, "rope_scaling must be an object, got 'yarn'"),
    "two objects": (
        {"rope_parameters": {"rope_theta": 1e6}},
        ValueError,
        "rope_parameters and rope_scaling must agree",
    ),
    "two thetas": (yarn(rope_theta=1e6), ValueError, "rope_theta must be the same .* 1000000.0 and 10000"),
    "theta as text": ({"rope_theta": "1e4"}, TypeError, "rope_scaling.rope_theta must be a number, got '1e4'"),
    "factor below 1": (yarn(factor=0.5), ValueError, "rope_scaling.factor must be at least 1"),
    "no factor": (yarn(factor=None), TypeError, "rope_scaling.factor must be a number, got None"),
    "NaN": (yarn(factor=float("nan")), ValueError, "rope_scaling.factor must be finite"),
    "no truncation": (yarn(truncate=False), ValueError, "rope_scaling.truncate must be true"),
    "a truncation of null, false in transformers": (yarn(truncate=None), ValueError, "truncate must be true, got None"),
    "betas": (yarn(beta_fast=1, beta_slow=32), ValueError, "rope_scaling.beta_fast must be above beta_slow"),
    "original length": (yarn(original_max_position_embeddings=0.5), TypeError, "original_max_position_embeddings must"),
    "an original length of a few tokens": (
        yarn(original_max_position_embeddings=4),
        ValueError,
        r"original_max_position_embeddings must be in \[6.28319, 2.01062e\+10\] .* got 4",
    ),
    "an endless original length": (
        yarn(rope_theta=10.0, original_max_position_embeddings=40960) | {"rope_theta": None},
        ValueError,
        r"original_max_position_embeddings must be in \[6.28319, 20106.2\] .* got 40960",
    ),
    "no turns": (
        yarn(rope_theta=1.0, original_max_position_embeddings=64) | {"rope_theta": None},
        ValueError,
        "rope_theta",
    ),
    "two mscales": (yarn(mscale=0.707), ValueError, "rope_scaling must leave .* factor of 0.921"),
    "no mscale_all_dim": (yarn(mscale_all_dim=None), ValueError, "rope_scaling must leave .* factor of 1.36"),
    "scaled cos and sin": (yarn(attention_factor=1.2), ValueError, "rope_scaling must leave .* factor of 1.2 "),
    "unknown in YaRN": (yarn(long_factor=[1.0]), ValueError, "rope_scaling.long_factor is not known"),
    "YaRN's, without it": ({"rope_scaling": {"factor": 40}}, ValueError, "rope_scaling.factor is not known .* default"),
}


YARN_FIELDS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale")
YARN_FIELDS += ("mscale_all_dim", "truncate", "partial_rotary_factor", "rope_theta", "rope_type", "type")


@pytest.mark.parametrize("where", ("rope_parameters", "rope_scaling"))
@pytest.mark.parametrize("null", YARN_FIELDS)
def test_a_null_is_read_as_transformers_reads_it_or_refused(null, where):
    """Where transformers fails, null may count as lacking."""
    parameters = V32_JSON["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": 1.0}
    fields = {name: value for name, value in V32_JSON.items() if name not in ("rope_scaling", "rope_theta")}
    fields[where] = parameters | {null: None}
    try:
        ours = DSAConfig.from_hf(fields)
    except (TypeError, ValueError) as error:
        assert null in str(error) and null in ("factor", "truncate")
        return
    try:
        theirs = DeepseekV32RotaryEmbedding(DeepseekV32Config.from_dict(copy.deepcopy(fields)))
    except (TypeError, KeyError, StrictDataclassError):
        return
    assert theirs.attention_scaling == 1
    torch.testing.assert_close(rope_frequencies(ours), theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_known_is_refused_by_name(fault):
    fields, error, message = REFUSED[fault]
    with pytest.raises(error, match=message):
        DSAConfig.from_hf(V32_JSON | fields)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"indexer_types": ["full", "sharde"]}, ValueError, "indexer_types must consist of full and shared"),
        ({"indexer_types": "full"}, ValueError, "indexer_types must consist of"),
        ({"indexer_types": [["full"]] * 78}, ValueError, "indexer_types must consist of"),
        ({"indexer_types": []}, ValueError, "indexer_types must have an entry for each of 78 layers, got 0"),
        ({"indexer_types": ["shared"] * 78}, ValueError, "indexer_types must give the first layer an indexer"),
        (
            {"indexer_types": ["full"] * 77},
            ValueError,
            "indexer_types must have an entry for each of 78 layers, got 77",
        ),
        ({"index_topk_pattern": "FXF"}, ValueError, "index_topk_pattern must consist of F and S"),
        ({"index_topk_pattern": ["F", "S"] * 39}, ValueError, "index_topk_pattern must consist of full and shared"),
        ({"index_topk_pattern": 4}, ValueError, "index_topk_pattern must consist of"),
        ({"index_topk_freq": 0}, ValueError, "index_topk_freq must be at least 1"),
        ({"index_topk_freq": 2.0}, TypeError, "index_topk_freq must be an int"),
        ({"index_skip_topk_offset": "3"}, TypeError, "index_skip_topk_offset must be an int"),
        ({"index_skip_topk_offset": 0}, ValueError, "index_topk_freq must give the first layer an indexer"),
        ({"indexer_rope_interleave": False}, ValueError, "indexer_rope_interleave must be True in a glm_moe_dsa"),
    ],
)
def test_sharing_that_is_not_clear_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        DSAConfig.from_hf(GLM_JSON | fields)


def test_files_that_are_not_there_or_no_json(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="config.json or a directory that holds one, got no file"):
        DSAConfig.from_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="zai-org/GLM-5"):
        DSAConfig.from_hf("zai-org/GLM-5")
    for text, message in (
        ("{", "must be JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("\udcff", "must be JSON"),
    ):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=message):
            DSAConfig.from_hf(tmp_path)
    for source in (None, 3, DeepseekV32Config()):
        with pytest.raises(TypeError, match="source must be a path or a mapping"):
            DSAConfig.from_hf(source)


def test_a_length_alone_turns_no_yarn_on(tmp_path):
    """Neither for a new config, nor for a small model trained without it, in whose file V3.2's factor stands."""
    assert not DSAConfig(max_seq_len=202752).yarn
    assert DSAConfig(max_seq_len=202752, rope_factor=40.0).yarn
    before = dataclasses.replace(TINY, rope_factor=40.0)
    save_small_model(SmallModel(ModelConfig(n_layers=1, attention=before)), tmp_path / "b")
    for path in (SMALL_MODEL, tmp_path / "b"):
        plain = load_small_model(path).config.attention
        longer = load_small_model(path, max_seq_len=16384).config.attention
        assert not plain.yarn and not longer.yarn
        assert torch.equal(rope_frequencies(longer), rope_frequencies(plain))
        assert load_small_model(path, max_seq_len=16384, rope_factor=4.0).config.attention.yarn
    assert plain.rope_factor == 40.0
    save_small_model(
        SmallModel(ModelConfig(n_layers=1, attention=dataclasses.replace(TINY, max_seq_len=8192))), tmp_path / "a"
    )
    assert load_small_model(tmp_path / "a", max_seq_len=16384).config.attention.rope_factor == 40.0  # it had YaRN


def test_configs_of_before_still_load():
    """Their fields, as JSON or pickled, did not include the indexer's layout and the pattern."""
    fields = dataclasses.asdict(V32)
    del fields["index_rope"], fields["index_pattern"]
    assert DSAConfig(**json.loads(json.dumps(fields))) == V32
    old = pickle.loads(pickle.dumps(V32))
    for name in ("index_rope", "index_pattern"):
        del old.__dict__[name]
    assert pickle.loads(pickle.dumps(old)) == V32 and old.yarn
