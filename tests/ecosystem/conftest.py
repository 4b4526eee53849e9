"""What the tests with the real models share. Their environment is made by ci/ecosystem.sh; plain `make test` does not collect them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def _declare_operators_of_torchvision() -> torch.library.Library | None:
    """Let a CUDA build of torchvision (what PyPI has for Linux) be imported beside a CPU build of torch.

    Its extension does not load there, and its import then misses two operators. No model here calls them.
    """
    folder = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    if torch.version.cuda is not None or "+cu" not in (folder / "version.py").read_text():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_LIBRARY = _declare_operators_of_torchvision()  # kept: the operators go with it


@pytest.fixture(autouse=True, scope="session")
def _random_weights() -> Iterator[None]:
    """No backbone asks for trained weights, which would be downloaded; some of anomalib's models have no switch for that."""
    import timm

    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False}))
        yield
