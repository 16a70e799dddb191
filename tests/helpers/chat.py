"""Chat templates and their encoders."""

from pathlib import Path

from data.preprocess.chat_template import ChatEncoder
from models.target import load_tokenizer

HERE = Path(__file__).parents[1]


TARGET = str(HERE.parent / "src" / "data" / "tiny" / "target")


def encoder_for(template, template_kwargs):
    tokenizer = load_tokenizer(TARGET)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if template == "tiny without markers":
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
    elif template:
        tokenizer.chat_template = (HERE / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
        tokenizer.add_special_tokens(
            {
                "eos_token": "</s>" if template == "mistral" else "<|im_end|>",
                "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            }
        )
    return ChatEncoder(tokenizer, template_kwargs), tokenizer


def supervised_runs(documents):
    """The tokens before each supervised run of tokens, and the run, over the documents of a conversation."""
    runs = []
    for document in documents:
        ids, mask = document.document.input_ids.tolist(), document.document.supervised.tolist()
        starts = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
        ends = [i for i in range(1, len(ids) + 1) if mask[i - 1] and not (i < len(ids) and mask[i])]
        runs += [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    return runs
