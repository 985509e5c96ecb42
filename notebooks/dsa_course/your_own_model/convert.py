"""The course's trained model as a directory that transformers loads, as somebody's own checkpoint would lie there.

`SmallModel` is DeepSeek-V3.2 in small, with dense feed-forwards, and its attention has Hugging Face's names already.
What is left to rename stands in NAMES. Its tokens are bytes, and so are the tokenizer's.
"""

import pathlib

import tokenizers
import transformers

from dsa_ref.nn.model import ModelConfig, SmallModel

NAMES = {  # beginning of a name in SmallModel -> in transformers; {} is the layer's number
    "embed.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "layers.{}.self_attn.": "model.layers.{}.self_attn.",
    "layers.{}.attention_norm.": "model.layers.{}.input_layernorm.",
    "layers.{}.mlp_norm.": "model.layers.{}.post_attention_layernorm.",
    "layers.{}.gate_proj.": "model.layers.{}.mlp.gate_proj.",
    "layers.{}.up_proj.": "model.layers.{}.mlp.up_proj.",
    "layers.{}.down_proj.": "model.layers.{}.mlp.down_proj.",
}


def write_checkpoint(model: SmallModel, directory) -> None:
    """Write config.json, weights and tokenizer into `directory`, which is made where it is missing.

    Raises: ValueError for weights that transformers' model does not have, or that it has and `model` has not; nothing
    is written then.
    """
    theirs = transformers.DeepseekV32ForCausalLM(their_config(model.config))
    weights = {their_name(name): weight for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    if other := sorted(weights.keys() ^ theirs.state_dict().keys()):
        raise ValueError(f"model must have just the weights of a {type(theirs).__name__}, got {', '.join(other)}")
    theirs.load_state_dict(weights)
    theirs.save_pretrained(pathlib.Path(directory))
    byte_tokenizer().save_pretrained(pathlib.Path(directory))


def their_config(config: ModelConfig) -> transformers.DeepseekV32Config:
    """The sizes under transformers' names. Raises: ValueError for YaRN, which this conversion does not write."""
    c = config.attention
    if c.yarn:
        raise ValueError(f"config must be without YaRN, got rope_factor {c.rope_factor}")
    same = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    same += ("index_n_heads", "index_head_dim", "index_topk")
    return transformers.DeepseekV32Config(
        **{name: getattr(c, name) for name in same},
        vocab_size=config.vocab_size,
        hidden_size=c.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        mlp_layer_types=["dense"] * config.n_layers,  # no experts
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=True,
        bos_token_id=None,  # it knows bytes only, and none of them ends a text
        eos_token_id=None,
    )


def their_name(name: str) -> str:
    """A weight's name in transformers. Raises: ValueError for one that NAMES does not know."""
    layer = name.split(".")[1] if name.startswith("layers.") else ""
    for ours, theirs in NAMES.items():
        if name.startswith(ours.format(layer)):
            return theirs.format(layer) + name.removeprefix(ours.format(layer))
    raise ValueError(f"name must begin as one of {', '.join(NAMES)}, got {name!r}")


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte of UTF-8, whose number is the byte's value. Padding is 255, which is no byte of any text."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 255)]  # GPT-2's way: a byte that leaves ink stands for
    rest = sorted(set(range(255)) - set(shown))  # itself, and the others for the characters from 256 on
    numbers = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=numbers | {"<pad>": 255}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")
