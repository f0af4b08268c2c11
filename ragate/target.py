"""The system under test: stored answers, `module:callable`, LangChain Runnable, HTTP endpoint or command."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import difflib
import hashlib
import importlib
import inspect
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from ragate.errors import RagateError, TargetAnswerError, TargetError
from ragate.evaluate import Answer
from ragate.testset import COLUMNS, LIMITS, MAX_CONTEXT_CHARS, MAX_CONTEXTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ragate.testset import Item

    Ask = Callable[[Item], Awaitable[object]]

CONCURRENCY = 8
"""Items asked at once of a system that does not say by an attribute `concurrency`."""
MAX_REPLY_BYTES = 32 << 20
MAX_HANGING = 64
"""Calls that timed out and still run, for a thread cannot be stopped: beyond this no more are begun."""
PROBE_SECONDS = 10.0

_ANSWER_KEYS = (*COLUMNS["answer"], "result", "text")
_CONTEXT_KEYS = (*COLUMNS["contexts"], "source_documents")
_INPUT_KEYS = ("question", "input", "query", "user_input")
_SOURCES = {".py", ".txt", ".md", ".j2", ".jinja", ".jinja2", ".prompt", ".toml", ".yaml", ".yml"}


class Target:
    """A system under test, asked one item at a time by up to `concurrency` callers at once."""

    def __init__(self, system: _System, timeout: float, concurrency: int) -> None:
        self._system, self._timeout, self._concurrency = system, timeout, concurrency
        self._slots: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @property
    def name(self) -> str:
        """What the run file calls it: the spec, a URL without password and query."""
        return self._system.name

    @property
    def identity(self) -> str:
        """A hash of what answers: source files and options, command and its files, or URL."""
        return self._system.identity

    async def answer(self, item: Item) -> Answer:
        """Ask for one item. The timeout runs from when its turn comes.

        Raises TargetAnswerError when this item fails, saying how: an exception, the timeout, a wrong shape.
        """
        async with self._turn():
            clock = asyncio.timeout(self._timeout)
            try:
                async with clock:
                    reply = await self._system.ask(item)
            except (RagateError, TargetAnswerError):
                raise
            except (Exception, SystemExit) as e:
                late = isinstance(e, TimeoutError) and clock.expired()
                why = f"no answer within {self._timeout:g} s" if late else f"raised {_what(e)}"
                raise TargetAnswerError(why) from e
        return _answer_of(reply)

    def _turn(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[0] is not loop:  # a semaphore belongs to one loop
            self._slots = (loop, asyncio.Semaphore(self._concurrency))
        return self._slots[1]

    def close(self) -> None:
        """Give back what the target holds (connections)."""
        self._system.close()


@dataclass(frozen=True)
class _System:
    """What `Target` wraps: how to ask, under which name and identity."""

    name: str
    identity: str
    ask: Ask
    close: Callable[[], None] = lambda: None
    concurrency: int = CONCURRENCY


def open_target(
    spec: str,
    *,
    timeout: float = 600.0,
    options: Mapping[str, Any] | None = None,
    concurrency: int | None = None,
) -> Target:
    """Open the system that `spec` names. `timeout` is in seconds, per item.

    - `stored`: the answer and contexts of the test set. No options.
    - `module:name`: a function, sync or async, of (question) or (question, item); an object that is called
      so; a class, built once with the options as keyword arguments and closed by its `close()`, where it
      has one; or a LangChain Runnable, whose only option is `input_key`. The current folder can be imported
      from. Sync code runs in threads, up to `concurrency` at once: the argument, else an attribute of that
      name on the function or object (1: never two at once), else 8.
    - `http://…`, `https://…`: POST of {"question", "id"}. Option: `headers`.
    - `cmd:…` or `command:…`: run without a shell for each item, the same JSON on stdin, the reply on stdout.

    A reply is {"answer": text, "contexts": [text, …]}; from Python also the pair (answer, contexts), an
    object with these attributes, a message or a text; contexts may be Documents.
    Raises TargetError when it cannot be opened.
    """
    options = dict(options or {})
    if timeout <= 0 or (concurrency is not None and concurrency < 1):
        raise TargetError(f"target timeout ({timeout:g} s) and concurrency ({concurrency}) must be positive")
    if spec == "stored":
        system = _stored(options)
    elif spec.startswith(("http://", "https://")):
        system = _endpoint(spec, options, timeout)
    elif spec.startswith(("cmd:", "command:")):
        system = _command(spec, options)
    elif ":" in spec:
        system = _python(spec, options)
    else:
        raise TargetError(f"target {spec!r}: expected stored, module:callable, http://…, or cmd:…")
    return Target(system, timeout, concurrency or system.concurrency)


def _stored(options: Mapping[str, Any]) -> _System:
    _allow(options, "stored", ())

    async def ask(item: Item) -> object:
        if item.answer is None:
            raise TargetAnswerError(f"item {item.id} has no stored answer")
        return Answer(answer=item.answer, contexts=item.contexts)

    return _System("stored", "stored", ask)


def _allow(options: Mapping[str, Any], spec: str, known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            hint = f"it has {', '.join(known)}" if known else "it has none"
            raise TargetError(f"target {spec}: unknown option {name!r}; {hint}")


# Replies


def _answer_of(reply: object) -> Answer:
    """The reply as an `Answer`. Raises TargetAnswerError naming the key or type that is wrong."""
    contexts: object = None
    if isinstance(reply, Answer):
        return reply
    if isinstance(reply, Mapping):
        answer = _first(reply, _ANSWER_KEYS)
        contexts = _first(reply, _CONTEXT_KEYS)
        if answer is None:
            raise TargetAnswerError(f"the reply has no 'answer'; its keys are {_shown(reply)}")
    elif isinstance(reply, tuple):
        if len(reply) != 2:
            raise TargetAnswerError(f"the reply is a tuple of {len(reply)}, not (answer, contexts)")
        answer, contexts = reply
    elif hasattr(reply, "answer"):
        answer, contexts = reply.answer, getattr(reply, "contexts", None)
    else:
        answer = reply
    return Answer(answer=_answer_text(answer), contexts=_context_texts(contexts))


def _first(reply: Mapping[Any, Any], keys: tuple[str, ...]) -> object:
    return next((reply[key] for key in keys if reply.get(key) is not None), None)


def _shown(reply: Mapping[Any, Any]) -> str:
    keys = [repr(str(key)[:40]) for key in reply]
    return ", ".join(keys[:10]) + (" …" if len(keys) > 10 else "") if keys else "none"


def _answer_text(value: object) -> str:
    content = value if isinstance(value, str) else getattr(value, "content", None)  # a LangChain message
    if isinstance(content, list):
        blocks = (block.get("text") if isinstance(block, Mapping) else block for block in content)
        content = "".join(text for text in blocks if isinstance(text, str))
    if not isinstance(content, str):
        raise TargetAnswerError(f"the answer is {_article(value)}, not text")
    if len(content) > LIMITS["answer"]:
        raise TargetAnswerError(f"the answer has {len(content):,} characters; at most {LIMITS['answer']:,}")
    return content


def _context_texts(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise TargetAnswerError(f"contexts is {_article(value)}, not a list of texts")
    if len(parts) > MAX_CONTEXTS:
        raise TargetAnswerError(f"there are {len(parts):,} contexts; at most {MAX_CONTEXTS:,}")
    texts = []
    for i, part in enumerate(parts):
        text = part
        if isinstance(part, Mapping):
            text = _first(part, ("page_content", "text", "content"))
        elif not isinstance(part, str):
            text = getattr(part, "page_content", None)  # a LangChain Document
        if not isinstance(text, str):
            raise TargetAnswerError(
                f"contexts[{i}] is {_article(part)}, not text nor a document with page_content"
            )
        if len(text) > MAX_CONTEXT_CHARS:
            raise TargetAnswerError(
                f"contexts[{i}] has {len(text):,} characters; at most {MAX_CONTEXT_CHARS:,}"
            )
        texts.append(text)
    return tuple(texts)


def _article(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _parse_reply(data: bytes) -> object:
    """The JSON object that an endpoint or a command sent."""
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        start = data[:80].decode(errors="replace")
        raise TargetAnswerError(
            f"the reply is not JSON but {start!r}" if data else "the reply is empty"
        ) from None
    if not isinstance(reply, dict):
        raise TargetAnswerError(
            f"the reply is a JSON {type(reply).__name__}, not an object with answer and contexts"
        )
    return reply


# Python


def _python(spec: str, options: Mapping[str, Any]) -> _System:
    module_name, _, path = spec.partition(":")
    found = _find(spec, module_name, path)
    input_key: str | None = None
    close: Callable[[], None] = lambda: None  # noqa: E731
    if inspect.isclass(found):
        system = _build(spec, found, options)
        close = getattr(system, "close", close)
    elif hasattr(found, "invoke") or hasattr(found, "ainvoke"):
        _allow(options, spec, ("input_key",))
        system, input_key = found, options.get("input_key")
    elif options:
        raise TargetError(f"target {spec}: only a class takes options, and this is {_article(found)}")
    else:
        system = found
    if hasattr(system, "invoke") or hasattr(system, "ainvoke"):
        ask = _ask_runnable(spec, system, input_key)
    elif callable(system):
        ask = _ask_callable(spec, system)
    else:
        raise TargetError(f"target {spec}: is {_article(system)}, which cannot be called")
    concurrency = getattr(system, "concurrency", CONCURRENCY)
    if type(concurrency) is not int or concurrency < 1:
        raise TargetError(
            f"target {spec}: its attribute concurrency must be a positive number, not {concurrency!r}"
        )
    settings = json.dumps(options, sort_keys=True, default=str)
    identity = _digest("python", spec, settings, *_source_digests(module_name))
    return _System(spec, identity, ask, close, concurrency)


def _find(spec: str, module_name: str, path: str) -> Any:
    """The object that module:path names; the current folder is put on sys.path, as pytest does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:
        if isinstance(e, ModuleNotFoundError) and e.name and f"{module_name}.".startswith(f"{e.name}."):
            raise TargetError(
                f"target {spec}: no module {e.name!r} in {here} or among the installed packages; "
                "run ragate in the folder that holds it"
            ) from None
        raise TargetError(f"target {spec}: importing {module_name or 'it'} raised {_what(e)}") from e
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"target {spec}: {module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def _build(spec: str, kind: type, options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except RagateError:
        raise
    except Exception as e:
        with_ = f"with the options {', '.join(options)}" if options else "without options"
        raise TargetError(f"target {spec}: building it {with_} raised {_what(e)}") from e


def _ask_callable(spec: str, function: Callable[..., Any]) -> Ask:
    wants_item = _wants_item(spec, function)
    threads = _Threads()
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    async def ask(item: Item) -> object:
        arguments = (item.question, item) if wants_item else (item.question,)
        if is_async:
            return await function(*arguments)
        reply = await threads.run(lambda: function(*arguments))
        return await reply if inspect.isawaitable(reply) else reply

    return ask


def _wants_item(spec: str, function: Callable[..., Any]) -> bool:
    """True for (question, item), False for (question); anything else is a TargetError."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False  # builtins may have no signature
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 2 or any(p not in places for p in needed) or not (places or rest):
        names = ", ".join(p.name for p in parameters)
        raise TargetError(
            f"target {spec}: is called with (question) or (question, item), but takes ({names})"
        )
    return len(needed) == 2 or (len(places) > 1 and places[1].name == "item")


def _ask_runnable(spec: str, system: Any, input_key: str | None) -> Ask:
    """Ask a LangChain Runnable by the question, or by {key: question} where its schema wants an object."""
    key = input_key or _input_key(spec, system)
    threads = _Threads()
    is_async = not hasattr(system, "invoke")

    async def ask(item: Item) -> object:
        nonlocal is_async
        value = item.question if key is None else {key: item.question}
        if not is_async:
            # Not `ainvoke`: its default runs in threads of asyncio, whose exit waits for a call that hangs.
            try:
                return await threads.run(lambda: system.invoke(value))
            except TypeError as e:
                if "ainvoke" not in str(e):  # how LangChain says that there is only an async side
                    raise
                is_async = True
        return await system.ainvoke(value)

    return ask


def _input_key(spec: str, system: Any) -> str | None:
    """The key that the question goes under; `None` where the Runnable takes the question itself."""
    try:
        schema = system.get_input_jsonschema()
    except (
        Exception
    ):  # not LangChain's, or a schema that pydantic cannot write: then it takes what it is given
        return None
    if schema.get("type") != "object":
        return None
    names = [str(name) for name in schema.get("properties", {})]
    if names == ["root"]:  # how LangChain writes "unknown"
        return None
    for name in _INPUT_KEYS:
        if name in names or not names:
            return name
    if len(names) == 1:
        return names[0]
    raise TargetError(
        f"target {spec}: takes {', '.join(names)}; say which is the question by the option input_key"
    )


class _Threads:
    """Runs sync calls in daemon threads, so that one that hangs holds up neither the run nor the exit."""

    def __init__(self) -> None:
        self._running: set[threading.Thread] = set()

    async def run(self, call: Callable[[], object]) -> object:
        """What `call` returns or raises. A cancelled wait leaves its thread behind, MAX_HANGING at most."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()
        context = contextvars.copy_context()

        def settle(result: tuple[object, BaseException | None]) -> None:
            if not done.done():
                done.set_result(result)

        def work() -> None:
            try:
                result: tuple[object, BaseException | None] = (context.run(call), None)
            except BaseException as e:
                result = (None, e)
            self._running.discard(threading.current_thread())
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result)

        if len(self._running) >= MAX_HANGING:
            raise TargetAnswerError(f"not asked, because {len(self._running)} earlier calls still hang")
        thread = threading.Thread(target=work, daemon=True, name="ragate-target")
        self._running.add(thread)
        thread.start()
        value, error = await done
        if error is None:
            return value
        if isinstance(error, Exception):
            raise error
        raise SystemExit(str(error)) from error  # also KeyboardInterrupt: raised in a thread it is no Ctrl-C


def _what(error: BaseException) -> str:
    """`ValueError: text (file.py:12)`, with the innermost frame."""
    text = " ".join(str(error).split())[:300]
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename if frame else __file__
    place = f" ({Path(file).name}:{frame.tb_lineno})" if frame and file != __file__ else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _source_digests(module_name: str) -> list[str]:
    """sha256 of each source and prompt file of the top-level package, or of the module's own file."""
    module = sys.modules[module_name.partition(".")[0]]
    roots = [Path(p) for p in getattr(module, "__path__", ())]
    if not roots:
        file = getattr(module, "__file__", None)
        return [_file_digest(Path(file))] if file else []
    digests = []
    for root in roots:
        for at, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f != "__pycache__" and not f.startswith("."))
            paths = [Path(at) / f for f in sorted(files) if Path(f).suffix in _SOURCES]
            digests += [f"{path.relative_to(root).as_posix()} {_file_digest(path)}" for path in paths]
    return digests


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# HTTP


def _endpoint(spec: str, options: Mapping[str, Any], timeout: float) -> _System:
    import httpx

    _allow(options, "by URL", ("headers",))
    headers = options.get("headers", {})
    if not isinstance(headers, Mapping) or not all(isinstance(v, str) for v in headers.values()):
        raise TargetError("target by URL: the option headers must map names to texts")
    try:
        url = httpx.URL(spec)
    except httpx.InvalidURL as e:
        raise TargetError(f"target {spec[:200]}: not a URL: {e}") from None
    name = str(url.copy_with(username=None, password=None, query=None, fragment=None))
    _probe(name, url.host, url.port or {"http": 80, "https": 443}[url.scheme], min(timeout, PROBE_SECONDS))
    client = httpx.Client(timeout=timeout, headers=dict(headers))
    threads = _Threads()

    def post(item: Item) -> object:
        try:
            with client.stream("POST", url, json={"question": item.question, "id": item.id}) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > MAX_REPLY_BYTES:
                        raise TargetAnswerError(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MB")
        except httpx.HTTPError as e:
            raise TargetAnswerError(f"{name}: {type(e).__name__}: {e}") from None
        if not response.is_success:
            start = bytes(data[:200]).decode(errors="replace")
            raise TargetAnswerError(f"{name} answers {response.status_code}: {' '.join(start.split())}")
        return _parse_reply(bytes(data))

    async def ask(item: Item) -> object:
        return await threads.run(lambda: post(item))

    return _System(name, _digest("url", spec), ask, client.close)


def _probe(name: str, host: str, port: int, timeout: float) -> None:
    """Raise TargetError when nothing listens there; behind a proxy that cannot be known."""
    if not host:
        raise TargetError(f"target {name}: the URL names no host")
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError as e:
        why = e.strerror or str(e)
        raise TargetError(
            f"target {name}: nothing answers at {host}:{port} ({why}); start it first"
        ) from None


# Commands


def _command(spec: str, options: Mapping[str, Any]) -> _System:
    _allow(options, "by command", ())
    try:
        words = shlex.split(spec.partition(":")[2])
    except ValueError as e:
        raise TargetError(f"target {spec}: cannot be split into words: {e}") from None
    if not words:
        raise TargetError(f"target {spec}: names no command")
    program = shutil.which(words[0])
    if program is None:
        raise TargetError(f"target {spec}: there is no program {words[0]!r} that can be run; give its path")
    files = [path for path in map(Path, (program, *words[1:])) if path.is_file()]

    async def ask(item: Item) -> object:
        # Files, not pipes: a child of the command that keeps a pipe open would keep us waiting for its end.
        with TemporaryFile() as request, TemporaryFile() as out, TemporaryFile() as err:
            request.write(json.dumps({"question": item.question, "id": item.id}).encode() + b"\n")
            request.seek(0)
            try:
                process = await asyncio.create_subprocess_exec(
                    *words, stdin=request, stdout=out, stderr=err, start_new_session=True
                )
            except OSError as e:
                raise TargetError(f"target {spec}: cannot be run: {e.strerror}") from None
            try:
                while process.returncode is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), 0.1)
                    if max(os.fstat(file.fileno()).st_size for file in (out, err)) > MAX_REPLY_BYTES:
                        raise TargetAnswerError(f"it wrote more than {MAX_REPLY_BYTES >> 20} MB")
            except BaseException:
                _kill(process)
                await process.wait()
                raise
            out.seek(0)
            err.seek(0)
            if status := process.returncode:
                last = err.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing on stderr"]
                how = f"was killed by signal {-status}" if status < 0 else f"exit status {status}"
                raise TargetAnswerError(f"{how}: {last[0][:300]}")
            return _parse_reply(out.read())

    return _System(spec, _digest("command", *words, *map(_file_digest, files)), ask)


def _kill(process: asyncio.subprocess.Process) -> None:
    """End the command and what it started: it has a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
