"""Other methods of quantizing a KV cache, written from their papers, for `benchmarks/quality.py`."""
