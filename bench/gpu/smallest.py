"""Run every kernel once on small, odd shapes. ``ci/gpu.sh`` runs this under compute-sanitizer."""

from __future__ import annotations

import torch

from tests.support import every_kernel


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.smallest: torch finds no GPU")
    every_kernel.run("cuda")
    torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
