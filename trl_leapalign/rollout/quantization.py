"""Quantized base models: loading them, making them in place on any device, and which of them LoRA can be trained on."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor, nn

from .components import DENOISER_PREFIXES, modules_of

LARGE = 2 * 2**30
"""Bytes of weights from which a component beside the denoisers is quantized."""
QUANT_TYPES = ("nf4", "fp4")
FLAGS = ("load_in_4bit", "load_in_8bit")
DETAILS = {
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant": "bnb_4bit_use_double_quant",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",  # as TRL calls it
    "bnb_4bit_compute_dtype": "bnb_4bit_compute_dtype",
}
BACKENDS = {"bitsandbytes_4bit": {"load_in_4bit": True}, "bitsandbytes_8bit": {"load_in_8bit": True}}
TRAINABLE = ("bitsandbytes", "torchao", "quanto")
HAVE_BITSANDBYTES_KERNELS = ("cuda", "xpu", "mps")


@dataclass(frozen=True)
class Quantization:
    """Weights of linear layers in 8 or 4 bits, by bitsandbytes.

    Args:
        bits (int): 4 or 8.
        quant_type (str): of 4 bits: "nf4" (Dettmers et al., arXiv 2305.14314) or "fp4".
        nested (bool): of 4 bits: whether the scales are quantized too.
        compute_dtype (torch.dtype | None): that products are computed in; None is the pipeline's own.

    Raises:
        ValueError: if a setting is out of range, or does not apply to these bits.
    """

    bits: int = 4
    quant_type: str = "nf4"
    nested: bool = False
    compute_dtype: torch.dtype | None = None

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits!r} must be 4 or 8.")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"bnb_4bit_quant_type={self.quant_type!r} is unknown; choose one of {QUANT_TYPES}.")
        if self.bits == 8 and self.nested:
            raise ValueError("use_bnb_nested_quant=True is for 4 bits. Leave it out, or set load_in_4bit=True.")

    @staticmethod
    def of(settings: dict[str, Any]) -> "Quantization | None":
        """Read settings of the names that transformers' BitsAndBytesConfig has; None if neither width is set.

        Args:
            settings (dict[str, Any]): `load_in_4bit`, `load_in_8bit` and details; others are left alone.

        Raises:
            ValueError: if both widths are set, or details without a width.
        """
        chosen = [flag for flag in FLAGS if settings.get(flag)]
        details = {DETAILS[name]: value for name, value in settings.items() if name in DETAILS and value is not None}
        if len(chosen) == 2:
            raise ValueError("load_in_4bit and load_in_8bit are both set. Choose one.")
        if not chosen:
            if details:
                raise ValueError(f"{sorted(details)} have no effect without load_in_4bit=True. Set it, or drop them.")
            return None
        dtype = details.get("bnb_4bit_compute_dtype")
        return Quantization(
            bits=4 if chosen == ["load_in_4bit"] else 8,
            quant_type=details.get("bnb_4bit_quant_type", "nf4"),
            nested=details.get("bnb_4bit_use_double_quant", False),
            compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        )

    def config(self, library: str, dtype: torch.dtype) -> Any:
        """The configuration that a library loads a model with.

        Args:
            library (str): "diffusers" or "transformers".
            dtype (torch.dtype): of the layers that are not quantized.
        """
        if library == "transformers":
            from transformers import BitsAndBytesConfig as kind
        else:
            kind = BitsAndBytesConfig
        if self.bits == 8:
            return kind(load_in_8bit=True)
        return kind(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=self.compute_dtype or dtype,
        )


# In place


def quantize_linears(
    module: nn.Module,
    quantization: Quantization,
    *,
    device: torch.device | str | None = None,
    initialise: Callable[[str, Tensor], None] | None = None,
) -> list[str]:
    """Quantize the linear layers of a module in place, one after another, on any device that bitsandbytes knows.

    Diffusers quantizes what it loads only where there is a GPU; this works on the CPU too, and on a module on the meta
    device, whose linear layers are made one at a time: the whole model is never there in full precision.

    Args:
        module (nn.Module): a model; layers that it keeps in float32 (`_keep_in_fp32_modules`) are left alone.
        quantization (Quantization): how.
        device (torch.device | str | None): where quantized layers go; None is where each one is.
        initialise (Callable[[str, Tensor], None] | None): fills the weight or bias of a layer on the meta device, by
            name.

    Returns:
        list[str]: names of the layers that were quantized.

    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: if the module has no linear layers to quantize, or is on the meta device without `initialise`.
    """
    require_bitsandbytes()
    kept = getattr(module, "_keep_in_fp32_modules", None) or []
    names = [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not any(part in name.split(".") for part in kept)
    ]
    if not names:
        raise ValueError(f"{type(module).__name__} has no linear layers to quantize.")
    for name in names:
        layer = module.get_submodule(name)
        if layer.weight.is_meta:
            if initialise is None:
                raise ValueError(f"{name} is on the meta device. Load its weights first, or pass initialise.")
            layer.to_empty(device="cpu" if device is None else device)
            for key, parameter in layer.named_parameters():
                initialise(f"{name}.{key}", parameter.data)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _quantized(layer, quantization, device))
    keep_differentiable(module)
    return names


def _quantized(layer: nn.Linear, quantization: Quantization, device: torch.device | str | None) -> nn.Linear:
    import bitsandbytes as bnb

    device = torch.device(device) if device is not None else layer.weight.device
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight = layer.weight.data.to(device)
    with torch.device("meta"):
        if quantization.bits == 4:
            new = bnb.nn.Linear4bit(
                *shape,
                bias=bias,
                compute_dtype=quantization.compute_dtype or weight.dtype,
                compress_statistics=quantization.nested,
                quant_type=quantization.quant_type,
            )
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0)
    if quantization.bits == 4:
        new.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=quantization.nested,
            quant_type=quantization.quant_type,
            module=new,
        ).to(device)
    else:
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if bias:
        new.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return new.train(layer.training)


def quantize_pipeline(
    pipeline: DiffusionPipeline, quantization: Quantization, components: Iterable[str] | None = None
) -> dict[str, int]:
    """Quantize components of a pipeline in place, on the device that they are on.

    Args:
        pipeline (DiffusionPipeline): a pipeline in full precision.
        quantization (Quantization): how.
        components (Iterable[str] | None): their names; None takes the denoisers, called transformer... or unet...,
            and further components of 2 GiB of weights or more, but decoders.

    Returns:
        dict[str, int]: bytes saved, by component.

    Raises:
        ValueError: if a component is unknown, quantized already or has no linear layers.
        ImportError: if bitsandbytes is not installed.
    """
    modules = modules_of(pipeline)
    if components is None:
        sizes = {name: num_bytes(module) for name, module in modules.items() if not hasattr(module, "decode")}
        components = [name for name in sizes if _is_chosen(name, sizes[name])]
    components = list(components)
    unknown = [name for name in components if name not in modules]
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} has no modules called {unknown}. It has {sorted(modules)}.")
    saved = {}
    for name in components:
        if quantization_of(modules[name]) is not None:
            raise ValueError(f"The {name} is quantized already, by {quantization_of(modules[name])}.")
        before = num_bytes(modules[name])
        quantize_linears(modules[name], quantization)
        saved[name] = before - num_bytes(modules[name])
    return saved


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, the scales of quantized ones included."""
    total = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = [state.absmax, *([state.state2.absmax] if getattr(state, "state2", None) is not None else [])]
            total += sum(scale.nbytes for scale in scales)
        if isinstance(getattr(parameter, "SCB", None), Tensor):
            total += parameter.SCB.nbytes
    return total


def keep_differentiable(module: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16: there is no way back."""
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def require_bitsandbytes() -> None:
    """Raise ImportError with the remedy if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ImportError("Weights in 4 or 8 bits need bitsandbytes: pip install bitsandbytes.")


# Loading


def read_quantization(init_kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Take what quantizes out of the arguments of `from_pretrained`.

    Args:
        init_kwargs (dict[str, Any]): with `load_in_4bit`, `load_in_8bit` and details, or `quantization_config`: a
            PipelineQuantizationConfig or its arguments as a dict, a BitsAndBytesConfig or its settings as a dict.

    Returns:
        tuple[dict, Quantization | PipelineQuantizationConfig | None]: the other arguments, and what quantizes.

    Raises:
        TypeError: if `quantization_config` is of another kind.
        ValueError: if settings are unknown or contradict each other.
    """
    own = {name: value for name, value in init_kwargs.items() if name in (*FLAGS, *DETAILS)}
    others = {name: value for name, value in init_kwargs.items() if name not in own}
    config = others.pop("quantization_config", None)
    flat = Quantization.of(own)
    if config is None:
        return others, flat
    if own:
        raise ValueError(f"quantization_config and {sorted(own)} are both given. Set one.")
    if isinstance(config, PipelineQuantizationConfig):
        return others, config
    if not isinstance(config, dict) and hasattr(config, "load_in_4bit"):  # a BitsAndBytesConfig of either library
        details = {} if config.load_in_8bit else {name: getattr(config, name) for name in set(DETAILS.values())}
        config = {"load_in_4bit": config.load_in_4bit, "load_in_8bit": config.load_in_8bit, **details}
    if not isinstance(config, dict):
        raise TypeError(
            f"quantization_config={config!r} must be a diffusers.PipelineQuantizationConfig, a BitsAndBytesConfig, or "
            "a dict of the arguments of one, since a pipeline has several models. For other back ends pass "
            'PipelineQuantizationConfig(quant_mapping={"transformer": ...}).'
        )
    if "quant_backend" in config or "quant_mapping" in config:
        return others, PipelineQuantizationConfig(**config)
    unknown = sorted(config.keys() - {*FLAGS, *DETAILS})
    quantization = Quantization.of(config)
    if unknown or quantization is None:
        raise ValueError(
            f"quantization_config={config} is not understood. Set load_in_4bit or load_in_8bit to true in it, or "
            'quant_backend and quant_kwargs, such as {"quant_backend": "quanto", "quant_kwargs": '
            '{"weights_dtype": "int8"}, "components_to_quantize": ["transformer"]}.'
        )
    return others, quantization


def load_quantized(
    name: str,
    quantization: Quantization | PipelineQuantizationConfig,
    device: torch.device,
    init_kwargs: dict[str, Any],
) -> DiffusionPipeline:
    """Load a pipeline with quantized components: the denoisers, and other components by their size.

    With bitsandbytes on a device that diffusers cannot quantize for while loading, such as the CPU, components are
    loaded in full precision and then quantized in place.

    Args:
        name (str): Hub id or path.
        quantization (Quantization | PipelineQuantizationConfig): how; the latter says for which components.
        device (torch.device): where the pipeline will run.
        init_kwargs (dict[str, Any]): arguments of `from_pretrained`, with `torch_dtype`.

    Returns:
        DiffusionPipeline: loaded.
    """
    on_the_fly = device.type in HAVE_BITSANDBYTES_KERNELS
    wanted = {} if on_the_fly and not isinstance(quantization, Quantization) else _components(quantization)
    if isinstance(quantization, Quantization):
        require_bitsandbytes()
        folder = Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name, **init_kwargs))
        libraries = chosen_components(folder)
        if on_the_fly:
            dtypes = init_kwargs["torch_dtype"]
            default = dtypes.get("default", torch.float32) if isinstance(dtypes, dict) else dtypes
            mapping = {key: quantization.config(library, default) for key, library in libraries.items()}
            quantization = PipelineQuantizationConfig(quant_mapping=mapping)
        else:
            wanted = dict.fromkeys(libraries, quantization)
    if not wanted:
        return DiffusionPipeline.from_pretrained(name, **{**init_kwargs, "quantization_config": quantization})
    pipeline = DiffusionPipeline.from_pretrained(name, **init_kwargs)
    for component, own in wanted.items():
        quantize_pipeline(pipeline, own, [component])
    return pipeline


def _components(config: Any) -> dict[str, Quantization]:
    """Which components a PipelineQuantizationConfig gives to bitsandbytes, if it gives all that it quantizes to it."""
    if not isinstance(config, PipelineQuantizationConfig):
        return {}
    if config.quant_mapping:
        settings = config.quant_mapping
        if not all(hasattr(each, "load_in_4bit") for each in settings.values()):
            return {}
        return {key: read_quantization({"quantization_config": each})[1] for key, each in settings.items()}
    if config.quant_backend not in BACKENDS:
        return {}
    own = read_quantization({"quantization_config": {**BACKENDS[config.quant_backend], **config.quant_kwargs}})[1]
    if not config.components_to_quantize:
        raise ValueError("Set components_to_quantize, such as ['transformer'], in the PipelineQuantizationConfig.")
    return dict.fromkeys(config.components_to_quantize, own)


def chosen_components(folder: Path) -> dict[str, str]:
    """Choose the components of a pipeline's folder to quantize.

    Args:
        folder (Path): with `model_index.json` and a folder for each component.

    Returns:
        dict[str, str]: the library, "diffusers" or "transformers", of the denoisers, called transformer... or
        unet..., and of each other component with 2 GiB of weights or more, by name; decoders are left out.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    chosen = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        kind = str(entry[1])
        sizes = {suffix: _files_size(folder / name, suffix) for suffix in (".safetensors", ".bin")}
        size = sizes[".safetensors"] or sizes[".bin"]
        if size and not kind.startswith("Autoencoder") and name != "vae" and _is_chosen(name, size):
            chosen[name] = "diffusers" if entry[0] == "diffusers" else "transformers"
    return chosen


def _files_size(folder: Path, suffix: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"*{suffix}"))


def _is_chosen(name: str, size: int) -> bool:
    return name.startswith(DENOISER_PREFIXES) or size >= LARGE


# Training


def quantization_of(module: nn.Module) -> str | None:
    """Name what quantized a module, such as "bitsandbytes NF4"; None for one in full precision."""
    parameters = [getattr(part, "weight", None) for part in module.modules()]
    for weight in parameters:
        if type(weight).__name__ == "Params4bit":
            return f"bitsandbytes {weight.quant_type.upper()}"
        if type(weight).__name__ == "Int8Params":
            return "bitsandbytes int8"
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        return str(getattr(method, "value", method))
    for part in module.modules():
        weight = getattr(part, "weight", None)
        for backend in ("torchao", "quanto"):
            if type(part).__module__.split(".")[0].endswith(backend) or type(weight).__module__.startswith(backend):
                return backend
        if type(weight).__name__ == "GGUFParameter":
            return "gguf"
        if isinstance(weight, Tensor) and not weight.is_floating_point() and weight.dtype != torch.bool:
            return f"weights in {weight.dtype}"
    return None


def check_quantized(name: str, module: nn.Module, full_finetuning: bool) -> None:
    """Raise ValueError if a denoiser's weights are quantized so that it cannot be trained as it is meant to be.

    Args:
        name (str): of the component.
        module (nn.Module): a denoiser.
        full_finetuning (bool): whether all weights are to be trained.
    """
    found = quantization_of(module)
    if found is None:
        return
    backend = found.split()[0]
    quantizer = getattr(module, "hf_quantizer", None)
    if backend not in TRAINABLE or not getattr(quantizer, "is_trainable", True):
        raise ValueError(
            f"The {name} is quantized by {found}, through which no LoRA can be trained. Load it in full precision, or "
            "quantize it by bitsandbytes (load_in_4bit, load_in_8bit), torchao int8 or quanto; the adapter will work "
            "on the other one too."
        )
    if full_finetuning:
        raise ValueError(
            f"The {name} is quantized ({found}), so its weights cannot be trained, only an adapter on them: use LoRA. "
            "Set full_finetuning=False, or load the pipeline in full precision."
        )
    keep_differentiable(module)
