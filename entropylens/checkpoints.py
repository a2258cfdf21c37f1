"""Weights of a checkpoint, a tensor at a time: safetensors, PyTorch's files, PEFT's adapters."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.capture.matrices import Matrix, MatrixSet, matrices_in
from entropylens.errors import EntropyLensError

__all__ = ["Adapter", "Checkpoint", "open_checkpoint"]

_PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
_INDICES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WRAPPINGS: Final = ("state_dict", "model_state_dict", "model", "module")
_CONFIG: Final = "adapter_config.json"
_PREFIX: Final = "base_model.model."
_FACTOR: Final = ".lora_"
_COMPANIONS: Final[Mapping[str, str]] = {
    r"(.+)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)": ".weight",
    r"(.+)\.(SCB|weight_format|weight_scale|weight_scale_inv)": ".weight",
    r"(.+)\.weight_(scale|zero_point|shape|g_idx)": ".weight_packed",
    r"(.+)\.(qzeros|scales|g_idx)": ".qweight",
    r"(.+)_scales": "_blocks",
}
"""Scales and tables beside quantised weights, and how the weights' own names end: those of
bitsandbytes, float8, compressed-tensors, GPTQ and AWQ, MXFP4."""
_SHOWN: Final = 12
_NO_WEIGHTS: Final = (torch.bool, torch.int64)
"""What masks and positions are kept in."""


# -- what is in it --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter, by its adapter_config.json."""

    alpha: float
    alphas: Mapping[re.Pattern[str], float]
    """For modules whose name is of such a pattern, instead of ``alpha``."""
    is_stabilised: bool
    """Whether alpha is divided by sqrt(r), not r (rsLoRA)."""
    is_transposed: bool
    """Whether the base's weights are ``[in, out]``, as in GPT-2."""
    has_magnitudes: bool
    """Whether the sum is scaled by learnt magnitudes (DoRA)."""

    def scale(self, module: str, rank: int) -> float:
        """Factor of the product B A of one module."""
        own = (alpha for pattern, alpha in self.alphas.items() if pattern.match(module))
        return next(own, self.alpha) / (sqrt(rank) if self.is_stabilised else rank)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors of a checkpoint by name; a value is read where it is asked for."""

    tensors: Mapping[str, Tensor]
    adapter: Adapter | None = None
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of the model that the adapter is for."""

    def groups(self) -> list[list[str]]:
        """Names that are looked at together: the factors of one LoRA product, else one tensor.

        Scales and tables of a quantised tensor are in none: the tensor itself is refused.
        """
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            if not _is_companion(name, self.tensors):
                place, factor, _ = name.partition(_FACTOR)
                found.setdefault(place + factor, []).append(name)
        return [*found.values()]

    def matrices(self, group: Sequence[str]) -> MatrixSet:
        """The matrices of one of `groups`, by the rules of `matrices_in`.

        A LoRA product has the scale of its adapter; without one it has the scale 1. Where there is
        a base its sum with the product stands beside it, as ``NAME+lora``.
        """
        place, factor, _ = group[0].partition(_FACTOR)
        if factor and (refused := _misfit(self.tensors, group)):
            return MatrixSet(refused=refused)
        if self.adapter is None or not factor:
            return _read(self.tensors, group)
        inner = (self.tensors[name] for name in group if "A" in name.removeprefix(place + factor))
        ranks = [len(value) for value in inner if value.ndim and len(value)] or [1]
        module = place.removeprefix(_PREFIX)
        found = _read(self.tensors, group, self.adapter.scale(module, ranks[0]))
        if self.base and found.matrices:
            is_embedding = f"{_FACTOR}embedding_" in group[0]
            self._add_sum(found, module, self.adapter.is_transposed or is_embedding)
        return found

    def _add_sum(self, found: MatrixSet, module: str, is_transposed: bool) -> None:
        product = found.matrices[0]
        name = f"{product.name.removesuffix('.lora')}+lora"
        weight = _name_in(self.base, f"{module}.weight")
        if weight is None:
            found.refused[name] = f"the base has no {module}.weight"
        elif self.adapter is not None and self.adapter.has_magnitudes:
            found.refused[name] = "the adapter has learnt magnitudes (DoRA)"
        elif refused := _read(self.base, [weight]).refused:
            found.refused[name] = f"of its base: {refused[weight]}"
        elif misfit := _beside(self.base[weight].shape, product.shape, is_transposed):
            found.refused[name] = misfit
        else:
            value = self.base[weight]
            read = partial(_sum, self.base, weight, product, is_transposed)
            found.add(name, (weight, *product.parameters), value.reshape(len(value), -1), read)


def _read(
    tensors: Mapping[str, Tensor], names: Sequence[str], scale: float | None = None
) -> MatrixSet:
    refused = {}
    for name in names:
        value = tensors[name]
        if f"{name}.absmax" in tensors:
            refused[name] = "it is quantised (packed by bitsandbytes)"
        elif value.layout != torch.strided:
            refused[name] = f"it is sparse ({str(value.layout).removeprefix('torch.')})"
        elif value.ndim > 1 and value.dtype in _NO_WEIGHTS:
            refused[name] = f"it holds no weights ({str(value.dtype).removeprefix('torch.')})"
    if refused:
        return MatrixSet(refused=refused)
    return matrices_in({name: tensors[name] for name in names}, scale=scale)


def _misfit(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, str]:
    """Why factors of a LoRA product cannot be multiplied, by the first one's name."""
    found = [(re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name), name) for name in names]
    sides = {match[1]: tensors[name].shape for match, name in found if match}
    if sides.keys() != {"A", "B"}:
        return {}
    inner, outer = sides["A"], sides["B"]
    if min(len(inner), len(outer)) > 1 and 0 < inner[0] == prod(outer[1:]):
        return {}
    return {names[0]: f"{_by(outer)} and {_by(inner)} have no product"}


def _beside(base: Sequence[int], product: Sequence[int], is_transposed: bool) -> str | None:
    """Why a product cannot be added to its base."""
    rows, columns = product[::-1] if is_transposed else product
    if len(base) > 1 and (base[0], prod(base[1:])) == (rows, columns):
        return None
    return f"its base is of {_by(base)}, the product of {rows}x{columns}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "no axes"


def _is_companion(name: str, names: Mapping[str, Tensor]) -> bool:
    found = ((re.fullmatch(pattern, name), end) for pattern, end in _COMPANIONS.items())
    return any(match is not None and match[1] + end in names for match, end in found)


def _name_in(base: Mapping[str, Tensor], name: str) -> str | None:
    """The base's name, which may have one prefix less than the adapter's, or more of them."""
    longer = [one for one in base if one.endswith(f".{name}")]
    names = [name, name.partition(".")[2], *(longer if len(longer) == 1 else [])]
    return next((one for one in names if one in base), None)


def _sum(base: Mapping[str, Tensor], name: str, product: Matrix, is_transposed: bool) -> Tensor:
    weight, change = base[name].float(), product.read()
    return weight.reshape(len(weight), -1) + (change.T if is_transposed else change)


# -- files ----------------------------------------------------------------------------------------


def open_checkpoint(path: Path, base: Path | None = None) -> Checkpoint:
    """Which tensors does a checkpoint hold?

    Nothing pickled is run: PyTorch's files are loaded with ``weights_only``.

    Args:
        path: A ``.safetensors`` file; a PyTorch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), of
            which a ``state_dict`` such as Lightning's is unwrapped; a folder of either, with an
            index or without; or the folder of a PEFT adapter.
        base: Checkpoint of the model that an adapter is for.

    Returns:
        The checkpoint, its files mapped into memory.

    Raises:
        EntropyLensError: There is no checkpoint, or it cannot be read, or not without running what
            is in it.

    Cost: the names; values are read later.
    """
    folder = path if path.is_dir() else path.parent
    is_adapter = (folder / _CONFIG).is_file() and (path.is_dir() or path.stem == "adapter_model")
    if is_adapter:
        below = {} if base is None else _tensors(base)
        adapter = _adapter(folder / _CONFIG)
        return Checkpoint(tensors=_tensors(path), adapter=adapter, base=below)
    if base is not None:
        raise EntropyLensError(
            f"spectra: expected an adapter with --base, found no {path / _CONFIG}"
        )
    return Checkpoint(tensors=_tensors(path))


def _adapter(path: Path) -> Adapter:
    config = _json(path)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise EntropyLensError(f"spectra: expected a LoRA adapter, {path} is of a {kind}")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise EntropyLensError(f"spectra: expected alpha_pattern as an object in {path}")
    return Adapter(
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", path),
        alphas={
            _pattern(key, path): _alpha(value, f"alpha_pattern {key!r}", path)
            for key, value in alphas.items()
        },
        is_stabilised=bool(config.get("use_rslora")),
        is_transposed=bool(config.get("fan_in_fan_out")),
        has_magnitudes=bool(config.get("use_dora")),
    )


def _alpha(value: Any, what: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = "none" if value is None else repr(value)
        raise EntropyLensError(f"spectra: expected a number as {what} in {path}, got {got}")
    return float(value)


def _pattern(key: str, path: Path) -> re.Pattern[str]:
    """PEFT's, of the names of modules that a key stands for."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise EntropyLensError(
            f"spectra: expected regular expressions in alpha_pattern of {path}, got {key!r} "
            f"({error.msg})"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise EntropyLensError(f"spectra: expected JSON in {path}, got {error}") from None
    if not isinstance(found, dict):
        raise EntropyLensError(
            f"spectra: expected a JSON object in {path}, got a {type(found).__name__}"
        )
    return found


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict):
        raise EntropyLensError(f"spectra: expected a weight_map by tensor name in {index}")
    for name in names.values():
        if not isinstance(name, str) or set("/\\\0") & set(name):
            raise EntropyLensError(
                f"spectra: expected names of files beside it in {index}, got {name!r}"
            )
    files = [index.parent / name for name in sorted({*names.values()})]
    for missing in (file for file in files if not file.is_file()):
        raise EntropyLensError(f"spectra: expected {missing}, which {index.name} names")
    return files


def _tensors(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a file, or of the files of a folder."""
    if not path.exists():
        raise EntropyLensError(f"spectra: expected a checkpoint at {path}, found nothing")
    readers = {".safetensors": _safetensors, **dict.fromkeys(_PICKLED, _pickled)}
    found: dict[str, Callable[[], Tensor]] = {}
    for file in _files(path) if path.is_dir() else [path]:
        if file.suffix not in readers:
            known = ", ".join(readers)
            raise EntropyLensError(f"spectra: expected a checkpoint ({known}), got {file}")
        tensors = readers[file.suffix](file)
        if twice := found.keys() & tensors.keys():
            raise EntropyLensError(
                f"spectra: expected each tensor once in {path}, found {min(twice)} again in "
                f"{file.name}; name one file"
            )
        found |= tensors
    if not found:
        raise EntropyLensError(f"spectra: expected tensors in {path}, found none")
    return _Lazy(found)


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are read again each time they are asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, not its optimiser's state."""
    for index in _INDICES:
        if (folder / index).is_file():
            return _indexed(folder / index)
    for pattern in (
        "model.safetensors",
        "*.safetensors",
        "pytorch_model*.bin",
        "adapter_model.bin",
    ):
        if found := sorted(folder.glob(pattern)):
            return found
    if (folder / ".metadata").is_file():
        raise EntropyLensError(
            f"spectra: expected whole tensors, {folder} is a distributed checkpoint; "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch makes one file of it"
        )
    others = sorted(file for file in folder.iterdir() if file.suffix in _PICKLED)
    if len(others) == 1:
        return others
    seen = ", ".join(file.name for file in others) or "none"
    raise EntropyLensError(f"spectra: expected the files of one model in {folder}, found {seen}")


def _safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise EntropyLensError(
            f"spectra: expected safetensors to be installed to read {path}, found none; "
            f"pip install 'entropylens[hf]'"
        ) from None
    try:
        opened: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise EntropyLensError(f"spectra: expected safetensors in {path}, got: {error}") from None
    return {name: partial(opened.get_tensor, name) for name in [*opened.keys()]}


def _pickled(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        loaded = _loaded(path)
    except OSError:
        raise
    except Exception as error:
        raise EntropyLensError(_refusal(path, error)) from None
    keys = [*loaded] if isinstance(loaded, Mapping) else []
    for _ in _WRAPPINGS:
        held = loaded if isinstance(loaded, Mapping) else {}
        inside = [held[key] for key in _WRAPPINGS if isinstance(held.get(key), Mapping)]
        loaded = inside[0] if inside else loaded
    if not isinstance(loaded, Mapping):
        raise EntropyLensError(
            f"spectra: expected a state_dict in {path}, got a {type(loaded).__name__}"
        )
    tensors = {str(name): one for name, one in loaded.items() if isinstance(one, Tensor)}
    if keys and not tensors:
        raise EntropyLensError(
            f"spectra: expected tensors in {path}, found none under its keys "
            f"({', '.join(map(str, keys[:_SHOWN]))}); save the model's state_dict"
        )
    return {name: partial(_itself, value) for name, value in tensors.items()}


def _refusal(path: Path, error: Exception) -> str:
    """Why a file is not loaded; torch's own words advise to run what is in it."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign is None:
        kind = type(error).__name__
        return f"spectra: expected a PyTorch file, {path} is none, or damaged ({kind})"
    return (
        f"spectra: expected {path} to hold tensors alone, but it holds {foreign[1]}, which could "
        f"run code; save the model's state_dict"
    )


def _itself(value: Tensor) -> Tensor:
    return value


def _loaded(path: Path) -> Any:
    """What a PyTorch file holds; those of before torch 1.6 cannot be mapped into memory."""
    kept = dict[str, Any](map_location="cpu", weights_only=True)
    try:
        return torch.load(path, mmap=True, **kept)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, **kept)
