"""Models larger than the device's memory: decoder layers stay on disk or in CPU memory and come in as they run.

A layer's weights are on the device while it runs and the next one's are read meanwhile, so that two layers at most are
there at a time. A walk for many removals (``layerprune.scoring``) holds a layer until every removal has passed it: one
pass over the weights for each batch, however many removals it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.architecture.stack import quiet
from layerprune.errors import ModelError, one_line
from layerprune.models.placement import Offload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensor = torch.Tensor
PAGE = 4096  # bytes, the smallest there are
Source = Callable[[], Tensor]  # reads one tensor into CPU memory


@dataclass(frozen=True)
class Arrived:
    """The weights of one layer on the device."""

    tensors: dict[str, Tensor]
    copied: torch.cuda.Event | None  # on a card: when the copies are done

    def wait(self) -> None:
        """Let what is computed next on this thread's stream wait for the copies, without waiting on the host."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.copied.device)
            stream.wait_event(self.copied)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)


@dataclass
class LayerStream:
    """Brings each decoder layer's weights to the device when it runs, and reads the layer that ran next last time."""

    device: torch.device
    sources: Sequence[dict[str, Source]]  # of each layer: its parameters by name
    room: int = 0  # bytes on the device for two of the layers
    folder: TemporaryDirectory[str] | None = None  # weights in a form that the checkpoint does not have them in
    reads: list[int] = field(init=False)  # how often each layer was read
    _after: dict[int, int] = field(default_factory=dict)  # which layer ran after which
    _last: int | None = None
    _ahead: tuple[int, Future[Arrived]] | None = None
    _held: int | None = None  # a layer that stays until its block ends
    _leave: Callable[[], None] | None = None  # takes the held layer's weights away

    def __post_init__(self) -> None:
        self.reads = [0] * len(self.sources)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStream:
        return self  # a view of the model (models.bypass) shares its weights

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Give each layer a ``forward`` that brings its weights in. The layers' parameters are on the meta device."""
        for index, layer in enumerate(layers):
            original = layer.forward
            streamed = partial(self._run, index, layer, original)
            streamed.__wrapped__ = original  # type: ignore[attr-defined]  # for who asks for the signature
            layer.forward = streamed  # type: ignore[method-assign]

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """Keep the weights of a layer, once it has run in the block, until the block ends."""
        self._held = index
        try:
            yield
        finally:
            self._held = None
            if self._leave is not None:
                self._leave()
                self._leave = None

    @contextmanager
    def present(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Have the weights of a layer in it while the block runs."""
        if self._leave is not None:  # it is held, and has come in
            yield
            return
        leave = _install(layer, self._take(index))
        if self._held == index:
            self._leave = leave
            yield
            return
        try:
            yield
        finally:
            leave()

    def replace(self, index: int, name: str, tensor: Tensor) -> None:
        """Let a layer have another weight from now on: a copy in CPU memory, in the dtype of the old one."""
        self._ahead = None  # it may hold the one that goes
        kept = tensor.detach().to("cpu", self.sources[index][name]().dtype, copy=True)
        self.sources[index][name] = partial(_itself, kept)

    def _run(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.present(index, layer):
            return original(*args, **kwargs)

    def _take(self, index: int) -> dict[str, Tensor]:
        """Return a layer's weights, read ahead or now, and begin to read the next one's."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            if ahead is not None:
                ahead[1].cancel()
            ahead = index, self._reader.submit(self.read, index)
        arrived = ahead[1].result()
        arrived.wait()
        if self._last is not None:
            self._after[self._last] = index
        self._last = index
        following = self._after.get(index, (index + 1) % len(self.sources))
        if following != index:
            self._ahead = following, self._reader.submit(self.read, following)
        return arrived.tensors

    def read(self, index: int) -> Arrived:
        """Bring a layer to the device; runs on the reader's thread."""
        self.reads[index] += 1
        sources = self.sources[index]
        if self._side is None:
            return Arrived({name: source() for name, source in sources.items()}, None)
        with torch.cuda.stream(self._side):
            tensors = {
                name: source().pin_memory().to(self.device, non_blocking=True) for name, source in sources.items()
            }
            return Arrived(tensors, self._side.record_event())


def _install(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put weights into a layer; returns what takes them away again."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for name, tensor in tensors.items():
        parent, _, own = name.rpartition(".")
        held: dict[str, Any] = layer.get_submodule(parent)._parameters
        before.append((held, own, held[own]))
        held[own] = nn.Parameter(tensor, requires_grad=False)

    def leave() -> None:
        for held, own, placeholder in before:
            held[own] = placeholder

    return leave


def load_streamed(
    load: Callable[..., tuple[PreTrainedModel, Mapping[str, Any]]], skeleton: nn.Module, stack: str,
    device: torch.device, kept: Offload,
) -> tuple[LayerStream, PreTrainedModel, Mapping[str, Any]]:  # fmt: skip
    """Load a model whose layers stay in CPU memory or on disk; returns their stream, the model, and what ``load`` says.

    ``load`` is transformers' ``from_pretrained`` without its places, ``skeleton`` the model without weights. Of what
    accelerate puts on the model only the places of the weights are taken: its hooks read a layer's weights module by
    module, at each call.
    """
    from accelerate.hooks import remove_hook_from_submodules

    scratch = TemporaryDirectory(prefix="layerprune-", ignore_cleanup_errors=True) if kept == "disk" else None
    with quiet("accelerate"):  # which says that weights are offloaded
        model, info = load(
            device_map=_places(skeleton, stack, str(device), kept),
            offload_folder=scratch.name if scratch is not None else None,
        )
    index: Mapping[str, Any] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index = weights.dataset.index
            break
    remove_hook_from_submodules(model)
    for name in ("hf_device_map", "to", "cuda"):
        vars(model).pop(name, None)
    layers = list(model.get_submodule(stack).children())
    sources = [sources_of(layer, f"{stack}.{number}", index, device) for number, layer in enumerate(layers)]
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
    stream = LayerStream(device, sources, 2 * largest, scratch)
    stream.attach(layers)
    return stream, model, info


def _places(skeleton: nn.Module, stack: str, device: str, kept: Offload) -> dict[str, str]:
    """Return where transformers is to leave each part of a model, by name: the layers of ``stack`` at ``kept``."""
    places: dict[str, str] = {f"{stack}.{layer}": kept for layer, _ in skeleton.get_submodule(stack).named_children()}
    parent, path = skeleton, ""
    for step in stack.split("."):
        beside = [*parent.named_children(), *parent.named_parameters(recurse=False)]
        places |= {path + name: device for name, _ in beside if name != step}
        parent, path = parent.get_submodule(step), f"{path}{step}."
    return places


def sources_of(layer: nn.Module, path: str, index: Mapping[str, Any], device: torch.device) -> dict[str, Source]:
    """Return how each parameter of a layer is read; those that are in CPU memory leave the layer."""
    found: dict[str, Source] = {}
    for name, parameter in layer.named_parameters():
        if parameter.is_meta:
            entry = index[f"{path}.{name}"]
            file, own, dtype = entry["safetensors_file"], entry["weight_name"], getattr(torch, entry["dtype"])
            found[name] = partial(_from_file, file, own, dtype)
            continue
        if parameter.device == device:  # a quantiser has put it there
            continue
        kept = parameter.detach().pin_memory() if device.type == "cuda" else parameter.detach()
        found[name] = partial(_itself, kept)
        parent, _, own = name.rpartition(".")
        layer.get_submodule(parent)._parameters[own] = nn.Parameter(kept.to("meta"), requires_grad=False)
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _from_file(file: str, name: str, dtype: torch.dtype) -> Tensor:
    """Read a tensor of a safetensors file; in its own dtype it stays mapped, and is in the page cache by then.

    So nothing is copied, and the system takes the memory back when others need it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            mapped: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        why = f"{file} can no longer be read, and layers stay there until they run: {one_line(error)}"
        raise ModelError(why) from error
    if mapped.dtype != dtype:
        return mapped.to(dtype)
    mapped.view(torch.uint8).flatten()[::PAGE].sum()  # one byte of each page; the system reads it and those around it
    return mapped
