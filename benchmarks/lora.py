"""Adapters, and what stands next to them: `python -m benchmarks.lora WHAT ...`.

make SIZE FOLDER                     model/ and data.jsonl
plain PROXY DATA LOG BATCH STEPS     peft, transformers and bitsandbytes only; writes a JSON line a step
load PROXY                           from_pretrained, and nothing else
full PROXY                           prints the bytes of a full fp32 update of the proxy
updates MODEL KEY LEDGER FOLDER      an update of adapters for each release in the ledger
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SHAPES, bulk_digest, write, write_file
from benchmarks.training import CLIP, LR, WEIGHT_DECAY, tokenizer

RANK = 16
TOKENS = 64
BATCH = 1


def make(size: str, folder: Path, rows: int = 64) -> None:
    """Write a model with random weights, a tokenizer of words, and texts of `TOKENS` tokens."""
    write(SHAPES[size], folder / "model", 0)
    words = SHAPES[size].vocabulary
    tokenizer(words).save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(rows):
            text = " ".join(f"w{rng.randrange(words - 10)}" for _ in range(TOKENS))
            file.write(json.dumps({"text": text}) + "\n")


def load(proxy: str) -> Any:
    """The model of a proxy as transformers opens it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(proxy)
    return getattr(transformers, config.architectures[0]).from_pretrained(proxy)


def plain(proxy: str, data: str, log: str, size: int, steps: int) -> None:
    """Train adapters with peft, as its documentation shows it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(proxy), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    words = transformers.AutoTokenizer.from_pretrained(proxy)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    model.train()
    begin = time.monotonic()
    with Path(log).open("w") as file:
        for step in range(steps):
            batch = [rows[(step * size + row) % len(rows)]["text"] for row in range(size)]
            inputs = words(batch, return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps({"step": step + 1, "loss": loss.item(), "seconds": time.monotonic() - begin}) + "\n")


def full_bytes(proxy: str) -> int:
    """Bytes of the numbers of a full fp32 update of a proxy."""
    from fedqsn_cli.artifacts.manifests import ProxyManifest, read_manifest
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.dense import DenseTensors
    from fedqsn_cli.training.steps.visible import read_visible
    from fedqsn_cli.training.updates import update

    with Checkpoint.open(Path(proxy)) as checkpoint:
        layout = DenseTensors(checkpoint).layout
    shapes = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    visible = read_visible(Path(proxy), read_manifest(Path(proxy), ProxyManifest), shapes)
    return 4 * update.parameters(layout, visible)


def updates(model: str, key: str, ledger: str, folder: Path) -> None:
    """Write what clients would have sent back: adapters of random factors for all linear layers."""
    from fedqsn_cli.artifacts import ledger as ledgers
    from fedqsn_cli.masks import job_key
    from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
    from fedqsn_cli.models.model import open_model

    job = job_key.load(Path(key))
    plan = open_model(model, axis=job.axis, overrides=job.overrides).plan
    tensors = [tensor for tensor in plan.tensors if tensor.role == "linear"]
    for number, release in enumerate(ledgers.read(Path(ledger))):
        target = folder / release.client
        target.mkdir(parents=True)
        masks = ClientMasks(
            ServerMasks(job), release.client, release.round, release.p2, release.schedule, release.rescale
        )
        visible = {tensor.name: masks.visible(tensor) for tensor in tensors}
        shapes = dict(_factors({tensor.name: tensor.shape for tensor in tensors}))
        write_file(target / "adapter_model.safetensors", shapes, "F32", 0.005, 1000 + number)
        _hide(target / "adapter_model.safetensors", visible)
        _describe(target, [tensor.name for tensor in tensors], release, 100 + number)


def _module(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}"


def _factors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the factors, in the order of names."""
    for name, (outputs, inputs) in sorted(shapes.items()):
        yield f"{_module(name)}.lora_A.weight", (RANK, inputs)
        yield f"{_module(name)}.lora_B.weight", (outputs, RANK)


def _hide(path: Path, visible: dict[str, Any]) -> None:
    """Put zeros into the rows of B that belong to hidden neurons."""
    import numpy as np

    data = np.memmap(path, np.uint8, mode="r+")
    length = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    for name, mask in visible.items():
        entry = header[f"{_module(name)}.lora_B.weight"]
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if mask is not None:
            data[start:stop].view("<f4").reshape(entry["shape"])[~mask.flags.reshape(-1)] = 0
    data.flush()


def _describe(target: Path, names: list[str], release: Any, examples: int) -> None:
    """Write adapter_config.json and update.json."""
    from fedqsn_cli.artifacts.manifests import (
        UPDATE_MANIFEST,
        AdapterRecord,
        Losses,
        UpdateManifest,
        file_digest,
        manifest_bytes,
    )

    modules = [name.removesuffix(".weight") for name in names]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (target / "adapter_config.json").write_text(json.dumps(config))
    manifest = UpdateManifest(
        proxy_id=release.proxy_id,
        proxy_sha256=release.proxy_sha256,
        num_examples=examples,
        steps=10,
        losses=Losses(first=1.0, last=0.9, eval_before=None, eval_after=None),
        precision="fp32",
        tool="fedqsn benchmarks",
        adapters={
            name: AdapterRecord(module=_module(name), rank=RANK, scaling=1.0, transposed=False) for name in names
        },
        files={
            path.name: bulk_digest(path) if path.suffix == ".safetensors" else file_digest(path)
            for path in target.iterdir()
        },
    )
    (target / UPDATE_MANIFEST).write_bytes(manifest_bytes(manifest))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "make":
        make(words[0], Path(words[1]))
    elif what == "plain":
        plain(*words[:3], *map(int, words[3:5]))
    elif what == "load":
        load(words[0])
    elif what == "full":
        print(full_bytes(words[0]))
    else:
        updates(*words[:3], Path(words[3]))
