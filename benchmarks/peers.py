"""The same work with other people's tools.

python -m benchmarks.peers quantize MODEL OUT     transformers + bitsandbytes: load, quantize, save_pretrained
python -m benchmarks.peers mergekit VENV          a virtual environment with mergekit in it
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def quantize(model: str, out: str) -> None:
    """What a user of transformers writes to make a 4-bit checkpoint on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    loaded.save_pretrained(out)


def install_mergekit(venv: Path) -> Path:
    """Make the environment, unless it is there; returns the command `mergekit-yaml`.

    Raises:
        subprocess.CalledProcessError: it cannot be installed; its stderr says why.
    """
    command = venv / "bin" / "mergekit-yaml"
    if not command.exists():
        python = str(venv / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True, text=True)
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "-c",
                str(HERE.parent / "constraints.txt"),
                "-r",
                str(HERE / "requirements-mergekit.txt"),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    return command


def linear_merge(models: list[Path]) -> str:
    """mergekit's YAML of the plain average of some models."""
    lines = ["merge_method: linear", "dtype: bfloat16", "models:"]
    for model in models:
        lines += [f"  - model: {model}", "    parameters:", "      weight: 1.0"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:4])
    else:
        print(install_mergekit(Path(sys.argv[2])))
