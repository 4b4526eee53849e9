"""Run every kernel once on a small, odd shape: what compute-sanitizer watches (ci/gpu.sh)."""

from __future__ import annotations

import torch

from tests.support import every_kernel


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.smallest: torch finds no GPU")
    every_kernel.run("cuda")
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
