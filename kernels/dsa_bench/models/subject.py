"""The model that is measured, and its four ways to attend.

`V32` has V3.2's attention, YaRN and dense MLP, but 4 layers, 8 experts and a small vocabulary; `SMALL` is for a CPU.
Weights are random, of a scale that keeps numbers near 1.
"""

import types

import torch
import transformers

from dsa_ref.integrations.transformers import make_sparse, undo_sparse

V32 = {
    "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
SMALL = V32 | {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "index_n_heads": 8, "index_head_dim": 32, "index_topk": 128,
    "intermediate_size": 512, "moe_intermediate_size": 128, "vocab_size": 512,
}  # fmt: skip
DENSE_LAYERS = 1
DENSE, SPARSE = ("eager", "sdpa"), ("ours", "ours_fp8")  # ours: index_fp8=False; ours_fp8: index_fp8=True
IMPLEMENTATIONS = DENSE + SPARSE


@torch.no_grad()
def random_model(sizes: dict, device: str, dtype: torch.dtype, seed: int = 0) -> transformers.PreTrainedModel:
    """A DeepseekV32ForCausalLM of these sizes, made on the device, one dense layer and the rest MoE."""
    experts = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": DENSE_LAYERS}
    config = transformers.DeepseekV32Config(**experts, **sizes)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # norms are ones
            width = 1 if "embed_tokens" in name else weight.shape[-1]
            weight.normal_(0.0, width**-0.5, generator=generator)
    return model


def use(model: transformers.PreTrainedModel, implementation: str, ops: types.ModuleType) -> None:
    """Let the model attend so from now on: one of IMPLEMENTATIONS; ops: whose steps ours takes."""
    if model.config._attn_implementation == "dsa":
        undo_sparse(model)
    if implementation in DENSE:
        model.set_attn_implementation(implementation)
    else:
        make_sparse(model, ops, index_fp8=implementation == "ours_fp8")


def random_tokens(model: transformers.PreTrainedModel, B: int, T: int, seed: int = 1) -> torch.Tensor:
    """int64 [B, T] on the model's device."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), device=model.device, generator=generator)
