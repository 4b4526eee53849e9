"""Programs that prepare, measure and inspect the kernels on a GPU (``ci/gpu.sh``)."""
