"""Plain transformers with an exported drafter: are the outputs those of the target alone?

    python scripts/checks/check_custom_generate.py checkpoints/tiny/export --also /path/to/other/python

One row for each kind of target that the installed packages allow, over GSM8K prompts: how many outputs are identical,
and tokens per verify step. Those with a star round by what shares a pass, so that near ties may fall another way.
`--also` adds the rows of other environments (transformers 4.57.3, bitsandbytes, torchao, peft), which need nothing of
this project. Not 0 if an output without a star differs.
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
    """The target as it is, in float32."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def bfloat16(target: Path) -> PreTrainedModel:
    """In bfloat16, where rounding decides near ties."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)


def without_old_name(target: Path) -> PreTrainedModel:
    """As announced for transformers 5.40: `past_key_values` is no name of any forward, and `**kwargs` swallows it."""
    model = plain(target)
    for kind in {type(module) for module in model.modules() if type(module).__module__ == type(model).__module__}:
        kind.forward = _without_deprecation(kind.forward)
    return model


def _without_deprecation(forward: Callable) -> Callable:
    """A function without the decorator that translates names of old; others around it stay."""
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
    """bitsandbytes, computing in float32: in bfloat16 near ties fall another way, quantized or not."""

    def load(target: Path) -> PreTrainedModel:
        config = transformers.BitsAndBytesConfig(**how)
        return AutoModelForCausalLM.from_pretrained(
            target, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    return load


def torchao(target: Path) -> PreTrainedModel:
    """torchao's int8 weights, computing in float32."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        target, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def lora(*modules: str, merge: bool = False) -> Callable[[Path], PreTrainedModel]:
    """PEFT's LoRA with small random updates."""

    def load(target: Path) -> PreTrainedModel:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=1, target_modules=list(modules), init_lora_weights=False)
        wrapped = get_peft_model(plain(target), config)
        return wrapped.merge_and_unload() if merge else wrapped

    return load


TARGETS = {  # name: packages needed, how to load it
    "float32": ([], plain),
    "8 bit, llm_int8_threshold=0 *": (["bitsandbytes"], bits(load_in_8bit=True, llm_int8_threshold=0.0)),
    "4 bit (bitsandbytes)": (["bitsandbytes"], bits(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)),
    "int8 weights (torchao)": (["torchao"], torchao),
    "LoRA on q_proj, v_proj": (["peft"], lora("q_proj", "v_proj")),
    "LoRA on gate_proj": (["peft"], lora("gate_proj")),
    "LoRA merged": (["peft"], lora("q_proj", "gate_proj", merge=True)),
    "bfloat16 *": ([], bfloat16),
    "8 bit (bitsandbytes) *": (["bitsandbytes"], bits(load_in_8bit=True)),
    "float32, old name of the cache removed": ([], without_old_name),  # last: it changes classes
}


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def compared(model: PreTrainedModel, prompts: list[torch.Tensor], drafter: Path, new_tokens: int) -> tuple[int, float]:
    """How many outputs are the same with the drafter, and tokens per verify step."""
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
    """What was found in this environment."""
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
    parser.add_argument("--also", action="append", default=[], help="another Python, whose rows are added")
    parser.add_argument("--only", nargs="+", help="targets whose names have one of these words")
    parser.add_argument("--json", action="store_true", help="print rows alone, as JSON")
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
    print("* what shares a pass changes roundings, so that near ties fall another way")
    exact = [row for row in found if not row["target"].endswith("*")]
    sys.exit(0 if all(row["same"] == row["prompts"] for row in exact) else "outputs differ")


if __name__ == "__main__":
    main()
