"""FlexDraft decoding for plain transformers: the target drafts with its own last layers, and verifies in one pass.

    target.generate(**inputs, max_new_tokens=256, custom_generate="<this repository>", trust_remote_code=True)

The output is the target's own, since a draft is kept only if it is the token that the target itself chooses there:
token for token, greedy or, of one prompt under the same seed, sampled, but for ties within rounding. Method: FlexDraft,
arXiv 2605.20022, sequential draft-then-verify. The rows of a batch are decoded one after the other, so a batch is no
faster than its rows alone. Needs torch, transformers (4.57 or newer), safetensors and huggingface_hub.

Arguments beside those of `generate`, which prepares logits processors, sampling and stopping criteria as ever:
    drafter: directory or Hub id of the drafter; None: that of `custom_generate`.
    revision, token: of a Hub id.
    calibrate: False leaves out what corrects the drafter's logits.
    selection, threshold: which drafts to verify (off | cumulative_product | min_confidence); None: as the drafter's
        config recommends.

With `return_dict_in_generate=True` the result has `sequences` and `acceptance_lengths`: for each row the tokens gained
by each verify step, the bonus token included.
"""

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import Cache, DynamicCache
from transformers.utils import ModelOutput

FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
RULES = ("off", "cumulative_product", "min_confidence")
# Arguments of `generate` that are not followed here: they need other passes of the target, or the batch as a whole.
ARGUMENTS = ("assistant_model", "negative_prompt_ids", "position_ids", "prefix_allowed_tokens_fn", "stop_strings")
SETTINGS = ("guidance_scale", "watermarking_config", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class FlexDraftOutput(ModelOutput):
    """[rows, tokens] prompts and answers, and the tokens gained by each verify step of each row."""

    sequences: torch.LongTensor | None = None
    acceptance_lengths: list[list[int]] | None = None


@torch.no_grad()
def generate(
    model,
    *,
    drafter=None,
    revision=None,
    token=None,
    calibrate=None,
    selection=None,
    threshold=None,
    streamer=None,
    **arguments,
):
    """See the top of this file.

    Raises:
        ValueError: no drafter, one for another target, or an argument that drafting cannot follow.
    """
    draft = _drafter(model, drafter or _source(), revision, token)
    said = draft.recommended
    calibrate = said.get("calibrate", True) if calibrate is None else calibrate
    selection = selection or said.get("selection", "cumulative_product")
    threshold = said.get("threshold", 0.01) if threshold is None else threshold
    if selection not in RULES:
        raise ValueError(f"selection={selection!r}: expected one of {', '.join(RULES)}.")
    _refuse([name for name in ARGUMENTS if arguments.get(name) is not None])

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        _check(generation_config, input_ids, prepared)
        mask = prepared.get("attention_mask")  # None: no padding
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = input_ids.to(model.get_input_embeddings().weight.device)
        texts, gained = [], []
        for row, kept in zip(prompts, mask.bool(), strict=True):
            texts.append(Text(row, generation_config, logits_processor, stopping_criteria, streamer))
            prompt = row[kept.to(row.device)].tolist()
            if not prompt:
                raise ValueError("A prompt is empty; decoding needs at least one token to continue.")
            _check_rope(model.config, len(prompt), texts[-1].room, draft.size)
            gained.append(_decode(model, draft, prompt, texts[-1], calibrate, selection, threshold))
        if streamer is not None:
            streamer.end()
        pad = generation_config._pad_token_tensor
        answers = [text.ids[0, : text.length] for text in texts]
        sequences = nn.utils.rnn.pad_sequence(answers, True, 0 if pad is None else pad.item()).to(input_ids.device)
        return FlexDraftOutput(sequences, gained) if generation_config.return_dict_in_generate else sequences

    # The class's own: the instance may have another in its place.
    return type(model).generate(model, streamer=streamer, custom_generate=decode, **arguments)


def _decode(model, draft, prompt, text, calibrate, selection, threshold):
    """One prompt, said to the end. Returns how many tokens each verify step gained."""
    # Without a config: with one, layers with a sliding window forget what a rejected draft has pushed out.
    cache, gained = DynamicCache(), []
    bonus, ended = text.say(_logits(model, prompt, cache)[-1])
    while not ended:
        anchor = cache.get_seq_length()
        drafts, confidence = draft.block(cache, anchor, bonus, calibrate)
        drafts = drafts[: min(_worth(confidence, selection, threshold), text.room)]
        logits = _logits(model, [bonus, *drafts], cache)
        gained.append(1)
        for drafted, after in zip([*drafts, None], logits, strict=True):
            bonus, ended = text.say(after)
            if bonus != drafted:
                break
            gained[-1] += 1
            if ended:
                break
        _crop(cache, anchor + gained[-1])
    return gained


def _logits(model, tokens, cache):
    """[tokens, V] of the target; the cache grows by the tokens."""
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    first = cache.get_seq_length() == 0  # of a prompt, the last alone are read
    named = {_cache_name(type(model)): cache}
    return model(input_ids=ids, use_cache=True, logits_to_keep=int(first), **named).logits[0]


def _cache_name(kind):
    """What a model's or a layer's forward calls the cache: `cache` from transformers 5.24 on."""
    names = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _crop(cache, length):
    """Forget what lies behind the first tokens; not `cache.crop`, whose meaning differs between versions."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _worth(confidence, selection, threshold):
    """How many leading drafts to verify, at least 1, from their probabilities [B-1] ("Flex Decoding")."""
    if selection == "off":
        return len(confidence)
    likely = confidence.cumprod(-1) if selection == "cumulative_product" else confidence
    return max(1, int((likely >= threshold).long().cumprod(-1).sum()))


class Text:
    """The tokens of one row, its padding included: what `generate` shows its processors and criteria."""

    def __init__(self, prompt, config, processors, criteria, streamer):
        self.length = len(prompt)
        self.ids = torch.cat([prompt, prompt.new_zeros(config.max_length - self.length)])[None]
        self.sample, self.processors, self.criteria, self.streamer = config.do_sample, processors, criteria, streamer

    @property
    def room(self):
        """How many tokens it may still take."""
        return self.ids.shape[1] - self.length

    def say(self, logits):
        """The target's next token, from its logits [V]: the most likely one, or a draw; and whether it is the last.

        Called once for each token of the text, in order: so draws are those of `generate` itself.
        """
        logits = logits[None].to(self.ids.device, torch.float32, copy=True)
        scores = self.processors(self.ids[:, : self.length], logits)
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sample else scores.argmax(-1)
        self.ids[:, self.length] = chosen
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(chosen.cpu())
        return int(chosen), bool(self.criteria(self.ids[:, : self.length], None).all())


def _refuse(names):
    if names:
        raise ValueError(f"Drafting does not follow {', '.join(names)}; leave it out, or decode without the drafter.")


def _check(settings, input_ids, prepared):
    """
    Raises:
        ValueError: what `generate` has prepared, and cannot be decoded by drafting.
    """
    mode = settings.get_generation_mode()
    _refuse([] if mode in ("greedy_search", "sample") else [mode.value.replace("_", " ")])
    found = [name for name in SETTINGS if getattr(settings, name, None) not in (None, 0, 1)]  # which change nothing
    _refuse(found + [name for name in OUTPUTS if getattr(settings, name, None)])
    filled = any(isinstance(value, Cache) and value.get_seq_length() for value in prepared.values())
    if not input_ids.shape[1] or filled:
        raise ValueError("Give the whole prompt as input_ids: drafting takes no inputs_embeds, and no filled cache.")


def _check_rope(config, length, room, size):
    """Candidates and slots lie behind the end of the text: they must not take RoPE beyond where it changes.

    Behind that, `longrope` stays as it is; `dynamic` changes with each token.

    Raises:
        ValueError: they might.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    holders = (rope.get("original_max_position_embeddings"), getattr(config, "original_max_position_embeddings", None))
    limit = next(filter(None, holders), config.max_position_embeddings)
    changing = kind == "dynamic" or (kind == "longrope" and length <= limit)
    if changing and length + room + 2 * size > limit:
        raise ValueError(
            f"{length} tokens and {room} new ones, with two blocks of {size} behind them, pass position {limit}, where "
            "this model's RoPE changes. Choose fewer new tokens."
        )


def _source():
    """What `generate` was given as `custom_generate`: transformers keeps it to itself, but for its own frame."""
    frame = inspect.currentframe()
    while frame is not None:
        given = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(given, str):
            return given
        frame = frame.f_back
    raise ValueError('Where is the drafter? Give drafter="directory or Hub id".')


def _drafter(model, source, revision, token):
    """The drafter, kept beside the model: a second call does not read it again."""
    directory = Path(source)
    if not directory.is_dir():
        directory = Path(snapshot_download(source, revision=revision, token=token, allow_patterns=FILES))
    files = sorted(file for pattern in FILES for file in directory.glob(pattern))
    key = [model.device, model.dtype, model.config.vocab_size]
    key += [(str(file.resolve()), file.stat().st_mtime_ns) for file in files]
    known = getattr(model, "_flexdraft", None)
    if known is None or known[0] != key:
        known = key, Drafter(model, directory)
        object.__setattr__(model, "_flexdraft", known)  # no part of the model: neither moved nor saved with it
    return known[1]


class Drafter:
    """The target's last layers with attention of their own, and what corrects their logits."""

    def __init__(self, model, directory):
        """
        Raises:
            ValueError: no drafter there, or one for another target.
        """
        config, settings = _settings(directory, model.config)
        if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise ValueError("This target is spread over devices; drafting needs all of it on one.")
        tensors = _tensors(directory)
        self.model, self.inner, self.size = model, model.model, config["block_size"]
        self.recommended = settings.get("recommended_decoding") or {}
        self.split = settings["target_layer_ids"][0]
        self.mask_embedding = tensors["mask_embedding"].to(model.device, model.dtype)
        self.layers = [
            _draft_layer(layer, tensors, f"layers.{i}.self_attn.")
            for i, layer in enumerate(self.inner.layers[self.split :])
        ]
        moved = {
            name: tensor.to(model.device, model.dtype) for name, tensor in tensors.items() if "layers." not in name
        }
        self.calibrator = moved if settings["enable_anchor_bias_logits"] else None
        self.chain = moved if settings.get("chain_rank") else None
        self.bonus_slot = moved["bonus_slot.weight"] if settings.get("bonus_slot") else None
        self.window = getattr(model.config, "sliding_window", None)
        everywhere = ["sliding_attention" if self.window else "full_attention"] * model.config.num_hidden_layers
        self.kinds = (getattr(model.config, "layer_types", None) or everywhere)[self.split :]

    def block(self, cache, anchor, bonus, calibrate):
        """Drafts of slots 1 .. B-1 of the block at an anchor, as a list, and their probabilities [B-1].

        `cache` holds the tokens before the anchor; the block's own keys and values are gone from it afterwards.
        """
        hidden = self.mask_embedding.expand(1, self.size, -1)
        if self.bonus_slot is not None:
            known = nn.functional.linear(self._embedded(bonus), self.bonus_slot)
            hidden = torch.cat([hidden[:, :1] + known, hidden[:, 1:]], dim=1)
        positions = torch.arange(anchor, anchor + self.size, device=hidden.device)[None]
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            hidden = layer(
                hidden,
                attention_mask=self._mask(positions[0], kind, hidden.dtype),
                position_ids=positions,
                **{_cache_name(type(layer)): cache},
                **self._rope(hidden, positions, kind),
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        _crop(cache, anchor)
        hidden = self.inner.norm(hidden)[0, 1:]
        logits = self.model.get_output_embeddings()(hidden)
        if calibrate and self.calibrator:
            logits = logits + _correction(self.calibrator, "anchor_bias_mlp", self._embedded(bonus), hidden)
        before = bonus
        for slot in range(len(logits) if calibrate and self.chain else 0):
            embedded = self._embedded(before)
            embedded = nn.functional.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
            logits[slot] += _correction(self.chain, "chain_mlp", embedded, hidden[slot : slot + 1])[0]
            before = int(logits[slot].argmax())
        best, drafts = logits.max(-1)
        return drafts.tolist(), (best.float() - logits.float().logsumexp(-1)).exp()

    def _embedded(self, token):
        return self.model.get_input_embeddings()(torch.tensor([token], device=self.model.device))

    def _mask(self, positions, kind, dtype):
        """[1, 1, B, anchor + B] added to scores: a slot sees its block, and of the tokens before those that its layer's
        window would show a token in its place. None without a window: it sees all there is."""
        if kind != "sliding_attention":
            return None
        keys = torch.arange(int(positions[-1]) + 1, device=positions.device)
        seen = keys > positions[:, None] - self.window  # and all of the block, which is no longer than a window
        hidden = torch.zeros(seen.shape, dtype=dtype, device=keys.device).masked_fill(~seen, torch.finfo(dtype).min)
        return hidden[None, None]

    def _rope(self, hidden, positions, kind):
        """What the architecture's layers take for RoPE. Gemma 3 has another base where it has a window."""
        if hasattr(self.inner, "rotary_emb_local"):  # in transformers 4
            both = {"global": self.inner.rotary_emb, "local": self.inner.rotary_emb_local}
            return {f"position_embeddings_{name}": rotary(hidden, positions) for name, rotary in both.items()}
        parts = (getattr(self.model.config, "rope_parameters", None) or {}).values()
        by_kind = (kind,) if any(isinstance(part, dict) for part in parts) else ()
        return {"position_embeddings": self.inner.rotary_emb(hidden, positions, *by_kind)}


def _correction(tensors, name, embedded, hidden):
    """[slots, V] `W2 SiLU(W1 [embedded ; h] + b1) + b2` for a token's embedding [1, H] and hidden states [slots, H]."""
    (w1, b1), (w2, b2) = ((tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"]) for i in (0, 2))
    inner = nn.functional.linear(torch.cat([embedded.expand_as(hidden), hidden], dim=-1), w1, b1)
    return nn.functional.linear(nn.functional.silu(inner), w2, b2)


def _draft_layer(target_layer, tensors, prefix):
    """The target's layer with the drafter's attention; norms and FFN stay the target's."""
    attention = copy.deepcopy(target_layer.self_attn)
    attention.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    attention.is_causal = False  # slots of a block see each other in both directions
    attention.config = copy.deepcopy(attention.config)
    if attention.config._attn_implementation not in ("sdpa", "eager"):  # others take no mask of this form
        attention.config._attn_implementation = "sdpa"
    layer = copy.copy(target_layer)
    layer._modules = target_layer._modules | {"self_attn": attention}
    return layer


def _settings(directory, target):
    """The drafter's config, and what of it is its own, once it is known to fit a target's config."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = config.get("flexdraft_config") or config.get("dflash_config")
    if not settings:
        raise ValueError(f"{directory}: no drafter there (config.json with flexdraft_config expected).")
    names = {"model_type": "model_type", "num_target_layers": "num_hidden_layers"}
    names |= {"hidden_size": "hidden_size", "vocab_size": "vocab_size"}
    for key, name in names.items():
        value = getattr(target, name, None)
        if config.get(key) != value:
            raise ValueError(f"{directory}: a drafter for {key}={config.get(key)}, but this model has {value}.")
    return config, settings


def _tensors(directory):
    """What the drafter owns. An export may hold tensors of the target's beside it, which the target has already."""
    index, tensors = directory / "model.safetensors.index.json", {}
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(files):
        with safe_open(directory / file, "pt") as shard:
            names = shard.keys()
            own = [name for name in names if ".self_attn." in name or not name.startswith(("layers.", "norm."))]
            tensors |= {name: shard.get_tensor(name) for name in own}
    return tensors
