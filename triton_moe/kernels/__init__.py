"""The Triton kernels, one operation a file: formula, configs, kernels, launchers."""
