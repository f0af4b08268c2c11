"""The judge as ragas sees it: one structured output a call, asked once, journaled, with P(verdict) read off.

`EngineJudge` asks the engine in this process, `UrlJudge` an OpenAI-compatible endpoint. Importing this module
imports ragas (seconds): nothing that `ragate.cli` imports at module level may import it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from ragate.endpoint import KEY_VARIABLE, endpoint_of
from ragate.errors import ConfigError, RunError
from ragate.journal import CallEntry
from ragate.metrics import RECORD, JudgedCall, Metric, keep_quiet
from ragate.run import ItemRecord
from ragate.schemas import AnswerSchema, answer_schema, breach, parse, portable, sample
from ragate.session import worn
from ragate.verdicts import LOGPROBS, verdict_probabilities
from ragate_engine import DeviceError, EngineClosedError, SamplingParams, TokenInfo

keep_quiet()

from ragas.embeddings.base import BaseRagasEmbedding  # noqa: E402
from ragas.llms.base import InstructorBaseRagasLLM  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import httpx

    from ragate.journal import Journal
    from ragate_engine import Engine

Output = TypeVar("Output", bound=BaseModel)


class JudgeError(Exception):
    """One call failed: the score it belongs to becomes `error`, the run goes on."""


class TruncatedError(JudgeError):
    """The judge reached its token limit before its answer was complete: the score becomes `truncated`."""


# Judges


class Judge(InstructorBaseRagasLLM):  # type: ignore[misc]
    """What both judges share: a distinct prompt is asked once, journaled, checked, and noted in the record.

    `calls_done` counts what ragas wanted; `call_ms` has the milliseconds of each computed call, by key.
    """

    is_async = True

    def __init__(self, name: str, identity: dict[str, str]) -> None:
        """`identity` is everything but the prompt that an answer depends on: part of each call's key."""
        self.name = name
        self.identity = identity
        self.journal: Journal | None = None
        self.on_call: Callable[[], None] = lambda: None
        self.calls_done = 0
        self.call_ms: dict[str, float] = {}
        self.probable = False
        """Whether it has given a probability of a verdict yet."""
        self._known: dict[str, CallEntry] = {}
        self._running: dict[str, asyncio.Task[CallEntry]] = {}
        self._waiting: dict[str, int] = {}

    def describe(self) -> dict[str, str]:
        """Fingerprint material: what judged."""
        raise NotImplementedError  # abstract

    def render(self, prompt: str) -> str:
        """The prompt as the model gets it, for the fingerprint's probes."""
        raise NotImplementedError  # abstract

    def progress(self) -> int:
        """A number that grows while the judge works: if it stands still, the judge hangs."""
        return self.calls_done

    def usage(self) -> dict[str, Any]:
        """Counters of the engine behind the judge; empty where there is none."""
        return {}

    async def aclose(self) -> None:
        """Let go of what belongs to the running event loop."""

    def forget(self) -> None:
        """Forget every answer: the next asking computes it anew, unless a journal has it."""
        self._known.clear()

    async def _ask(self, key: str, prompt: str, schema: AnswerSchema) -> CallEntry:
        raise NotImplementedError  # abstract

    def generate(self, prompt: str, response_model: type[Output]) -> Output:
        """`agenerate` for callers without an event loop."""
        return asyncio.run(self.agenerate(prompt, response_model))

    async def agenerate(self, prompt: str, response_model: type[Output]) -> Output:
        """Ask for a `response_model`; an equal question is answered from the journal or the call in flight.

        Raises JudgeError (TruncatedError at the token limit); RunError when the engine or the disk fails.
        """
        schema = answer_schema(response_model, prompt)
        key = self.key(prompt, schema)
        record = RECORD.get()
        try:
            entry = await self._once(key, prompt, response_model, schema)
        except _TooLongError as e:
            what = f"item {record.item}" if record else "the prompt"
            raise JudgeError(
                f"context too long: {what} needs {e.needed} tokens, the judge's window is {e.window}: "
                "retrieve fewer or shorter contexts, or take a judge with a larger window"
            ) from None
        self.calls_done += 1
        self.on_call()
        if record is not None:
            record.calls.append(JudgedCall(response_model.__name__, prompt, entry))
        if entry.finish == "length":
            raise TruncatedError(f"the judge's answer was cut at {entry.output_tokens} tokens")
        if fault := _fault(entry, response_model, schema):
            raise JudgeError(f"the judge's answer is not what was asked for: {fault}")
        return response_model.model_validate_json(entry.output)

    def key(self, prompt: str, schema: AnswerSchema) -> str:
        """Content address of a call: sha256 over the judge's identity, the prompt and the schema."""
        material = json.dumps([self.identity, prompt, schema.text], sort_keys=True)
        return hashlib.sha256(material.encode()).hexdigest()[:32]

    async def _once(
        self, key: str, prompt: str, response_model: type[BaseModel], schema: AnswerSchema
    ) -> CallEntry:
        if key in self._known:
            return self._known[key]
        entry = self.journal.call(key) if self.journal else None
        # a laxer ragate may have kept an answer that makes no score
        if entry is not None and not _fault(entry, response_model, schema):
            return entry
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.ensure_future(
                self._compute(key, prompt, response_model, schema)
            )
            self._waiting[key] = 0
        self._waiting[key] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:  # the last one to wait takes the call with it
                task.cancel()
                del self._running[key], self._waiting[key]

    async def _compute(
        self, key: str, prompt: str, response_model: type[BaseModel], schema: AnswerSchema
    ) -> CallEntry:
        started = time.perf_counter()
        entry = await self._ask(key, prompt, schema)
        self.call_ms[key] = round((time.perf_counter() - started) * 1e3, 3)
        if self.journal is not None and not _fault(entry, response_model, schema):
            self.journal.append(entry)
        self._known[key] = entry
        return entry


def _fault(entry: CallEntry, response_model: type[BaseModel], schema: AnswerSchema) -> str | None:
    """Why no score can be made from an answer, or `None`; one that was cut is no fault but `truncated`."""
    if entry.finish == "length":
        return None
    try:
        response_model.model_validate_json(entry.output)
        return breach(schema.tree, parse(entry.output))
    except ValidationError as e:
        return str(e.errors()[0]["msg"])
    except ValueError as e:
        return str(e)


class _TooLongError(Exception):
    def __init__(self, needed: int, window: int) -> None:
        self.needed = needed
        self.window = window


class EngineJudge(Judge):
    """A judge that is a `ragate_engine.Engine` of this process: greedy, under a grammar."""

    def __init__(self, engine: Engine, name: str) -> None:
        """`name` is what reports call it: a catalogue name or a path."""
        self.engine = engine
        self.adapter = worn(engine)
        self.description = engine.describe(self.adapter)
        identity = self.description | {"template": self.render("probe"), "window": str(engine.max_len)}
        super().__init__(name, identity)

    def describe(self) -> dict[str, str]:
        """The engine's own description: weights, quantization, tokenizer, backend, dtype, version."""
        return self.description

    def render(self, prompt: str) -> str:
        """The token ids of the prompt inside the chat template."""
        return " ".join(map(str, self.engine.chat_prompt([{"role": "user", "content": prompt}])))

    def progress(self) -> int:
        """Steps of the engine: it steps as long as any request, of whomever, is alive."""
        return self.engine.usage().steps + self.calls_done

    def usage(self) -> dict[str, Any]:
        """The engine's counters since it started."""
        return dict(vars(self.engine.usage()))

    async def _ask(self, key: str, prompt: str, schema: AnswerSchema) -> CallEntry:
        ids = self.engine.chat_prompt([{"role": "user", "content": prompt}])
        room = self.engine.max_len - len(ids)
        if room < schema.chars:
            raise _TooLongError(len(ids) + schema.chars, self.engine.max_len)
        params = SamplingParams(max_tokens=min(schema.octets, room), schema=schema.text, logprobs=LOGPROBS)
        try:
            completion = await asyncio.wrap_future(self.engine.submit(ids, params, self.adapter))
        except (DeviceError, EngineClosedError) as e:
            raise RunError(
                f"the judge stopped: {e}; what was judged is safe in the journal: run the same command again to go on"
            ) from e
        return CallEntry(
            key=key,
            output=completion.text,
            prompt_tokens=completion.prompt_tokens,
            output_tokens=len(completion.tokens),
            finish=completion.finish,
            verdicts=verdict_probabilities(completion.text, completion.tokens),
        )


class UrlJudge(Judge):
    """A judge behind an OpenAI-compatible endpoint: strict json_schema, temperature 0, logprobs if offered.

    What the endpoint does not enforce is checked afterwards, so that a score is never made from a short list
    or a verdict other than 0 and 1.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 16,
    ) -> None:
        """`url` is the API's root, such as http://localhost:8000/v1, with the model's name after a `#`.

        Without a `model` there or here it takes the first one that the endpoint lists. A user and password in
        the URL go out as basic authentication, else `api_key` as a bearer token; neither is part of the name.
        `timeout` is in seconds, per request; `concurrency` is how many run at once. Raises ConfigError when
        the endpoint must name its model and cannot, and for a malformed URL or key.
        """
        self.endpoint = endpoint_of(url)
        self.url = self.endpoint.name
        self.auth = self.endpoint.auth
        api_key = (api_key or "").strip()
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(f"{KEY_VARIABLE}: not an API key: it has other than printable ASCII characters")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key and not self.auth else {}
        self.timeout = timeout
        self.concurrency = concurrency
        self.model = model or self.endpoint.model or self._first_model()
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self._logprobs = True
        super().__init__(self.url, {"url": str(self.endpoint.at("")), "model": self.model})

    def describe(self) -> dict[str, str]:
        """The model's name: an endpoint does not say which weights it runs."""
        return {"weights": f"unknown: {self.model} behind an endpoint", "backend": "http"}

    def render(self, prompt: str) -> str:
        """The prompt itself: the template is the endpoint's own."""
        return prompt

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = self._slots = None

    def _first_model(self) -> str:
        import httpx

        try:
            response = httpx.get(
                self.endpoint.at("/models"), headers=self.headers, auth=self.auth, timeout=30
            )
            if response.is_success:
                return str(response.json()["data"][0]["id"])
            why = f"status {response.status_code}"
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as e:
            why = str(e)
        if why in ("status 401", "status 403"):
            why += f"; set {KEY_VARIABLE} to its API key"
        raise ConfigError(
            f"judge {self.url}: it does not say which model it serves: {why}; or name one with {self.url}#MODEL"
        )

    async def _ask(self, key: str, prompt: str, schema: AnswerSchema) -> CallEntry:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": schema.chars,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": portable(schema.tree)},
            },
        }
        if self._client is None or self._slots is None:
            import httpx

            self._client = httpx.AsyncClient(headers=self.headers, auth=self.auth, timeout=self.timeout)
            self._slots = asyncio.Semaphore(self.concurrency)
        async with self._slots:
            answer = await self._post(body)
        try:
            choice = answer["choices"][0]
            text, usage = choice["message"]["content"], answer.get("usage") or {}
            tokens = _tokens_of(text, (choice.get("logprobs") or {}).get("content") or [])
            return CallEntry(
                key=key,
                output=text,
                prompt_tokens=usage.get("prompt_tokens", 0),
                output_tokens=usage.get("completion_tokens", 0),
                finish=choice.get("finish_reason") or "stop",
                verdicts=verdict_probabilities(text, tokens),
            )
        except (LookupError, TypeError, AttributeError, ValidationError) as e:
            raise JudgeError(f"judge {self.url}: not a chat completion: {e}") from None

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        assert self._client is not None
        failure = ""
        for attempt in range(4):
            if attempt:
                await asyncio.sleep(0.5 * 2**attempt)
            extra = {"logprobs": True, "top_logprobs": LOGPROBS} if self._logprobs else {}
            try:
                response = await self._client.post(self.endpoint.at("/chat/completions"), json=body | extra)
            except httpx.TimeoutException:
                raise TimeoutError(f"judge {self.url}: no answer within {self.timeout:g} s") from None
            except httpx.HTTPError as e:
                failure = str(e) or type(e).__name__
                continue
            if response.status_code in (400, 422) and self._logprobs and "logprobs" in response.text:
                self._logprobs = False
                failure = "it refuses logprobs"
                continue
            if response.status_code in (429, 500, 502, 503, 504):
                failure = f"status {response.status_code}"
                continue
            if response.is_error:
                raise JudgeError(f"judge {self.url}: status {response.status_code}: {response.text[:200]}")
            try:
                return dict(response.json())
            except ValueError:
                raise JudgeError(f"judge {self.url}: its answer is not JSON: {response.text[:200]}") from None
        raise JudgeError(f"judge {self.url}: {failure}, four times in a row")


def _tokens_of(text: str, content: Sequence[dict[str, Any]]) -> tuple[TokenInfo, ...]:
    """OpenAI's logprobs as tokens with offsets; nothing when they do not spell the text."""
    if "".join(token["token"] for token in content) != text:
        return ()
    tokens, start = [], 0
    for token in content:
        top = tuple((t["token"], float(t["logprob"])) for t in token.get("top_logprobs") or ())
        tokens.append(TokenInfo(id=-1, start=start, logprob=float(token["logprob"]), top=top))
        start += len(token["token"])
    return tuple(tokens)


# Probes


PROBE = ItemRecord(
    id="probe",
    question="What is asked?",
    reference="This.",
    answer="That.",
    contexts=("The first.", "The second."),
)


async def probe_hash(metric: Metric, judge: Judge) -> str:
    """sha256 over every prompt (inside the judge's chat template) and schema of `metric` for one fixed item.

    It changes whenever ragas, pydantic, the chat template or our schemas change what the judge is asked.
    """
    seen = hashlib.sha256()

    def note(prompt: str, schema: AnswerSchema) -> None:
        seen.update(json.dumps([judge.render(prompt), schema.text]).encode())

    await metric.scorer(_Probe(note), _ProbeEmbedding()).ascore(**metric.row(PROBE))
    return seen.hexdigest()


async def prompts_of(metric: Metric, item: ItemRecord) -> list[str]:
    """What a judge is asked for one score of `item`, which must have all that `metric` needs.

    Prompts that quote an earlier answer of the judge quote the plainest one that its schema allows.
    """
    prompts: list[str] = []
    probe = _Probe(lambda prompt, schema: prompts.append(prompt))
    await metric.scorer(probe, _ProbeEmbedding()).ascore(**metric.row(item))
    return prompts


class _Probe(InstructorBaseRagasLLM):  # type: ignore[misc]
    is_async = True

    def __init__(self, note: Callable[[str, AnswerSchema], None]) -> None:
        self.note = note

    async def agenerate(self, prompt: str, response_model: type[Output]) -> Output:
        schema = answer_schema(response_model, prompt)
        self.note(prompt, schema)
        return response_model.model_validate(sample(schema.tree))

    def generate(self, prompt: str, response_model: type[Output]) -> Output:
        raise NotImplementedError  # abstract


class _ProbeEmbedding(BaseRagasEmbedding):  # type: ignore[misc]
    def embed_text(self, text: str, **kwargs: Any) -> list[float]:
        return [1.0]

    async def aembed_text(self, text: str, **kwargs: Any) -> list[float]:
        return [1.0]
