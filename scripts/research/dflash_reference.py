"""Train a DFlash-like reference drafter on an experiment's batches and decode the experiment's prompts to compare τ.

    python scripts/research/dflash_reference.py --learning-rate 2e-3 +experiment=tiny name=dflash_0 seed=0

The drafter follows z-lab's DFlash (arXiv 2602.06036). It has separate decoder layers with attention, FFN and norms,
whose attention sees the context as the fused hidden states of several target layers. Slot 0 holds the bonus token. The
embedding and the head are the target's and stay frozen. Training uses the same batches as the two training stages of
the experiment, with a single schedule over all their steps.
Supports Qwen3 targets.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from data.batch import Batch
from data.config.compose import composed
from data.config.validate import check_settings
from data.errors import UserError
from models.acceptance import mean_acceptance_length, tau_interval
from models.attention.layers import run_layers
from models.attention.packed import KeysValues, Mask, View, blocks_mask
from models.decoding.generation_settings import active_settings, stop_tokens
from models.families import position_embeddings
from models.hf_cache import crop, forward_cached
from models.loss.block_loss import block_loss
from models.loss.objectives import Objective
from models.target import target_pass
from train.context import Resources
from train.evaluate.acceptance import own_answers
from train.evaluate.run import decoding_settings
from train.loop.batches import BatchSettings, TrainingBatches
from train.loop.modules import lr_factor
from train.names import TRAINED
from train.run_dir.state import write_json
from train.settings.derived import device

FEATURES = 3  # layers of the target whose outputs are fused


class Reference(nn.Module):
    """DFlash-like drafter. Shapes as in `data.batch`; F = `FEATURES`."""

    def __init__(self, target: PreTrainedModel, *, num_layers: int, block_size: int, from_target: bool = False) -> None:
        """
        Args:
            from_target: initialize the layers from the target's last layers instead of randomly.
        """
        super().__init__()
        object.__setattr__(self, "target", target)  # not registered: neither owned nor trained
        self.block_size, self.split_layer = block_size, target.config.num_hidden_layers - num_layers
        # Evenly spaced from the second layer to the last but two, as in DFlash.
        self.feature_layers = torch.linspace(1, target.config.num_hidden_layers - 3, FEATURES).round().long().tolist()
        hidden = target.config.hidden_size
        self.fc = nn.Linear(FEATURES * hidden, hidden, bias=False, dtype=target.dtype)
        self.hidden_norm, self.norm = copy.deepcopy(target.model.norm), copy.deepcopy(target.model.norm)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in target.model.layers[self.split_layer :])
        fresh = [self.fc, self.hidden_norm] if from_target else [self.fc, self.hidden_norm, self.norm, self.layers]
        for parameter in (p for module in fresh for p in module.parameters()):
            matrix = parameter.dim() > 1
            nn.init.normal_(parameter, std=target.config.initializer_range) if matrix else nn.init.ones_(parameter)
        self.mask_embedding = nn.Parameter(target.get_input_embeddings().weight.detach().mean(0))
        for layer in self.layers:
            layer.self_attn.is_causal = False  # slots of a block attend to each other in both directions
        self.requires_grad_(True)

    def context(self, features: Tensor, positions: Tensor) -> list[KeysValues]:
        """Compute the keys and values of clean tokens for each draft layer.

        Args:
            features: [R, T, F*H] outputs of the target's layers. positions: [R, T].
        """
        fused = self.hidden_norm(self.fc(features))
        cos, sin = position_embeddings(self.target, fused, positions, range(1))[0]
        cos, sin = cos[:, None], sin[:, None]  # over heads
        pairs = []
        for attention in (layer.self_attn for layer in self.layers):
            heads = (*fused.shape[:2], -1, attention.head_dim)
            keys = attention.k_norm(attention.k_proj(fused).view(heads)).transpose(1, 2)
            values = attention.v_proj(fused).view(heads).transpose(1, 2)
            pairs.append((keys * cos + rotate_half(keys) * sin, values))
        return pairs

    def forward(self, context: list[KeysValues], bonus: Tensor, positions: Tensor, mask: Mask | None = None) -> Tensor:
        """Return hidden states [R, A, B, H] for slot positions [R, A, B] and bonus tokens [R, A]; no mask: see all."""
        embedded = self.target.get_input_embeddings()(bonus)[..., None, :]  # [R, A, 1, H]
        masks = self.mask_embedding.expand(*positions.shape[:2], self.block_size - 1, -1)
        hidden = torch.cat([embedded, masks], dim=2).flatten(1, 2)
        views = [View(mask, own) for own in context]
        hidden = run_layers(self.target, self.layers, self.split_layer, hidden, positions.flatten(1), views)
        return self.norm(hidden).view(*positions.shape, -1)

    def forward_batch(self, batch: Batch) -> Tensor:
        """Return the hidden states [R, A, B, H] of a training batch; the bonus token is the token of the text."""
        with outputs(self.target, self.feature_layers) as kept:
            target_pass(self.target, batch, self.split_layer, with_hidden=False)
        context = self.context(torch.cat(kept, dim=-1), batch.position_ids)
        mask = blocks_mask(batch.document_ids, batch.anchors, self.block_size, "auto")
        return self(context, batch.input_ids.gather(1, batch.anchors), batch.slot_positions(), mask)

    def logits(self, hidden: Tensor, *_: Tensor | None) -> Tensor:
        """Compute logits [..., V] with the target's head."""
        return self.target.get_output_embeddings()(hidden)


@contextmanager
def outputs(target: PreTrainedModel, layers: list[int]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the given target layers, in order, while the context is active."""
    kept: list[Tensor] = []
    hooks = [target.model.layers[i].register_forward_hook(lambda *call: kept.append(call[-1])) for i in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def train(draft: Reference, batches: list[Batch] | Iterator[Batch], *, steps: int, **how: Any) -> list[float]:
    """Train the drafter. Return the loss of each step.

    Args:
        batches: one per step.
        how: objective, chunk, learning_rate, warmup_ratio, clip, and autocast, the context of forward passes.
    """
    parameters = list(draft.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=how["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, how["warmup_ratio"]))
    losses = []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for batch in batches:
            with how["autocast"]:
                hidden = draft.forward_batch(batch)
                loss, weight, _ = block_loss(
                    draft.logits, hidden, batch, objective=how["objective"], chunk=how["chunk"]
                )
            optimizer.zero_grad()
            (loss / weight.clamp(min=1e-6)).backward()
            nn.utils.clip_grad_norm_(parameters, how["clip"])
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach() / weight))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses


def training_batches(config: DictConfig, resources: Resources) -> Iterator[Batch]:
    """Yield the batches of both stages, in order."""
    for stage in TRAINED:
        settings = replace(BatchSettings.of_stage(config, stage), micro_batch_size=None)
        drawn = TrainingBatches(resources.rows[0], settings)
        yield from (drawn.batch(step).to(resources.target.device) for step in range(settings.steps))


class Decoder:
    """Decoding state of one prompt: the target's cache, and the drafter's keys and values of the same tokens."""

    def __init__(self, draft: Reference) -> None:
        self.draft, self.target = draft, draft.target
        self.cache, self.pairs = DynamicCache(), None

    def verify(self, tokens: list[int]) -> list[int]:
        """Append tokens to the caches. Return the target's greedy choice after each of them."""
        before = self.cache.get_seq_length()
        ids = torch.tensor([tokens], device=self.target.device)
        with outputs(self.target, self.draft.feature_layers) as kept:
            logits = forward_cached(self.target, ids, self.cache).logits[0]
        positions = torch.arange(before, before + len(tokens), device=ids.device)[None]
        new = self.draft.context(torch.cat(kept, dim=-1), positions)
        old = self.pairs or [tuple(part[:, :, :0] for part in pair) for pair in new]
        self.pairs = [
            tuple(torch.cat(parts, dim=2) for parts in zip(*both, strict=True)) for both in zip(old, new, strict=True)
        ]
        return logits.argmax(-1).tolist()

    def forget(self, length: int) -> None:
        """Crop the caches to the first `length` tokens."""
        crop(self.cache, length)
        self.pairs = [tuple(part[:, :, :length] for part in pair) for pair in self.pairs]

    def drafts(self, bonus: int) -> list[int]:
        """Return the B-1 greedy drafts after a bonus token."""
        at = self.cache.get_seq_length() + torch.arange(self.draft.block_size, device=self.target.device)
        hidden = self.draft(self.pairs, torch.tensor([[bonus]], device=at.device), at[None, None])
        return self.draft.logits(hidden[0, 0, 1:]).argmax(-1).tolist()


@torch.inference_mode()
def decode(draft: Reference, prompt: list[int], max_new_tokens: int) -> tuple[list[int], list[int]]:
    """Draft and verify greedily, with all drafts verified. Return the answer and the accepted drafts of each step."""
    stop, decoder, tokens, accepted = stop_tokens(draft.target), Decoder(draft), [], []
    bonus = decoder.verify(prompt)[-1]
    while len(tokens) + 1 < max_new_tokens and bonus not in stop:
        length = decoder.cache.get_seq_length()
        drafts = decoder.drafts(bonus)[: max_new_tokens - len(tokens) - 1]
        chosen = decoder.verify([bonus, *drafts])
        right = next((i for i, pair in enumerate(zip(drafts, chosen, strict=False)) if pair[0] != pair[1]), len(drafts))
        kept = [bonus, *drafts[:right]]
        end = next((i for i, token in enumerate(kept) if token in stop), None)
        if end is not None:
            return tokens + kept[: end + 1], [*accepted, end]
        tokens, accepted, bonus = tokens + kept, [*accepted, right], chosen[right]
        decoder.forget(length + len(kept))
    return [*tokens, bonus][:max_new_tokens], accepted


def compare(config: DictConfig, resources: Resources, draft: Reference) -> dict[str, Any]:
    """Measure τ on the first benchmark, and count the outputs that equal the target's own."""
    how = decoding_settings(config)
    settings = active_settings(resources.target)
    if settings:
        raise UserError(
            f"model.target: its generation_config sets {settings}; expected no such defaults, because this script "
            "supports only plain greedy decoding. Choose another target."
        )
    name, conversations = next(iter(resources.benchmarks.items()))
    prompts = own_answers(resources.target, resources.encoder, name, conversations, how, draft.block_size)
    found = [decode(draft, tokens, how.max_new_tokens) for tokens in tqdm(prompts.tokens, desc=name, unit="prompt")]
    steps = [accepted for _, accepted in found]
    low, high = tau_interval(steps)
    return {
        "tau": mean_acceptance_length([count for own in steps for count in own]),
        "low": low,
        "high": high,
        "verify_steps": sum(map(len, steps)),
        "identical": sum(answer == own for (answer, _), own in zip(found, prompts.answers, strict=True)),
        "prompts": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=3, help="number of draft layers")
    parser.add_argument(
        "--from-target", action="store_true", help="initialize the layers from the target's last layers"
    )
    parser.add_argument("overrides", nargs="*", help="settings, as for `python -m train`")
    options = parser.parse_args()
    config = composed(options.overrides)
    check_settings(config, options.overrides)
    resources, where = Resources(config), device(config)
    resources.check("attention_tuning")
    torch.manual_seed(config.seed)
    target = resources.target.to(where)
    shape = {"num_layers": options.layers, "block_size": config.model.draft.block_size}
    draft = Reference(target, **shape, from_target=options.from_target).to(where)
    stage, mixed = config.stage.attention_tuning, config.trainer.precision == "bf16-mixed"
    steps = sum(config.stage[name].steps for name in TRAINED)
    objective: Objective = instantiate(config.objective)
    train(
        draft,
        training_batches(config, resources),
        steps=steps,
        objective=objective,
        chunk=stage.module.chunk,
        learning_rate=options.learning_rate,
        warmup_ratio=stage.module.warmup_ratio,
        clip=stage.gradient_clip,
        autocast=torch.autocast(where, torch.bfloat16) if mixed else nullcontext(),
    )
    found = compare(config, resources, draft)
    settings = {"learning_rate": options.learning_rate, "layers": options.layers, "from_target": options.from_target}
    settings |= {"steps": steps, "seed": config.seed, "parameters": sum(p.numel() for p in draft.parameters())}
    write_json(Path(config.run_dir) / "reference.json", settings | found)
    print("| parameters | steps | learning rate | seed | τ (95%) | verify steps | identical |")
    print(
        f"| {settings['parameters']:,} | {steps:,} | {options.learning_rate:g} | {config.seed} "
        f"| {found['tau']:.3f} ({found['low']:.2f}-{found['high']:.2f}) | {found['verify_steps']:,} "
        f"| {found['identical']}/{found['prompts']} |"
    )


if __name__ == "__main__":
    main()
