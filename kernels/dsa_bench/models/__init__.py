"""transformers' DeepSeek-V3.2 as it is and made sparse, a few layers of random weights: `python -m dsa_bench.models`."""
