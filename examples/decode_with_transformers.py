"""Decode with an exported drafter in plain transformers (4.57 or newer), without this project.

    python examples/decode_with_transformers.py TARGET DRAFTER [PROMPT]

`trust_remote_code` runs the drafter's file custom_generate/generate.py: read it first if the drafter is not yours.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="directory or Hub id of the drafter's target")
    parser.add_argument("drafter", help="directory or Hub id of the exported drafter")
    parser.add_argument("prompt", nargs="?", default="Tom has 3 apples and buys 4 more. How many apples does he have?")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    chat = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(device)
    output = target.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        custom_generate=arguments.drafter,
        trust_remote_code=True,
        return_dict_in_generate=True,
    )
    print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    steps = [gained for row in output.acceptance_lengths for gained in row]
    print(f"\n{sum(steps)} tokens in {len(steps)} verify steps: {sum(steps) / max(len(steps), 1):.2f} per step")


if __name__ == "__main__":
    main()
