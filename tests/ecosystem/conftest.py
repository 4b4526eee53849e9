"""What the tests with the real models share. Their environment is made by ci/ecosystem.sh; plain
`make test` does not collect them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import peers

peers.prepare_torchvision()


@pytest.fixture(autouse=True, scope="session")
def _random_weights() -> Iterator[None]:
    """No backbone asks for trained weights, which would be downloaded; some of anomalib's models
    have no switch for that.
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
