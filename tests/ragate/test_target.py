"""Targets: what answers, in which shapes, and the sentence for each way of failing."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from ragate import target as target_module
from ragate.errors import TargetAnswerError, TargetError
from ragate.evaluate import Answer
from ragate.target import Target, open_target
from ragate.testset import Item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Write = Callable[[str], str]

ITEM = Item(id="a", question="Why?", answer="stored", contexts=("s",))


def ask(target: Target, item: Item = ITEM) -> Answer:
    return asyncio.run(target.answer(item))


def failure(target: Target, item: Item = ITEM) -> str:
    with pytest.raises(TargetAnswerError) as caught:
        ask(target, item)
    return str(caught.value)


def refusal(spec: str, **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        open_target(spec, options=options)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the module `app_N` into the current folder and get its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    names: list[str] = []

    def write(source: str) -> str:
        names.append(f"app_{tmp_path.name.replace('-', '_')}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield write
    for name in [m for m in sys.modules if m.partition(".")[0] in names]:
        del sys.modules[name]


def test_stored_answers_are_given_back(tmp_path: Path) -> None:
    target = open_target("stored")
    assert (target.name, target.identity) == ("stored", "stored")
    assert ask(target) == Answer(answer="stored", contexts=("s",))
    assert failure(target, Item(id="b", question="q")) == "item b has no stored answer"


# module:callable


@pytest.mark.parametrize(
    "source",
    [
        "def answer(question): return {'answer': question + '!', 'contexts': ['c', 'd']}",
        "async def answer(question): return question + '!', ['c', 'd']",
        "def answer(question, item): return {'output': item.question + '!', 'context': ('c', 'd')}",
        "def answer(question, item=None): return item.question + '!', ['c', 'd']",
        "def answer(question, k=3): return question + '!', [{'text': 'c'}, {'page_content': 'd'}]",
        "def answer(*args): return args[0] + '!', ['c', 'd']",
        """
        from types import SimpleNamespace
        def answer(question): return SimpleNamespace(answer=question + '!', contexts=['c', 'd'])
        """,
        """
        class Pipeline:
            async def __call__(self, question): return question + '!', ['c', 'd']
        answer = Pipeline()
        """,
        """
        import asyncio
        async def later(question): return question + '!', ['c', 'd']
        answer = lambda question: later(question)
        """,
        """
        import functools
        async def full(mark, question): return question + mark, ['c', 'd']
        answer = functools.partial(full, '!')
        """,
    ],
)
def test_every_usual_signature_and_reply_is_understood(write: Write, source: str) -> None:
    assert ask(open_target(f"{write(source)}:answer")) == Answer(answer="Why?!", contexts=("c", "d"))


def test_a_text_alone_is_an_answer_that_does_not_tell_its_contexts(write: Write) -> None:
    assert ask(open_target(f"{write('def f(question): return question')}:f")) == Answer(
        answer="Why?", contexts=None
    )


def test_one_context_may_be_a_plain_text_and_none_may_be_found(write: Write) -> None:
    app = write("def one(q): return q, 'c'\ndef none(q): return {'answer': q, 'contexts': []}")
    assert ask(open_target(f"{app}:one")).contexts == ("c",)
    assert ask(open_target(f"{app}:none")).contexts == ()


def test_a_class_is_built_once_with_its_options_and_closed(write: Write) -> None:
    app = write("""
        built = []
        class Pipeline:
            def __init__(self, k, prompt='p'):
                self.k, self.prompt, self.open = k, prompt, True
                built.append(self)
            def __call__(self, question):
                return f'{self.k}{self.prompt}{len(built)}', []
            def close(self):
                self.open = False
    """)
    target = open_target(f"{app}:Pipeline", options={"k": 2})
    assert [ask(target).answer, ask(target).answer] == ["2p1", "2p1"]
    target.close()
    assert sys.modules[app].built[0].open is False


def test_names_inside_objects_and_packages_are_found(write: Write, tmp_path: Path) -> None:
    package = write("") + "_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "rag.py").write_text(
        "class A:\n    @staticmethod\n    def f(question): return 'yes', []"
    )
    assert ask(open_target(f"{package}.rag:A.f")).answer == "yes"


def test_the_current_folder_is_importable_only_from_where_one_stands(write: Write, tmp_path: Path) -> None:
    app = write("def f(question): return 'here', []")
    open_target(f"{app}:f")
    assert str(tmp_path) in sys.path
    message = refusal("no_such_module_here.rag:f")
    assert message == (
        f"target no_such_module_here.rag:f: no module 'no_such_module_here' in {tmp_path} "
        "or among the installed packages; run ragate in the folder that holds it"
    )


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def answer(q): ...", "anser", "has no 'anser'; did you mean 'answer'?"),
        ("def answer(q): ...", "", "has no ''"),
        (
            "import no_such_dependency",
            "f",
            "raised ModuleNotFoundError: No module named 'no_such_dependency' (app_",
        ),
        ("raise SystemExit(3)", "f", "raised SystemExit: 3 (app_"),
        ("def f(:", "f", "raised SyntaxError: "),
        ("f = 7", "f", "is a int, which cannot be called"),
        ("def f(): ...", "f", "is called with (question) or (question, item), but takes ()"),
        ("def f(a, b, c): ...", "f", "but takes (a, b, c)"),
        ("def f(q, *, k): ...", "f", "but takes (q, k)"),
        ("class C:\n    def __init__(self, k): ...", "C", "building it without options raised TypeError: "),
    ],
)
def test_a_callable_that_cannot_be_opened_says_why(
    write: Write, source: str, name: str, message: str
) -> None:
    assert message in refusal(f"{write(source)}:{name}")


def test_options_that_fit_nothing_are_refused(write: Write) -> None:
    app = write("""
        def f(question): ...
        class C:
            def __init__(self, k): raise ValueError('k is odd')
    """)
    assert "only a class takes options, and this is a function" in refusal(f"{app}:f", k=1)
    assert "building it with the options k raised ValueError: k is odd (app_" in refusal(f"{app}:C", k=1)
    assert "unknown option 'k'; it has none" in refusal("stored", k=1)
    assert "unknown option 'header'; it has headers" in refusal("http://127.0.0.1:9", header={})
    assert "the option headers must map names to texts" in refusal("http://127.0.0.1:9", headers={"a": 1})


@pytest.mark.parametrize("spec", ["", "pipeline", "rag.py"])
def test_another_kind_of_spec_names_the_four(spec: str) -> None:
    assert "expected stored, module:callable, http://…, or cmd:…" in refusal(spec)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("{'text_': 'a', 'docs': []}", "the reply has no 'answer'; its keys are 'text_', 'docs'"),
        ("{}", "the reply has no 'answer'; its keys are none"),
        ("{'answer': 7}", "the answer is a int, not text"),
        ("None", "the answer is None, not text"),
        ("('a', 'b', 'c')", "the reply is a tuple of 3, not (answer, contexts)"),
        ("('a', 7)", "contexts is a int, not a list of texts"),
        ("('a', {'c': 1})", "contexts is a dict, not a list of texts"),
        ("('a', ['c', None])", "contexts[1] is None, not text nor a document with page_content"),
        ("('a', [{'body': 'c'}])", "contexts[0] is a dict, not text nor a document with page_content"),
        ("('a', ['c'] * 1001)", "there are 1,001 contexts; at most 1,000"),
        ("('a' * 1_000_001, [])", "the answer has 1,000,001 characters; at most 1,000,000"),
        ("('a', ['c' * 1_000_001])", "contexts[0] has 1,000,001 characters; at most 1,000,000"),
    ],
)
def test_a_reply_of_the_wrong_shape_names_key_and_type(write: Write, reply: str, message: str) -> None:
    assert failure(open_target(f"{write(f'def f(question): return {reply}')}:f")) == message


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_an_exception_is_the_items_own_with_its_place(write: Write, kind: str) -> None:
    app = write(f"{kind} f(question):\n    raise KeyError('index')")
    assert failure(open_target(f"{app}:f")) == f"raised KeyError: 'index' ({app}.py:2)"


@pytest.mark.parametrize(
    "error", ["SystemExit(2)", "KeyboardInterrupt()", "StopIteration()", "TimeoutError('mine')"]
)
def test_even_an_exit_in_a_thread_ends_only_the_item(write: Write, error: str) -> None:
    message = failure(open_target(f"{write(f'def f(question): raise {error}')}:f"))
    assert message.startswith("raised ")
    assert "no answer within" not in message


@pytest.mark.parametrize(
    "source",
    [
        "import threading\ndef f(question): threading.Event().wait()",
        "import asyncio\nasync def f(q): await asyncio.sleep(60)",
    ],
)
def test_a_call_that_hangs_times_out_as_one_item(write: Write, source: str) -> None:
    assert failure(open_target(f"{write(source)}:f", timeout=0.05)) == "no answer within 0.05 s"


def test_a_hanging_thread_does_not_keep_the_process_from_ending(write: Write, tmp_path: Path) -> None:
    write("")
    (tmp_path / "hang.py").write_text("import threading\ndef f(question): threading.Event().wait()")
    code = """
import asyncio
from ragate.target import open_target
from ragate.testset import Item
try:
    asyncio.run(open_target("hang:f", timeout=0.05).answer(Item(id="a", question="q")))
except Exception as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.stdout, done.returncode) == ("no answer within 0.05 s\n", 0)


def test_hanging_calls_are_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "MAX_HANGING", 2)
    before = set(threading.enumerate())
    app = write(
        "import threading\nevent = threading.Event()\ndef f(question): event.wait(); return 'late', []"
    )
    target = open_target(f"{app}:f", timeout=0.05)
    assert [failure(target) for _ in range(3)][2] == "not asked, because 2 earlier calls still hang"
    sys.modules[app].event.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert ask(target).answer == "late"


def test_calls_run_side_by_side_but_no_more_than_allowed(write: Write) -> None:
    app = write("""
        import threading
        barrier = threading.Barrier(3)
        lock, now, most = threading.Lock(), 0, 0
        def f(question):
            global now, most
            with lock:
                now += 1
                most = max(most, now)
            barrier.wait(30)
            with lock:
                now -= 1
            return question, []
    """)
    target = open_target(f"{app}:f", concurrency=3)

    async def many() -> list[Answer]:
        return await asyncio.gather(*(target.answer(Item(id=str(i), question=str(i))) for i in range(12)))

    assert [a.answer for a in asyncio.run(many())] == [str(i) for i in range(12)]
    assert sys.modules[app].most == 3
    assert len(asyncio.run(many())) == 12  # a second loop, as when the reserve is asked


def test_a_system_may_say_how_many_it_takes_at_once(write: Write) -> None:
    app = write("""
        import threading
        lock = threading.Lock()
        class Single:
            concurrency = 1
            def __call__(self, question):
                if not lock.acquire(blocking=False):
                    raise RuntimeError('two at once')
                try:
                    return question, []
                finally:
                    lock.release()
        class Wrong(Single):
            concurrency = '4'
    """)
    target = open_target(f"{app}:Single")

    async def many() -> list[Answer]:
        return await asyncio.gather(*(target.answer(ITEM) for _ in range(50)))

    assert len(asyncio.run(many())) == 50
    assert "its attribute concurrency must be a positive number, not '4'" in refusal(f"{app}:Wrong")
    with pytest.raises(TargetError, match=r"concurrency \(0\) must be positive"):
        open_target("stored", concurrency=0)


def test_a_waiting_item_is_not_timed_out_by_its_turn(write: Write) -> None:
    app = write("import time\ndef f(question): time.sleep(0.3); return question, []")
    target = open_target(f"{app}:f", concurrency=1, timeout=1.5)

    async def many() -> list[Answer]:
        return await asyncio.gather(*(target.answer(ITEM) for _ in range(6)))

    assert len(asyncio.run(many())) == 6


def test_the_identity_follows_source_prompts_and_options(write: Write, tmp_path: Path) -> None:
    package = write("") + "_p"
    root = tmp_path / package
    (root / "deep").mkdir(parents=True)
    (root / "__init__.py").write_text(
        "class C:\n    def __init__(self, **k): ...\n    def __call__(self, q): ...\n"
    )
    (root / "deep" / "prompt.txt").write_text("Answer.")

    def identity(**options: Any) -> str:
        return open_target(f"{package}:C", options=options).identity

    first = identity(k=1)
    (root / "__pycache__").mkdir(exist_ok=True)
    (root / "out.bin").write_bytes(b"x")
    assert identity(k=1) == first
    assert identity(k=2) != first
    (root / "deep" / "prompt.txt").write_text("Lie.")
    second = identity(k=1)
    assert second != first
    (root / "deep" / "more.py").write_text("")
    assert identity(k=1) not in (first, second)


def test_the_identity_of_a_module_is_its_file_alone(write: Write, tmp_path: Path) -> None:
    app = write("def f(question): ...\ndef g(question): ...")
    first = open_target(f"{app}:f").identity
    (tmp_path / "neighbour.py").write_text("")
    assert open_target(f"{app}:f").identity == first
    assert open_target(f"{app}:g").identity != first


# LangChain


def test_a_runnable_is_asked_by_the_question_or_by_the_key_that_its_schema_names(write: Write) -> None:
    app = write("""
        from operator import itemgetter
        from langchain_core.documents import Document
        from langchain_core.prompts import ChatPromptTemplate
        from langchain_core.runnables import RunnableLambda, RunnablePassthrough as Row

        retrieve = RunnableLambda(lambda question: [Document(page_content=f'about {question}')])
        write = RunnableLambda(lambda row: f"so: {row['question']}")
        rag = {'context': retrieve, 'question': Row()} | Row.assign(answer=write)
        found = Row.assign(source_documents=itemgetter('input') | retrieve)
        keyed = found | Row.assign(result=lambda row: row['input'] + '!')
        prompt = ChatPromptTemplate.from_template('Q: {query}') | RunnableLambda(lambda p: p.to_messages()[0])

        async def later(question):
            return {'answer': question + ' later', 'context': 'c'}
        only_async = RunnableLambda(later)

        def wants_two(row: dict) -> str:
            return row['left'] + row['right']
    """)
    assert ask(open_target(f"{app}:rag")) == Answer(answer="so: Why?", contexts=("about Why?",))
    keyed = open_target(f"{app}:keyed", options={"input_key": "input"})
    assert ask(keyed) == Answer(answer="Why?!", contexts=("about Why?",))
    assert ask(open_target(f"{app}:prompt")) == Answer(answer="Q: Why?", contexts=None)
    target = open_target(f"{app}:only_async")
    assert [ask(target) for _ in range(2)] == [Answer(answer="Why? later", contexts=("c",))] * 2


def test_a_runnable_with_several_unknown_inputs_asks_for_the_key(write: Write) -> None:
    app = write("""
        from langchain_core.prompts import ChatPromptTemplate
        prompt = ChatPromptTemplate.from_template('{left} {right}')
    """)
    assert "takes left, right; say which is the question by the option input_key" in refusal(f"{app}:prompt")
    assert "unknown option 'k'; it has input_key" in refusal(f"{app}:prompt", k=1)


def test_a_chat_model_answers_with_a_message(write: Write) -> None:
    app = write("""
        from langchain_core.language_models import FakeListChatModel
        from langchain_core.messages import AIMessage
        from langchain_core.runnables import RunnableLambda
        model = FakeListChatModel(responses=['a message'])
        blocks = RunnableLambda(lambda q: AIMessage(content=[{'type': 'text', 'text': 'in '}, 'blocks']))
        broken = RunnableLambda(lambda q: 1 / 0)
        wrong = RunnableLambda(lambda q: q + 1)
    """)
    assert ask(open_target(f"{app}:model")).answer == "a message"
    assert ask(open_target(f"{app}:blocks")).answer == "in blocks"
    assert failure(open_target(f"{app}:broken")).startswith("raised ZeroDivisionError: ")
    assert failure(open_target(f"{app}:wrong")).startswith("raised TypeError: ")


def test_a_class_with_invoke_is_built_and_invoked(write: Write) -> None:
    app = write("""
        class Chain:
            def __init__(self, k): self.k = k
            def invoke(self, question): return {'output': question * self.k, 'documents': []}
        class Later:
            async def ainvoke(self, question): return question
    """)
    assert ask(open_target(f"{app}:Chain", options={"k": 2})) == Answer(answer="Why?Why?", contexts=())
    assert ask(open_target(f"{app}:Later")).answer == "Why?"


# HTTP


class Endpoint(ThreadingHTTPServer):
    """An endpoint with one behaviour per path; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any], str | None]] = []
        super().__init__(("127.0.0.1", 0), EndpointHandler)

    def url(self, path: str = "/rag") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class EndpointHandler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append((self.path, body, self.headers["Authorization"]))
        replies = {
            "/rag": (200, json.dumps({"answer": body["question"] + "!", "contexts": ["c"]}).encode()),
            "/error": (500, b"the index\nis gone"),
            "/html": (200, b"<html>hello</html>"),
            "/empty": (200, b""),
            "/list": (200, b"[1]"),
            "/shape": (200, b'{"answer": ["a"]}'),
            "/away": (302, b""),
            "/slow": (200, b""),
        }
        status, data = replies.get(self.path.partition("?")[0], (404, b"no such path"))
        if self.path == "/slow":
            time.sleep(1)
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_gets_question_and_id_and_answers(endpoint: Endpoint) -> None:
    target = open_target(endpoint.url(), options={"headers": {"Authorization": "Bearer x"}})
    assert ask(target) == Answer(answer="Why?!", contexts=("c",))
    assert endpoint.sent == [("/rag", {"question": "Why?", "id": "a"}, "Bearer x")]
    target.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/error", "answers 500: the index is gone"),
        ("/nowhere", "answers 404: no such path"),
        ("/away", "answers 302: "),
        ("/html", "the reply is not JSON but '<html>hello</html>'"),
        ("/empty", "the reply is empty"),
        ("/list", "the reply is a JSON list, not an object with answer and contexts"),
        ("/shape", "the answer is a list, not text"),
        ("/slow", "no answer within 0.3 s"),
    ],
)
def test_an_endpoint_that_fails_an_item_says_how(endpoint: Endpoint, path: str, message: str) -> None:
    assert message in failure(open_target(endpoint.url(path), timeout=0.3))


def test_an_endless_reply_is_cut(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "MAX_REPLY_BYTES", 1 << 20)
    assert failure(open_target(endpoint.url("/endless"))) == "the reply is longer than 1 MB"


def test_an_endpoint_that_goes_away_fails_its_items_only(endpoint: Endpoint) -> None:
    target = open_target(endpoint.url())
    endpoint.shutdown()
    endpoint.server_close()
    assert "ConnectError" in failure(target)


def test_an_endpoint_that_is_not_there_is_refused_at_once() -> None:
    assert "nothing answers at 127.0.0.1:9 (Connection refused); start it first" in refusal(
        "http://127.0.0.1:9/rag"
    )
    assert "names no host" in refusal("http:///rag")


def test_a_password_and_a_query_stay_out_of_the_name(endpoint: Endpoint) -> None:
    url = endpoint.url("/rag?key=secret").replace("http://", "http://me:secret@")
    target = open_target(url)
    assert target.name == endpoint.url("/rag")
    assert "secret" not in target.identity
    assert target.identity != open_target(endpoint.url("/rag")).identity
    assert ask(target).answer == "Why?!"


# Commands


def python(code: str) -> str:
    return f"cmd:{sys.executable} -c {shlex.quote(textwrap.dedent(code))}"


def test_a_command_reads_the_question_and_prints_the_reply() -> None:
    target = open_target(
        python("""
        import json, sys
        request = json.load(sys.stdin)
        print('progress on stderr', file=sys.stderr)
        print(json.dumps({'answer': request['question'] + request['id'], 'contexts': ['c']}))
    """)
    )
    assert ask(target) == Answer(answer="Why?a", contexts=("c",))


def test_a_command_is_not_run_by_a_shell(tmp_path: Path) -> None:
    target = open_target(f'command:echo \'{{"answer": "$HOME; touch {tmp_path}/x"}}\'')
    assert ask(target).answer == f"$HOME; touch {tmp_path}/x"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no index')", "exit status 1: no index"),
        ("import sys; sys.exit(3)", "exit status 3: nothing on stderr"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9: nothing on stderr"),
        ("print('hello')", "the reply is not JSON but 'hello\\n'"),
        ("pass", "the reply is empty"),
        ("print('{\"contexts\": []}')", "the reply has no 'answer'; its keys are 'contexts'"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "it wrote more than 1 MB"),
        ("import sys\nfor _ in range(4): sys.stderr.write('y' * 65536)\nsys.exit(' z')", "exit status 1: "),
    ],
)
def test_a_command_that_fails_an_item_says_how(
    monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(target_module, "MAX_REPLY_BYTES", 1 << 20)
    assert failure(open_target(python(code))).startswith(message)


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = f"""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
        open({str(tmp_path / "pids")!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')
        time.sleep(60)
    """
    target = open_target(python(code), timeout=2)
    assert failure(target) == "no answer within 2 s"
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        deadline = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """False too for a zombie that waits for somebody to ask for its status."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_that_outlives_the_command_is_not_waited_for(tmp_path: Path) -> None:
    child = python("import time; time.sleep(60)").removeprefix("cmd:")
    target = open_target(
        python(f"""
        import shlex, subprocess
        child = subprocess.Popen(shlex.split({child!r}), start_new_session=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print('{{"answer": "a"}}')
    """)
    )
    assert ask(target).answer == "a"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cmd:", "names no command"),
        (
            "cmd:no-such-program --fast",
            "there is no program 'no-such-program' that can be run; give its path",
        ),
        ("cmd:echo 'a", "cannot be split into words: No closing quotation"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(spec: str, message: str) -> None:
    assert message in refusal(spec)


def test_a_program_that_the_system_refuses_ends_the_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("neither a script nor a binary")
    program.chmod(0o755)
    with pytest.raises(TargetError, match="cannot be run: Exec format error"):
        ask(open_target(f"cmd:{program}"))


def test_the_identity_of_a_command_follows_its_words_and_its_files(tmp_path: Path) -> None:
    script = tmp_path / "rag.py"
    script.write_text("print(1)")
    first = open_target(f"cmd:{sys.executable} {script} --k 3").identity
    assert open_target(f"cmd:{sys.executable} {script} --k 4").identity != first
    script.write_text("print(2)")
    assert open_target(f"cmd:{sys.executable} {script} --k 3").identity != first
    script.write_text("print(1)")
    assert open_target(f"cmd:{sys.executable} {script} --k 3").identity == first
