"""Arguments passed to transformers' models and layers take effect, in this version and in others."""

import inspect
import warnings

import pytest
import torch
from helpers.shared import random_draft, random_target
from transformers import DynamicCache

from models.attention.layers import run_layers
from models.hf_cache import NAMES, crop, forward_arguments, forward_cached, keys_values
from models.target import clean_views, load_target

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def target():
    forward_arguments.cache_clear()
    yield random_target()
    forward_arguments.cache_clear()


def rename(monkeypatch, kind, old, new):
    """Return a forward with one argument renamed, which swallows unknown names."""
    forward, signature = kind.forward, inspect.signature(kind.forward)

    def renamed(self, *args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        elif old in kwargs:
            del kwargs[old]
        return forward(self, *args, **kwargs)

    parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)
    monkeypatch.setattr(kind, "forward", renamed)


def here(kind):
    return next(name for name in NAMES if name in inspect.signature(kind.forward).parameters)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_cache_is_passed_under_the_models_argument_name(target, monkeypatch, name):
    expected = target(IDS).logits
    if name != here(type(target)):
        rename(monkeypatch, type(target), here(type(target)), name)
    cache = DynamicCache()
    first, rest = (forward_cached(target, part, cache).logits for part in (IDS[:, :3], IDS[:, 3:]))
    assert torch.allclose(torch.cat([first, rest], dim=1), expected, atol=1e-5)


@torch.no_grad()
def test_a_model_without_a_cache_argument_is_an_error(target, monkeypatch):
    rename(monkeypatch, type(target), here(type(target)), "memory")
    with pytest.raises(ValueError, match="Qwen3ForCausalLM.forward in transformers .* does not accept cache"):
        forward_cached(target, IDS, DynamicCache())


@torch.no_grad()
def test_a_cache_that_did_not_grow_is_an_error(target, monkeypatch):
    forward = type(target).forward

    def swallowing(self, *args, cache=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "forward", swallowing)
    with pytest.raises(ValueError, match=r"Layer 0 of DynamicCache holds keys and values for \[\] tokens; expected 5"):
        forward_cached(target, IDS, DynamicCache())


@torch.no_grad()
def test_a_cache_is_cropped_to_its_first_tokens_and_unknown_attributes_are_an_error(target):
    cache = DynamicCache()
    forward_cached(target, IDS, cache)
    keys, values = keys_values(cache, 1)
    crop(cache, 2)
    assert torch.equal(keys_values(cache, 1, 2)[1], values[:, :, :2]) and cache.get_seq_length() == 2
    del cache.layers[1].keys
    with pytest.raises(ValueError, match="Layer 1 of DynamicCache holds"):
        crop(cache, 1)


@pytest.mark.parametrize("name", ["attention_mask", "position_embeddings"])
@torch.no_grad()
def test_a_layer_that_drops_an_argument_is_an_error(target, monkeypatch, name):
    """Without its mask a layer would attend to future tokens, which the loss would not reveal."""
    rename(monkeypatch, type(target.model.layers[0]), name, "renamed")
    hidden, positions = target.get_input_embeddings()(IDS), torch.arange(5)[None]
    views = clean_views(target, torch.zeros_like(IDS), "sdpa")
    with pytest.raises(ValueError, match=f"Qwen3DecoderLayer.forward .* does not accept {name}"):
        run_layers(target, target.model.layers, 0, hidden, positions, views)


@torch.no_grad()
def test_no_argument_is_deprecated(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        forward_cached(target, IDS, DynamicCache())
        random_draft(target)


def test_a_target_is_loaded_in_a_named_or_its_stored_dtype():
    sizes = {"model_type": "qwen3", "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_target(None, architecture=sizes, dtype=dtype).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='auto'"):
        load_target(None, architecture=sizes, dtype="auto")
