"""Models larger than memory: one block at a time is read from the safetensors files, and the next one meanwhile.

The streams of all batches are carried along: each block sees all of them before the next block takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from depthprune.anatomy import IN_FILES, Anatomy, weights_hash
from depthprune.families import check_supported, refuse_quantised
from depthprune.filled import check_filled, first_line
from depthprune.loading import (
    MODEL_TYPE,
    config_dict,
    parse_dtype,
    refuse_custom_code,
    refuse_lossy_folder,
    resolve,
)
from depthprune.weight_files import WeightFiles


class OffloadedModel:
    """A model whose blocks stay in their files but for one.

    Args:
        name: as :func:`depthprune.load` takes it; the model has to be an unpruned one, or a plain folder.
        dtype: as there.
        revision: as there.
        attn_implementation: as there.
        device: where the block, the embeddings and the last norm are.

    Attributes:
        model: the model; weights of blocks and of the head are on the meta device.
        files: its weights.

    Raises:
        ValueError: it is not there or not supported, its files are damaged, or they hold tensors under other names than
            the model has.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        chosen = parse_dtype(dtype)
        folder = _plain_folder(name, revision)
        self.files = WeightFiles(folder)
        with _refusing(name):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_supported(config)
        self.dtype = chosen if isinstance(chosen, torch.dtype) else (config.dtype or self.files.dtype())
        with _refusing(name), init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=attn_implementation
            ).eval()
        self.model.requires_grad_(False)
        if (folder / "generation_config.json").is_file():
            try:
                self.model.generation_config = GenerationConfig.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder}/generation_config.json is damaged: remove it.") from error
        self.model.name_or_path = self.model.config._name_or_path = str(name)
        self.anatomy = Anatomy.of(self.model)
        self.device = torch.device(device)
        tied = self.model.all_tied_weights_keys
        self._stored = {key: other for key, other in tied.items() if key not in self.files}  # keys by those in files
        self._prefixes = [f"{_name_of(self.model, block)}." for block in self.anatomy.blocks]
        self._check_names(name)
        self._places: dict[tuple[nn.Module, str], nn.Parameter | None] = {}  # what stands where weights are not
        decoder = f"{_name_of(self.model, self.model.get_decoder())}."
        outside = [key for key in self._keys() if key.startswith(decoder) and not key.startswith(tuple(self._prefixes))]
        self._put(self.files.read(outside, self.dtype))
        self.model.tie_weights()
        rows = (self.files.first_row(self._stored.get(name, name)) for name in sorted(self._keys()))
        setattr(self.model, IN_FILES, weights_hash(row.to(self.dtype) for row in rows))
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        self._free: list[Tensor] = []  # memory of blocks that were dropped
        self._old: dict[str, Tensor] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reading-blocks")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._next = None
        self._reader.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def block(self, place: int) -> Iterator[nn.Module]:
        """A block with its weights, for the length of a ``with``; the next one is read meanwhile.

        Args:
            place: in the list of blocks.
        """
        self._take(place)
        try:
            yield self.anatomy.blocks[place]
        finally:
            self._drop(place)

    @contextmanager
    def on_demand(self, count: int = 1) -> Iterator[None]:
        """Let every block read its weights when it runs, for the length of a ``with``.

        Args:
            count: so many blocks stay in memory, those that ran last.
        """
        here: list[int] = []

        def fetch(place: int) -> Callable[..., None]:
            def hook(*_: object) -> None:
                if place in here:
                    return
                while len(here) >= count:
                    self._drop(here.pop(0))
                self._take(place)
                here.append(place)

            return hook

        handles = [block.register_forward_pre_hook(fetch(place)) for place, block in enumerate(self.anatomy.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for place in here:
                self._drop(place)

    def keep_keys(self) -> None:
        """Remember which tensor is stored where, before sites are removed for good."""
        # by the tensors themselves, which a removal moves to other keys
        self._old = {key: tensor for key, tensor in self.model.named_parameters() if ".replacement." not in key}
        self._old |= {key: buffer for key, buffer in self.model.named_buffers() if key in self.files}

    def stored_keys(self) -> dict[str, str]:
        """The name in the files of every weight of the model that is left, by its present key."""
        names = {id(tensor): self._stored.get(key, key) for key, tensor in self._old.items()}
        now = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {key: names[id(tensor)] for key, tensor in now.items() if id(tensor) in names}

    def _take(self, place: int) -> None:
        """Give a block its weights, and begin to read those of the next one."""
        waiting = self._next if self._next is not None and self._next[0] == place else (place, self._read(place))
        state = waiting[1].result()
        self._next = (place + 1, self._read(place + 1)) if place + 1 < len(self._prefixes) else None
        self._put(state)

    def _drop(self, place: int) -> None:
        for name, module in self.anatomy.blocks[place].named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and "replacement" not in name.split("."):
                    module._parameters[leaf] = self._places.pop((module, leaf))
                    if parameter.device.type == "cpu":
                        self._free.append(parameter.data)

    def _read(self, place: int) -> Future[dict[str, Tensor]]:
        keys = [key for key in self._keys() if key.startswith(self._prefixes[place]) and ".replacement." not in key]
        return self._reader.submit(self.files.read, keys, self.dtype, self._memory)

    def _memory(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory of a block that was dropped, as taking and freeing it for every block would scatter the heap."""
        for number, tensor in enumerate(self._free):
            if tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu":
                return self._free.pop(number)
        return torch.empty(shape, dtype=dtype)

    def _keys(self) -> Iterable[str]:
        return self.model.state_dict().keys()

    def _put(self, state: dict[str, Tensor]) -> None:
        """Give the model some of its weights."""
        for key, tensor in state.items():
            owner, _, leaf = key.rpartition(".")
            module = self.model.get_submodule(owner)
            here = tensor.to(self.device)
            if leaf in module._parameters:
                self._places[module, leaf] = module._parameters[leaf]
                module._parameters[leaf] = nn.Parameter(here, requires_grad=False)
            else:
                module._buffers[leaf] = here

    def _check_names(self, name: str) -> None:
        """Refuse files whose tensors are not those of the model."""
        state, there = self.model.state_dict(), set(self.files.files)
        lacking = sorted(set(state) - there - set(self._stored))
        spare = there - set(state)
        if whole := sorted(self.files.whole_numbers() & {key for key, _ in self.model.named_parameters()}):
            raise ValueError(f"{whole[0]} of {name} holds no floating-point numbers: fetch the model again.")
        for key, other in self.model.all_tied_weights_keys.items():
            both = self.files.mapped([key, other], self.dtype) if {key, other} <= there else {}
            if both and not torch.equal(both[key], both[other]):
                raise ValueError(
                    f"{key} of {name} is not {other}, which config.json says it is tied to: set tie_word_embeddings "
                    "to false there."
                )
        head = f"{_name_of(self.model, self.model.get_output_embeddings())}.weight"
        alike = [key for key in spare if "." in key and self.files.shapes[key] == tuple(state.get(head, ()).shape)]
        if lacking == [head] and len(alike) == 1:  # some families store it under a name of its own
            self._stored[head] = alike[0]
        elif lacking:
            raise ValueError(
                f"The weights of {name} have no {lacking[0]}, or hold it in another form: open the model with "
                "transformers once, save it with save_pretrained, and name that folder."
            )
        blocks = self._prefixes[0].removesuffix("0.")
        found = {
            "missing_keys": [],
            "mismatched_keys": [
                (key,) for key in state if key in there and self.files.shapes[key] != tuple(state[key].shape)
            ],
        }
        check_filled(name, found, [key for key in spare if key.startswith(blocks)])


def _plain_folder(name: str, revision: str | None) -> Path:
    """The local folder of a model, once it is known to be one that transformers opens."""
    source = resolve(name, revision)
    config = config_dict(source, revision)
    if config.get("model_type") == MODEL_TYPE:
        raise ValueError(f"{name} is a pruned model that only depthprune opens, and whole: leave offload out.")
    refuse_custom_code(name, config)
    refuse_lossy_folder(name, config)
    refuse_quantised(config.get("quantization_config"))
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Make one sentence of whatever a damaged config makes of transformers."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"Cannot open the model {name}: {first_line(error)}") from error


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
