"""Every kernel once on a small, odd shape, forward, backward and inverse: what compute-sanitizer watches (ci/gpu.sh)."""

from __future__ import annotations

import torch
from torch import nn

from fastflow_kernels import AllInOneBlock

SHAPES = ((3, 33, 7, 9), (5, 66))  # P not divisible by 4; and rank 0


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.smallest: torch finds no GPU")
    for batch, channels, *spatial in SHAPES:
        for gin in (False, True):
            subnet = nn.Conv2d if spatial else nn.Linear
            size = (1,) if spatial else ()
            block = AllInOneBlock(
                [(channels, *spatial)],
                subnet_constructor=lambda i, o, subnet=subnet, size=size: subnet(i, o, *size),
                gin_block=gin,
                backend="triton",
            ).cuda()
            x = torch.randn(batch, channels, *spatial, device="cuda", requires_grad=True)
            (y,), logdet = block([x])
            (y.square().sum() - logdet.sum()).backward()
            with torch.no_grad():
                block([y], rev=True)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
