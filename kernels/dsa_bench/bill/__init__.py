"""The bill: what a whole layer of V3.2 takes with DSA and with dense attention, 4K to 1M tokens, prefill and decode."""
