"""all-MiniLM-L6-v2 on the CPU, each text alone, so that an embedding depends on nothing but its text.

The model runs in float64 and its result is rounded to float32: thread count and instruction set then do not
show. Importing this module imports ragas (seconds); torch and transformers come with the first `MiniLM`.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ragate.catalog import model_path, weights_sha256
from ragate.metrics import keep_quiet

keep_quiet()

from ragas.embeddings.base import BaseRagasEmbedding  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "all-minilm-l6-v2"
MAX_TOKENS = 256


class MiniLM(BaseRagasEmbedding):  # type: ignore[misc]
    """Sentence embeddings of 384 dimensions and length 1: mean pooling over at most 256 tokens, then L2 norm.

    Source: the model card of sentence-transformers/all-MiniLM-L6-v2. One worker thread computes, so that the
    event loop stays free; each text is embedded once.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Load from a folder in the Hugging Face layout, or from the catalogue. Raises CatalogError."""
        super().__init__()
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = path or model_path(MODEL)
        self.sha256 = weights_sha256(folder)
        self.seconds = 0.0
        """Time spent computing."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # in torch's default type, made float64 after: transformers makes it the default of the whole process meanwhile,
        # and the judge is being loaded beside it
        model = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        )
        self._model = model.double().eval()
        self._vectors: dict[str, list[float]] = {}
        self._worker = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="ragate-embed", initializer=torch.set_num_threads, initargs=(1,)
        )

    def embed_text(self, text: str, **kwargs: Any) -> list[float]:
        """The embedding of one text: 384 floats of length 1."""
        return self._vectors.get(text) or self._worker.submit(self._embed, text).result()

    async def aembed_text(self, text: str, **kwargs: Any) -> list[float]:
        """As `embed_text`, without blocking the event loop."""
        if text in self._vectors:
            return self._vectors[text]
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._embed, text)

    def close(self) -> None:
        """Stop the worker thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _embed(self, text: str) -> list[float]:
        if text in self._vectors:
            return self._vectors[text]
        import torch

        started = time.perf_counter()
        tokens = self._tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**tokens).last_hidden_state[0]
            vector = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        self._vectors[text] = vector.to(torch.float32).tolist()
        self.seconds += time.perf_counter() - started
        return self._vectors[text]
