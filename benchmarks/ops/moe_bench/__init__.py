"""What the benchmarks of a whole mixture-of-experts layer are made of; `benchmarks/ops/moe_layer.py` drives it."""
