"""transformers' DeepSeek-V3.2 as it is and made sparse, few layers of random weights: `python -m dsa_bench.models`."""
