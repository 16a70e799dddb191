"""Compare decoding with an exported drafter in plain transformers to decoding with the target alone.

    python scripts/checks/check_custom_generate.py checkpoints/tiny/export --also /path/to/other/python

Prints one row for each kind of target that the installed packages support, over GSM8K prompts: identical outputs and
tokens per verify step. In rows marked with a star, rounding depends on the other tokens in a forward pass, so near ties
may be resolved differently. `--also` adds rows for other environments (transformers 4.57.3, bitsandbytes, torchao,
peft), in which this project need not be installed. The exit status is nonzero if an output in an unmarked row differs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"


def plain(target: Path) -> PreTrainedModel:
    """Load the unchanged target in float32."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def bfloat16(target: Path) -> PreTrainedModel:
    """Load the target in bfloat16, where rounding decides near ties."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)


def without_old_name(target: Path) -> PreTrainedModel:
    """Load a target as announced for transformers 5.40: no forward names `past_key_values`; `**kwargs` swallows it."""
    model = plain(target)
    for kind in {type(module) for module in model.modules() if type(module).__module__ == type(model).__module__}:
        kind.forward = _without_deprecation(kind.forward)
    return model


def _without_deprecation(forward: Callable) -> Callable:
    """Return a function without the decorator that translates old names; other decorators remain."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        return forward
    bare = _without_deprecation(inner)
    if forward.__code__.co_filename.endswith("deprecation.py"):
        return bare
    for cell in forward.__closure__ or ():
        if cell.cell_contents is inner:
            cell.cell_contents = bare
    return forward


def bits(**how: object) -> Callable[[Path], PreTrainedModel]:
    """Return a loader with bitsandbytes that computes in float32, since bfloat16 alone changes near ties."""

    def load(target: Path) -> PreTrainedModel:
        config = transformers.BitsAndBytesConfig(**how)
        return AutoModelForCausalLM.from_pretrained(
            target, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    return load


def torchao(target: Path) -> PreTrainedModel:
    """Load the target with torchao's int8 weights, computing in float32."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        target, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def lora(*modules: str, merge: bool = False) -> Callable[[Path], PreTrainedModel]:
    """Return a loader with small random LoRA updates (PEFT)."""

    def load(target: Path) -> PreTrainedModel:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=1, target_modules=list(modules), init_lora_weights=False)
        wrapped = get_peft_model(plain(target), config)
        return wrapped.merge_and_unload() if merge else wrapped

    return load


TARGETS = {  # name: required packages, loader
    "float32": ([], plain),
    "8 bit, llm_int8_threshold=0 *": (["bitsandbytes"], bits(load_in_8bit=True, llm_int8_threshold=0.0)),
    "4 bit (bitsandbytes)": (["bitsandbytes"], bits(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)),
    "int8 weights (torchao)": (["torchao"], torchao),
    "LoRA on q_proj, v_proj": (["peft"], lora("q_proj", "v_proj")),
    "LoRA on gate_proj": (["peft"], lora("gate_proj")),
    "LoRA merged": (["peft"], lora("q_proj", "gate_proj", merge=True)),
    "bfloat16 *": ([], bfloat16),
    "8 bit (bitsandbytes) *": (["bitsandbytes"], bits(load_in_8bit=True)),
    "float32, old name of the cache removed": ([], without_old_name),  # last, because it patches classes
}


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def compared(model: PreTrainedModel, prompts: list[torch.Tensor], drafter: Path, new_tokens: int) -> tuple[int, float]:
    """Return the number of identical outputs with the drafter, and the tokens per verify step."""
    same, gained = 0, []
    for ids in prompts:
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
        own = model.generate(input_ids=ids, **arguments)
        arguments |= {"custom_generate": str(drafter), "trust_remote_code": True, "return_dict_in_generate": True}
        drafted = model.generate(input_ids=ids, **arguments)
        same += int(torch.equal(drafted.sequences, own))
        gained += [number for row in drafted.acceptance_lengths for number in row]
    return same, sum(gained) / max(len(gained), 1)


def rows(arguments: argparse.Namespace) -> list[dict]:
    """Return the rows of this environment."""
    tokenizer, lines = AutoTokenizer.from_pretrained(arguments.target), (TINY / "prompts.jsonl").read_text("utf-8")
    prompts = []
    for line in lines.splitlines()[: arguments.prompts]:
        chat = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        prompts.append(tokenizer.apply_chat_template(chat, **how)["input_ids"])
    found = []
    for name, (packages, load) in TARGETS.items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        if not all(map(installed, packages)) or (load is without_old_name and transformers.__version__[0] < "5"):
            continue
        same, tau = compared(load(arguments.target).eval(), prompts, arguments.drafter, arguments.new_tokens)
        row = {"transformers": transformers.__version__, "target": name, "same": same, "tau": round(tau, 2)}
        found.append(row | {"prompts": len(prompts)})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", type=Path, default=TINY / "target")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--also", action="append", default=[], help="another Python interpreter whose rows are added")
    parser.add_argument("--only", nargs="+", help="only targets whose names contain one of these words")
    parser.add_argument("--json", action="store_true", help="print only the rows, as JSON")
    arguments = parser.parse_args()
    found = rows(arguments)
    here = [__file__, arguments.drafter, "--target", arguments.target, "--prompts", arguments.prompts, "--json"]
    for python in arguments.also:
        call = [python, *map(str, here), "--new-tokens", str(arguments.new_tokens)]
        call += ["--only", *arguments.only] if arguments.only else []
        found += json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{'transformers':<14}{'target':<42}{'identical':>10}{'tokens per step':>17}")
    for row in found:
        print(f"{row['transformers']:<14}{row['target']:<42}{row['same']:>6}/{row['prompts']}{row['tau']:>17.2f}")
    print("* rounding depends on the other tokens in a pass, so near ties may be decided differently")
    exact = [row for row in found if not row["target"].endswith("*")]
    sys.exit(0 if all(row["same"] == row["prompts"] for row in exact) else "outputs differ")


if __name__ == "__main__":
    main()
