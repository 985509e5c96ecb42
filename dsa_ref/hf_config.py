"""A Hugging Face `config.json` as the fields of a `DSAConfig`: the families of DeepSeek-V3.2 and GLM-5, nothing else.

Meanings, and the values of fields that the file lacks, are transformers'. A field that is null counts as lacking, but
for sizes and YaRN's `truncate`. What would change the attention and is not known here is refused by its name.

Source: SPEC section 9; transformers 5.23, models/deepseek_v32 and models/glm_moe_dsa.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping

CONFIG = "config.json"
FAMILIES = {  # what a file of this model_type need not say
    "deepseek_v32": {
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_hidden_layers": 61,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "max_position_embeddings": 163840,
    },
    "glm_moe_dsa": {
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "num_hidden_layers": 78,
        "q_lora_rank": 2048,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 2048,
        "max_position_embeddings": 202752,
    },
}
OURS = {"hidden_size": "dim", "num_attention_heads": "n_heads", "max_position_embeddings": "max_seq_len"}
INDEX_ROPE = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}

SHARING = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
YARN |= {"mscale_all_dim", "truncate"}
# These sound like attention and do not change it: transformers ignores them, or another part of the model reads them.
HARMLESS = {"head_dim", "topk_method", "topk_group", "norm_topk_prob", "mlp_bias", "output_attentions"}
HARMLESS |= {"index_share_for_mtp_iteration", "mlp_layer_types", "num_nextn_predict_layers", "attn_implementation"}
HARMLESS |= {"_attn_implementation"}
SOUNDS_LIKE_ATTENTION = re.compile(
    "attention|attn|rope|rotary|position|index|sliding|window|head|qk|lora|kv|mla|softcap|sink|alibi|mscale|topk|"
    "sparse|nope|proj|bias|softmax|causal|query|key_|compress"
)


def read_config(source: str | os.PathLike | Mapping) -> Mapping:
    """The fields of a config.json, of the directory that holds one, or of a mapping, as they are.

    Raises: FileNotFoundError without such a file, ValueError for one that is no JSON object, TypeError for no source.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path or a mapping of config.json's fields, got {type(source).__name__}")
    path = pathlib.Path(source)
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"source must be a {CONFIG} or a directory that holds one, got no file {path}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def hf_fields(source: str | os.PathLike | Mapping) -> dict:
    """What `DSAConfig.from_hf` passes to `DSAConfig`. Raises as it says."""
    everything = read_config(source)
    if strange := [name for name in everything if not isinstance(name, str)]:
        raise TypeError(f"source must have str for its names, got {strange[0]!r}")
    hf = {name: value for name, value in everything.items() if value is not None}
    null = everything.keys() - hf.keys()
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    sizes = {}
    for name, default in FAMILIES[family].items():
        if name in null:
            raise TypeError(f"{name} must be an int, got None")
        sizes[name] = _count(hf, name, default)
    _check_same(hf, sizes, family)
    fields = {OURS.get(name, name): size for name, size in sizes.items() if name != "num_hidden_layers"}
    fields |= _rope(hf, sizes["max_position_embeddings"])
    return fields | {
        "norm_eps": 1e-6,  # of the two norms inside attention, whatever rms_norm_eps says of those outside
        "index_rope": INDEX_ROPE[family],
        "index_pattern": _index_pattern(hf, family, sizes["num_hidden_layers"]),
    }


def _check_same(hf, sizes, family) -> None:
    """Refuse a known field with a value that we do not compute, and an unknown one that may concern attention."""
    only = {
        "attention_bias": False,
        "attention_dropout": 0,
        "num_key_value_heads": sizes["num_attention_heads"],
        "qk_head_dim": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"],
        "rope_interleave": True,
        "indexer_rope_interleave": INDEX_ROPE[family] == "interleaved",
        "partial_rotary_factor": 1,
        "use_sliding_window": False,
        "add_cross_attention": False,
        "pruned_heads": {},
    }
    for name, wanted in only.items():
        if hf.get(name, wanted) != wanted:
            raise ValueError(f"{name} must be {wanted} in a {family} model, got {hf[name]!r}")
    layer_types = hf.get("layer_types", [])
    known = ("indexed_attention", "deepseek_sparse_attention")  # two names of one thing
    if not isinstance(layer_types, (list, tuple)) or not all(kind in known for kind in layer_types):
        raise ValueError(f"layer_types must be indexed_attention in every layer, got {layer_types!r}")
    for name in sorted(hf.keys() - only.keys() - FAMILIES[family].keys() - {*ROPE, *SHARING} - HARMLESS):
        if SOUNDS_LIKE_ATTENTION.search(name):
            raise ValueError(f"{name} is not known, and may change the attention: it must be absent, got {hf[name]!r}")


def _rope(hf, max_positions):
    """rope_theta and YaRN's fields, from `rope_parameters` or the older `rope_scaling`."""
    given = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if name in hf and hf[name] != {}}
    for name, parameters in given.items():
        if not isinstance(parameters, Mapping):
            raise TypeError(f"{name} must be an object, got {parameters!r}")
    where = next(iter(given), "rope_parameters")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise ValueError(f"rope_parameters and rope_scaling must agree, got {' and '.join(map(repr, given.values()))}")
    # transformers takes a null truncate, and no other null, for something else than a lacking one: for false
    rope = {name: value for name, value in given.get(where, {}).items() if value is not None or name == "truncate"}
    for name in ("rope_theta", "original_max_position_embeddings"):  # older files have them beside the object
        if name in hf and rope.setdefault(name, hf[name]) != hf[name]:
            raise ValueError(f"{name} must be the same in {where} and beside it, got {rope[name]!r} and {hf[name]!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise ValueError(f"{where}.type must agree with rope_type = {kind!r}, got {rope['type']!r}")
    if kind not in ("default", "yarn"):
        raise ValueError(f"{where}.rope_type must be default or yarn, got {kind!r}")
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
    if unknown := sorted(rope.keys() - known - (YARN if kind == "yarn" else set())):
        raise ValueError(f"{where}.{unknown[0]} is not known where rope_type is {kind}, got {rope[unknown[0]]!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}.partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r}")
    fields = {"rope_theta": _number(rope, "rope_theta", 10000.0, where), "rope_factor": 1.0}
    if kind == "yarn":
        fields |= _yarn(rope, max_positions, where, fields["rope_theta"])
    return fields


def _yarn(rope, max_positions, where, theta):
    """YaRN's fields. transformers multiplies cos and sin by a factor, which must be 1 here."""
    factor = _number(rope, "factor", None, where)
    if factor < 1:
        raise ValueError(f"{where}.factor must be at least 1, got {factor}")
    numerator, mscale = (_number(rope, name, 0.0, where) for name in ("mscale", "mscale_all_dim"))
    fast, slow = _number(rope, "beta_fast", 32.0, where), _number(rope, "beta_slow", 1.0, where)
    if fast <= slow:
        raise ValueError(f"{where}.beta_fast must be above beta_slow = {slow}, got {fast}")
    if rope.get("truncate", True) is not True:
        raise ValueError(f"{where}.truncate must be true, got {rope['truncate']!r}")
    log = math.log(factor)
    both = numerator and mscale
    amplitude = (0.1 * numerator * log + 1) / (0.1 * mscale * log + 1) if both else 0.1 * log + 1
    amplitude = _number(rope, "attention_factor", amplitude, where)
    if amplitude != 1:
        raise ValueError(
            f"{where} must leave RoPE's cos and sin unscaled (mscale = mscale_all_dim, or attention_factor = 1), got "
            f"a factor of {amplitude:.6g} from mscale {numerator}, mscale_all_dim {mscale} and factor {factor}"
        )
    original = _count(rope, "original_max_position_embeddings", max_positions, f"{where}.")
    low, high = 2 * math.pi * slow, 2 * math.pi * fast * theta**2
    if not low <= original <= high:  # YaRN's ramp would begin behind its end, which transformers turns around
        raise ValueError(
            f"{where}.original_max_position_embeddings must be in [{low:.6g}, {high:.6g}] with these betas and "
            f"rope_theta, got {original}"
        )
    fields = {"rope_factor": factor, "original_seq_len": original, "mscale": mscale}
    fields |= {"beta_fast": fast, "beta_slow": slow}
    if max_positions <= original:  # the file names YaRN and not the length it stretches to
        fields["max_seq_len"] = max(original + 1, math.ceil(original * factor))
    return fields


def _index_pattern(hf, family, layers):
    """F for a layer with an indexer, S for one that shares a selection, or "" where no layer shares."""
    if "indexer_types" in hf:
        name, letters = "indexer_types", {"full": "F", "shared": "S"}
    elif "index_topk_pattern" in hf:
        name, letters = "index_topk_pattern", {"F": "F", "S": "S"}
        if not isinstance(hf[name], str):
            letters = {"full": "F", "shared": "S"}
    else:
        name, every = "index_topk_freq", _count(hf, "index_topk_freq", 1)
        offset = hf.get("index_skip_topk_offset", 2)
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise TypeError(f"index_skip_topk_offset must be an int, got {offset!r}")
        pattern = "".join("FS"[max(i - offset + 1, 0) % every > 0] for i in range(layers))
    if name != "index_topk_freq":
        kinds = list(letters)  # not the dict: what is looked up may be anything
        if not isinstance(hf[name], (str, list, tuple)) or not all(kind in kinds for kind in hf[name]):
            raise ValueError(f"{name} must consist of {' and '.join(letters)}, got {hf[name]!r}")
        pattern = "".join(letters[kind] for kind in hf[name])
        if len(pattern) < layers:
            raise ValueError(f"{name} must have an entry for each of {layers} layers, got {len(pattern)}")
    if "S" not in pattern:
        return ""
    if family == "deepseek_v32":
        raise ValueError(f"{name} must give every layer of a deepseek_v32 model an indexer, got {hf[name]!r}")
    if pattern[0] == "S":
        raise ValueError(f"{name} must give the first layer an indexer, got the pattern {pattern}")
    return pattern


def _count(fields, name, default, where=""):
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}{name} must be at least 1, got {value}")
    return value


def _number(fields, name, default, where):
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}.{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}.{name} must be finite and not negative, got {value}")
    return float(value)
