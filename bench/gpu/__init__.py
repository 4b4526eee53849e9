"""What prepares, measures and inspects a run on a GPU (ci/gpu.sh)."""
