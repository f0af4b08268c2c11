"""Checkpoints: `open_checkpoint` reads a GGUF file or a Hugging Face folder into one form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ragate_engine.errors import ModelFileError
from ragate_engine.weights import gguf
from ragate_engine.weights.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ragate_engine.config import ModelConfig
    from ragate_engine.quant.tensor import QuantTensor


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, how it tokenizes, and its tensors, read one at a time when asked for."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    """`None` only for a safetensors folder that has no tokenizer files."""
    tensors: Mapping[str, Callable[[], QuantTensor | torch.Tensor]]
    """A loader per canonical name (`weights/names.py`)."""
    quantization: str
    """Such as `Q4_K_M`, or `bfloat16` for plain weights."""
    files: tuple[Path, ...]

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the tensors there are."""
        return frozenset(self.tensors)

    def load(self, name: str) -> QuantTensor | torch.Tensor:
        """Read a tensor from the file: dense ones keep their stored dtype. KeyError for an unknown name."""
        return self.tensors[name]()

    @cached_property
    def identity(self) -> str:
        """sha256, hex, of the weights file; of a folder, of the list of its files' sums and names."""
        try:
            sums = []
            for path in self.files:
                with open(path, "rb") as file:
                    sums.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if len(sums) == 1:
            return sums[0]
        listing = "".join(f"{digest}  {path.name}\n" for digest, path in zip(sums, self.files, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.gguf` file, or a folder with config.json and *.safetensors. Reads headers only, no weights.

    Raises ModelFileError, one sentence, for what is missing, corrupt, truncated or not supported.
    """
    path = Path(path)
    if path.is_dir():
        from ragate_engine.weights import safetensors

        config = safetensors.model_config(path)
        files = safetensors.weight_files(path)
        return Checkpoint(
            path=path,
            config=config,
            tokenizer=Tokenizer.from_folder(path),
            tensors=safetensors.tensors(path, files, config),
            quantization=safetensors.quantization(files),
            files=(*files, path / "config.json"),
        )
    if not path.exists():
        raise ModelFileError(f"{path} does not exist")
    file = gguf.read_header(path)
    config = gguf.model_config(file)
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(
            f"{path} has {tokenizer.vocab_size} tokens but {config.vocab_size} embeddings: fetch it again"
        )
    return Checkpoint(
        path=path,
        config=config,
        tokenizer=tokenizer,
        tensors=gguf.tensors(file, config),
        quantization=gguf.quantization(file),
        files=(path,),
    )
