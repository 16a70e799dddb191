"""DeepSpeed ZeRO under Lightning, on GPUs and (for tests) on CPU, with strategy-independent checkpoints."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from train.loop.modules import DraftTraining

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state except for the step count


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with float32 master weights and strategy-independent checkpoints.

    Checkpoints load under any strategy and world size, whereas DeepSpeed's own checkpoints are directories of pickles
    that load only with the same ZeRO stage and number of ranks. The trained parameters are a small fraction of the
    model, so they are gathered and saved as on a single device.
    """

    def __init__(self, stage: int, zero_optimization: dict[str, Any] | None = None) -> None:
        """
        Args:
            stage: ZeRO stage (1, 2 or 3).
            zero_optimization: additional settings for DeepSpeed's `zero_optimization` section.
        """
        # DeepSpeed uses this batch size only for its logs; data loaders and losses do not depend on it.
        super().__init__(stage=stage, exclude_frozen_parameters=True, logging_batch_size_per_gpu=1)
        assert self.config is not None  # Lightning builds it from the arguments
        self.config["zero_optimization"].update(zero_optimization or {})

    @property
    def _module(self) -> DraftTraining:
        return cast(DraftTraining, self.lightning_module)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, whose attributes differ between the ZeRO stages."""
        return self.optimizers[0]

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # Lightning's implementation rejects CPU and omits the device index that DeepSpeed requires.
        count = len(self.parallel_devices or ())
        self.parallel_devices = [torch.device("cpu", i) for i in range(count)]
        # Use gloo collectives: DeepSpeed's shared-memory ones need a compiler at run time.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(cast(DDPStrategy, self))

    def setup(self, trainer: Trainer) -> None:
        if self.precision_plugin.precision == "bf16-mixed":
            # Lightning's plugin would cast all parameters to bfloat16, including the trained ones; autocast only
            # computes in bfloat16.
            self.precision_plugin = DeepSpeedPrecision("32-true")
            assert self.config is not None
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        # Keep dtypes: Lightning would permanently cast the frozen target to the trained parameters' dtype.
        self.precision_plugin.convert_module = lambda module: module  # type: ignore[method-assign]  # this instance only
        if self.zero_stage_3:
            # Shard one parameter at a time; otherwise, DeepSpeed would first move the entire target to the device.
            self._init_config_if_needed()
            assert self.model is not None  # Lightning sets it before calling setup
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(self.root_device)
            deepspeed.zero.Init(module=self.model, config_dict_or_path=self.config)
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has already divided the loss by the accumulation steps; DeepSpeed would divide again.
        kwargs.setdefault("scale_wrt_gas", False)
        self._zero.loss_scale = 1.0
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer step and check that DeepSpeed skipped it if a fault was found.

        If DeepSpeed skipped the step but no fault was found, the skip is recorded as a fault in `module.step`.

        Raises:
            RuntimeError: DeepSpeed took a step that should have been skipped.
        """
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        module = self._module
        if not module.ends_step:
            return result
        skipped = bool(self._zero.overflow)
        if module.step.fault and not skipped:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} took a step that should have been skipped: {module.step.fault}."
            )
        if skipped and not module.step.fault:
            module.step = replace(module.step, fault="a gradient computed by DeepSpeed is not finite")
        return result

    def divide_gradients(self, divisor: float) -> None:
        """Set DeepSpeed's loss scale, by which its next step divides the gradients and their norm.

        Call before the optimizer step.
        """
        self._zero.loss_scale = divisor

    def gradient_norms(self) -> Tensor:
        """Return the norm of each trained parameter's reduced gradient, over this rank's shard only, [parameters]."""
        zero, trained = self._zero, self._module.trained().values()
        norms = {id(parameter): torch.zeros((), device=self.root_device) for parameter in trained}
        groups = zero.fp16_groups if self.zero_stage_3 else zero.params_in_partition
        for number, parameters in enumerate(groups):
            # The parameter shards are followed by padding, so that the group has the same size on every rank.
            for parameter, piece in zip(parameters, zero.averaged_gradients[number], strict=False):
                norms[id(parameter)] = torch.linalg.vector_norm(piece.float())
        return torch.stack([norms[id(parameter)] for parameter in trained])

    def skip_step(self) -> None:
        """Make DeepSpeed skip the next optimizer step by filling the gradients with NaN.

        Call before the optimizer step.
        """
        for pieces in self._zero.averaged_gradients.values():
            for piece in pieces:
                piece.fill_(math.nan)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        with self._gathered():
            return {name: tensor.to("cpu", copy=True) for name, tensor in self._module.state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        with self._gathered(write=True):
            self._module.load_state_dict(checkpoint["state_dict"], strict=strict)
        self._zero.refresh_fp32_params()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer state in single-device format: full tensors, keyed by parameter index.

        Must be called on every rank.
        """
        inner = self._zero.optimizer
        hyperparameters = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        parameters = list(self._module.trained().values())
        step = next((state["step"] for state in inner.state.values()), None)
        state = {} if step is None else {i: {"step": step.clone(), **_moments(p)} for i, p in enumerate(parameters)}
        return {"state": state, "param_groups": [hyperparameters | {"params": list(range(len(parameters)))}]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved, zero = checkpoint["optimizer_states"][0], self._zero
        hyperparameters = {key: value for key, value in saved["param_groups"][0].items() if key != "params"}
        flats = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for group in zero.optimizer.param_groups:
            group.update(hyperparameters)
        if not saved["state"]:
            return  # no step has been taken yet: all were skipped
        for flat in flats:
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            zero.optimizer.state[flat] = {"step": saved["state"][0]["step"].clone(), **moments}
        for i, parameter in enumerate(self._module.trained().values()):
            for name in MOMENTS:
                self._set_moment(parameter, name, saved["state"][i][name])

    def _gathered(self, *, write: bool = False) -> AbstractContextManager:
        """Return a context manager that gathers the trained parameters; a no-op unless ZeRO 3 shards them.

        Must be entered on every rank.

        Args:
            write: scatter rank 0's changes to all shards on exit.
        """
        if not self.zero_stage_3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(
            list(self._module.trained().values()), modifier_rank=0 if write else None
        )

    def _set_moment(self, parameter: Any, name: str, value: Tensor) -> None:
        """Copy this rank's shard of a parameter's moment into DeepSpeed's optimizer state.

        Args:
            name: one of `MOMENTS`.
            value: the full, unsharded tensor.
        """
        zero = self._zero
        value = value.flatten().to(self.root_device)
        if self.zero_stage_3:
            size = parameter.partition_numel()  # shard size: the parameter is padded to a multiple of the world size
            padded = nn.functional.pad(value, (0, size * self.world_size - value.numel()))
            deepspeed.utils.safe_set_local_optimizer_state(
                parameter, padded.narrow(0, size * self.global_rank, size), name
            )
            return
        zero._lazy_init_hp_params_optimizer_state()  # DeepSpeed creates the state only after the first step
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, name)


def _moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {name: safe_get_full_optimizer_state(parameter, name).to("cpu", copy=True) for name in MOMENTS}
