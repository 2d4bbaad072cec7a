"""The flat forward, and kernels chosen by measuring."""
