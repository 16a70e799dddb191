"""FlexDraft decoding for plain transformers (4.57 or newer): the target drafts with its own last layers and verifies.

    target.generate(**inputs, max_new_tokens=256, custom_generate="<this repository>", trust_remote_code=True)

A draft is kept only if it equals the target's own choice, so the output is the target's own, whether greedy or sampled
(with the same seed); rounding may resolve near ties differently. Method: FlexDraft, arXiv 2605.20022. The rows of a
batch are decoded one after another, so batching does not make decoding faster.

Arguments beyond those of `generate`; None uses what the drafter's evaluation recommends:
    drafter: directory or Hub id of the drafter; None: the value of `custom_generate`. revision, token: for a Hub id.
    calibrate: False disables the corrections to the drafter's logits.
    selection, threshold: rule for which drafts to verify (off | cumulative_product | min_confidence) and its threshold.
With `return_dict_in_generate`, the output has `acceptance_lengths`: for each row, the tokens gained per verify step.
"""

import copy
import inspect
import json
import warnings
from numbers import Real
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "recommended_decoding.json"]
CACHES = ("cache", "past_key_values")  # names of the cache argument in transformers: since 5.24, and earlier
TOKENS = torch.arange(3, 91, 11)  # rows of the embedding and LM head in the fingerprint
# Supported arguments of `generate`, generation settings, and model inputs prepared by `generate`. Anything else is
# rejected by name unless it has its default value: it may require forward passes that this decoder does not run.
ARGUMENTS = """inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer
    use_model_defaults"""
SETTINGS = """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample use_cache
    cache_implementation max_cache_len temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
    repetition_penalty no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    num_return_sequences return_dict_in_generate pad_token_id bos_token_id eos_token_id decoder_start_token_id
    compile_config disable_compile prefill_chunk_size early_stopping length_penalty low_memory transformers_version
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind max_matching_ngram_size assistant_ensemble_weight is_assistant"""
NEUTRAL = {"guidance_scale": 1, "penalty_alpha": 0}  # in addition to transformers' defaults
EXACT = (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window")  # unquantized caches
PREPARED = ("attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep")
UNKNOWN = f". Tested with transformers 4.57.3 and 5.24.0, not {transformers.__version__}; install one of those."
RECOMMENDED = {"calibrate": True, "selection": "cumulative_product", "threshold": 0.01}  # if there is no recommendation
OWN_LOOP = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")  # bypassed here


class Refused(ValueError):
    """Raised for a damaged drafter, a mismatch between drafter and target, or an unsupported request."""


@torch.no_grad()
def generate(model, *, drafter=None, revision=None, token=None, **arguments):
    """Decode with drafting; the module docstring lists the arguments. Raises Refused, a ValueError."""
    given = {name: value for name in RECOMMENDED if (value := arguments.pop(name, None)) is not None}
    arguments = _arguments(model, arguments)
    draft, streamer = _drafter(model, drafter, revision, token), arguments.get("streamer")
    options = _options(draft.settings["recommended_decoding"] | given)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        put = (lambda _: None) if streamer is None else streamer.put
        end, sampled, pad = (getattr(generation_config, n) for n in ("max_length", "do_sample", "_pad_token_tensor"))
        masks = _token_mask(generation_config, input_ids, prepared)
        rows = [Row(draft, row[m].tolist(), end - len(row), options) for row, m in zip(input_ids, masks, strict=True)]
        # From here on as in `generate`: if there are stop tokens, finished rows are padded.
        padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        ids, active = input_ids, torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
        while active.any():
            for row, more in zip(rows, active.tolist(), strict=True):
                row.advance(end - ids.shape[1] if more or not padded else None)
            logits = torch.stack([row.logits for row in rows]).to(ids.device, torch.float32, copy=True)
            scores = logits_processor(ids, logits)
            chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if sampled else scores.argmax(-1)
            chosen = torch.where(active, chosen, pad.to(ids.device)) if padded else chosen
            for row, new in zip(rows, chosen.tolist(), strict=True):
                row.take(new)
            ids = torch.cat([ids, chosen[:, None]], dim=-1)
            put(chosen.cpu())
            active = active & ~stopping_criteria(ids, None)
        if streamer is not None:
            streamer.end()
        output = GenerateDecoderOnlyOutput(sequences=ids)
        output["acceptance_lengths"] = [row.gained for row in rows]
        return output if generation_config.return_dict_in_generate else ids

    # Call the class's method: the instance may override it.
    return type(model).generate(model, custom_generate=decode, **arguments)


class Row:
    """Decoding state of one row. Holds the target's logits [V] for its next token; one pass may compute several."""

    def __init__(self, draft, prompt, room, options):
        draft.check_rope(len(prompt), room)
        self.draft, (self.calibrate, self.selection, self.threshold) = draft, options
        # No config: with one, sliding-window layers would lose tokens that rejected drafts had pushed out.
        self.cache, self.drafts, self.gained = DynamicCache(), [], []
        self.pending, self.length = [*draft.target(self.cache, 0, prompt, 1)], len(prompt)  # tokens in the cache

    def advance(self, room):
        """Set `logits`. If none are left, draft and verify within `room` new tokens; None: the row has ended."""
        if not self.pending and room is not None:
            drafts, confidence = self.draft.block(self.cache, self.length, self.bonus, self.calibrate)
            likely = confidence.cumprod(-1) if self.selection == "cumulative_product" else confidence
            count = max(1, int((likely >= self.threshold).long().cumprod(-1).sum()))  # "Flex Decoding": at least 1
            self.drafts = drafts[: max(0, min(room, len(drafts) if self.selection == "off" else count))]
            tokens = [self.bonus, *self.drafts]
            self.pending = [*self.draft.target(self.cache, self.length, tokens, len(tokens))]
            if self.drafts and torch.stack(self.pending).isnan().any():  # overflow on a draft: rerun without drafts
                self.draft.crop(self.cache, self.length, *2 * [self.length + len(tokens)])
                self.drafts, self.pending = [], [*self.draft.target(self.cache, self.length, tokens[:1], 1)]
            self.length += 1 + len(self.drafts)
            self.gained.append(1)
        self.logits = self.pending[0] if self.pending else self.logits

    def take(self, token):
        """Append a token, which either accepts the next draft or rejects all remaining ones."""
        if self.drafts and token == self.drafts[0]:
            self.gained[-1] += 1
            self.drafts, self.pending = self.drafts[1:], self.pending[1:]
        elif self.pending:
            self.draft.crop(self.cache, self.length - len(self.drafts), self.length, self.length)
            self.length, self.bonus, self.drafts, self.pending = self.length - len(self.drafts), token, [], []


def _refuse(given):
    if names := sorted(name for name, value in given.items() if value is not None and value is not False):
        raise Refused(f"Drafting does not support {', '.join(names)}. Change the call, or decode without the drafter.")


def _arguments(model, arguments):
    """Check and convert the arguments for `generate`, which does not pass its tokenizer on to a decoding function."""
    others = {*inspect.signature(type(model).generate).parameters, "position_ids", "cache_position"}
    caches = {name: cache for name in CACHES if (cache := arguments.pop(name, None)) is not None}
    empty = [n for n, c in caches.items() if type(c) in (DynamicCache, StaticCache) and not c.get_seq_length()]
    refused = {f"{name} (only an empty cache; pass the full prompt)": name not in empty for name in caches}
    refused |= {name: arguments.get(name) for name in others - set(ARGUMENTS.split())}
    # PEFT hooks select adapters by row or, for Activated LoRA, by position; drafting runs different passes.
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if str(getattr(hook, "func", hook).__module__).startswith("peft.")]
    refused |= {f"{name} (PEFT)": True for hook in hooks for name in getattr(hook, "keywords", ())}
    for function in (getattr(model, name) for name in OWN_LOOP):
        function = getattr(function, "__func__", function)
        by = getattr(function, "__globals__", {}).get("__name__", "")
        what = f"inputs prepared by {getattr(function, '__qualname__', function)} in {by}"
        refused[what] = by.split(".")[0] != "transformers"
    _refuse(refused)
    tokenizer, strings = arguments.pop("tokenizer", None), arguments.pop("stop_strings", None)
    for config in (arguments.get("generation_config"), model.generation_config):
        strings = getattr(config, "stop_strings", None) if strings is None else strings
    if strings is None or tokenizer is None:  # transformers rejects stop strings without a tokenizer
        return arguments | {"stop_strings": strings}
    own = StopStringCriteria(tokenizer, strings)
    criteria = StoppingCriteriaList([own, *(arguments.get("stopping_criteria") or [])])
    return arguments | {"stopping_criteria": criteria, "stop_strings": None}


def _token_mask(settings, input_ids, prepared):
    """Return the mask of non-padding tokens [rows, tokens], after checking the settings and prepared inputs."""
    usual = vars(type(settings)()) | NEUTRAL | getattr(settings, "_get_default_generation_params", dict)()
    rest = [name for name in usual.keys() - SETTINGS.split() if name[0] != "_"]  # `generate` ignores others
    found = {name: value for name in rest if (value := getattr(settings, name, None)) != usual[name]}
    found[f"cache_implementation={settings.cache_implementation}"] = settings.cache_implementation not in EXACT
    _refuse(found | {n: v for n, v in prepared.items() if n not in PREPARED and not isinstance(v, Cache) and v != {}})
    mask = prepared.get("attention_mask")  # None: no padding
    kept = torch.ones_like(input_ids).bool() if mask is None else mask.to(input_ids.device).bool()
    if kept.ndim != 2 or kept.shape != input_ids.shape:
        raise Refused(f"attention_mask has shape {list(kept.shape)}, but input_ids has shape {list(input_ids.shape)}.")
    if not kept.any(-1).all():
        raise Refused("A prompt is empty; expected at least one token.")
    return kept


def _drafter(model, source, revision, token):
    """Load the drafter and cache it on the model. Without `source`, reads `custom_generate` from `generate`'s frame."""
    calls = [] if source else [call.frame.f_locals for call in inspect.stack(0) if call.function == "generate"]
    source = next((given for call in calls if isinstance(given := call.get("custom_generate"), str)), source)
    if not source:
        raise Refused('drafter=None: no drafter was given. Pass drafter="<directory or Hub id>".')
    hub = {"revision": revision, "token": token, "allow_patterns": FILES}
    directory = Path(source if Path(source).is_dir() else snapshot_download(source, **hub))
    files = sorted(file.resolve() for pattern in FILES for file in directory.glob(pattern))
    key = [model.device, model.dtype, model.config.vocab_size, *((str(f), f.stat().st_mtime_ns) for f in files)]
    if getattr(model, "_flexdraft", [None])[0] != key:
        new = key, _checked(directory, Drafter, model, directory)
        object.__setattr__(model, "_flexdraft", new)  # not a submodule: neither moved nor saved with the model
    return model._flexdraft[1]


def _checked(where, make, *arguments):
    """Call `make`, converting any failure into an error that names the file or directory."""
    try:
        return make(*arguments)
    except Exception as error:
        if isinstance(error, (Refused, MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise  # torch reports running out of CPU memory with this message
        found = f"{where}: damaged, or not a drafter for this target ({type(error).__name__}: {error})"
        raise Refused(f"{found}. Download or export it again, or use the target it was trained for.") from error


class Drafter:
    """The target's last layers with separate attention projections, and the modules that correct their logits."""

    def __init__(self, model, directory):
        config, settings = _settings(directory, model.config)
        self.model, self.inner, self.device, self.size = model, model.model, model.device, config["block_size"]
        if {parameter.device for parameter in model.parameters()} != {model.device} or model.device.type == "meta":
            raise Refused("The target is split across devices or offloaded; load it on a single device.")
        self.dtype = self._embedded(0).dtype  # compute dtype, which may differ from the weights' dtype
        self.tensors = {name: t.to(self.device, self.dtype) for name, t in _tensors(directory).items()}
        self.settings, self.split, self.vocabulary = settings, settings["target_layer_ids"][0], config["vocab_size"]
        self.layers = [self._layer(number) for number in range(self.split, len(self.inner.layers))]
        _checked(directory / "config.json", _compare, model, config.get("target_fingerprint") or {})
        self.window = getattr(model.config, "sliding_window", None)
        everywhere = ["sliding_attention" if self.window else "full_attention"] * len(self.inner.layers)
        self.kinds = (getattr(model.config, "layer_types", None) or everywhere)[self.split :]
        (self.names, self.cache_name), (self.layer_names, self.layer_cache) = _names(model), _names(self.layers[0])
        # Trial run: all tensors must exist, the cache must be used, and splitting a text must change only rounding.
        cache, full = DynamicCache(), self.target(DynamicCache(), 0, [1, 2, 3, 4], 1)
        self.target(cache, 0, [1, 2, 3], 1)
        self.block(cache, 3, 4, True)
        change, rounding = (self.target(cache, 3, [4], 1) - full).abs().max(), 0.01 if self.dtype.itemsize > 2 else 0.25
        if not change <= rounding * full.abs().max():
            raise Refused("The target's logits depend on the other tokens in a pass. Quantize only its weights.")

    def check_rope(self, length, room):
        """Check that drafts and slots after the text do not reach the length at which RoPE's angles change."""
        config, name = self.model.config, "original_max_position_embeddings"
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kind = rope.get("rope_type") or rope.get("type")
        limit = rope.get(name) or getattr(config, name, None) or config.max_position_embeddings
        if (kind == "dynamic" or (kind == "longrope" and length <= limit)) and length + room + 2 * self.size > limit:
            total = f"{length} prompt tokens, {room} new ones and two blocks of {self.size} exceed {limit} positions"
            raise Refused(f"{total}, beyond which the target's RoPE changes. Reduce max_new_tokens.")

    def target(self, cache, before, tokens, wanted):
        """Run the target on tokens that follow `before` cached ones. Return the last `wanted` logits [wanted, V]."""
        after = before + len(tokens)
        positions = torch.arange(before, after, device=self.device)[None]
        given = {"position_ids": positions, "use_cache": True, "logits_to_keep": wanted}
        given = {name: value for name, value in given.items() if name in self.names} | {self.cache_name: cache}
        logits = self.model(input_ids=torch.tensor([tokens], device=self.device), **given).logits
        self.crop(cache, after, after, after)
        if logits.shape[1] < wanted:
            raise Refused(f"A forward pass returned logits for {logits.shape[1]} tokens; expected {wanted}{UNKNOWN}")
        return logits[0, -wanted:]

    def crop(self, cache, length, early, late):
        """Truncate the cache to `length` tokens, from `early` in non-draft layers and `late` in draft layers."""
        layers = [vars(layer) for layer in getattr(cache, "layers", ())]
        held = [{name: t for name, t in layer.items() if isinstance(t, Tensor) and t.ndim == 4} for layer in layers]
        found = [[t.shape[2] for t in pair.values()] for pair in held]
        expected = [early] * self.split + [late] * (len(self.inner.layers) - self.split)
        if found != [[tokens, tokens] for tokens in expected]:
            raise Refused(f"After a pass, the cache layers hold {found} tokens; expected {expected}{UNKNOWN}")
        for layer, pair in zip(cache.layers, held, strict=True):
            vars(layer).update({name: t[..., :length, :] for name, t in pair.items()})
        if cache.get_seq_length() != length:
            raise Refused(f"A cache truncated to {length} tokens reports length {cache.get_seq_length()}{UNKNOWN}")

    def block(self, cache, anchor, bonus, calibrate):
        """Return the drafts for slots 1 .. B-1 at `anchor`, and their probabilities [B-1]. The cache is unchanged."""
        hidden = self.tensors["mask_embedding"].repeat(1, self.size, 1)
        if self.settings.get("bonus_slot"):
            hidden[:, 0] += nn.functional.linear(self._embedded(bonus), self.tensors["bonus_slot.weight"])
        positions = torch.arange(anchor, anchor + self.size, device=self.device)[None]
        # Additive mask: a slot attends to its block and the tokens in its window. None: to everything.
        unseen = torch.arange(anchor + self.size, device=self.device) <= positions[0, :, None] - (self.window or 0)
        masks = {"sliding_attention": (torch.finfo(self.dtype).min * unseen.to(self.dtype))[None, None]}
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            given = {"attention_mask": masks.get(kind), **self._rope(hidden, positions, kind)}
            hidden = layer(hidden, position_ids=positions, **{self.layer_cache: cache}, **given)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        self.crop(cache, anchor, anchor, anchor + self.size)
        hidden = self.inner.norm(hidden)[0, 1:]
        logits = self.model.get_output_embeddings()(hidden)[:, : self.vocabulary]
        if calibrate and self.settings["enable_anchor_bias_logits"]:
            logits = logits + self._correction("anchor_bias_mlp", self._embedded(bonus), hidden)
        for slot in range(len(logits) if calibrate and self.settings.get("chain_rank") else 0):
            known = nn.functional.rms_norm(self._embedded(bonus), hidden.shape[-1:], eps=1e-6)
            logits[slot] += self._correction("chain_mlp", known, hidden[slot : slot + 1])[0]
            bonus = int(logits[slot].argmax())  # for the next slot
        best, drafts = logits.max(-1)
        return drafts.tolist(), (best.float() - logits.float().logsumexp(-1)).exp()

    def _correction(self, name, embedded, hidden):
        """Compute `W2 SiLU(W1 [embedded ; h] + b1) + b2` [slots, V] from embeddings [1, H] and states h [slots, H]."""
        (w1, b1), (w2, b2) = ((self.tensors[f"{name}.{i}.weight"], self.tensors[f"{name}.{i}.bias"]) for i in (0, 2))
        inner = nn.functional.linear(torch.cat([embedded.expand_as(hidden), hidden], dim=-1), w1, b1)
        return nn.functional.linear(nn.functional.silu(inner), w2, b2)

    def _embedded(self, token):
        return self.model.get_input_embeddings()(torch.tensor([token], device=self.device))

    def _layer(self, number):
        """Copy a target layer with newly built attention, since the target's may be quantized or have adapters."""
        layer, prefix = copy.copy(self.inner.layers[number]), f"layers.{number - self.split}.self_attn."
        base, config = layer.self_attn, copy.deepcopy(layer.self_attn.config)
        config._attn_implementation = {"eager": "eager"}.get(config._attn_implementation, "sdpa")  # both accept a mask
        with torch.device("meta"):
            attention = type(base)(config, base.layer_idx).eval()
        own = {n.removeprefix(prefix): tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}
        attention.load_state_dict(own, assign=True)
        attention.is_causal = False  # slots of a block attend to each other in both directions
        vars(layer).pop("forward", None)  # a hook's forward would call the original layer
        layer._modules = layer._modules | {"self_attn": attention}
        return layer

    def _rope(self, hidden, positions, kind):
        """Return the layers' RoPE arguments. Gemma 3 uses a different base in sliding-window layers."""
        parts = (getattr(self.model.config, "rope_parameters", None) or {}).values()
        by_kind = (kind,) if any(isinstance(part, dict) for part in parts) else ()
        every = {name: self.inner.rotary_emb for name in self.layer_names if name.startswith("position_embeddings")}
        if hasattr(self.inner, "rotary_emb_local"):  # in transformers 4
            every["position_embeddings_local"] = self.inner.rotary_emb_local
        return {name: rotary(hidden, positions, *by_kind) for name, rotary in every.items()}


def _options(chosen, where=""):
    """Check and return calibrate, selection and threshold."""
    calibrate, selection, threshold = (chosen[name] for name in RECOMMENDED)
    if not isinstance(calibrate, bool):
        raise Refused(f"{where}calibrate={calibrate!r}: expected True or False.")
    if selection not in ("off", "cumulative_product", "min_confidence"):
        raise Refused(f"{where}selection={selection!r}: expected one of off, cumulative_product, min_confidence.")
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise Refused(f"{where}threshold={threshold!r}: expected a number in [0, 1].")
    return calibrate, selection, float(threshold)


def _compare(model, fingerprint):
    """Warn if sampled unquantized weights or embeddings differ from those of the drafter's target."""
    modules, changed = dict(model.model.named_modules()) | {"lm_head": model.get_output_embeddings()}, []
    for name, values in fingerprint.items():
        weight = getattr(modules.get(name), "weight", None)
        expected = torch.tensor([float(value) for value in values.split()])
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() == 1:
            continue
        size, count = len(weight), 8 // weight.ndim
        rows = TOKENS % size if name in ("embed_tokens", "lm_head") else torch.arange(count) * (size - 1) // (count - 1)
        found = modules[name](rows.to(weight.device)) if name == "embed_tokens" else weight[rows]
        found = found[:, torch.arange(4) * (found.shape[1] - 1) // 3] if found.ndim == 2 else found
        distance = (found.float().cpu().flatten() - expected).norm()
        changed += [] if distance <= 0.005 * expected.norm() else [name]  # NaN counts as changed
    if changed:
        found = f"{len(changed)} of this model's weights, e.g. {changed[0]}, differ from those of the drafter's target"
        warnings.warn(f"{found}: expect fewer accepted drafts. The output is still the model's own.", stacklevel=2)


def _names(module):
    """Return the named parameters of a module's forward, with annotations, and the name of its cache argument."""
    every = inspect.signature(type(module).forward).parameters.items()
    names = {name: str(p.annotation) for name, p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    caches = [name for name in CACHES if name in names] or [name for name, kind in names.items() if "Cache" in kind]
    if not caches:
        raise Refused(f"{type(module).__name__}.forward has no cache argument ({', '.join(names)}){UNKNOWN}")
    return names, caches[0]


def _settings(directory, target):
    """Read the drafter's config.json and its FlexDraft settings, and check them against the target's config."""
    file = directory / "config.json"
    config = _checked(file, lambda: json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    settings = _checked(file, lambda: config.get("flexdraft_config") or config.get("dflash_config"))
    if not settings:
        raise Refused(f"{directory}: not a drafter; expected a config.json with flexdraft_config.")
    expected = {"model_type": target.model_type, "num_target_layers": target.num_hidden_layers}
    expected |= {name: getattr(target, name, None) for name in ("hidden_size", "num_key_value_heads")}
    expected["vocab_size"] = min(config["vocab_size"], target.vocab_size)  # the target may have extra rows
    for name, value in expected.items():
        if config.get(name) != value:
            raise Refused(f"{file}: drafter for a target with {name}={config.get(name)}, but this one has {value}.")
    size, layers = config["block_size"], settings["target_layer_ids"]
    if not layers or layers != [*range(target.num_hidden_layers)][-len(layers) :] or size < 2:
        raise Refused(f"{file}: target_layer_ids={layers} are not the last layers, or block_size={size} is below 2.")
    found = settings.get("recommended_decoding") or {}  # written into the config by earlier versions
    if (own := directory / "recommended_decoding.json").exists():
        file, found = own, _checked(own, lambda: json.loads(own.read_text(encoding="utf-8")))
    if not isinstance(found, dict):
        raise Refused(f"{file}: recommended_decoding={found!r}: expected an object with selection and threshold.")
    settings["recommended_decoding"] = RECOMMENDED | found
    _options(settings["recommended_decoding"], f"{file}: recommended_decoding: ")
    return config, settings


def _tensors(directory):
    """Load the drafter's own tensors and skip copies of the target's tensors, which an export may contain."""
    index, names, found = directory / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.is_file():
        names = _checked(index, lambda: json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted({directory / name for name in names}):
        found |= _checked(file, load_file, file)
    return {n: t for n, t in found.items() if ".self_attn." in n or not n.startswith(("layers.", "norm."))}
