"""Set-up of the tests with the real models.

``ci/ecosystem.sh`` makes their environment; plain ``make test`` does not collect them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import peers

peers.prepare_torchvision()


@pytest.fixture(autouse=True, scope="session")
def _random_weights() -> Iterator[None]:
    """Build all backbones with random weights, so that none is downloaded.

    Some of anomalib's models have no option for that.
    """
    import timm

    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timm,
            "create_model",
            lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False}),
        )
        yield
