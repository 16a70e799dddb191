"""Reads the evaluation prompts for the report, and checks them as a run does."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.config.compose import plain
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.questions import first_prompt_length
from data.sources.benchmarks import read_benchmark
from data.sources.readers import read_strictly
from data.sources.records import Conversation, prompt
from data.terminal import say


def read_prompts(config: DictConfig, encoder: ChatEncoder) -> list[Conversation]:
    """Return the held-out prompts. Check them and all benchmarks in local files; nothing is downloaded.

    Raises:
        UserError: a prompt is invalid; the message gives its file and line.
    """

    def parse(record: Any) -> Conversation:
        conversation = prompt(record)
        first_prompt_length(encoder, conversation)
        return conversation

    settings = plain(config, "data", "benchmarks", "stage")
    limit = settings["stage"]["evaluate"]["num_prompts"]
    for name, given in settings["benchmarks"].items():
        if not isinstance(given, dict) or Path(str(given.get("path"))).exists():
            read_benchmark(name, given, limit, check=lambda talk: first_prompt_length(encoder, talk))
    prompts = settings["data"]["prompts"]
    return read_strictly(prompts, parse, split="test", limit=None, setting="data.prompts", warn=say)
