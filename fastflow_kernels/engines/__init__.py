"""The formula, three times: plain operations, hand-derived functions for CPUs, Triton kernels."""
