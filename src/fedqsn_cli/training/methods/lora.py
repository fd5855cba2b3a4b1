"""`--method lora`: low-rank adapters on the proxy as it is stored, through peft.

    layer(x) = P x + scaling · B A x            P stays as it came: packed, or dense in its own dtype
    U        = scaling · B A                    what the update of the layer's weight would be; never computed here

Rows of B that belong to hidden output neurons, and columns of A that belong to hidden input columns, are zero from the
beginning and no part of what is trained: U is zero on hidden units. Adapters, and modules that are trained in full
beside them, are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import ADAPTER_CONFIG, ADAPTER_TENSORS, AdapterRecord, ProxyManifest
from fedqsn_cli.artifacts.update_folder import PEFT_PREFIX, UPDATE_FORMATS, factor_names, lora_scaling
from fedqsn_cli.checkpoint import ArtifactWriter, Checkpoint, TensorSpec
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.dense import DenseTensors
from fedqsn_cli.models.stored_model import load_stored
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.options.lora import LoraOptions
from fedqsn_cli.training.methods.lora_modules import ChosenModules, TargetModule, choose_modules
from fedqsn_cli.training.steps.compact import TrainedPart, VisibleParameters
from fedqsn_cli.training.steps.precision import repeatable
from fedqsn_cli.training.steps.visible import expanded, read_visible
from fedqsn_cli.training.updates import update

_ADAPTER = "default"  # peft's name of the only adapter
_A_SUFFIX, _B_SUFFIX = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"  # of a module's name, once it has one


@dataclass(slots=True)
class LoraMethod:
    """A `Method`.

    Args:
        received: the proxy's tensors, read one by one. visible: its visible units, empty where all are trained.
        chosen: what is trained. seed: of the adapters' first values.
    """

    loaded: Loaded
    received: DenseTensors
    visible: dict[str, UnitMask]
    chosen: ChosenModules
    options: LoraOptions
    seed: int
    device: torch.device

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, manifest: ProxyManifest, options: TrainOptions, device: torch.device
    ) -> LoraMethod:
        """Load a verified proxy, whose checkpoint stays open. Raises InputError, FormatError."""
        shapes = {name: tuple(tensor.shape) for name, tensor in DenseTensors(checkpoint).layout.items()}
        visible = {} if manifest.train == "all" else read_visible(checkpoint.path, manifest, shapes)
        if any(mask.axis == "element" for mask in visible.values()):
            what = "the proxy hides single weights, which a product of factors cannot leave alone"
            raise InputError(what, where="--method", hint="use --method full")
        compute = torch.float32 if options.precision == "fp32" else torch.bfloat16
        loaded = load_stored(checkpoint, manifest.quantization, compute)
        return cls.on(checkpoint, loaded, visible, options, options.seed, device)

    @classmethod
    def on(
        cls,
        checkpoint: Checkpoint,
        loaded: Loaded,
        visible: dict[str, UnitMask],
        options: LoraOptions,
        seed: int,
        device: torch.device,
    ) -> LoraMethod:
        """Choose what is trained of a model, whose checkpoint stays open. Raises InputError."""
        received = DenseTensors(checkpoint)
        chosen = choose_modules(loaded.model, received.layout, checkpoint.config, options)
        method = cls(loaded, received, visible, chosen, options, seed, device)
        method._refuse_rank()
        return method

    def trainable(self) -> VisibleParameters:
        """Put adapters into the model, and give what is trained of them."""
        model = self.loaded.model.to(self.device)
        with repeatable(self.device, self.seed):
            _insert(model, self._config(), self.chosen)
        masks = {name: mask.to(self.device) for name, mask in self._masks()}
        trained = TrainedPart.of(model)
        with torch.no_grad():
            for name, mask in masks.items():
                if name.endswith((_A_SUFFIX, _B_SUFFIX)):
                    trained.parameters[name].mul_(mask)
        return VisibleParameters(trained, masks)

    @property
    def tokens_at_once(self) -> None:
        """All: packed weights are unpacked each time."""
        return None

    @property
    def numbers_sent(self) -> int:
        """Numbers in the update: factors, and what was trained in full twice, as it is and as U."""
        return sum(tensor.numel() for tensor in self._adapter_tensors().values()) + update.parameters(
            self._saved_layout(), self.visible
        )

    def bytes_sent(self, options: TrainOptions) -> int:
        """Bytes of these numbers."""
        _, specs = update.stored_as(self._saved_layout(), self.visible, options.update_format)
        return sum(spec.nbytes for spec in [*self._adapter_specs(options), *specs])

    def write(self, writer: ArtifactWriter, options: TrainOptions) -> dict[str, Any]:
        """Write the adapters as peft does, and U of what was trained in full."""
        self._write_adapters(writer, options)
        layout = self._saved_layout()
        if layout:
            differences = update.Differences(self.received, layout, self.visible, self.saved(), frozenset())
            update.write_tensors(writer, differences, options.update_format)
        saved = {tensor: PEFT_PREFIX + name for name, tensor in self._saved_names()}
        return {"adapters": self.records(), "saved": saved or None}

    def prepare(self, out: Path, digest: str) -> None:
        """Nothing is kept."""

    def sent(self) -> None:
        """Nothing is kept."""

    def records(self) -> dict[str, AdapterRecord]:
        """The adapters by the tensors that they change."""
        rank, scaling = self.options.rank, self.scaling
        return {
            target.tensor: AdapterRecord(
                module=PEFT_PREFIX + target.name, rank=rank, scaling=scaling, transposed=target.transposed
            )
            for target in self.chosen.targets
        }

    @property
    def scaling(self) -> float:
        """What the product of two factors is multiplied by."""
        return lora_scaling(self.options.rank, self.options.alpha, rank_stabilised=self.options.use_rslora)

    def factors(self) -> dict[str, tuple[Tensor, Tensor, bool]]:
        """A [rank, in] and B [out, rank] by the tensor that they change, and whether that is stored as [in, out]."""
        return {
            target.tensor: (
                self._parameter(target.name + _A_SUFFIX),
                self._parameter(target.name + _B_SUFFIX),
                target.transposed,
            )
            for target in self.chosen.targets
        }

    def saved(self) -> dict[str, Tensor]:
        """What was trained in full, by the checkpoint's names."""
        return {tensor: self._parameter(_saved(name, self.chosen)) for name, tensor in self._saved_names()}

    def _refuse_rank(self) -> None:
        """Refuse a rank that a layer cannot have. Raises InputError."""
        layout = self.received.layout
        for target in self.chosen.targets:
            most = min(layout[target.tensor].shape)
            if self.options.rank > most:
                what = f"{target.name} has no more than {most} dimensions"
                raise InputError(what, where="--lora-r", hint=f"give {most} or less, or name other --target-modules")

    def _config(self) -> Any:
        """peft's configuration; with whole names, which fit nothing else."""
        from peft import LoraConfig

        options, chosen = self.options, self.chosen
        return LoraConfig(
            r=options.rank,
            lora_alpha=cast(int, options.alpha),  # peft divides it, whatever it is
            lora_dropout=options.lora_dropout or 0.0,
            use_rslora=options.use_rslora,
            target_modules=[target.name for target in chosen.targets],
            modules_to_save=list(chosen.saved) or None,
            fan_in_fan_out=any(target.transposed for target in chosen.targets),
            task_type="CAUSAL_LM" if self.loaded.task == "causal-lm" else None,
        )

    def _masks(self) -> Iterator[tuple[str, Tensor]]:
        """What is visible of the parameters that are trained, for those with hidden units, by the model's names."""
        layout = self.received.layout
        for target in self.chosen.targets:
            mask = self.visible.get(target.tensor)
            if mask is not None and not mask.flags.all():
                yield _factor_mask(target, mask, self.options.rank)
        for name, tensor in self._saved_names():
            mask = self.visible.get(tensor)
            if mask is not None and not mask.flags.all():
                yield _saved(name, self.chosen), expanded(mask, tuple(layout[tensor].shape))

    def _saved_names(self) -> list[tuple[str, str]]:
        """Parameters that are trained in full: the model's name before peft and the proxy's."""
        return list(self.chosen.parameters.items())

    def _saved_layout(self) -> dict[str, Tensor]:
        layout = self.received.layout
        return {tensor: layout[tensor] for tensor in self.chosen.parameters.values()}

    def _parameter(self, name: str) -> Tensor:
        parameter: Tensor = self.loaded.model.get_parameter(name)
        return parameter.detach()

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """What the file of adapters holds, under peft's names."""
        factors = {
            name: self._parameter(target.name + suffix)
            for target in self.chosen.targets
            for name, suffix in zip(factor_names(PEFT_PREFIX + target.name), (_A_SUFFIX, _B_SUFFIX), strict=True)
        }
        saved = {PEFT_PREFIX + name: self._parameter(_saved(name, self.chosen)) for name, _ in self._saved_names()}
        return dict(sorted((factors | saved).items()))

    def _adapter_specs(self, options: TrainOptions) -> list[TensorSpec]:
        dtype = UPDATE_FORMATS[options.update_format].dtype
        return [TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in self._adapter_tensors().items()]

    def _write_adapters(self, writer: ArtifactWriter, options: TrainOptions) -> None:
        """Write adapter_model.safetensors and adapter_config.json."""
        stored = UPDATE_FORMATS[options.update_format]
        stem = ADAPTER_TENSORS.removesuffix(".safetensors")
        sink = writer.tensors(stem, self._adapter_specs(options), max_shard_bytes=None, metadata={"format": "pt"})
        for name, tensor in self._adapter_tensors().items():
            for _, data in update.encode_update(name, tensor.float().cpu(), stored).parts:
                sink.write(name, 0, data)
        sink.close()
        writer.add_bytes(ADAPTER_CONFIG, strictjson.pretty(_public(self._config())).encode())


def _insert(model: Any, config: Any, chosen: ChosenModules) -> None:
    """Let peft put adapters into a model in place, and check that they are where they should be."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    get_peft_model(model, config, adapter_name=_ADAPTER)
    modules = dict(model.named_modules())
    adapted = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    saved = {name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    if adapted != {target.name for target in chosen.targets} or saved != set(chosen.saved):
        raise InputError("peft changes other modules than those that were named", where="--target-modules")
    for name in chosen.saved:
        module = modules[name].modules_to_save[_ADAPTER]
        module.float()
        if dtype != torch.float32:
            module.register_forward_pre_hook(_widen, with_kwargs=True)
            module.register_forward_hook(lambda _, __, output, dtype=dtype: _cast(output, dtype))


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give a module in fp32 its inputs in fp32."""
    return tuple(_cast(value, torch.float32) for value in args), {
        name: _cast(value, torch.float32) for name, value in kwargs.items()
    }


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _saved(name: str, chosen: ChosenModules) -> str:
    """The name, once peft has copied its module, of a parameter that is trained in full."""
    module = next(module for module in chosen.saved if name.startswith(f"{module}."))
    return f"{module}.modules_to_save.{_ADAPTER}{name.removeprefix(module)}"


def _factor_mask(target: TargetModule, mask: UnitMask, rank: int) -> tuple[str, Tensor]:
    """The factor whose rows or columns belong to the units of a tensor, and which of its elements are visible."""
    outputs: Literal["row", "column"] = "column" if target.transposed else "row"
    flags = torch.from_numpy(mask.flags).reshape(-1)
    if mask.axis == outputs:
        return f"{target.name}{_B_SUFFIX}", flags[:, None].expand(-1, rank)
    return f"{target.name}{_A_SUFFIX}", flags[None].expand(rank, -1)


def _public(config: Any) -> dict[str, Any]:
    """A configuration as peft stores it, the same in every process, and without a trace of where the proxy was."""
    document = {
        name: sorted(value) if isinstance(value, set | frozenset) else value for name, value in config.to_dict().items()
    }
    return document | {"base_model_name_or_path": None, "revision": None, "inference_mode": True}
