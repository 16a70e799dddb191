"""Runs the code of a step on tensors without data, and records its FLOPs and memory.

`meta_target` builds a target that has no weight data and uses `traced_attention`. A `Trace` around the step records
the shapes, dtypes and storages of every operation, so new architectures and new parts of the drafter need no formulas.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data.batch import Batch
from data.errors import out_of_memory
from models.attention.packed import View, attend_tiles, gather_keys
from models.families import layer_kinds

NAME = "traced"  # attention function, registered with transformers
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN._grouped_mm}
PRODUCTS |= {ATEN._scaled_dot_product_flash_attention_for_cpu}


def _experts_flops(tokens: Tensor, weights: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of multiplying tokens [n, in], repeated per active expert, by weights [experts, in, out]."""
    return 2 * tokens.shape[0] * tokens.shape[1] * weights.shape[2]


FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, ATEN._grouped_mm: _experts_flops}


@dataclass(frozen=True)
class AttentionCall:
    """Widths of one layer's attention, in elements per token."""

    queries: int
    keys_values: int
    window: int | None
    of_blocks: bool  # whether the queries are mask tokens rather than clean tokens

    def flops(self, pairs: float, tokens: float) -> float:
        """Return the forward FLOPs for `pairs` query-key pairs; a window limits these to `tokens` full windows."""
        return 4 * self.queries * (pairs if self.window is None else min(pairs, tokens * self.window))


@dataclass
class _Storage:
    size: float
    part: str
    product: bool = False  # input or output of a matrix product
    source: weakref.ref | None = None  # the storage that was copied to this one, if its dtype is narrower
    original: weakref.ref | None = None  # the storage at the start of the chain of copies that led to this one


@dataclass
class Trace(TorchDispatchMode):
    """Dispatch mode that counts FLOPs by phase, and live memory by phase and part.

    Args:
        given: tensors that exist beforehand, such as weights; they are not counted.
        head: weight of the target's LM head. In the loss phases, its products are recorded under `head`.
        clean_pairs, mask_pairs: query-key pairs that attention computes in a layer without a window, over all rows.
        gradient_fraction: fraction of each gradient that this rank stores.
        without_masks: whether to ignore boolean tensors, since FlexAttention's masks are much smaller.
    """

    given: Iterable[Tensor] = ()
    head: Tensor | None = None
    clean_pairs: float = 0
    mask_pairs: float = 0
    gradient_fraction: float = 1
    without_masks: bool = False
    phase: str = "target pass"
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # FLOPs by phase, or under `head`
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # current bytes by part
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)  # phase -> bytes by part at the phase's peak
    attention: list[AttentionCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._total, self._part = 0.0, ""
        self._highest: dict[str, float] = defaultdict(float)
        self._storages: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._given = weakref.WeakSet(tensor.untyped_storage() for tensor in self.given)
        self._vocabulary = self.head.shape[0] if self.head is not None else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func._overloadpacket
        if packet is ATEN._grouped_mm:  # without data, torch supports only bfloat16
            out = args[0].new_empty(args[0].shape[0], args[1].shape[2])
        else:
            out = func(*args, **(kwargs or {}))
        inputs = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Tensor)]
        if packet in FLOPS:
            in_head = self.head is not None and any(_same_storage(arg, self.head) for arg in inputs)
            count = FLOPS[packet](*args, **(kwargs or {}), out_val=out)
            self.flops["head" if in_head and "loss" in self.phase else self.phase] += count
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, packet, inputs)
        if packet in PRODUCTS:
            self.keep(*inputs)
        return out

    def _see(self, tensor: Tensor, packet: Any, inputs: list[Tensor]) -> None:
        """Count the storage of an operation's output, if it is new."""
        storage = tensor.untyped_storage()
        if storage in self._storages or storage in self._given or (self.without_masks and tensor.dtype == torch.bool):
            return
        part = self._part or ("logits" if tensor.shape[-1:] == (self._vocabulary,) else "activations")
        copied = packet is ATEN._to_copy
        if copied and isinstance(inputs[0], nn.Parameter):
            part = "bfloat16 copies"
        seen = _Storage(storage.nbytes(), part, packet in PRODUCTS)
        if copied:
            source = inputs[0].untyped_storage()
            before = self._storages.get(source)
            seen.original = before and before.original or weakref.ref(source)
            seen.source = weakref.ref(source) if inputs[0].itemsize < tensor.itemsize else None
        self._storages[storage] = seen
        weakref.finalize(storage, self._change, seen, -1).atexit = False
        self._change(seen, 1)

    def _change(self, storage: _Storage, sign: int) -> None:
        self.parts[storage.part] += sign * storage.size
        self._total += sign * storage.size
        if self._total > self._highest[self.phase]:
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = dict(self.parts)

    def move(self, part: str, *tensors: Tensor, fraction: float = 1) -> None:
        """Reassign tensors to another part, counting only a fraction of their size."""
        for tensor in tensors:
            if seen := self._storages.get(tensor.untyped_storage()):
                self._change(seen, -1)
                seen.part, seen.size = part, seen.size * fraction
                self._change(seen, 1)

    def store_gradient(self, parameter: Tensor) -> None:
        """Reassign a parameter's complete gradient to the part `gradients`."""
        assert parameter.grad is not None
        seen = self._storages[parameter.grad.untyped_storage()]
        if seen.part != "gradients":
            self.move("gradients", parameter.grad, fraction=self.gradient_fraction)

    def keep(self, *tensors: Tensor) -> None:
        """Mark tensors as inputs or outputs of a matrix product."""
        for tensor in tensors:
            if seen := self._storages.get(tensor.untyped_storage()):
                seen.product = True

    def compile(self, layer: nn.Module) -> None:
        """Make a layer save only what a compiled layer saves for its backward pass: inputs and outputs of products."""
        saved: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor, self._storages.get(tensor.untyped_storage())))
            return saved[-1]

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpack)

        def finish(*_: Any) -> None:
            hooks.__exit__(None, None, None)
            kept: set = set()
            for tensor in saved:
                tensor.settle(kept)
            saved.clear()

        layer.register_forward_pre_hook(lambda *_: hooks.__enter__())
        layer.register_forward_hook(finish)


class _Saved:
    """A tensor saved for the backward pass of a compiled layer, or just its shape if it would be recomputed."""

    def __init__(self, tensor: Tensor, seen: _Storage | None) -> None:
        self.tensor: Tensor | None = tensor
        self.like, self.dtype, self.seen = (tensor.shape, tensor.stride()), tensor.dtype, seen
        self.source = seen.source() if seen and seen.source else None
        self.original = seen and seen.original or weakref.ref(tensor.untyped_storage())

    def settle(self, kept: set) -> None:
        """Drop the tensor if a compiled layer would recompute it.

        A compiled layer keeps only inputs and outputs of matrix products, and only one copy of each.
        """
        copy_of = (id(self.original), self.dtype, self.like[0].numel())
        if self.seen and (not self.seen.product or copy_of in kept):
            self.tensor = None
        else:
            kept.add(copy_of)
            self.source = None  # the narrower tensor is not needed

    def unpack(self) -> Tensor:
        return torch.empty_strided(*self.like, dtype=self.dtype) if self.tensor is None else self.tensor


def _same_storage(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage() is other.untyped_storage()


class _FusedAttention(torch.autograd.Function):
    """A stand-in for a fused attention kernel.

    It computes nothing, but saves the same tensors as the kernel: inputs, output and log-sum-exp of the scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, trace: Trace, flops: float) -> Tensor:
        output, scale = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, scale)
        ctx.trace, ctx.flops = trace, flops
        trace.keep(query, key, value, output, scale)
        trace.flops[trace.phase] += flops
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trace.flops[ctx.trace.phase] += 2 * ctx.flops  # gradients of both factors in each of the two products
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None, None


def traced_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: View, **kwargs: Any
) -> tuple[Tensor, None]:
    """Stand in for `models.attention.packed.packed_attention` and record the call in the current `Trace`."""
    trace, view = torch.utils._python_dispatch._get_current_dispatch_mode(), attention_mask
    assert isinstance(trace, Trace)
    call = AttentionCall(
        query.shape[1] * query.shape[3], 2 * key.shape[1] * key.shape[3], view.window, view.context is not None
    )
    trace.attention.append(call)
    if view.keep:
        trace.move("K/V and masks", key, value)
    trace._part = "K/V and masks"
    try:
        query, key, value = gather_keys(module, query, key, value, view, **kwargs)
        if isinstance(view.mask, list):
            return attend_tiles(query, key, value, view.mask, kwargs.get("scaling")), None
    finally:
        trace._part = ""
    pairs = trace.mask_pairs if call.of_blocks else trace.clean_pairs
    flops = call.flops(pairs, query.shape[0] * query.shape[2])
    return _FusedAttention.apply(query, key, value, trace, flops).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, traced_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def meta_target(config: PretrainedConfig, dtype: torch.dtype, last_layers: int | None = None) -> PreTrainedModel:
    """Build a target without data on the meta device, with all its layers or only the last `last_layers`."""
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=NAME)
    if last_layers is not None:
        target.config.layer_types = layer_kinds(config)[-last_layers:]
        target.config.num_hidden_layers = min(last_layers, config.num_hidden_layers)
        target.model.layers = target.model.layers[-last_layers:]
    return target.requires_grad_(False).eval()


def on_fake_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's meta tensors with fake CPU tensors, for which autocast works as it does for real ones."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (original, fake); keeps the original, so its id is not reused

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            found: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, found
        return made[id(tensor)][1]

    for child in module.modules():
        for registry in (child._parameters, child._buffers):
            registry.update({n: fake(t) for n, t in registry.items() if t is not None and t.is_meta})


def full_batch(rows: int, max_seq_len: int, num_anchors: int, block_size: int) -> Batch:
    """Build a batch whose rows are single documents with evenly spread anchors and labels in all slots."""
    ids = torch.zeros(rows, max_seq_len, dtype=torch.long)
    anchors = torch.linspace(1, max_seq_len - block_size, num_anchors).long().expand(rows, -1).contiguous()
    labels = ids.new_zeros(rows, num_anchors, block_size)
    positions = torch.arange(max_seq_len).expand(rows, -1).contiguous()
    return Batch(ids, positions, torch.zeros_like(ids), anchors, labels, (block_size,) * (rows * num_anchors))


@contextmanager
def traceable(target: PreTrainedModel) -> Iterator[None]:
    """Context manager that turns errors of operations that need data into one that names the architecture.

    Raises:
        ValueError: an operation of the target's layers depends on values, such as a loop over the experts in use.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{target.config.model_type} cannot be traced without data ({reason}).") from error
