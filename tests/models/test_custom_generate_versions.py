"""The shipped decoder under other versions of transformers: names from signatures, caches checked, never garbage.

Names in other versions are simulated here; scripts/checks/check_custom_generate.py runs the actual versions.
"""

import inspect
import warnings

import pytest
import torch
from check_families import random_pair
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from models.custom_generate import generate as shipped
from models.export.artifact_io import export_draft
from models.hf_cache import forward_cached

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])
CALL = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 20, "do_sample": False, "eos_token_id": 96}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a target loaded by plain transformers, the directory of a drafter, and the target's own output."""
    root = tmp_path_factory.mktemp("pair")
    target, draft = random_pair("qwen3")
    target.save_pretrained(root / "target")
    export_draft(draft, root / "drafter", torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(root / "target", dtype="auto")
    return twin, str(root / "drafter"), twin.generate(IDS, **CALL)


def drafted(twin, drafter):
    twin.__dict__.pop("_flexdraft", None)  # reload, as in another process
    return shipped.generate(twin, inputs=IDS, drafter=drafter, **CALL)


def call_it(monkeypatch, kind, name, *, annotation=inspect.Parameter.empty, keep=True):
    """Patch a forward that names its cache differently and swallows unknown names."""
    forward = kind.forward
    signature = inspect.signature(forward)
    here = next(known for known in shipped.CACHES if known in signature.parameters)

    def renamed(self, *args, **kwargs):
        given = kwargs.pop(name, None)
        if here not in kwargs and keep and given is not None:
            kwargs[here] = given  # the name in its own model
        return forward(self, *args, **kwargs)

    parameters = [
        p.replace(name=name, annotation=annotation) if p.name == here else p for p in signature.parameters.values()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)
    monkeypatch.setattr(kind, "forward", renamed)


@pytest.mark.parametrize("where", ["model", "layer", "both"])
@pytest.mark.parametrize(
    ("name", "annotation"),
    [("past_key_values", Cache | None), ("cache", Cache | None), ("memory", Cache | None), ("memory", "Cache | None")],
)
def test_a_cache_is_passed_under_the_name_in_the_signature(pair, monkeypatch, name, annotation, where):
    twin, drafter, own = pair
    kinds = {"model": [type(twin)], "layer": [type(twin.model.layers[0])]}
    for kind in kinds.get(where) or kinds["model"] + kinds["layer"]:
        call_it(monkeypatch, kind, name, annotation=annotation)
    assert torch.equal(drafted(twin, drafter), own)


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_forward_without_a_cache_argument_is_an_error(pair, monkeypatch, where):
    twin, drafter, _ = pair
    call_it(monkeypatch, type(twin) if where == "model" else type(twin.model.layers[0]), "memory")
    with pytest.raises(ValueError, match=r"has no cache argument .*Tested with transformers"):
        drafted(twin, drafter)


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_swallowed_cache_is_an_error_and_never_garbage(pair, monkeypatch, where):
    twin, drafter, _ = pair
    kind = type(twin) if where == "model" else type(twin.model.layers[0])
    call_it(monkeypatch, kind, "memory", annotation=Cache, keep=False)
    with pytest.raises(ValueError, match="cache layers hold .*; expected"):
        drafted(twin, drafter)


class OtherLayer:
    """Cache layer with other tensor names, which cannot be cropped."""

    is_sliding = False

    def __init__(self):
        self.counter, self.first, self.second = 0, None, None

    def add(self, keys, values):
        together = (
            [keys, values]
            if self.first is None
            else [torch.cat(p, dim=2) for p in zip(self.parts(), (keys, values), strict=True)]
        )
        self.first, self.second = together
        return together

    def parts(self):
        return self.first, self.second


class OtherCache(Cache):
    """Cache of such layers."""

    def __init__(self):
        self.layers = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(OtherLayer())
        return self.layers[layer_idx].add(key_states, value_states)

    def get_seq_length(self, layer_idx=0):
        first = self.layers[layer_idx].first if self.layers else None
        return 0 if first is None else first.shape[2]

    def get_mask_sizes(self, query, layer_idx=0):
        length = query if isinstance(query, int) else len(query)  # 4.57 passes positions
        return self.get_seq_length() + length, 0

    crop = is_compileable = property()  # no longer available

    @property
    def is_sliding(self):
        return [False]


def test_tensors_of_a_cache_are_found_under_any_name(pair, monkeypatch):
    twin, drafter, own = pair
    monkeypatch.setattr(shipped, "DynamicCache", OtherCache)
    assert torch.equal(drafted(twin, drafter), own)


class Hidden(OtherCache):
    """Cache whose tensors are stored in an unexpected place."""

    @property
    def layers(self):
        return [] if inspect.stack()[1].function == "crop" else self.hidden

    @layers.setter
    def layers(self, layers):
        self.hidden = layers


class Forgetful(OtherCache):
    """Cache that keeps only the last 8 tokens."""

    def update(self, *args, **kwargs):
        super().update(*args, **kwargs)
        layer = self.layers[args[2]]
        whole = layer.parts()
        layer.first, layer.second = (part[:, :, -8:] for part in whole)
        return whole


class Counting(OtherCache):
    """Cache with a separate token counter, so that cropping its tensors does not shorten it."""

    count = 0

    def update(self, *args, **kwargs):
        self.count += args[0].shape[2] if args[2] == 0 else 0
        return super().update(*args, **kwargs)

    def get_seq_length(self, layer_idx=0):
        return self.count


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Hidden, Forgetful, Counting])
def test_a_cache_with_a_different_implementation_is_an_error(pair, monkeypatch, kind):
    twin, drafter, _ = pair
    monkeypatch.setattr(shipped, "DynamicCache", kind)
    with pytest.raises(ValueError, match="Tested with transformers"):
        drafted(twin, drafter)


def test_a_model_that_does_not_read_its_cache_is_detected(pair, monkeypatch):
    """The model writes to the cache but attends only to the new tokens."""
    twin, drafter, _ = pair

    class Unread(OtherCache):
        def update(self, key_states, value_states, *args, **kwargs):
            super().update(key_states, value_states, *args, **kwargs)
            return key_states, value_states

        def get_mask_sizes(self, query, layer_idx=0):
            return (query if isinstance(query, int) else len(query)), 0

    monkeypatch.setattr(shipped, "DynamicCache", Unread)
    with pytest.raises(ValueError, match="The target's logits depend on the other tokens in a pass"):
        drafted(twin, drafter)


def test_no_called_function_is_deprecated(pair):
    twin, drafter, own = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        assert torch.equal(drafted(twin, drafter), own)


def test_a_filled_cache_from_the_caller_is_rejected_by_name(pair):
    """An empty one is accepted: tests/models/test_custom_generate_calls.py."""
    twin, drafter, _ = pair
    cache = DynamicCache()
    forward_cached(twin, IDS, cache)
    for name in shipped.CACHES:
        with pytest.raises(ValueError, match=f"does not support {name} .only an empty cache"):
            shipped.generate(twin, inputs=IDS, drafter=drafter, **{name: cache}, **CALL)
