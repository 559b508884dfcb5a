"""Triton kernels of AnTKV: anchor score, encode, decode attention, prefill over a quantized past. Tensors only."""
