"""Streams before the first trained block, kept on disk for later runs on the same batches.

They depend on the frozen weights and the batch alone, so runs on one text that differ in what is trained, how and for
how long have them in common. The epochs of one run have not, where documents are shuffled and packed anew in each.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from depthprune.anatomy import Anatomy
from depthprune.files import make_folder, whole_file
from depthprune.head import Batch
from depthprune.shards import whole


class PrefixCache:
    """A folder with one safetensors file for each batch.

    Args:
        folder: the folder; made if it is not there.
        anatomy: of the model.
        start: the place of the first block that is not part of the prefix.

    Raises:
        ValueError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, anatomy: Anatomy, start: int) -> None:
        self.folder = make_folder(folder)
        self._prefix = _fingerprint(anatomy, start)

    def path(self, batch: Batch) -> Path:
        """The file of a batch, named by all that its stream depends on."""
        digest = hashlib.sha256(self._prefix.encode())
        device = batch["input_ids"].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        digest.update(f"{autocast} {device}".encode())
        for name in ("input_ids", "position_ids", "attention_mask"):
            if name in batch:
                tensor = batch[name].cpu().long().contiguous()
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def load(self, batch: Batch) -> Tensor | None:
        """The stream of a batch, ``(B, T, D)``; None if it is not there.

        Raises:
            ValueError: its file cannot be read.
        """
        path = self.path(batch)
        if not path.exists():
            return None
        try:
            return load_file(path)["stream"].to(batch["input_ids"].device)
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"Cannot read a stream from {path} ({error}): remove the file.") from error

    def save(self, batch: Batch, stream: Tensor) -> None:
        """Keep the stream of a batch, ``(B, T, D)``, as it is.

        Raises:
            ValueError: it cannot be written.
        """
        with whole_file(self.path(batch)) as partial:
            try:
                save_file({"stream": stream.detach().cpu().contiguous()}, partial)
            except SafetensorError as error:
                raise OSError(str(error)) from error

    def size(self) -> int:
        """How many bytes the folder's streams take."""
        return sum(path.stat().st_size for path in self.folder.glob("[!.]*.safetensors"))


def _fingerprint(anatomy: Anatomy, start: int) -> str:
    """A hash of the config and of the first row of every tensor before a block."""
    decoder, config = anatomy.model.get_decoder(), anatomy.model.config
    digest = hashlib.sha256()
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(f"{start} {anatomy.model.dtype} {config._attn_implementation}".encode())
    blocks = f"{anatomy.family.blocks}."
    for name, tensor in sorted(decoder.state_dict().items()):
        if name.startswith(blocks) and int(name.removeprefix(blocks).split(".")[0]) >= start:
            continue
        value = whole(tensor)
        row = (value if value.dim() < 2 else value[0]).reshape(-1)
        digest.update(name.encode() + row.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
