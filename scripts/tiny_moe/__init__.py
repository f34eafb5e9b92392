"""Parts of `scripts/train_tiny_moe.py` and `scripts/measure_tiny_moe.py`."""
