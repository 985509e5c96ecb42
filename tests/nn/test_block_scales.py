"""FP8 scales of other checkpoints: read where name and quantization_config say what they mean, else refused by name."""

import json
import re

import pytest
import torch
from inputs import E4M3, assert_same_bits, normal
from safetensors.torch import save_file

from dsa_ref import TINY, DSALayer, load_layer
from dsa_ref.nn.block_scales import dequantize_blocks

E8M0 = torch.float8_e8m0fnu
NAME = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
CONFIG = {
    "model_type": "deepseek_v32",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 4096,
}


def compressed(strategy, **weights):
    """A quantization_config as compressed-tensors writes it."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }


def save(directory, quantization, **scales):
    """A checkpoint in which one matrix, [40, 64], is FP8: all its numbers are 2."""
    weights = {f"model.layers.0.self_attn.{name}": x for name, x in DSALayer(TINY).state_dict().items()}
    weights[NAME] = torch.full((40, 64), 2.0, dtype=E4M3)
    weights |= {f"{NAME}_{suffix}": scale.clone() for suffix, scale in scales.items()}
    save_file(weights, directory / "model.safetensors")
    fields = CONFIG if quantization is None else CONFIG | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(fields))


def load(directory):
    return load_layer(directory, 0, dtype=torch.float32).kv_a_proj_with_mqa.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E8M0], ids=str)
def test_scales_in_three_dtypes_with_short_last_blocks(dtype):
    """576 rows are four blocks and a half, as in V3.2's kv_a_proj_with_mqa."""
    weight = normal(576, 300).to(E4M3)
    scale = (2.0 ** torch.arange(-7, 8).reshape(5, 3)).to(dtype)
    assert scale.float()[4, 2] == 128 and scale.float()[0, 0] == 2**-7
    wanted = weight.float()
    for r in range(5):
        for c in range(3):
            wanted[128 * r : 128 * r + 128, 128 * c : 128 * c + 128] *= 2.0 ** (3 * r + c - 7)
    assert_same_bits(dequantize_blocks(weight, scale), wanted)


def test_other_blocks():
    weight, scale = torch.full((5, 7), 2.0, dtype=E4M3), torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    got = dequantize_blocks(weight, scale, block=(3, 4))
    assert got[[0, 2, 2, 3, 4, 4], [3, 3, 4, 3, 3, 6]].tolist() == [2, 2, 4, 8, 8, 16]
    with pytest.raises(ValueError, match=r"weight_scale_inv must have shape \[2, 2\], one scale for each 3×4 block"):
        dequantize_blocks(weight, scale.T[:1], block=(3, 4))


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_scales_that_are_no_scales(bad):
    with pytest.raises(ValueError, match="weight_scale_inv must be finite and not negative"):
        dequantize_blocks(torch.ones(2, 2, dtype=E4M3), torch.tensor([[bad]]))


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}
ROWS = torch.arange(1, 41).float()
READ = {
    "no config": (None, {"scale_inv": torch.full((1, 1), 0.5)}, 1.0),
    "fp8": (FP8 | {"weight_block_size": [128, 128]}, {"scale_inv": torch.full((1, 1), 0.5)}, 1.0),
    "fp8, E8M0": (FP8, {"scale_inv": torch.full((1, 1), 0.5).to(E8M0)}, 1.0),
    "fp8, other blocks": (
        FP8 | {"weight_block_size": [32, 64]},
        {"scale_inv": torch.tensor([[0.5], [4.0]])},
        torch.tensor([1.0] * 32 + [8.0] * 8)[:, None],
    ),
    "fp8, one number": (FP8 | {"weight_block_size": None}, {"scale_inv": torch.tensor(0.5)}, 1.0),
    "compressed, one number": (compressed("tensor"), {"scale": torch.tensor([0.5])}, 1.0),
    "compressed, a column": (compressed("channel"), {"scale": ROWS[:, None].bfloat16()}, 2 * ROWS[:, None]),
    "compressed, 1-D": (compressed("channel"), {"scale": ROWS}, 2 * ROWS[:, None]),
    "compressed, blocks": (
        compressed("block", block_structure=[128, 128]),
        {"scale": torch.full((1, 1), 3.0, dtype=torch.bfloat16)},
        6.0,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_scales_whose_meaning_is_certain(tmp_path, case):
    quantization, scales, wanted = READ[case]
    save(tmp_path, quantization, **scales)
    assert_same_bits(load(tmp_path).detach(), torch.as_tensor(wanted).expand(40, 64).contiguous())


ONE = torch.full((1, 1), 0.5)
REFUSED = {
    "multiplier or divisor?": (None, {"scale": ONE}, "{n}_scale_inv, got {n}_scale, whose meaning is not known"),
    "a number for each row": (None, {"scale_inv": ROWS}, "{n}_scale_inv must have shape"),
    "a column for each row": (None, {"scale_inv": ROWS[:, None]}, r"{n}_scale_inv must have shape \[1, 1\]"),
    "a number alone": (None, {"scale_inv": torch.tensor(0.5)}, "{n}_scale_inv must have shape"),
    "fp8 with the other name": (FP8, {"scale": ONE}, "{n}_scale_inv, got {n}_scale, .* not known by fp8"),
    "both names": (FP8, {"scale": ONE, "scale_inv": ONE}, "unknown ones: {n}_scale$"),
    "an activation's scale": (FP8, {"input": ONE, "scale_inv": ONE}, "unknown ones: {n}_input$"),
    "compressed with V3.2's name": (
        compressed("block", block_structure=[128, 128]),
        {"scale_inv": ONE},
        "{n}_scale, got",
    ),
    "fp8, rows": (FP8, {"scale_inv": ROWS}, "{n}_scale_inv must have shape"),
    "e5m2": (FP8 | {"fmt": "e5m2"}, {"scale_inv": ONE}, "fmt must be e4m3, got 'e5m2'"),
    "a block of one size": (
        FP8 | {"weight_block_size": [128]},
        {"scale_inv": ONE},
        "weight_block_size must be two",
    ),
    "another method": (
        {"quant_method": "modelopt"},
        {"scale": ONE},
        "quant_method must be .* for {n}, got 'modelopt'",
    ),
    "packed": (
        compressed("tensor") | {"format": "pack-quantized"},
        {"scale": ONE},
        "format must be float-quantized",
    ),
    "4 bits": (compressed("tensor", num_bits=4), {"scale": ONE}, "weights.num_bits must be 8, got 4"),
    "a zero point": (compressed("tensor", symmetric=False), {"scale": ONE}, "weights.symmetric must be True"),
    "groups": (
        compressed("group"),
        {"scale": ONE},
        "weights.strategy must be tensor, channel or block, got 'group'",
    ),
    "no groups": (compressed("tensor") | {"config_groups": {}}, {"scale": ONE}, "config_groups must describe"),
    "two schemes": (
        compressed("tensor") | {"config_groups": {"a": {"weights": {"strategy": "tensor"}}, "b": {"weights": {}}}},
        {"scale": ONE},
        "config_groups must hold one scheme",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_scales_whose_meaning_is_not_certain_are_refused(tmp_path, fault):
    quantization, scales, message = REFUSED[fault]
    save(tmp_path, quantization, **scales)
    with pytest.raises(ValueError, match=message.replace("{n}", re.escape(NAME))):
        load(tmp_path)


def test_a_method_is_asked_for_only_where_a_matrix_is_fp8(tmp_path):
    """Of a model whose experts alone are quantised, attention is read as it is."""
    save(tmp_path, {"quant_method": "mxfp4"})
    weights = {f"model.layers.0.self_attn.{name}": x for name, x in DSALayer(TINY).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_bits(load(tmp_path).detach(), weights[NAME])
