"""``Accelerate``: a callback for Lightning's Trainer and anomalib's Engine.

This module needs Lightning; importing ``fastflow_kernels`` does not.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from fastflow_kernels import backends
from fastflow_kernels.patch import accelerate
from fastflow_kernels.reporting import report


class Accelerate(Callback):  # type: ignore[misc, unused-ignore]
    """A callback that accelerates the model before training, validation, testing or prediction.

    It does so in ``setup``, before a checkpoint is loaded into the model. The model stays
    accelerated; :func:`fastflow_kernels.restore` gives its own blocks back. Blocks that a module
    builds in ``configure_model`` come too late for this callback: call
    :func:`fastflow_kernels.accelerate` there.

    Args:
        backend: "auto", "eager" or "triton", for the blocks.
        reversible, half_output: See :func:`fastflow_kernels.accelerate`.

    Raises:
        TypeError, ValueError: ``backend`` is not the name of a backend.

    Example:
        >>> from anomalib.engine import Engine
        >>> from fastflow_kernels.lightning import Accelerate
        >>> engine = Engine(callbacks=[Accelerate()], max_epochs=100)
    """

    def __init__(
        self, backend: str = "auto", reversible: bool = False, half_output: bool = False
    ) -> None:
        self.backend, self.reversible = backends.validated(backend), reversible
        self.half_output = half_output
        self._last_message = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Accelerate the model and log what runs, once.

        Lightning calls this in every stage. :func:`fastflow_kernels.accelerate` warns if no block
        runs fused.
        """
        model = accelerate(
            pl_module,
            backend=self.backend,
            reversible=self.reversible,
            half_output=self.half_output,
        )
        result = report(model)
        message = str(result) if result.left else str(result).splitlines()[0]
        if result.changed and message != self._last_message:
            rank_zero_info(f"fastflow_kernels: {message}")
            self._last_message = message
