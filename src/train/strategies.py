"""DeepSpeed ZeRO under Lightning, on GPUs and, for tests, on CPU."""

from typing import Any

import deepspeed
import torch
from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy with float32 master weights, checkpoints without the target, and CPU ranks allowed."""

    def __init__(self, stage: int, autocast: str | None = None) -> None:
        """
        Args:
            stage: 1, 2 or 3.
            autocast: dtype of the arithmetic, such as `bfloat16`; None computes in the parameters' dtype. Lightning's
                own `bf16-mixed` would cast the trained parameters themselves to bfloat16 under DeepSpeed.
        """
        # The batch size is only DeepSpeed's bookkeeping here; loaders and losses know nothing of it.
        super().__init__(stage=stage, exclude_frozen_parameters=True, logging_batch_size_per_gpu=1)
        if autocast:
            self.config["torch_autocast"] = {"enabled": True, "dtype": autocast}

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # Lightning refuses CPU here and leaves the devices without the index that DeepSpeed asks for.
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        # Collectives over gloo; the shared-memory ones would need a compiler at run time.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    def setup(self, trainer: Trainer) -> None:
        # Lightning would cast the frozen target to the trained parameters' dtype, and leave it so.
        self.precision_plugin.convert_module = lambda module: module
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided the loss by the accumulation steps; DeepSpeed would do it again.
        kwargs.setdefault("scale_wrt_gas", False)
        super().backward(closure_loss, optimizer, *args, **kwargs)
