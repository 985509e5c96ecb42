"""`python -m dsa_ref.integrations.transformers`: what it says of whole and of broken directories, and how it ends."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny
from transformers import DeepseekV32ForCausalLM

from dsa_ref.integrations.transformers import report as reporting
from dsa_ref.integrations.transformers.__main__ import main
from dsa_ref.integrations.transformers.files import read_header, read_weights, runs, scale_suffix, their_config
from dsa_ref.integrations.transformers.machine import Machine
from dsa_ref.nn.block_scales import quantize_blocks

ROOT = pathlib.Path(__file__).parents[2]
KV_B, WQ_B = "self_attn.kv_b_proj.weight", "self_attn.indexer.wq_b.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NOWHERE = Machine("2.13.0", "5.23.0", None, False, None, None, None, 0, 1 << 30)
CARD = Machine("2.13.0", "5.23.0", "3.7.1", True, None, "a card", (9, 0), 1, 1 << 30)


def save(directory, family="deepseek_v32", dtype=torch.bfloat16, shards=False, **fields):
    """A tiny random model's directory."""
    model = tiny(family, **{"mlp_layer_types": ["dense", "sparse", "sparse"]} | fields).to(dtype)
    model.save_pretrained(directory, max_shard_size="100KB" if shards else "1GB")
    return directory


def change(directory, **fields):
    """Write other fields into config.json; ... takes one out."""
    file = directory / "config.json"
    changed = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


def rewrite(directory, change_tensors):
    """Load the single file's tensors, change the dict, write them again."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change_tensors(tensors)
    save_file(tensors, file, {"format": "pt"})


def weights(directory, keeps_fp8=False):
    fields = json.loads((directory / "config.json").read_text())
    return read_weights(directory, their_config(fields), scale_suffix(fields), keeps_fp8)


def text_of(directory, machine):
    """The report without its lines."""
    return " ".join(reporting.report(directory, machine=machine)[0].split())


def status(*arguments):
    """The exit status of the command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_directory(family, tmp_path, capsys):
    directory = save(tmp_path / "model", family)
    capsys.readouterr()  # transformers shows progress
    main([str(directory)])
    said, errors = capsys.readouterr()
    indexers = {"deepseek_v32": "3: each with an indexer", "glm_moe_dsa": "3: 2 with an indexer, 1 that share"}
    for text in (
        family, indexers[family], "4 heads of 16 + 8, values of 16", "16 heads of 16, selects k = 8 keys",
        "4,096 tokens", "whole ", "BF16", "make_sparse(model", "1 sequence of 4,096 tokens, in bfloat16",
        "longest that fits",
    ):  # fmt: skip
        assert text in said
    assert "wrong" not in said and not errors
    assert max(len(line) for line in said.splitlines() if str(directory) not in line) <= 80


def test_tokens_and_batch_are_counted(tmp_path, capsys):
    directory = save(tmp_path)
    main([str(directory), "--tokens", "1000", "--batch", "3"])
    said = capsys.readouterr().out
    cache = 3 * 1000 * 3 * (32 + 8 + 16) * 2  # sequences, tokens, layers, numbers of a token and layer, bf16
    main([str(directory), "--tokens", "5000"])
    assert "1 sequence of 5,000 tokens, past the model's 4,096" in capsys.readouterr().out
    assert "3 sequences of 1,000 tokens, in" in said and f"{cache / 1024:,.1f} KiB" in said
    assert status(directory, "--tokens", "0") == 2
    assert "argument --tokens: must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_weights_are_those_of_the_loaded_model(family, dtype, tmp_path):
    save(tmp_path, family, dtype)
    model = FAMILIES[family][1].from_pretrained(tmp_path)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    found = weights(tmp_path)
    assert found.memory == held and found.dtype == dtype
    file = tmp_path / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(found.by_dtype.values()) == file.stat().st_size - header - 8


def test_tied_embeddings_are_held_once(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    found = weights(tmp_path)
    model = DeepseekV32ForCausalLM.from_pretrained(tmp_path)
    assert found.wrong == [] and found.memory == sum(t.nbytes for t in {*model.parameters(), *model.buffers()}) - (
        model.model.rotary_emb.inv_freq.nbytes + model.model.rotary_emb.original_inv_freq.nbytes  # in no file
    )


def test_the_dtype_is_the_configs_else_the_files(tmp_path):
    save(tmp_path)
    whole = weights(tmp_path).memory
    change(tmp_path, dtype=...)
    assert weights(tmp_path).dtype == torch.bfloat16 and weights(tmp_path).memory == whole
    change(tmp_path, dtype="float32")
    assert weights(tmp_path).dtype == torch.float32
    assert whole < weights(tmp_path).memory < 2 * whole  # some of it is in fp32 anyway


def test_shards(tmp_path):
    save(tmp_path / "one")
    save(tmp_path / "many", shards=True)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert weights(tmp_path / "one") == weights(tmp_path / "many")


def test_faults_of_shards_are_named_and_counted(tmp_path, capsys):
    save(tmp_path, shards=True)
    shards = sorted(tmp_path.glob("*.safetensors"))
    lost = len(read_header(shards[0]))
    size = shards[1].stat().st_size
    shards[0].unlink()
    with shards[1].open("r+b") as file:
        file.truncate(size - 10)
    shards[2].write_bytes(b"\xff" * 100)
    found = weights(tmp_path).wrong
    assert f"missing: file {shards[0].name}, which has {lost} tensors" in found
    assert f"{shards[1].name} must have {size} bytes, as its header says, got {size - 10}" in found
    assert any(text.startswith(f"{shards[2].name} must be a safetensors file: its header has") for text in found)
    assert len(found) == 3  # what lies in them is not missing besides
    assert status(tmp_path) == f"python -m {reporting.__package__}: wrong: 3 faults in the files, listed above"
    said = capsys.readouterr().out
    assert shards[0].name in said and "whole " not in said


@pytest.mark.parametrize(
    "header", (b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}')
)
def test_damaged_headers(header, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"x\.safetensors must be a safetensors file: its header is damaged"):
        read_header(file)


def test_missing_tensors_wrong_shapes_and_strangers(tmp_path):
    def damage(tensors):
        for i in (0, 1):
            del tensors[f"model.layers.{i}.{WQ_B}"]
        tensors[f"model.layers.2.{KV_B}"] = torch.zeros(5, 32)
        del tensors["lm_head.weight"], tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
        tensors["model.stranger"] = torch.zeros(3)

    rewrite(save(tmp_path), damage)
    found = weights(tmp_path)
    assert sorted(found.wrong) == [
        "missing: lm_head.weight",
        "missing: mlp.experts.*.up_proj.weight of layer 2",
        f"missing: {WQ_B} of layer 0-1",
        f"{KV_B} of layer 2 must have shape [128, 32] (from config.json), got [5, 32]",
    ]
    assert found.ignored == ["model.stranger"]


def test_layers_that_share_need_no_indexer_and_others_do(tmp_path):
    save(tmp_path, "glm_moe_dsa")
    assert weights(tmp_path).wrong == []
    change(tmp_path, indexer_types=["full"] * 3)
    assert f"missing: {WQ_B} of layer 1" in weights(tmp_path).wrong
    change(tmp_path, indexer_types=["full", "shared", "shared"])
    assert weights(tmp_path).wrong == [] and f"{WQ_B} of layer 2" in weights(tmp_path).ignored


def test_what_the_index_places_in_a_file_that_lacks_it(tmp_path):
    save(tmp_path, shards=True)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    places = names["weight_map"]
    own = places[f"model.layers.1.{KV_B}"]
    other = next(file for file in places.values() if file != own)
    places[f"model.layers.1.{KV_B}"] = other
    index.write_text(json.dumps(names))
    assert weights(tmp_path).wrong == [f"missing: {KV_B} of layer 1, which the index places in {other}"]


def test_layers_past_the_last_are_counted_and_not_held(tmp_path):
    save(tmp_path)
    whole = weights(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"model.layers.3.{KV_B}": torch.zeros(128, 32)}))
    found = weights(tmp_path)
    assert found.beyond == {3: 128 * 32 * 4} and found.memory == whole.memory and found.wrong == found.ignored == []
    text, faults = reporting.report(tmp_path)
    assert faults == 0 and "layer 3, past the model's 3 (multi-token prediction): 16.0 KiB" in text


def test_a_model_saved_without_its_head(tmp_path):
    save(tmp_path)
    DeepseekV32ForCausalLM.from_pretrained(tmp_path).model.save_pretrained(tmp_path / "base")
    assert weights(tmp_path / "base").wrong == ["missing: lm_head.weight"]


def narrow(tensors):
    """Every matrix of a layer in FP8, as V3.2's files have it."""
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and ".layers." in name and "weights_proj" not in name and "gate.weight" not in name:
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(tensor)


def test_fp8_weights(tmp_path):
    plain = weights(save(tmp_path)).memory
    rewrite(tmp_path, narrow)
    bare = weights(tmp_path)
    assert "self_attn.kv_b_proj.weight of layer 0-2 is FP8 and must come with a quantization_config in config.json" in (
        bare.wrong
    )
    change(tmp_path, quantization_config=FP8)
    found = weights(tmp_path)
    assert found.wrong == found.ignored == [] and found.memory == plain  # bf16 is made of it
    kept = weights(tmp_path, keeps_fp8=True)
    assert kept.memory == sum(kept.by_dtype.values()) + 2 * 4 * 2 < 0.8 * plain  # two routers' biases become fp32
    rewrite(tmp_path, lambda tensors: tensors.pop(f"model.layers.1.{KV_B}_scale_inv"))
    assert weights(tmp_path).wrong == [f"{KV_B} of layer 1 is FP8 and must come with a _scale_inv beside it"]


def test_what_quantisation_means_is_said(tmp_path):
    rewrite(save(tmp_path), narrow)
    change(tmp_path, quantization_config=FP8)
    here = text_of(tmp_path, NOWHERE)
    assert "transformers needs accelerate" in here and "makes bf16 of FP8" in here and "unit vectors" not in here
    there = text_of(tmp_path, CARD)
    assert "kv_b_proj by a product with unit vectors" in there and "dequantize=True" in there
    change(tmp_path, quantization_config=FP8 | {"dequantize": True})
    assert "config.json says dequantize" in text_of(tmp_path, CARD)
    change(tmp_path, quantization_config={"quant_method": "gptq"})
    other = text_of(tmp_path, CARD)
    assert "gptq: transformers needs the package of that method" in other and "were not compared" in other


def refusals():
    """{name: (what is done to a whole directory, a part of the message)}."""

    def write(text):
        return lambda directory: (directory / "config.json").write_text(text)

    def fields(**changed):
        return lambda directory: change(directory, **changed)

    return {
        "no config.json": (lambda directory: (directory / "config.json").unlink(), "got no file"),
        "not JSON": (write("{"), "must be JSON"),
        "a list": (write("[]"), "must hold a JSON object, got list"),
        "another family": (fields(model_type="llama"), "model_type must be one of deepseek_v32, glm_moe_dsa, got"),
        "null sizes": (fields(kv_lora_rank=None), "kv_lora_rank must be an int, got None"),
        "an unknown field": (fields(attention_sinks=4), "attention_sinks is not known, and may change the attention"),
        "dropout": (fields(attention_dropout=0.1), "attention_dropout must be 0 in a deepseek_v32 model, got 0.1"),
        "rope": (fields(rope_parameters={"rope_type": "linear", "factor": 2}), "rope_type must be default or yarn"),
        "no model": (fields(hidden_act="nonsense"), "must be that of a model transformers can make"),
        "no experts": (fields(n_routed_experts=0), "must be that of a model transformers can make"),
        "int8": (
            fields(dtype="int8"),
            "dtype in config.json must be that of a float of 16 bits or more, got torch.int8",
        ),
        "dtype": (fields(dtype=3), "dtype in config.json must be that of a float of 16 bits or more, got 3"),
        "not transformers'": (fields(vocab_size="many"), "config.json must be one that transformers takes"),
        "quantisation": (fields(quantization_config=3), "quantization_config must be an object, got 3"),
        "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "does not exist (nor model."),
        "a cut file": (
            lambda directory: (directory / "model.safetensors").write_bytes(b"\1" * 20),
            "a safetensors file",
        ),
        "an index of another kind": (
            lambda directory: (
                (directory / "model.safetensors").rename(directory / "x")
                and (directory / "model.safetensors.index.json").write_text("[]")
            ),
            "must be JSON with a weight_map",
        ),
    }


REFUSALS = refusals()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_model_is_refused_with_one_sentence(name, whole, tmp_path, capsys):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, reason = REFUSALS[name]
    damage(tmp_path)
    assert status(tmp_path) == 2
    said, errors = capsys.readouterr()
    assert said == "" and reason in errors.splitlines()[-1] and "Traceback" not in errors


def test_what_is_no_directory(whole, tmp_path, capsys):
    assert status(whole / "config.json") == 2
    assert "must be a directory that holds config.json, got a file" in capsys.readouterr().err
    assert status(tmp_path / "missing") == 2
    assert "must be a directory that holds config.json, got nothing there" in capsys.readouterr().err


def test_a_closed_stdout(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert status(whole) == 2 and "standard output must be open, got a closed one" in capsys.readouterr().err


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk(whole, monkeypatch, capsys):
    with pathlib.Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert status(whole) == 1
        said = capsys.readouterr().err
    assert said.count("\n") == 1 and "error: standard output must be writable, got [Errno 28]" in said


def test_a_reader_that_has_enough(whole, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert status(whole) == 1
        assert capsys.readouterr().err == ""


def test_an_older_transformers_is_named(tmp_path):
    (tmp_path / "transformers-5.20.2.dist-info").mkdir()
    (tmp_path / "transformers-5.20.2.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.20.2\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "dsa_ref.integrations.transformers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs transformers 5.23 or newer, got 5.20.2" in done.stderr.splitlines()[-1]


def test_runs_of_numbers():
    assert runs([5, 0, 2, 1]) == "0-2, 5" and runs([]) == ""
