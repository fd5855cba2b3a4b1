"""The files beside the weights: config.json, tokenizer and generation files."""

from __future__ import annotations

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.artifacts.sanitize import public_companion, public_config
from fedqsn_cli.checkpoint import ArtifactWriter, FolderWriter
from fedqsn_cli.models.model import OpenModel


def copy_companions(model: OpenModel, writer: ArtifactWriter, quantization: Quantization | None = None) -> None:
    """Write them for a model that stays with the owner: as they are, but for the quantization in config.json."""
    config = model.checkpoint.config
    packed = model.quantization_config(quantization)
    if config is not None and packed is None and "quantization_config" not in config:
        writer.add_file("config.json", model.source.path / "config.json")
    elif config is not None:
        document = {key: value for key, value in config.items() if key != "quantization_config"}
        if packed is not None:
            document["quantization_config"] = packed
        writer.add_bytes("config.json", strictjson.pretty(document).encode())
    for companion in model.checkpoint.companions:
        writer.add_file(companion.name, companion)


def write_public_companions(model: OpenModel, writer: FolderWriter, quantization: Quantization | None) -> None:
    """Write them for a proxy: without anything private."""
    if model.checkpoint.config is not None:
        public = public_config(model.checkpoint.config, model.quantization_config(quantization))
        writer.add_bytes("config.json", public)
    for companion in model.checkpoint.companions:
        writer.add_bytes(companion.name, public_companion(companion))
