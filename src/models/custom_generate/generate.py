"""FlexDraft decoding for plain transformers: the target drafts with its own last layers, and verifies in one pass.

    target.generate(**inputs, max_new_tokens=256, custom_generate="<this repository>", trust_remote_code=True)

The output is the target's own: greedy token for token, sampled in distribution, since a draft is kept only if it is the
token that the target itself chooses there. FlexDraft, arXiv 2605.20022: sequential draft-then-verify. Rows of a batch
are decoded one after the other. Needs torch, transformers (4.57 or newer), safetensors and huggingface_hub.

Arguments beside those of `generate`:
    drafter: directory or Hub id of the drafter; None: that of `custom_generate`.
    revision: of a Hub id.
    calibrate: False leaves the calibrator out.
    selection, threshold: which drafts to verify (off | cumulative_product | min_confidence); None: as the drafter's
        config recommends.

With `return_dict_in_generate=True` the result also has `acceptance_lengths`: for each row the tokens gained by each
verify step, the bonus token included.
"""

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
# Settings of `generate` that are followed here; any other that is not at its default is refused.
FOLLOWED = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
FOLLOWED |= {"bos_token_id", "eos_token_id", "pad_token_id", "return_dict_in_generate", "use_cache"}
FOLLOWED |= {"transformers_version", "use_model_defaults", "compile_config", "disable_compile"}


@dataclass
class FlexDraftOutput(ModelOutput):
    """[rows, tokens] prompts and answers, and the tokens gained by each verify step of each row."""

    sequences: torch.LongTensor | None = None
    acceptance_lengths: list[list[int]] | None = None


@torch.no_grad()
def generate(
    model,
    inputs=None,
    generation_config=None,
    logits_processor=None,
    *,
    input_ids=None,
    attention_mask=None,
    drafter=None,
    revision=None,
    calibrate=None,
    selection=None,
    threshold=None,
    **kwargs,
):
    """See the top of this file."""
    draft = _drafter(model, drafter or _source(), revision)
    config = _settings(model, generation_config, kwargs)
    input_ids = inputs if input_ids is None else input_ids
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    said = draft.recommended
    how = {
        "choose": _choice(config, logits_processor),
        "stop": set(_tokens(config.eos_token_id)),
        "calibrate": said.get("calibrate", True) if calibrate is None else calibrate,
        "selection": selection or said.get("selection", "cumulative_product"),
        "threshold": said.get("threshold", 0.01) if threshold is None else threshold,
    }
    rows, room = [], _room(config, input_ids.shape[1])
    for row, kept in zip(input_ids, mask.bool(), strict=True):
        if not kept.any():
            raise ValueError("A prompt is empty; decoding needs at least one token to continue.")
        draft.check_room(int(kept.sum()), room)
        rows.append(_decode(model, draft, row[kept].tolist(), room, **how))
    longest = max(len(tokens) for tokens, _ in rows)
    pad = next(iter(_tokens(config.pad_token_id) + _tokens(config.eos_token_id)), 0)
    answers = [tokens + [pad] * (longest - len(tokens)) for tokens, _ in rows]
    answers = torch.tensor(answers, dtype=input_ids.dtype, device=input_ids.device).view(len(rows), longest)
    sequences = torch.cat([input_ids, answers], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return FlexDraftOutput(sequences=sequences, acceptance_lengths=[gained for _, gained in rows])


def _decode(model, draft, prompt, room, *, choose, stop, calibrate, selection, threshold):
    """One prompt. Returns its new tokens, and how many of them each verify step gained."""
    tokens, gained = [], []
    # Without a config: with one, layers with a sliding window forget what a rejected draft has pushed out.
    cache = DynamicCache()
    bonus = choose(prompt, _logits(model, prompt, cache)[-1])
    while len(tokens) + 1 < room and bonus not in stop:
        anchor = cache.get_seq_length()
        drafts, confidence = draft.block(cache, anchor, bonus if calibrate else None)
        count = min(_worth(confidence, selection, threshold), room - len(tokens) - 1)
        candidates = [bonus, *drafts[:count]]
        logits = _logits(model, candidates, cache)
        before, accepted = prompt + tokens, 0
        while True:
            chosen = choose(before + candidates[: accepted + 1], logits[accepted])
            if candidates[accepted + 1 : accepted + 2] != [chosen]:
                break
            accepted += 1
        _crop(cache, anchor + accepted + 1)
        kept = candidates[: accepted + 1]
        end = next((i + 1 for i, token in enumerate(kept) if token in stop), len(kept))
        tokens += kept[:end]
        gained.append(end)
        if tokens[-1] in stop or len(tokens) >= room:
            return tokens, gained
        bonus = chosen
    return tokens + [bonus], gained


def _logits(model, tokens, cache):
    """[tokens, V] of the target; the cache grows by the tokens."""
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]


def _crop(cache, length):
    """Forget what lies behind the first tokens; not `cache.crop`, whose meaning differs between versions."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _worth(confidence, selection, threshold):
    """How many leading drafts to verify, at least 1, from their probabilities [B-1] ("Flex Decoding")."""
    if selection == "off":
        return len(confidence)
    if selection not in ("cumulative_product", "min_confidence"):
        raise ValueError(f"selection={selection!r}: expected off, cumulative_product or min_confidence.")
    likely = confidence.cumprod(-1) if selection == "cumulative_product" else confidence
    return max(1, int((likely >= threshold).long().cumprod(-1).sum()))


def _choice(config, processors):
    """The next token from all tokens so far and the target's logits [V]: the most likely one, or a draw."""
    processors = LogitsProcessorList(processors or [])
    if config.repetition_penalty not in (None, 1.0):
        processors.insert(0, RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            processors.append(TemperatureLogitsWarper(float(config.temperature)))
        top_k = 50 if config.top_k is None else config.top_k  # as in `generate`
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if config.top_p is not None and config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))

    def choose(tokens, logits):
        scores = logits[None].float()
        if processors:
            scores = processors(torch.tensor([tokens], device=logits.device), scores)
        return int(torch.multinomial(scores.softmax(-1), 1) if config.do_sample else scores.argmax(-1))

    return choose


def _settings(model, generation_config, given):
    """The settings of `generate`: those of the call, of its config, of the model's."""
    config = copy.deepcopy(generation_config or model.generation_config)
    for name, value in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    unused = config.update(**{key: value for key, value in given.items() if value is not None})
    # What counts as not set: a config's defaults (transformers 4), or what `generate` puts for None (5).
    plain = GenerationConfig().to_dict() | getattr(config, "_get_default_generation_params", dict)()
    differing = {name for name, value in config.to_dict().items() if value not in (None, False, plain.get(name))}
    differing |= {name for name, value in unused.items() if value is not False}
    refused = sorted(name for name in differing - FOLLOWED if not name.startswith("_"))
    if refused:
        raise ValueError(f"Drafting does not follow {', '.join(refused)}; set it to its default, or decode without.")
    return config


def _room(config, length):
    """How many new tokens there may be; 20 where nothing is said, as in `generate`."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    room = 20 if config.max_length in (None, 20) else config.max_length - length
    if room < 1:
        raise ValueError(f"max_length={config.max_length}, but the prompt has {length} tokens; give max_new_tokens.")
    return room


def _tokens(ids):
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _source():
    """What `generate` was given as `custom_generate`: transformers keeps it to itself, but for its own frame."""
    frame = inspect.currentframe()
    while frame is not None:
        given = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(given, str):
            return given
        frame = frame.f_back
    raise ValueError('Where is the drafter? Give drafter="directory or Hub id".')


def _drafter(model, source, revision):
    """The drafter, kept beside the model: a second call does not read it again."""
    directory = Path(source)
    if not directory.is_dir():
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=FILES))
    files = sorted(directory.glob("*.safetensors"))
    key = [(str(file.resolve()), file.stat().st_mtime_ns) for file in (*files, directory / "config.json")]
    key += [model.device, model.dtype, model.get_input_embeddings().weight.shape]
    known = getattr(model, "_flexdraft", None)
    if known is None or known[0] != key:
        known = key, Drafter(model, directory, files)
        object.__setattr__(model, "_flexdraft", known)  # no part of the model: neither moved nor saved with it
    return known[1]


class Drafter:
    """The target's last layers with attention of their own, and the calibrator."""

    def __init__(self, model, directory, files):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        settings = config.get("flexdraft_config") or config["dflash_config"]
        self.recommended = settings.get("recommended_decoding") or {}
        self.model, self.inner, self.size = model, model.model, config["block_size"]
        _check_target(config, model.config, directory)
        if len({p.device for p in model.parameters()}) > 1 or any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise ValueError("This target is spread over devices; drafting needs all of it on one.")
        if hasattr(self.inner, "rotary_emb_local"):
            raise ValueError(f"{config['model_type']} drafters need transformers 5.")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        self.mask_embedding = tensors["mask_embedding"].to(model.device, model.dtype)
        self.split = settings["target_layer_ids"][0]
        own = copy.deepcopy(model.config)
        if own._attn_implementation not in ("sdpa", "eager"):  # others take no mask of this form
            own._attn_implementation = "sdpa"
        self.layers = []
        for i, target_layer in enumerate(self.inner.layers[self.split :]):
            prefix = f"layers.{i}.self_attn."
            weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.layers.append(_draft_layer(target_layer, weights, model.config, own))
        self.calibrator = None
        if settings["enable_anchor_bias_logits"]:
            parts = [(tensors[f"anchor_bias_mlp.{i}.weight"], tensors[f"anchor_bias_mlp.{i}.bias"]) for i in (0, 2)]
            self.calibrator = [tuple(tensor.to(model.device, model.dtype) for tensor in pair) for pair in parts]
        kinds = getattr(model.config, "layer_types", None)
        window = getattr(model.config, "sliding_window", None)
        self.kinds = kinds or ["sliding_attention" if window else "full_attention"] * model.config.num_hidden_layers
        self.windows = [window if kind == "sliding_attention" else None for kind in self.kinds]
        ropes = (getattr(model.config, "rope_parameters", None) or {}).values()
        self.rope_by_kind = any(isinstance(rope, dict) for rope in ropes)

    def check_room(self, length, room):
        """Slots lie behind the end of the text: they must not be what takes RoPE beyond the length where it changes."""
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "dynamic"):
            return
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = limit or config.max_position_embeddings
        if length <= limit < length + room + 2 * self.size:
            raise ValueError(
                f"{length} tokens and {room} new ones, with two blocks of {self.size} behind them, pass position "
                f"{limit}, where this model's RoPE changes. Choose fewer new tokens."
            )

    def block(self, cache, anchor, bonus):
        """Drafts of slots 1 .. B-1 of the block at an anchor, as a list, and their probabilities [B-1].

        `cache` holds the tokens before the anchor; the block's own keys and values are gone from it afterwards.
        """
        device = self.mask_embedding.device
        hidden = self.mask_embedding.expand(1, self.size, -1)
        positions = torch.arange(anchor, anchor + self.size, device=device)[None]
        for i, layer in enumerate(self.layers):
            number = self.split + i
            kind = (self.kinds[number],) if self.rope_by_kind else ()
            hidden = layer(
                hidden,
                attention_mask=self._mask(positions[0], anchor, self.windows[number], hidden.dtype),
                position_ids=positions,
                past_key_values=cache,
                cache_position=positions[0],
                position_embeddings=self.inner.rotary_emb(hidden, positions, *kind),
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        _crop(cache, anchor)
        hidden = self.inner.norm(hidden)[0, 1:]
        logits = self.model.get_output_embeddings()(hidden)
        if bonus is not None and self.calibrator:
            (w1, b1), (w2, b2) = self.calibrator
            embedded = self.model.get_input_embeddings()(torch.tensor([bonus], device=device)).expand_as(hidden)
            inner = nn.functional.silu(nn.functional.linear(torch.cat([embedded, hidden], dim=-1), w1, b1))
            logits = logits + nn.functional.linear(inner, w2, b2)
        best, drafts = logits.max(-1)
        return drafts.tolist(), (best.float() - logits.float().logsumexp(-1)).exp()

    def _mask(self, positions, anchor, window, dtype):
        """[1, 1, B, anchor + B] added to scores: a slot sees the tokens before the anchor, within its layer's window,
        and its whole block."""
        keys = torch.arange(anchor + self.size, device=positions.device)
        seen = keys[None] >= anchor
        seen = seen | ((keys > positions[:, None] - window) if window else True)
        return torch.zeros(seen.shape, dtype=dtype, device=keys.device).masked_fill(~seen, torch.finfo(dtype).min)[
            None, None
        ]


def _draft_layer(target_layer, weights, config, own_config):
    """The target's layer with the drafter's attention; norms and FFN stay the target's."""
    layer = copy.copy(target_layer)
    attention = copy.deepcopy(target_layer.self_attn, {id(config): own_config})
    attention.load_state_dict(weights)
    attention.is_causal = False  # slots of a block see each other in both directions
    layer._modules = target_layer._modules | {"self_attn": attention}
    return layer


def _check_target(config, target, directory):
    expected = {
        "model_type": target.model_type,
        "num_target_layers": target.num_hidden_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise ValueError(f"{directory}: a drafter for {key}={config.get(key)}, but this model has {value}.")
