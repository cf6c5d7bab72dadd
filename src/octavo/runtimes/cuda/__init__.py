"""The runtime torch-cuda: torch with quantized layers in Triton kernels for int8 tensor cores."""
