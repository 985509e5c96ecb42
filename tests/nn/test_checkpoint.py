"""Checkpoints: exact round trips, FP8 blocks against plain loops, the file format, lazy reading, and every refusal."""

import json
import re
import types

import pytest
import safetensors
import torch
from inputs import E4M3, assert_same_bits, normal
from safetensors.torch import load_file, save_file

import dsa_ref
from dsa_ref import TINY, DSAConfig, DSALayer, load_layer
from dsa_ref.nn import save_checkpoint
from dsa_ref.nn.block_scales import dequantize_blocks, quantize_blocks

INDEX = "model.safetensors.index.json"
RAGGED = DSAConfig(  # blocks end short in rows (176 = 160 + 16, 136), in columns (136, 160, 144), and in both
    dim=256,
    n_heads=9,
    q_lora_rank=136,
    kv_lora_rank=160,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=4,
    rope_factor=40.0,
    max_seq_len=8192,
)
FP8_NAMES = (
    "q_a_proj.weight",
    "q_b_proj.weight",
    "kv_a_proj_with_mqa.weight",
    "kv_b_proj.weight",
    "o_proj.weight",
    "indexer.wq_b.weight",
    "indexer.wk.weight",
)
BF16_NAMES = ("q_a_layernorm.weight", "kv_a_layernorm.weight", "indexer.weights_proj.weight")
FP32_NAMES = ("indexer.k_norm.weight", "indexer.k_norm.bias")
ALL_NAMES = {*FP8_NAMES, *BF16_NAMES, *FP32_NAMES}


def full(index, name):
    return f"model.layers.{index}.self_attn.{name}"


def make_layer(config=TINY, dtype=torch.bfloat16, seed=0):
    """A layer with no two parameters alike, in the dtypes a loaded one has."""
    layer = DSALayer(config)
    for n, (name, parameter) in enumerate(layer.named_parameters()):
        kept = torch.float32 if name in FP32_NAMES else dtype
        parameter.data = normal(*parameter.shape, seed=100 * seed + n).mul(0.1).to(kept)
    return layer


def state_dict(*layers, start=0):
    return {full(i, name): x for i, layer in enumerate(layers, start) for name, x in layer.state_dict().items()}


def assert_same_layer(got, wanted):
    wanted = wanted.state_dict()
    assert got.state_dict().keys() == wanted.keys() == ALL_NAMES
    for name, tensor in got.state_dict().items():
        assert_same_bits(tensor, wanted[name])


def loop_dequantize(weight, scale_inv):
    """One product in fp32 for each element, block by block of at most 128×128."""
    out = torch.full(weight.shape, torch.nan)
    for top in range(0, weight.shape[0], 128):
        for left in range(0, weight.shape[1], 128):
            block = weight[top : top + 128, left : left + 128].float()
            out[top : top + 128, left : left + 128] = block * scale_inv[top // 128, left // 128]
    return out


def read_all(directory):
    """Every tensor of a checkpoint by way of its index, which must name exactly what the shards hold."""
    index = json.loads((directory / INDEX).read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(directory / file)
        assert all(index["weight_map"][name] == file for name in shard) and not tensors.keys() & shard.keys()
        tensors |= shard
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
def test_unquantized_round_trip_changes_no_bit_and_no_output(tmp_path, config, dtype):
    layer = make_layer(config, dtype)
    save_checkpoint(tmp_path, {3: layer}, fp8=False)
    loaded = load_layer(tmp_path, 3, config, dtype=dtype)
    assert_same_layer(loaded, layer)
    x, positions = normal(12, config.dim, dtype=dtype), torch.arange(12)
    with torch.no_grad():
        out, wanted = loaded(x, positions), layer(x, positions)
    assert wanted.isfinite().all() and wanted.abs().max() > 0
    assert_same_bits(out, wanted)


def test_all_four_sources_give_the_same_layer(tmp_path):
    layers = make_layer(seed=1), make_layer(seed=2)
    weights = state_dict(*layers, start=7)
    (tmp_path / "single").mkdir()
    save_file(weights, tmp_path / "single/model.safetensors")
    save_checkpoint(tmp_path / "sharded", dict(enumerate(layers, 7)), fp8=False, max_shard_bytes=1000)
    sources = weights, tmp_path / "single", str(tmp_path / "single/model.safetensors"), tmp_path / "sharded"
    for source in sources:
        assert_same_layer(load_layer(source, 7, TINY), layers[0])
        assert_same_layer(load_layer(source, 8, TINY), layers[1])


@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
def test_fp8_round_trip(tmp_path, config):
    layer = make_layer(config)
    save_checkpoint(tmp_path, {0: layer})
    stored, loaded = read_all(tmp_path), load_layer(tmp_path, 0, config, dtype=torch.float32)
    for name, original in layer.state_dict().items():
        got = loaded.state_dict()[name]
        if name not in FP8_NAMES:
            assert_same_bits(got, original.float())
            continue
        weight, scale_inv = stored[full(0, name)], stored[full(0, name) + "_scale_inv"]
        assert_same_bits(got, loop_dequantize(weight, scale_inv))
        # e4m3 keeps four significant bits (half a step is 2^-4), and steps of 2^-9 below its normal range
        ones = torch.full(original.shape, 1.0, dtype=E4M3)
        bound = torch.maximum(original.float().abs() * 2**-4, loop_dequantize(ones, scale_inv) * 2**-10)
        error = (got - original.float()).abs()
        assert (error <= bound * (1 + 1e-6)).all() and error.max() > 0
    rounded = load_layer(tmp_path, 0, config)  # bf16 is the fp32 product, rounded once
    for name, tensor in loaded.state_dict().items():
        assert_same_bits(rounded.state_dict()[name], tensor if name in FP32_NAMES else tensor.bfloat16())


def test_the_scale_is_a_multiplier():
    weights = state_dict(make_layer(RAGGED))
    name = full(0, "kv_a_proj_with_mqa.weight")
    weights[name] = torch.full((176, 256), 2.0, dtype=E4M3)
    weights[name + "_scale_inv"] = torch.tensor([[0.5, 4.0], [0.25, 1.0]])
    got = load_layer(weights, 0, RAGGED).kv_a_proj_with_mqa.weight
    corners = got[[0, 0, 127, 128, 175, 175], [0, 128, 127, 127, 127, 255]]
    assert corners.tolist() == [1.0, 8.0, 1.0, 0.5, 0.5, 2.0]


@pytest.mark.parametrize("shape", [(576, 300), (128, 128), (1, 129), (257, 1)], ids=str)
def test_dequantize_blocks_is_the_loops(shape):
    weight = normal(*shape).to(E4M3)
    blocks = [-(-n // 128) for n in shape]
    scale_inv = normal(*blocks, seed=1).abs() + 0.1
    assert_same_bits(dequantize_blocks(weight, scale_inv), loop_dequantize(weight, scale_inv))


def test_quantize_blocks_scales_each_block_by_its_own_maximum(poisoned):
    weight = normal(300, 200, dtype=torch.bfloat16)
    weight[:128, :128] *= 1000
    weight[128:256, 128:] = 0
    weight[256:, :128] = 1e-40  # below the normal range of bf16 and fp32
    w8, scale_inv = quantize_blocks(weight)
    assert w8.dtype == E4M3 and w8.shape == weight.shape
    assert scale_inv.dtype == torch.float32 and scale_inv.shape == (3, 2)
    assert scale_inv.isfinite().all() and (scale_inv > 0).all()
    for b, rows in enumerate(weight.float().split(128)):
        for c, block in enumerate(rows.split(128, dim=1)):
            values = w8[128 * b : 128 * b + 128, 128 * c : 128 * c + 128].float()
            amax = block.abs().max()
            if amax < 1e-30:
                assert (values * scale_inv[b, c] - block).abs().max() <= 2**-4 * amax and values.isfinite().all()
                continue
            assert scale_inv[b, c] == amax / 448
            assert values.abs().max() == 448 and torch.equal(values.sign(), values.sign() * block.abs().gt(0))
    assert torch.equal(dequantize_blocks(w8, scale_inv)[128:256, 128:], torch.zeros(128, 72))


def test_the_file_has_the_format_of_v32(tmp_path):
    layers = {2: make_layer(RAGGED, seed=2), 0: make_layer(RAGGED)}
    save_checkpoint(tmp_path, layers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model-00001-of-00001.safetensors", INDEX]
    stored = read_all(tmp_path)
    scales = {name + "_scale_inv" for name in FP8_NAMES}
    assert stored.keys() == {full(i, name) for i in layers for name in ALL_NAMES | scales}
    for i, layer in layers.items():
        for name, parameter in layer.state_dict().items():
            wanted = E4M3 if name in FP8_NAMES else torch.float32 if name in FP32_NAMES else torch.bfloat16
            assert (stored[full(i, name)].dtype, stored[full(i, name)].shape) == (wanted, parameter.shape)
    scale_inv = stored[full(0, "kv_a_proj_with_mqa.weight_scale_inv")]
    assert (scale_inv.dtype, scale_inv.shape) == (torch.float32, (2, 2))
    assert stored[full(0, "kv_b_proj.weight_scale_inv")].shape == (3, 2)  # [9 · 32, 160]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index.keys() == {"metadata", "weight_map"}
    assert index["metadata"] == {"total_size": sum(x.numel() * x.element_size() for x in stored.values())}
    with safetensors.safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_shards_keep_to_their_bound_and_cut_through_layers(tmp_path):
    layers, bound = {0: make_layer(seed=1), 1: make_layer(seed=2)}, 9000
    save_checkpoint(tmp_path, layers, fp8=False, max_shard_bytes=bound)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    count = len(set(weight_map.values()))
    files = {f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    assert count > 4 and set(weight_map.values()) == files
    assert {file.name for file in tmp_path.iterdir()} == files | {INDEX}
    for file in files:
        sizes = [x.nbytes for x in load_file(tmp_path / file).values()]
        assert sum(sizes) <= bound or len(sizes) == 1
    per_layer = [{weight_map[full(i, name)] for name in ALL_NAMES} for i in layers]
    assert all(len(shards) > 1 for shards in per_layer) and per_layer[0] & per_layer[1]
    for i, layer in layers.items():
        assert_same_layer(load_layer(tmp_path, i, TINY), layer)


@pytest.mark.parametrize("harm", ["delete", "corrupt"])
def test_shards_of_other_layers_are_never_opened(tmp_path, harm):
    layers = {0: make_layer(seed=1), 1: make_layer(seed=2)}
    save_checkpoint(tmp_path, layers, fp8=False, max_shard_bytes=1)  # a shard for each tensor
    for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        if name.startswith(full(0, "")):
            (tmp_path / file).unlink() if harm == "delete" else (tmp_path / file).write_bytes(b"junk")
    assert_same_layer(load_layer(tmp_path, 1, TINY), layers[1])
    error, words = (FileNotFoundError, "does not exist") if harm == "delete" else (ValueError, "must be a safetensors")
    with pytest.raises(error, match=rf"model-000\d\d-of-00024.safetensors {words}"):
        load_layer(tmp_path, 0, TINY)


def test_only_the_tensors_of_the_layer_are_read(tmp_path, monkeypatch):
    read, safe_open = [], safetensors.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    layers = make_layer(seed=1), *(make_layer(seed=2) for _ in range(10))  # layer 1's name begins that of layer 10
    save_file(state_dict(*layers), tmp_path / "model.safetensors")
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    load_layer(tmp_path, 1, TINY)
    assert sorted(read) == sorted(full(1, name) for name in ALL_NAMES)


def test_the_state_dict_is_neither_changed_nor_shared():
    weights = state_dict(make_layer())
    before = {name: tensor.clone() for name, tensor in weights.items()}
    layer = load_layer(weights, 0, TINY)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    assert weights.keys() == before.keys()
    for name, tensor in weights.items():
        assert_same_bits(tensor, before[name])


def test_a_loaded_layer_is_whole():
    ops = types.SimpleNamespace(**vars(dsa_ref))
    layer = load_layer(state_dict(make_layer(RAGGED)), 0, RAGGED, ops=ops)
    assert layer.ops is ops and layer.config is RAGGED
    assert_same_bits(layer.freqs, DSALayer(RAGGED).freqs)  # YaRN's, in fp32
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())
    assert {name for name, x in layer.state_dict().items() if x.dtype == torch.float32} == set(FP32_NAMES)


def without(name):
    return lambda weights: weights.pop(full(0, name))


def replaced(name, tensor):
    return lambda weights: weights.update({full(0, name): tensor})


Q_A = "q_a_proj.weight"
BAD_TENSORS = {
    "missing": (without("o_proj.weight"), ValueError, "none named {p}o_proj.weight$"),
    "no such layer": (lambda weights: weights.clear(), ValueError, "layer 0, got none named {p}.*q_a_proj.*q_b_proj"),
    "shape": (replaced(Q_A, torch.ones(32, 63)), ValueError, r"{p}q_a_proj.weight must.* \[32, 64\].* got \[32, 63\]"),
    "rank": (replaced("indexer.k_norm.bias", torch.ones(16, 1)), ValueError, r"{p}indexer.k_norm.bias must.*\[16, 1\]"),
    "dtype": (replaced(Q_A, torch.ones(32, 64, dtype=torch.int8)), TypeError, "{p}q_a_proj.weight must.*got int8"),
    "no tensor": (replaced(Q_A, [1.0]), TypeError, "{p}q_a_proj.weight must be a torch.Tensor, got list"),
    "no scale": (without(Q_A + "_scale_inv"), ValueError, "{p}q_a_proj.weight is FP8.*{p}q_a_proj.weight_scale_inv"),
    "scale shape": (
        replaced(Q_A + "_scale_inv", torch.ones(1, 2)),
        ValueError,
        r"{p}q_a_proj.weight_scale_inv must have shape \[1, 1\].*got \[1, 2\]",
    ),
    "scale dtype": (
        replaced(Q_A + "_scale_inv", torch.ones(1, 1, dtype=torch.float16)),
        TypeError,
        "{p}q_a_proj.weight_scale_inv must have dtype float32, bfloat16, float8_e8m0fnu, got float16",
    ),
    "scale, no FP8": (replaced(Q_A, torch.ones(32, 64)), ValueError, "unknown ones: {p}q_a_proj.weight_scale_inv$"),
    "unknown": (replaced("q_proj.weight", torch.ones(1)), ValueError, "unknown ones: {p}q_proj.weight$"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(fault):
    spoil, error, message = BAD_TENSORS[fault]
    weights = state_dict(make_layer())
    weights[full(0, Q_A)] = weights[full(0, Q_A)].to(E4M3)
    weights[full(0, Q_A) + "_scale_inv"] = torch.ones(1, 1)
    load_layer(weights, 0, TINY)
    spoil(weights)
    with pytest.raises(error, match=message.replace("{p}", re.escape(full(0, "")))):
        load_layer(weights, 0, TINY)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_layer(tmp_path / "nothing.safetensors", 0, TINY)
    with pytest.raises(FileNotFoundError, match="model.safetensors .*model.safetensors.index.json"):
        load_layer(tmp_path, 0, TINY)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_layer(tmp_path / "nowhere", 0, TINY)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} must be JSON with a weight_map"):
        load_layer(tmp_path, 0, TINY)


def test_an_index_that_lies_is_refused(tmp_path):
    save_checkpoint(tmp_path, {0: make_layer()}, fp8=False, max_shard_bytes=1)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][full(0, Q_A)] = index["weight_map"][full(0, "o_proj.weight")]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"none named {re.escape(full(0, Q_A))}$"):
        load_layer(tmp_path, 0, TINY)
    (tmp_path / INDEX).rename(tmp_path / "elsewhere")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "elsewhere").rename(tmp_path / INDEX)
    with pytest.raises(ValueError, match="got both"):
        load_layer(tmp_path, 0, TINY)


def test_bad_arguments_are_refused(tmp_path):
    weights, layer = state_dict(make_layer()), make_layer()
    with pytest.raises(ValueError, match="layer_index must be at least 0, got -1"):
        load_layer(weights, -1, TINY)
    for index in (True, "0", 0.0):
        with pytest.raises(TypeError, match="layer_index must be an int"):
            load_layer(weights, index, TINY)
    for dtype in (E4M3, torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match="dtype must be one of"):
            load_layer(weights, 0, TINY, dtype=dtype)
    with pytest.raises(TypeError, match="path_or_state_dict must be a path or a mapping, got list"):
        load_layer([], 0, TINY)
    with pytest.raises(ValueError, match="layers must have at least one entry"):
        save_checkpoint(tmp_path, {})
    with pytest.raises(TypeError, match="layers must be a dict {index: DSALayer}, got list"):
        save_checkpoint(tmp_path, [layer])
    with pytest.raises(TypeError, match=r"layers\[0\] must be a DSALayer, got Linear"):
        save_checkpoint(tmp_path, {0: layer.o_proj})
    with pytest.raises(TypeError, match="layer_index must be an int, got '0'"):
        save_checkpoint(tmp_path, {"0": layer})
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        save_checkpoint(tmp_path, {0: layer}, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_never_written_over(tmp_path):
    save_checkpoint(tmp_path, {0: make_layer()})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="must not hold a checkpoint already"):
        save_checkpoint(tmp_path, {0: make_layer(seed=1)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_bad_blocks_are_refused():
    weight, scale_inv = normal(130, 10).to(E4M3), torch.ones(2, 1)
    dequantize_blocks(weight, scale_inv)
    for bad in (torch.ones(1, 1), torch.ones(1, 2), torch.ones(130, 10)):
        with pytest.raises(ValueError, match=r"weight_scale_inv must have shape \[2, 1\]"):
            dequantize_blocks(weight, bad)
    with pytest.raises(ValueError, match="weight_scale_inv must have shape"):
        dequantize_blocks(weight, torch.ones(2))
    with pytest.raises(TypeError, match="weight must have dtype float8_e4m3fn, got float32"):
        dequantize_blocks(weight.float(), scale_inv)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weight must be finite"):
            quantize_blocks(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="weight must have shape"):
        quantize_blocks(torch.ones(3))
    with pytest.raises(TypeError, match="weight must have dtype"):
        quantize_blocks(torch.ones(3, 3, dtype=torch.int32))
