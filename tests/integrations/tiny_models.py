"""Tiny random models of transformers' own classes, and what a sparse one is compared with."""

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

FAMILIES = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM, {}),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {"indexer_types": ["full", "shared", "full"]}),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,  # fewer give exact ties at 0, which torch's topk breaks as it likes
    "index_head_dim": 16,
    "index_topk": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FEWER = {  # layers, for what takes long
    "deepseek_v32": {"num_hidden_layers": 1, "first_k_dense_replace": 1},
    "glm_moe_dsa": {"num_hidden_layers": 2, "first_k_dense_replace": 2, "indexer_types": ["full", "shared"]},
}
T = 40


def tiny(family, implementation="eager", seed=0, **fields):
    """A model without gradients, in eval mode."""
    Config, Model, more = FAMILIES[family]
    torch.manual_seed(seed)
    config = Config(**(SIZES | more | fields))
    config._attn_implementation = implementation
    return Model(config).eval().requires_grad_(False)


def tokens(B=2, length=T, seed=1):
    return torch.randint(1, SIZES["vocab_size"], (B, length), generator=torch.Generator().manual_seed(seed))


def assert_same(got, wanted, where=None):
    """Logits [B, S, V] equal to 1e-5 of the largest, at the tokens where `where` [B, S] holds."""
    where = torch.ones_like(got[..., 0], dtype=torch.bool) if where is None else where.bool()
    got, wanted = got[where], wanted[where]
    assert got.isfinite().all()
    difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert difference < 1e-5, f"differs by {difference:.2g} of the largest logit"
