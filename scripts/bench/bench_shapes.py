"""Targets and batches for `bench_train_step.py`, with their FLOPs and minimum memory.

Shape names are defined in `data.batch`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from data.batch import Batch
from models.attention.layers import Execution
from models.attention.masks import allowed_pairs
from models.cost.flops import step_flops
from models.cost.trace import meta_target
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.loss.block_loss import block_loss
from models.loss.objectives import Objective
from models.target import target_pass

PARTS = ("target pass", "mask pass", "head and loss")  # parts of the FLOPs


@dataclass(frozen=True)
class Preset:
    """Sizes of a target and of the batches to train its drafter on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 151936
    tied: bool = True
    draft_layers: int = 10
    block_size: int = 16
    max_seq_len: int = 4096
    documents: int = 4
    anchors: int = 512

    def architecture(self, vocabulary: int) -> dict:
        """Return the target's config."""
        return {
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2**20,
        }

    def draft(self, vocabulary: int, draft_layers: int) -> DraftModel:
        """Return a drafter and its target without data."""
        return meta_draft(self.architecture(vocabulary), draft_layers, self.block_size)


def meta_draft(architecture: dict, draft_layers: int, block_size: int) -> DraftModel:
    """Build a drafter and its target without data."""
    target = meta_target(AutoConfig.for_model(**architecture), torch.float32)
    with torch.device("meta"):
        return DraftModel(target, DraftConfig(num_layers=draft_layers, block_size=block_size, calibrator_rank=0))


SMALL_ROWS = {"max_seq_len": 512, "anchors": 24}
PRESETS = {
    "tiny": Preset(192, 512, 8, 6, 3, 32, vocabulary=2048, draft_layers=6, block_size=8, **SMALL_ROWS),
    "cpu": Preset(1024, 3072, 8, 16, 8, 64, vocabulary=32768, draft_layers=4, max_seq_len=1024, anchors=64),
    "0.6b": Preset(1024, 3072, 28, 16, 8, 128),
    "1.7b": Preset(2048, 6144, 28, 16, 8, 128),
    "4b": Preset(2560, 9728, 36, 32, 8, 128),
    "8b": Preset(4096, 12288, 36, 32, 8, 128, tied=False),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch."""

    rows: int  # R
    max_seq_len: int  # T
    documents: int  # per row, of equal length up to rounding
    anchors: int  # A
    block_size: int  # B
    vocabulary: int  # V

    @property
    def places(self) -> int:
        """Number of valid anchors in a row: each position of a document, except its first, where a full block fits."""
        return self.max_seq_len - self.documents * self.block_size

    @property
    def clean(self) -> int:
        """Number of clean tokens per step."""
        return self.rows * self.max_seq_len

    @property
    def masks(self) -> int:
        """Number of mask tokens per step."""
        return self.rows * self.anchors * self.block_size

    @property
    def drafted(self) -> int:
        """Number of slots with a loss: all slots except slot 0, since every slot is labeled."""
        return self.rows * self.anchors * (self.block_size - 1)

    def misfit(self) -> str | None:
        """Explain why the blocks do not fit into the documents; None if they fit."""
        rows = f"rows of {self.max_seq_len} tokens in {self.documents} documents"
        if self.max_seq_len // self.documents <= self.block_size:
            return f"blocks of {self.block_size} do not fit after the first token of a document: {rows}"
        if self.anchors > self.places:
            return f"{self.anchors} anchors of {self.block_size} slots: {rows} have only {self.places} valid anchors"
        return None


def random_batch(shape: Shape, seed: int) -> Batch:
    """Build a batch of random tokens, with anchors drawn without replacement from each row's valid positions."""
    generator = torch.Generator().manual_seed(seed)
    size, length = shape.block_size, shape.max_seq_len
    ids = torch.randint(shape.vocabulary, (shape.rows, length), generator=generator)
    documents = torch.arange(length) * shape.documents // length  # [T]
    positions = torch.arange(length) - torch.searchsorted(documents, documents)
    starts = torch.arange(length - size + 1)
    places = starts[(positions[starts] > 0) & (documents[starts + size - 1] == documents[starts])]
    drawn = [places[torch.randperm(len(places), generator=generator)[: shape.anchors]] for _ in range(shape.rows)]
    anchors = torch.stack(drawn).sort().values  # [R, A]
    at = anchors[..., None] + torch.arange(size)  # [R, A, B]
    labels = ids.gather(1, at.flatten(1)).view_as(at)
    positions, documents = (one.expand(shape.rows, -1).contiguous() for one in (positions, documents))
    return Batch(ids, positions, documents, anchors, labels)


@dataclass(frozen=True)
class Block:
    """Location of a block in a batch: row, start of its document, anchor, and index among the row's blocks."""

    row: int
    start: int
    anchor: int
    number: int


def typical_blocks(batch: Batch, count: int) -> list[Block]:
    """Return `count` blocks with representative prefix lengths: the medians of `count` equal quantile groups."""
    prefixes = batch.position_ids.gather(1, batch.anchors).tolist()
    blocks = [
        Block(row, anchor - prefix, anchor, number)
        for row, (anchors, lengths) in enumerate(zip(batch.anchors.tolist(), prefixes, strict=True))
        for number, (anchor, prefix) in enumerate(zip(anchors, lengths, strict=True))
    ]
    blocks.sort(key=lambda block: block.anchor - block.start)
    return [blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)]


def floor_flops(draft: DraftModel, batches: list[Batch], objective: Objective) -> dict[str, float]:
    """Return the minimum FLOPs of a step by part, averaged over the batches, whose anchors differ.

    Args:
        draft: on the meta device, without windows.
    """
    parameters = draft.requires_grad_(False).attention_parameters().values()
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss(batch: Batch) -> tuple[torch.Tensor, ...]:
        execution = Execution("dense")
        clean = target_pass(
            draft.target, batch, draft.split_layer, with_hidden=objective.needs_target, execution=execution
        )
        hidden = draft.forward_batch(clean.context, batch, execution)
        return block_loss(
            draft.logits, hidden, batch, objective=objective, chunk=hidden.numel(), target_hidden=clean.hidden
        )

    rows, length = batches[0].input_ids.shape
    clean_pairs, mask_pairs = (sum(pairs) / len(batches) for pairs in zip(*map(allowed_pairs, batches), strict=True))
    labeled = sum(max(0, count - 1) for batch in batches for count in batch.lengths)
    slots = (draft.block_size - 1) * sum(batch.anchors.numel() for batch in batches)
    parts = step_flops(
        loss,
        draft,
        rows=rows,
        max_seq_len=length,
        num_anchors=batches[0].anchors.shape[1],
        labeled=labeled / slots,
        clean_pairs=clean_pairs,
        mask_pairs=mask_pairs,
    )
    return {part: parts[part] for part in PARTS}


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Return the number of elements."""
    return sum(parameter.numel() for parameter in parameters)


def least_memory(draft: DraftModel, shape: Shape, *, word: int, chunk: int, recompute: bool) -> dict[str, int]:
    """Return the minimum memory of a step in bytes, by purpose. `word`: bytes per element of the target."""
    config = draft.target.config
    keys = config.num_key_value_heads * config.head_dim
    # Per mask token and draft layer: norm inputs, queries, keys, values, attention output, FFN.
    token = 2 * config.hidden_size + 2 * config.num_attention_heads * config.head_dim + 2 * keys
    token = config.hidden_size if recompute else token + 3 * config.intermediate_size
    return {
        "target": count(draft.target.parameters()) * word,
        "drafter, gradients, AdamW": 4 * 4 * count(draft.attention_parameters().values()),
        "activations": len(draft.layers) * word * (shape.masks * token + shape.clean * 2 * keys),
        "logits": min(chunk, shape.drafted) * config.vocab_size * 4,
    }


def free_memory(device: str) -> int | None:
    """Return the available memory in bytes; None if the system does not report it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")  # a container's limit may be below the machine's memory
        found += [int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())]
    except (OSError, ValueError):
        pass
    return min(found, default=None)
