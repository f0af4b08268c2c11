"""Settings: flag > environment > ragate.toml or [tool.ragate] in pyproject.toml > default, each with its origin."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ragate.errors import ConfigError
from ragate.gate.verdict import Mode, OnInconclusive, Rule, Strategy
from ragate.metrics import METRICS, Statements

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SPELLINGS = {
    "answer_relevancy": "answer_relevance",
    "response_relevancy": "answer_relevance",
    "llm_context_recall": "context_recall",
    "llm_context_precision_with_reference": "context_precision",
}
"""ragas' other names of the four; its class names are turned into these before."""


def _metric_names(value: object) -> object:
    """Comma-separated text or a list, in ragas' spelling or ours -> our names, each once."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected names, as a list or separated by commas")
    names: list[str] = []
    for given in value:
        snake = (
            re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", given.strip())
            .replace("-", "_")
            .lower()
        )
        name = _SPELLINGS.get(snake, snake)
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METRICS)}"
            raise ValueError(f"there is no metric {given.strip()!r}; {hint}")
        if name not in names:
            names.append(name)
    if not names:
        raise ValueError(f"none named; choose from {', '.join(METRICS)}")
    return tuple(names)


def _table(value: object) -> object:
    """Options as a table, or as JSON text from the environment."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object") from None


def _rules(value: object) -> object:
    """Metric -> what it is held to, as tables, or as JSON text from the environment; metrics in either spelling."""
    value = _table(value)
    if not isinstance(value, dict):
        return value
    rules: dict[str, object] = {}
    for given, rule in value.items():
        names = _metric_names([given])
        assert isinstance(names, tuple)
        if names[0] in rules:
            raise ValueError(f"{names[0]} is there twice")
        rules[names[0]] = (
            {k.replace("-", "_"): v for k, v in rule.items()} if isinstance(rule, dict) else rule
        )
    return rules


Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseModel):
    """Everything that can be set; `load_settings` makes it. Each is a flag, RAGATE_NAME and a key of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    testset: str = ""
    """File, folder or `datasets:NAME[:SPLIT]` with the test cases; there is no default."""
    metrics: Annotated[tuple[str, ...], BeforeValidator(_metric_names)] = tuple(METRICS)
    """Which of the four to score, as a list or separated by commas; ragas' spellings are understood."""
    judge: str = Field("auto", min_length=1)
    """`auto` (qwen-0.5b-judge), a name of the catalogue, a .gguf file, a folder, or the URL of an
    OpenAI-compatible API with the model after a `#` (`http://host:8000/v1#my-model`; without one, the first that
    it lists). Its API key stands in the environment variable RAGATE_JUDGE_KEY and nowhere else; a user and
    password in the URL are sent as basic authentication instead, and never shown."""
    adapter: str | None = None
    """Folder of a LoRA adapter that the judge wears, in PEFT's layout: what `ragate judge tune` makes."""
    target: str = Field("stored", min_length=1)
    """What answers: `stored`, `module:callable`, `http://…` or `cmd:…`. In a file also a table [target] with
    `spec`, `options` and `timeout`."""
    target_options: Annotated[dict[str, Any], BeforeValidator(_table)] = Field(default_factory=dict)
    """Options of the target: keyword arguments of a class, `input_key` of a Runnable, `headers` of a URL."""
    target_timeout: Seconds = 600.0
    """Seconds that the target may take for one item."""
    embeddings: str = Field("all-minilm-l6-v2", min_length=1)
    """Embedding model of answer_relevance: a name of the catalogue."""
    baseline: str | None = None
    """Baseline file; by default baselines/SUITE.json."""
    threshold: float = Field(0.05, gt=0, le=1, allow_inf_nan=False)
    """The drop of a metric that fails: a share of the baseline's mean, or points when the mode is absolute."""
    threshold_mode: Mode = "relative"
    """Whether the threshold is relative to the baseline's mean or in points of the score."""
    gate: Annotated[dict[str, Rule], BeforeValidator(_rules)] = Field(default_factory=dict)
    """What differs for one metric: in a file the table [gate.METRIC] with `threshold`, `threshold_mode` and `min`, the
    mean below which it fails whatever the baseline was."""
    strategy: Strategy = "significant"
    """How a drop decides: `significant` fails what is not chance and passes what is surely below the limit; `point`
    looks at the mean drop alone."""
    on_inconclusive: OnInconclusive = "auto"
    """What a verdict that stays INCONCLUSIVE does: `fail` (exit 2), `warn` (exit 0), or `auto`: fail where a mean fell
    by its limit or more."""
    reserve: Literal["auto", "always", "never"] = "auto"
    """When the test set's reserve is judged: `auto` is once where the others are INCONCLUSIVE, and for a baseline."""
    release: str | None = None
    """Baseline file of the last release: the run is held against it too, so that small losses do not add up."""
    judge_accuracy: float | None = Field(None, gt=0.5, le=1, allow_inf_nan=False)
    """The judge's balanced accuracy on human-labelled data, where known: a weak judge shows only part of a drop."""
    scores: Literal["hard", "soft"] = "hard"
    """What a score is made of: the judge's verdicts, as ragas does it, or their probabilities (`soft`)."""
    statements: Statements = "judge"
    """What cuts an answer into the statements of faithfulness: the `judge`, as ragas does it, or its own `sentences`,
    of which the judges that ship tell more, in half the calls."""
    calibration: str | None = None
    """The map that `ragate judge calibrate` wrote for this judge: soft scores of its metric go through it, and reports
    say which true drop a run can detect."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the judge runs; `auto` takes a card where there is one."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many items, and no reserve; by default all."""
    out: str | None = None
    """Run folder; by default .ragate/SUITE."""
    max_batch: int | None = Field(None, ge=1, le=4096)
    """Requests that the engine runs at once; by default 64 on a CPU, 1,024 on a card. Changes no score."""
    call_timeout: Seconds = 600.0
    """Seconds without any progress of judge and target after which a score is given up."""
    kv_gib: float | None = Field(None, gt=0, le=4096, allow_inf_nan=False)
    """GiB for the engine's KV blocks; by default 2 on a CPU, most of the free memory on a card."""
    kv_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """How the engine keeps K and V on a card; the 8-bit floats hold twice the tokens and may change scores."""
    weights: Literal["auto", "packed", "dense", "int8"] = "auto"
    """How the engine keeps weights on a card: quantized ones `packed` or unpacked (`dense`, which `auto` is), or all
    rounded to `int8` with the activations; may change scores."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of the engine; by default one per core. Changes no score."""

    root: str = "."
    """Folder of the settings file as seen from here: `baselines/` and `.ragate/` lie in it. Cannot be set."""
    origins: dict[str, str] = Field(default_factory=dict)
    """Setting -> the flag, variable or file that set it; what is not here has its default. Cannot be set."""


KEYS = tuple(name for name in Settings.model_fields if name not in ("root", "origins"))
"""The names that can be set."""

_PATHS = ("testset", "baseline", "release", "out", "judge", "adapter", "calibration")


def load_settings(flags: Mapping[str, Any], cwd: Path) -> Settings:
    """The settings in force: `flags` (name -> value, `None` is not given) over RAGATE_* over the file.

    The file is ragate.toml, or pyproject.toml with [tool.ragate], in `cwd` or in a folder above it within the
    same git repository; its paths are relative to it. Raises ConfigError naming the flag, variable or file and
    key.
    """
    file = find_file(cwd)
    root = "." if file is None else _seen_from(file.parent, cwd)
    layers: list[dict[str, tuple[str, Any]]] = [
        {} if file is None else _from_file(file, cwd),
        _from_environment(os.environ),
        {
            _known("flags", name): (f"--{name.replace('_', '-')}", v)
            for name, v in flags.items()
            if v is not None
        },
    ]
    found: dict[str, tuple[str, Any]] = {}
    for layer in layers:
        if "target" in layer and layer["target"][1] != found.get("target", ("", "stored"))[1]:
            found.pop("target_options", None)  # they were another target's
        found |= layer
    for name, (origin, value) in found.items():
        if isinstance(value, bool):  # pydantic would take true for 1
            raise ConfigError(f"{origin}: {name}: no setting is true or false")
    try:
        return Settings.model_validate(
            {name: value for name, (_, value) in found.items()}
            | {"root": root, "origins": {name: origin for name, (origin, _) in found.items()}}
        )
    except ValidationError as e:
        raise ConfigError(_sentence(e, found)) from None


def find_file(cwd: Path) -> Path | None:
    """The settings file that holds in `cwd`, or `None`.

    Only folders of the repository are searched: a file above it may be somebody else's, and it names programs
    to run.
    """
    cwd = cwd.resolve()
    above = [cwd, *cwd.parents]
    ends = [i for i, folder in enumerate(above) if (folder / ".git").exists()]
    for folder in above[: ends[0] + 1] if ends else above[:1]:
        if (folder / "ragate.toml").is_file():
            return folder / "ragate.toml"
        if (folder / "pyproject.toml").is_file() and _tool_table(folder / "pyproject.toml") is not None:
            return folder / "pyproject.toml"
    return None


def _from_file(file: Path, cwd: Path) -> dict[str, tuple[str, Any]]:
    """Name -> (origin, value) of a settings file."""
    origin = _seen_from(file, cwd)
    table = _read(file) if file.name == "ragate.toml" else _tool_table(file) or {}
    found: dict[str, tuple[str, Any]] = {}
    for name, value in _flat(origin, table):
        if name in found:
            raise ConfigError(f"{origin}: {name} is set twice, in the table [target] and outside it")
        found[name] = (origin, _moved(name, value, file.parent, cwd))
    return found


def _flat(origin: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a table, with those of [target] under their own names."""
    for key, value in table.items():
        if key == "target" and isinstance(value, dict):
            if "spec" not in value:
                raise ConfigError(
                    f"{origin}: the table [target] needs the key 'spec', such as 'module:callable'"
                )
            for part, inner in value.items():
                names = {"spec": "target", "options": "target_options", "timeout": "target_timeout"}
                yield names[_known(f"{origin}: [target]", part, tuple(names))], inner
        else:
            yield _known(origin, key), value


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Name -> (variable, value); an empty variable is not set."""
    variables = {name: f"RAGATE_{name.upper()}" for name in KEYS}
    return {name: (var, environment[var]) for name, var in variables.items() if environment.get(var)}


def _known(origin: str, key: str, names: tuple[str, ...] = KEYS) -> str:
    """`key` with its dashes as underscores; a ConfigError with the nearest name when there is none such."""
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    raise ConfigError(f"{origin}: unknown setting {key!r}; {hint}")


def _moved(name: str, value: Any, folder: Path, cwd: Path) -> Any:
    """A path of the file as seen from `cwd`; anything else as it is."""
    if name not in _PATHS or not isinstance(value, str) or folder == cwd.resolve():
        return value
    if name == "testset" and value.startswith("datasets:"):
        return value
    if name == "judge" and not (folder / value).exists():
        return value
    return _seen_from(folder / value, cwd)


def _seen_from(path: Path, cwd: Path) -> str:
    return Path(os.path.relpath(path, cwd.resolve())).as_posix()


def _tool_table(file: Path) -> dict[str, Any] | None:
    table = _read(file).get("tool", {}).get("ragate")
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{file}: tool.ragate must be a table")
    return table


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file}: byte {e.start} is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{file}: not TOML: {e}") from None
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read: {e.strerror}") from None


def _sentence(error: ValidationError, found: Mapping[str, tuple[str, Any]]) -> str:
    """The first thing wrong, with where it was set."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    origin, value = found[name]
    if len(first["loc"]) > 1 and name == "gate":  # inside a table of tables: say where
        name, value = ".".join(map(str, first["loc"])), first["input"]
        origin = f"{origin}: {name}" if origin.startswith(("--", "RAGATE_")) else origin
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] != "value_error":
        message += f", got {value!r:.80}"
    return f"{origin}: {message}" if origin.startswith(("--", "RAGATE_")) else f"{origin}: {name}: {message}"
