"""Check each tested family with random weights: training-decoding parity, losslessness and export round trip.

    python scripts/checks/check_families.py

Prints a table and exits with a nonzero status if a family fails. Sliding windows are shorter than the texts, so that
they take effect.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from data.batch import Batch
from data.preprocess.anchors import make_batch, valid_anchors
from data.preprocess.document import Document
from data.preprocess.packing import pack_documents
from models.decoding.flex import generate
from models.decoding.reference import draft_logits
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import export_draft, load_draft
from models.hf_cache import forward_cached
from models.target import bonus_tokens, load_target, target_pass

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.2], "long_factor": [2.0, 4.0]}
LONG |= {"original_max_position_embeddings": 128, "factor": 2.0, "partial_rotary_factor": 0.5}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {  # settings in addition to the common sizes
    "qwen3": {"model_type": "qwen3"},
    "qwen2.5": {"model_type": "qwen2"},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "qwen3 moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gemma 3": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "layer_types": [*KINDS, *KINDS[1:]],
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "phi 3": {"model_type": "phi3", "sliding_window": 9},
    "phi 4 mini": {"model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": 128},
    "olmo 2": {"model_type": "olmo2"},
}


def random_pair(family: str, dtype: str = "float32") -> tuple[PreTrainedModel, DraftModel]:
    """Return a target with random weights and a drafter far from it, so that no check passes by similarity."""
    torch.manual_seed(0)
    target = load_target(None, architecture=SIZES | FAMILIES[family], dtype=dtype)
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=8))
    with torch.no_grad():
        for parameter in draft.own_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return target, draft


def packed_batch(block_size: int) -> tuple[list, Batch]:
    """Return rows of several documents, and a batch with all their anchors."""
    random = np.random.default_rng(0)
    documents = [
        Document(random.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) > 0) for n in (40, 31, 22, 12)
    ]
    rows = pack_documents(documents, 64, pad_id=0)
    count = max(len(valid_anchors(row)) for row in rows)
    return rows, make_batch(rows, num_anchors=count, block_size=block_size, seeds=[(i,) for i in range(len(rows))])


@torch.no_grad()
def parity(target: PreTrainedModel, draft: DraftModel) -> tuple[int, float]:
    """Return the number of compared states and the largest logit difference of training and decoding in both stages."""
    rows, batch = packed_batch(draft.block_size)
    clean = target_pass(target, batch, draft.split_layer)
    bonus = bonus_tokens(target, clean.hidden, batch.anchors)
    hidden = draft.forward_batch(clean.context, batch)
    tuned, calibrated = draft.logits(hidden), draft.logits(hidden, bonus[..., None].expand(-1, -1, draft.block_size))
    states, worst = 0, 0.0
    for r, row in enumerate(rows):
        for a, anchor in enumerate(batch.anchors[r, : len(valid_anchors(row))].tolist()):
            start = int((row.document_ids == row.document_ids[anchor]).argmax())
            prefix, cache = torch.from_numpy(row.input_ids[start:anchor])[None].long(), DynamicCache()
            predicted = forward_cached(target, prefix, cache).logits[0, -1:].argmax(-1)
            for logits, known in ((tuned, None), (calibrated, predicted)):
                decoded = draft_logits(draft, cache, anchor - start, known)
                worst = max(worst, float((decoded - logits[r, a]).abs().max()))
                states += 1
    return states, worst


def lossless(target: PreTrainedModel, draft: DraftModel, prompts: int, new_tokens: int) -> int:
    """Count the prompts, in batches of unequal lengths, that both modes decode like `generate` of transformers."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, VOCABULARY, (1 + 7 * i % 40,), generator=generator).tolist() for i in range(prompts)]
    own = []
    for prompt in tokens:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        answer = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        own.append(answer[0].tolist())
    same = 0
    for first in range(0, prompts, 4):
        batch, expected = tokens[first : first + 4], own[first : first + 4]
        both = [
            generate(target, draft, batch, max_new_tokens=new_tokens, mode=m).tokens for m in ("parallel", "sequential")
        ]
        same += sum(
            prompt + a == prompt + b == answer for prompt, a, b, answer in zip(batch, *both, expected, strict=True)
        )
    return same


@torch.no_grad()
def unchanged_by_export(target: PreTrainedModel, draft: DraftModel) -> bool:
    """Return whether the drafter's logits are bit-identical after export and loading."""
    with tempfile.TemporaryDirectory() as directory:
        export_draft(draft, Path(directory), torch.float32)
        again = load_draft(Path(directory), target)
    cache = DynamicCache()
    forward_cached(target, torch.arange(3, 23)[None], cache)
    return all(
        torch.equal(draft_logits(draft, cache, 20, bonus), draft_logits(again, cache, 20, bonus))
        for bonus in (None, torch.tensor([7]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    table = Table(title="Targets with random weights, 5 layers, 3 of them drafting, float32")
    for title in ("family", "model_type", "states", "parity", "lossless", "export"):
        table.add_column(title, justify="left" if title in ("family", "model_type") else "right")
    failed = []
    for family, special in FAMILIES.items():
        target, draft = random_pair(family)
        states, worst = parity(target, draft)
        same, kept = (
            lossless(target, draft, arguments.prompts, arguments.new_tokens),
            unchanged_by_export(target, draft),
        )
        if not (worst < 1e-4 and same == arguments.prompts and kept):
            failed.append(family)
        outcome = (str(states), f"{worst:.1e}", f"{same}/{arguments.prompts}", "identical" if kept else "differs")
        table.add_row(family, special["model_type"], *outcome)
    Console(width=100).print(table)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
