"""Chat templates of published model families, with their tokens, and the text that each target writes as an answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.target import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TARGET = str(ROOT.parent / "src" / "data" / "tiny" / "target")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>")
KIMI = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
NEMOTRON = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")


def plain(content: str, reasoning: str | None) -> str:
    """Write the content alone: the template knows no reasoning."""
    return content


def stripped(content: str, reasoning: str | None) -> str:
    return content.strip()


def block(content: str, reasoning: str | None) -> str:
    return f"<think>\n{(reasoning or '').strip()}\n</think>\n\n{content}"


def opened(content: str, reasoning: str | None) -> str | None:
    """Continue the reasoning block that the prompt opens; None if there is no reasoning."""
    return None if reasoning is None else f"{reasoning.strip()}\n</think>\n\n{content}"


def kimi(content: str, reasoning: str | None) -> str:
    return content if content.startswith("<think>") else f"<think>{reasoning or ''}</think>{content}"


def harmony(content: str, reasoning: str | None) -> str:
    thought = f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant" if reasoning else ""
    return f"{thought}<|channel|>final<|message|>{content}"


# The answers with tool calls, given as (name, arguments), that the targets write.
Calls = list[tuple[str, dict[str, Any], str]]  # name, arguments, id


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def in_tags(content: str, reasoning: str | None, calls: Calls) -> str:
    blocks = [f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(a)}}}\n</tool_call>' for name, a, _ in calls]
    return "\n".join([content] * bool(content) + blocks)


def in_tags_after_block(content: str, reasoning: str | None, calls: Calls) -> str:
    return block(in_tags(content, None, calls), reasoning)


def in_tags_after_opened(content: str, reasoning: str | None, calls: Calls) -> str | None:
    return opened(in_tags(content, None, calls), reasoning)


def llama_call(content: str, reasoning: str | None, calls: Calls) -> str:
    return f'{{"name": "{calls[0][0]}", "parameters": {as_json(calls[0][1])}}}'


def mistral_calls(space: str) -> Callable[[str, str | None, Calls], str]:
    def write(content: str, reasoning: str | None, calls: Calls) -> str:
        return f"[TOOL_CALLS]{space}" + as_json([{"name": n, "arguments": a, "id": i} for n, a, i in calls])

    return write


def olmo_calls(content: str, reasoning: str | None, calls: Calls) -> str:
    lines = [f"{name}({', '.join(f'{k}={as_json(v)}' for k, v in a.items())})" for name, a, _ in calls]
    return content + "<function_calls>" + "\n".join(lines) + "</function_calls>"


def harmony_call(content: str, reasoning: str | None, calls: Calls) -> str | None:
    name, arguments, _ = calls[0]
    thought = content or reasoning
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    call = f" to=functions.{name}<|channel|>commentary json<|message|>{as_json(arguments)}"
    return None if len(calls) > 1 else analysis + call  # the template drops further calls


def glm_calls(content: str, reasoning: str | None, calls: Calls) -> str:
    return content + "".join(f"{name}\n{as_json(arguments)}" for name, arguments, _ in calls)


def no_calls(content: str, reasoning: str | None, calls: Calls) -> None:
    """Return None: the template writes tools, but drops calls."""


@dataclass(frozen=True)
class Family:
    """A chat template with its special tokens, end tokens and arguments."""

    template: str
    special: tuple[str, ...]
    end: str  # that the template writes after the last answer
    stop: tuple[str, ...]  # eos_token_id of generation_config.json
    bos: str | None = None
    eos: str | None = None  # of the tokenizer; default: end
    not_special: tuple[str, ...] = ()  # added tokens that are not special
    kwargs: dict[str, Any] = field(default_factory=dict)
    writes: Callable[[str, str | None], str | None] = plain  # the answer without its end token
    no_system: bool = False  # the template refuses system messages
    calls: Callable[[str, str | None, Calls], str | None] | None = None  # None: the template has no tools
    call_end: str | None = None  # after a call; default: end
    tools: str = "tools"  # the template's name for them; "" if they are a text in the system message

    def tokenizer(self) -> Any:
        """Return the embedded tokenizer with the family's template and tokens."""
        tokenizer = load_tokenizer(TARGET)
        tokenizer.add_tokens(list(self.special), special_tokens=True)
        tokenizer.add_tokens(list(self.not_special))
        tokenizer.eos_token = self.eos or self.end
        if self.bos:
            tokenizer.bos_token = self.bos
        file = ROOT / "data" / "templates" / f"{self.template}.jinja"
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return tokenizer

    def stop_ids(self, tokenizer: Any) -> list[int]:
        return tokenizer.convert_tokens_to_ids(list(self.stop))


THINK = ("<think>", "</think>")
QWEN = {"special": CHATML, "end": "<|im_end|>", "stop": ("<|im_end|>", "<|endoftext|>"), "not_special": THINK}
LLAMA = {
    "special": LLAMA3, "end": "<|eot_id|>", "stop": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "bos": "<|begin_of_text|>", "writes": stripped, "calls": llama_call,
}  # fmt: skip
MISTRAL_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
MISTRAL = {
    "special": ("<s>", "</s>", "[INST]", "[/INST]", *MISTRAL_TOOLS),
    "end": "</s>",
    "stop": ("</s>",),
    "bos": "<s>",
}
GEMMAS = {
    "special": GEMMA, "end": "<end_of_turn>", "stop": ("<eos>", "<end_of_turn>"), "bos": "<bos>", "eos": "<eos>",
    "writes": stripped,
}  # fmt: skip
PHIS = {"special": PHI, "end": "<|end|>", "stop": ("<|end|>", "<|endoftext|>"), "eos": "<|endoftext|>"}
FAMILIES = {
    "Qwen2.5": Family("qwen2.5", **QWEN, calls=in_tags),
    "Qwen3": Family("qwen3", **QWEN, writes=block, calls=in_tags_after_block),
    "Qwen3 without thinking": Family("qwen3", **QWEN, kwargs={"enable_thinking": False}, calls=in_tags),
    "Qwen3-Thinking": Family("qwen3_thinking", **QWEN, writes=opened, calls=in_tags_after_opened),
    "QwQ": Family("qwq", **QWEN, writes=opened, calls=in_tags_after_opened),
    "Hermes 3": Family("hermes3", **QWEN, calls=lambda content, reasoning, calls: in_tags("", reasoning, calls)),
    "DeepSeek-R1-Distill": Family(
        "deepseek_r1_distill", R1, R1[1], (R1[1],), bos=R1[0], not_special=THINK, writes=opened
    ),
    "Llama 3.1": Family("llama3.1", **LLAMA),
    "Llama 3.3": Family("llama3.3", **LLAMA),
    "Mistral 7B v0.3": Family("mistral_7b_v0.3", **MISTRAL, writes=lambda content, _: " " + content.strip(),
                              calls=mistral_calls(" ")),
    "Llama 3.1 with built-in tools": Family("llama3.1", **LLAMA, kwargs={"builtin_tools": []}, call_end="<|eom_id|>"),
    "Mistral Nemo": Family("mistral_nemo", **MISTRAL, calls=mistral_calls("")),
    "Gemma 2": Family("gemma2", **GEMMAS, no_system=True),
    "Gemma 3": Family("gemma3", **GEMMAS),
    "Phi-3": Family("phi3", **PHIS),
    "Phi-4-mini": Family("phi4_mini", **PHIS, calls=no_calls, tools=""),
    "OLMo 2": Family("olmo2", ("<|endoftext|>",), "<|endoftext|>", ("<|endoftext|>",), bos="<|endoftext|>"),
    "OLMo 3": Family("olmo3", CHATML, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), calls=olmo_calls),
    "SmolLM2": Family("smollm2", CHATML, "<|im_end|>", ("<|im_end|>",)),
    "SmolLM3": Family(
        "smollm3", CHATML, "<|im_end|>", ("<|im_end|>",), not_special=THINK, calls=no_calls, tools="xml_tools"
    ),
    "SmolLM3 without thinking": Family(
        "smollm3", CHATML, "<|im_end|>", ("<|im_end|>",), not_special=THINK, kwargs={"enable_thinking": False},
        calls=no_calls, tools="xml_tools",
    ),
    "Kimi K2 Thinking": Family(
        "kimi_k2_thinking", KIMI, "<|im_end|>", ("<|im_end|>",), not_special=THINK,
        writes=kimi,
    ),
    "Nemotron Nano v2": Family(
        "nemotron_nano_v2", NEMOTRON, "\n<SPECIAL_12>", ("<SPECIAL_12>",), eos="<SPECIAL_12>", not_special=THINK,
        writes=opened,
    ),
    "gpt-oss": Family("gpt_oss", HARMONY, "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>"), writes=harmony,
                      calls=harmony_call, call_end="<|call|>"),
    "GLM-4": Family(
        "glm4", GLM, "<|user|>", ("<|endoftext|>", "<|user|>", "<|observation|>"), eos="<|endoftext|>",
        calls=glm_calls, call_end="<|observation|>",
    ),
}  # fmt: skip
