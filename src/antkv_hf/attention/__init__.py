"""How an attention call on a cached layer is answered. Knows tensors, not transformers."""
