"""One layer of ours against transformers' DeepseekV32 on the same weights, on the CPU: seconds and peak memory.

    python -m dsa_bench.layer_cpu --log figures/layer_cpu.json

Ours attends to the k selected keys alone; transformers' computes every pair and masks. Each run is a process of its
own, so that its peak resident memory is its own; the peak before the measured passes is subtracted (Linux, KiB).
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from dsa_ref import DSAConfig, DSALayer
from dsa_ref.records import output_file, positive, provenance, write_log

CONFIG = DSAConfig(
    dim=512,
    n_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=256,
    index_fp8=False,  # transformers has no FP8 path
    original_seq_len=16384,
    max_seq_len=16384,
)


def their_layer(config, implementation):
    """transformers' attention module for these sizes, as a function of x [T, dim] like ours, and the module."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as modeling
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

    same_name = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    same_name += ("index_n_heads", "index_head_dim", "index_topk")
    theirs = DeepseekV32Config(
        hidden_size=config.dim,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_seq_len,
        **{name: getattr(config, name) for name in same_name},
    )
    theirs._attn_implementation = implementation
    module = modeling.DeepseekV32Attention(theirs, layer_idx=0).eval()
    rotary = modeling.DeepseekV32RotaryEmbedding(theirs)

    def run(x, positions):
        T = x.shape[0]
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        tables = rotary(x[None], positions[None])
        return module(x[None], tables, mask, position_ids=positions[None])[0][0]

    return run, module


@torch.no_grad()
def measure_one(who, T, repeats):
    """{"seconds": median, "peak_mib": ..., "checksum": ...} of one implementation in this process."""
    generator = torch.Generator().manual_seed(0)
    ours = DSALayer(CONFIG)
    for parameter in ours.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x, positions = torch.randn(T, CONFIG.dim, generator=generator), torch.arange(T)
    run = ours
    if who != "ours":
        run, module = their_layer(CONFIG, who)
        module.load_state_dict(ours.state_dict())
    run(x[:64], positions[:64])  # first-call costs: libraries, caches
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = run(x, positions)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = out.abs().mean().item()
    return {
        "seconds": round(statistics.median(seconds), 2),
        "peak_mib": peak // 1024,
        "mean_abs_output": round(size, 5),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=output_file, help="where the figures go, as JSON")
    parser.add_argument("--T", type=positive, nargs="+", default=(4096, 8192))
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--one", choices=("ours", "eager", "sdpa"), help="measure one in this process and print")
    options = parser.parse_args(arguments)
    if max(options.T) > CONFIG.max_seq_len:
        parser.error(f"--T must be at most {CONFIG.max_seq_len}, got {max(options.T)}")
    if options.one != "ours" and importlib.util.find_spec("transformers") is None:
        parser.error("transformers must be installed, which this compares with: pip install transformers")
    if options.one:
        print(json.dumps(measure_one(options.one, options.T[0], options.repeats)))
        return
    rows = []
    for T in options.T:
        for who in ("ours", "sdpa", "eager"):
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--one",
                who,
                "--T",
                str(T),
                "--repeats",
                str(options.repeats),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            row = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip()[-200:]}
            rows.append(
                {"T": T, "k": CONFIG.index_topk, "who": who if who == "ours" else f"transformers, {who}", **row}
            )
            print(rows[-1], flush=True)
    result = {"rows": rows, "threads": torch.get_num_threads()}
    result["provenance"] = provenance("dsa_bench.layer_cpu", arguments)
    if options.log:
        write_log("dsa_bench.layer_cpu", options.log, result)


if __name__ == "__main__":
    main()
