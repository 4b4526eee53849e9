"""``Accelerate``: a callback for Lightning's Trainer and anomalib's Engine. Needs Lightning;
importing ``fastflow_kernels`` does not.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from fastflow_kernels import backends
from fastflow_kernels.patch import accelerate
from fastflow_kernels.reporting import report


class Accelerate(Callback):  # type: ignore[misc, unused-ignore]
    """Accelerate the model once training, validation, testing or prediction sets up, before a
    checkpoint is loaded into it.

    The model stays accelerated; :func:`fastflow_kernels.restore` gives its own blocks back. Blocks
    that a module builds in ``configure_model`` come too late for this callback: call
    :func:`fastflow_kernels.accelerate` there.

    Args:
        backend: "auto", "eager" or "triton", for the blocks.
        reversible: Also make the model's chains reversible, see
            :func:`fastflow_kernels.accelerate`.

    Raises:
        TypeError, ValueError: An unknown backend.

    Example:
        >>> from anomalib.engine import Engine
        >>> from fastflow_kernels.lightning import Accelerate
        >>> engine = Engine(callbacks=[Accelerate()], max_epochs=100)
    """

    def __init__(self, backend: str = "auto", reversible: bool = False) -> None:
        self.backend, self.reversible = backends.validated(backend), reversible
        self._said = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning in every stage; logs what runs, once.
        :func:`fastflow_kernels.accelerate` warns if no block runs fused.
        """
        result = report(accelerate(pl_module, backend=self.backend, reversible=self.reversible))
        said = str(result) if result.left else str(result).splitlines()[0]
        if result.changed and said != self._said:
            rank_zero_info(f"fastflow_kernels: {said}")
            self._said = said
