"""The readable truth in PyTorch: every formula once. Kernels are tested against it; it is also the CPU path."""
