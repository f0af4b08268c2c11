"""Checkpoints: `open_checkpoint` reads a GGUF file or a Hugging Face folder into one form."""

from __future__ import annotations

import hashlib
import math
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ragate_engine.errors import ModelFileError
from ragate_engine.weights import names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from ragate_engine.config import ModelConfig
    from ragate_engine.quant.tensor import Form
    from ragate_engine.weights.stream import Weight
    from ragate_engine.weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, how it tokenizes, and its tensors, read one at a time when asked for."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    """`None` only for a safetensors folder that has no tokenizer files."""
    tensors: Mapping[str, Callable[[], Weight]]
    """A loader per canonical name (`weights/names.py`); a `stream.Stored` or `Joined` where it lies in files."""
    quantization: str
    """Such as `Q4_K_M` or `AWQ int4 g128`, or `bfloat16` for plain weights."""
    files: tuple[Path, ...]

    changed: frozenset[str] = frozenset()
    """Names of the tensors that are not what the files hold: an adapter was added (`lora.merge_adapter`)."""

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of the tensors there are."""
        return frozenset(self.tensors)

    @property
    def forms(self) -> dict[str, Form]:
        """How each tensor is stored, by canonical name, from the header alone; weights that are made have no form."""
        found = {name: getattr(loader, "form", None) for name, loader in self.tensors.items()}
        return {name: form for name, form in found.items() if form is not None}

    @property
    def parameters(self) -> int:
        """How many weights there are; known from the header alone."""
        return sum(math.prod(shape) for shape in names.expected(self.config).values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the files; 0 for weights that are made."""
        return sum(file.stat().st_size for file in self.files)

    def load(self, name: str) -> Weight:
        """Read a tensor from the file: dense ones keep their stored dtype. KeyError for an unknown name."""
        return self.tensors[name]()

    @contextmanager
    def stream(self, device: torch.device) -> Iterator[Callable[[str], Weight]]:
        """What loads tensors by name: to a card, reading ahead, layers last; to a CPU, as `load` does.

        Use it as `with checkpoint.stream(device) as load`. Raises ModelFileError from `load`.
        """
        if device.type == "cpu":
            yield self.load
            return
        from ragate_engine.weights.stream import Uploader

        order = sorted(self.tensors, key=lambda name: name.startswith("layers."))  # as a decoder is built
        with Uploader(self.tensors, order, device) as uploader:
            yield uploader.load

    def hash_ahead(self) -> Future[str]:
        """Begin to work out `identity` in a thread: over 16 GB that takes many seconds the first time."""
        return self._identity

    @property
    def identity(self) -> str:
        """sha256, hex, of the weights file; of a folder, of the list of its files' sums and names.

        Raises ModelFileError where a file cannot be read.
        """
        return self._identity.result()

    @cached_property
    def _identity(self) -> Future[str]:
        return _in_thread(lambda: _identity_of(self.path, self.files))


def _identity_of(folder: Path, files: tuple[Path, ...]) -> str:
    from ragate_engine.weights.digest import sha256_of

    at_once = threading.Semaphore(4)  # a disk has no more to give

    def digest(path: Path) -> str:
        with at_once:
            return sha256_of(path)

    try:
        sums = [future.result() for future in [_in_thread(partial(digest, path)) for path in files]]
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be read: {error.strerror or error}") from None
    if len(sums) == 1:
        return sums[0]
    listing = "".join(f"{digest}  {path.name}\n" for digest, path in zip(sums, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _in_thread(work: Callable[[], str]) -> Future[str]:
    """`work` in a thread that nothing waits for when the process ends, as it would for a pool's."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # who waits for it must hear of it
            future.set_exception(error)

    threading.Thread(target=run, name="ragate-hash", daemon=True).start()
    return future


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.gguf` file, or a folder with config.json and *.safetensors. Reads headers only, no weights.

    Raises ModelFileError, one sentence, for what is missing, corrupt, truncated or not supported.
    """
    from ragate_engine.weights.tokenizer import Tokenizer

    path = Path(path)
    if path.is_dir():
        from ragate_engine.weights import safetensors

        config = safetensors.model_config(path)
        files = safetensors.weight_files(path)
        scheme = safetensors.scheme(path)
        return Checkpoint(
            path=path,
            config=config,
            tokenizer=Tokenizer.from_folder(path),
            tensors=safetensors.tensors(path, files, config, scheme),
            quantization=safetensors.quantization(files, scheme),
            files=(*files, path / "config.json"),
        )
    if not path.exists():
        raise ModelFileError(f"{path} does not exist")
    from ragate_engine.weights import gguf

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
