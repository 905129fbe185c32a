"""What surrounds django_ws: packages, long runs, the tutorial, README, the example.

`python -m pytest` runs it after test_django_ws.py.
"""

import asyncio
import contextlib
import gc
import inspect
import itertools
import json
import os
import pathlib
import re
import signal
import socket as sockets
import ssl
import struct
import sys
import threading
import time
from typing import Any
from urllib.parse import quote

import django
import pytest

import django_ws
from project import *
from stages import *
from validator import FAILURES

# isort: split
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpResponse
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as dial
from websockets.typing import Origin

from django_ws import (
    InvalidMessage,
    WebSocket,
    WebSocketDisconnect,
    websocket,
)


class TestReload:
    def test_reload_with_open_sockets(self, tmp_path: Path) -> None:
        source = "from project import application\n"
        (tmp_path / "reloaded.py").write_text(source)
        with Process(tmp_path, *UVICORN, "--reload", "reloaded:application") as server:
            for life in STOPPED:
                server.open_raw(f"/live/{quote(life)}/")
            wait_for(lambda: server.output.count("has begun.") == 3)
            writes = itertools.count(1)

            def detected() -> bool:
                """Write again until the reloader, which begins late, has seen it."""
                change = f"# changed {next(writes)}\n"
                (tmp_path / "reloaded.py").write_text(source + change)
                with contextlib.suppress(AssertionError):
                    return bool(wait_for(lambda: "Reloading" in server.output, 1))
                return False

            wait_for(detected, 60)
            wait_for(lambda: "Finished server process" in server.output, 30)
            has_stopped_well(server)

            def ready() -> bool:
                with contextlib.suppress(OSError, InvalidStatus):
                    client = server.dial("/echo/")
                    client.send("ready")
                    return bool(client.recv(20) == "ready")
                return False

            wait_for(ready, 60)


class TestSentry:
    @pytest.mark.parametrize("traces", ["", "SENTRY_TRACES", "SENTRY_MIDDLEWARE"])
    def test_errors_carry_their_own_clients(self, tmp_path: Path, traces: str) -> None:
        """As people install it: `sentry_sdk.init(…)`, nothing else, or its wrapper."""

        def events(kind: str) -> list[Any]:
            whole = file.read_text().rpartition("\n")[0]  # the last may be under way
            found = [json.loads(line) for line in whole.splitlines()]
            return [one for one in found if (kind == "error") == ("exception" in one)]

        needs("sentry_sdk")
        file = tmp_path / "events"
        file.touch()
        env = {"SENTRY": str(file), **dict.fromkeys([traces, "SENTRY_TRACES"], "1")}
        if not traces:
            env = {"SENTRY": str(file)}
        names = ["ann", "bob", "eve", ""]
        command = (*UVICORN, "--lifespan", "off", "project:application")
        options: Any = {"MIDDLEWARE": middleware("tag_sentry"), "env": env}
        with Process(tmp_path, *command, **options) as server:
            clients = [server.dial(f"/tagged/?who={name}") for name in names]
            for client in clients:
                assert client.recv(20) == "tagged"
            for name in names:
                assert server.get(f"/fails/?who={name}web").status == 500
                refused = server.handshake(f"/tagged/?fail=1&who={name}refused")
                assert refused.status == 500
            for client in clients:
                client.send("fail")
            wait_for(lambda: len(events("error")) >= 12)
            if traces == "SENTRY_MIDDLEWARE":
                wait_for(lambda: len(events("transaction")) >= 12)
        assert len(events("error")) == 12
        every = {f"{name}{how}" for name in names for how in ("", "web", "refused")}
        for error in events("error"):
            name = error["exception"]["values"][-1]["value"]
            for part in ("modules", "extra", "server_name", "exception"):
                error.pop(part, None)
            words = set(re.findall(r"[a-z]+", json.dumps(error)))
            others = every - {name, name or "None", ""}
            assert not words & others, (name, words & others, error)
        if traces == "SENTRY_MIDDLEWARE":
            kinds = [one["contexts"]["trace"]["op"] for one in events("transaction")]
            assert kinds.count("websocket.server") == 8
            assert kinds.count("http.server") == 4


class TestTenants:
    @pytest.mark.parametrize("age, place", [(0, ""), (600, ""), (0, "?select=1")])
    def test_no_row_of_another_tenant(
        self, postgres: Any, tmp_path: Path, age: int, place: str
    ) -> None:
        process = prepare_tenants(postgres, tmp_path, CONN_MAX_AGE=age)
        names = [f"t{number}" for number in range(30)]
        with process as server:
            clients = [
                server.dial(f"/tenant/{place}", f"{name}.example.com") for name in names
            ]
            for client in clients:
                assert client.recv(20) == "ready"
            answers = ask_all(clients, "look")
        assert [answer[0] for answer in answers] == names
        for own, before, asked, later, asked_later in answers:
            assert {before, later} <= {None, own} and asked == asked_later == own


class TestZoo:
    def test_a_stack_of_everything(self, tmp_path: Path) -> None:
        process = prepare_zoo(tmp_path)
        names = ["ann", "bob", "eve"] * 3
        with process as server:
            assert b"djDebug" in server.get("/").body  # the toolbar's
            assert server.get("/static/a.txt").body == b"static"
            clients = []
            for name in names:
                answer = str(server.get(f"/?how=enter&who={name}").msg)
                [cookie] = re.findall(r"sessionid=\w+", answer)
                headers = {"Cookie": cookie, "HX-Request": "1"}
                place = f"/ws/?how=accept&who={name}"
                clients.append(server.dial(place, additional_headers=headers))
            looks = [ask_all(clients, "look") for _ in range(2)]
            assert looks[0] == looks[1]  # the same for the whole life of a view
            for name, look in zip(names, looks[0], strict=True):
                assert (look["user"], look["history"]) == (name, name)
                assert (look["host"], look["flag"]) == ("www", True)
            for what in ("request_id", "trace"):
                assert len({look[what] for look in looks[0] if look[what]}) == len(
                    names
                )
            for how, code in (("close", 403), ("raise", 500)):
                refused = server.handshake(f"/ws/?how={how}&who={how}")
                assert refused.status == code
                assert refused.getheader("Content-Security-Policy")
            assert server.get("/?how=raise&who=page").status == 500
            clients[0].send("raise")
            assert closed_with(clients[0])[0] == 1011
            for client in clients:
                client.close()
            wait_for(lambda: b"<body>0 open" in server.get("/").body)
            client = server.dial("/ws/", "other.example.com")
            client.send("other")
            assert client.recv(20) == "other"
        raised = re.findall(
            r"^(\w+(?:Error|Exception|Warning).*)$", server.output, re.M
        )
        assert set(raised) == {f"LookupError: {w}" for w in ("raise", "page", "ann")}
        events = map(json.loads, (tmp_path / "events").read_text().splitlines())
        values = [event["exception"]["values"][-1]["value"] for event in events]
        assert sorted(values) == ["ann", "page", "raise"]


class TestCrowds:
    @pytest.mark.parametrize("implementation", ["websockets-sansio", "wsproto"])
    def test_a_slow_client_delays_nobody(
        self, tmp_path: Path, implementation: str
    ) -> None:
        needs(implementation.split("-")[0])
        options = ("--ws", implementation, "--ws-per-message-deflate", "false")
        command = (*UVICORN, *options, "project:application")
        with Process(tmp_path, *command) as server:
            others = server.dial_all(3, "/room/")
            for client in others:
                client.recv(20)
            slow = server.open_raw("/room/")
            late = []
            for number in range(600):
                message = f"{number} " + "x" * 50_000
                start = time.monotonic()
                others[0].send(message)
                for client in others:
                    assert client.recv(20) == message
                late.append(time.monotonic() - start)
            assert max(late) < 2
            others[0].send("memory")
            assert seen(others[0]) < 250_000  # KiB
            slow.settimeout(30)
            received = b""
            while struct.pack("!H", 1013) + b"reads too slowly" not in received:
                part = slow.recv(2**20)
                assert part, "it was not closed"
                received = received[-200:] + part
        assert "Traceback" not in server.output


class TestSoak:
    def test_thousands_of_connections_leave_nothing_behind(self) -> None:
        ways = (
            "returned denied query bad error close group gone leave nowhere/at".split()
        )

        def connect(how: str, count: int) -> None:
            with server.open_raw(f"/ws/{how}/") as raw:
                if how in ("returned", "denied", "nowhere/at"):
                    return
                raw.sendall(frame(1, b"hi") * (1 + (how == "bad")))
                if count % 3 == 0:
                    raw.sendall(frame(8, b"\x03\xe8"))
                elif count % 3 == 1:
                    reset(raw)

        def census() -> tuple[int, int, int]:
            server.clients.close()
            state = server.uvicorn.server_state
            # The server's own task, and none that is still ending.
            wait_for(lambda: len(asyncio.all_tasks(own.loop)) <= 1)
            wait_for(lambda: not (state.tasks or state.connections))
            gc.collect()
            return (
                threading.active_count(),
                len(os.listdir("/proc/self/fd")),
                len(gc.get_objects()),
            )

        with without_logs(), serve(websocket("ws/<path:how>/", ending)) as server:
            for count in range(300):
                connect(ways[count % len(ways)], count)
            before = census()
            for count in range(3_000):
                connect(ways[count % len(ways)], count)
                if count % 100 == 0:
                    connect("asleep", count)
            after = census()
        assert after[0] <= before[0] + 1 and after[1] <= before[1]
        # Some hundred objects more may be caches; one for each connection is a leak.
        assert after[2] - before[2] < 1_000


# Whatever comes


CLIENT = [text("a"), text("[1]"), binary(b"b"), binary(b"{}"), text("{"), binary(b"")]


ACTIONS: list[tuple[Any, ...]] = [
    *[("accept",), ("accept", "chat"), ("accept", "other")],
    *[("accept", None, {"X-A": "1"}), ("accept", None, {"X-A": "\n"})],
    *[("close",), ("close", 4000, "bye"), ("close", 1005), ("close", 1000, "x" * 200)],
    *[("send_text", "x"), ("send_text", 1), ("send_bytes", b"x"), ("send_bytes", "x")],
    *[("send_json", [1]), ("send_json", object()), ("send_json", float("nan"))],
    *[("receive_text",), ("receive_bytes",), ("receive_json",), ("receive",)],
    *[("send", {"type": "websocket.accept"}), ("send", {"type": "websocket.close"})],
    *[("send", {"type": "websocket.send", "text": "x"}), ("send", {"type": "?"})],
    *[("raise", ValueError()), ("raise", PermissionDenied()), ("raise", Http404())],
    *[("raise", WebSocketDisconnect()), ("raise", InvalidMessage(1007, "x"))],
    *[("join", "room"), ("leave", "room"), ("return", HttpResponse("no", status=418))],
]


class TestAnySequence:
    def test_events_never_break_the_asgi_specification(self) -> None:
        """The validator around the application says so."""
        needs("hypothesis")
        from hypothesis import given
        from hypothesis import settings as hypothesis_settings
        from hypothesis import strategies as st

        @hypothesis_settings(max_examples=400, deadline=None, database=None)
        @given(
            st.lists(st.sampled_from(CLIENT), max_size=5),
            st.lists(st.sampled_from(ACTIONS), max_size=8),
            *[st.booleans()] * 3,
        )
        def check(
            events: Any, actions: Any, strict: bool, denial: bool, catching: bool
        ) -> None:
            async def view(socket: WebSocket) -> Any:
                misuse = (RuntimeError, ValueError, TypeError)
                for name, *arguments in actions:
                    try:
                        if name == "raise":
                            raise arguments[0]
                        if name == "return":
                            return arguments[0]
                        await getattr(socket, name)(*arguments)
                    except (WebSocketDisconnect, InvalidMessage, *misuse):
                        if not catching:
                            raise

            def prepare(drive: Drive) -> None:
                async def before(event: Any) -> None:
                    """A server that raises after the end, as ASGI 2.4 wants."""
                    if strict and drive.queue.empty():
                        raise OSError("the client has gone")

                drive.before = before

            extensions: Any = {"websocket.http.response": {}} if denial else {}
            options: Any = {"subprotocols": ["chat"], "extensions": extensions}
            play(view, *events, GONE, prepare=prepare, **options)
            assert not FAILURES

        with without_logs():
            check()


class TestTutorial:
    def test_verbatim(self, tmp_path: Path) -> None:
        """WebSockets in Django 3.1, as their tutorial has them."""
        project = start_project(tmp_path, "project_name")
        with (project / "asgi.py").open("a") as file:
            file.write("from django_ws import websockets\n")
            file.write("application = websockets(application)\n")
        (project / "urls.py").write_text("""
from django.urls import path
from django_ws import websocket
from . import views
urlpatterns = [
    path("", views.IndexView.as_view()), websocket("ws/", views.websocket_view)
]
""")
        (project / "views.py").write_text("""
from django.http import HttpResponse
from django.views import View
class IndexView(View):
    def get(self, request):
        return HttpResponse("index")
async def websocket_view(socket):
    await socket.accept()
    while True:
        message = await socket.receive_text()
        await socket.send_text(message)
""")
        with Process(tmp_path, *UVICORN, "project_name.asgi:application") as server:
            assert server.get("/").body == b"index"
            for origin in (f"http://127.0.0.1:{server.port}", None):
                client = server.dial("/ws/", origin=origin)
                for message in ("hello", "déjà", ""):
                    client.send(message)
                    assert client.recv(20) == message
                client.close_socket()
        assert not re.search("Traceback|ERROR", server.output)


def said_in(browser: Any) -> str:
    return str(browser.find_element("tag name", "ul").text)


def say(browser: Any, text: str) -> None:
    browser.find_element("name", "text").send_keys(text, "\ue007")


class TestReadme:
    def test_every_block_of_python_is_a_file(self) -> None:
        files = r"# (hello|conftest|mysite/\w+)\.py(, anew)?\n|# hello.py: run"
        assert all(re.match(files, block) for block in readme_blocks("python"))

    def test_the_shortest_program(self, tmp_path: Path) -> None:
        [program] = readme_blocks("python", "# hello.py")
        (tmp_path / "hello.py").write_text(program)
        with Process(tmp_path, *UVICORN, "hello:application") as server:
            for host in ("127.0.0.1", "localhost"):
                client = server.dial("/ws/", host=host)
                client.send("hi")
                assert client.recv(20) == "hi"

    def test_the_tutorial(self, browser: Any, redis: Redis, tmp_path: Path) -> None:
        """From an empty directory to users, tests and a second process."""
        commands = readme_blocks("sh")
        [begin] = [block for block in commands if "startproject" in block]
        for line in begin.splitlines():
            if "manage.py" in line:
                run(*line.split(), cwd=tmp_path)
            elif "startproject" in line:
                start_project(tmp_path, line.split()[2])
                write_readme(tmp_path, "Tutorial: a chat")
        serving = (*UVICORN, "mysite.asgi:application")
        with Process(tmp_path, *serving) as server:
            page = f"http://127.0.0.1:{server.port}/"
            tabs = []
            for _ in range(2):
                browser.switch_to.new_window("tab")
                browser.get(page)
                tabs.append(browser.current_window_handle)
                status = browser.find_element("css selector", "[role=status]")
                wait_for(lambda: status.text == "connected")
            say(browser, "<b>hello")
            for tab in tabs:
                browser.switch_to.window(tab)
                wait_for(lambda: said_in(browser) == "somebody: <b>hello")
            width = "return document.documentElement.scrollWidth <= innerWidth"
            metrics = {"width": 360, "height": 600, "mobile": True}
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {**metrics, "deviceScaleFactor": 1},
            )
            assert browser.execute_script(width)
            assert browser.execute_script("return innerWidth") == 360
            # From now on a wait is noted, and takes a hundredth of its time.
            browser.execute_script(
                "const wait = setTimeout; window.waits = [];"
                "window.setTimeout = (f, ms) => { waits.push(ms); wait(f, ms / 100) }"
            )
            client = server.dial("/ws/chat/lobby/")
            client.send(b"rubbish")
            assert closed_with(client)[0] == 1003
        status = browser.find_element("css selector", "[role=status]")
        wait_for(lambda: status.text == "connecting again")
        waits = wait_for(lambda: browser.execute_script("return waits.slice(7)[0]"), 30)
        assert 15_000 <= waits <= 30_000  # milliseconds; it has grown
        assert browser.execute_script("return waits[0]") <= 1000
        say(browser, "typed while it was down")
        with Process(tmp_path, *serving, port=server.port):
            wait_for(lambda: "typed while it was down" in said_in(browser), 60)
        write_readme(tmp_path, "Let users log in", "Test it")
        assert "OK" in run(
            "python",
            "manage.py",
            "test",
            cwd=tmp_path,
            capture_output=False,
            stdout=-1,
            stderr=-2,
        )
        environment = {**os.environ, "DJANGO_SUPERUSER_PASSWORD": "pass"}
        create = "createsuperuser --noinput --username ann --email a@b.cd"
        command = ("python", "manage.py", *create.split())
        run(*command, cwd=tmp_path, env=environment)
        [second] = readme_blocks("python", "# mysite/settings.py\nWEBSOCKETS")
        assert "redis://127.0.0.1:6379" in second
        with (tmp_path / "mysite" / "settings.py").open("a") as settings:
            settings.write(second.replace("redis://127.0.0.1:6379", redis.url))
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(Process(tmp_path, *serving)) for _ in "12"]
            for server in servers:
                browser.switch_to.new_window("tab")
                browser.get(f"http://127.0.0.1:{server.port}/")
                if server is servers[0]:  # cookies do not tell ports apart
                    browser.find_element("name", "username").send_keys("ann")
                    browser.find_element("name", "password").send_keys("pass", "\ue007")
                status = wait_for(
                    lambda: browser.find_elements("css selector", "[role=status]")
                )
                wait_for(lambda: status[0].text == "connected")
            wait_for(
                lambda: redis.ask("pubsub", "numsub", "django_ws:chat-lobby")[-2] == "2"
            )
            say(browser, "from the second")
            browser.switch_to.window(browser.window_handles[-2])
            wait_for(lambda: said_in(browser) == "ann: from the second")
            for server in servers:
                assert "Traceback" not in server.output

    def test_its_client_stops_on_4001(self, readme: Any, browser: Any) -> None:
        readme.add("urls.py", "urlpatterns += [path('close/', views.close)]")
        readme.add(
            "views.py",
            "from django.http import HttpResponse",
            "def close(request):",
            "    async_to_sync(close_group)('chat-lobby', 4001)",
            "    return HttpResponse()",
        )
        with readme.serve() as server:
            browser.get(f"http://127.0.0.1:{server.port}/admin/login/")
            browser.add_cookie({"name": "sessionid", "value": readme.ann})
            browser.get(f"http://127.0.0.1:{server.port}/")
            status = browser.find_element("css selector", "[role=status]")
            wait_for(lambda: status.text == "connected")
            server.get("/close/")
            wait_for(lambda: status.text == "logged out")
            [script] = [one for one in readme_blocks("html") if "connect(" in one]
            client = script.split("  function connect")[1].split("\n  }\n")[0]
            assert client.count("\n") <= 25

    @pytest.mark.parametrize("how", ["manage.py test", "pytest", "asyncio", "django"])
    def test_its_tests(self, readme: Any, how: str) -> None:
        files = {
            "pytest": "import asyncio\ndef test_it(): asyncio.run(limited())\n",
            "asyncio": "@pytest.mark.asyncio\nasync def test_it(): await limited()\n",
            "django": "@pytest.mark.django_db(transaction=True)\n"
            "async def test_it(django_user_model):\n"
            "    await django_user_model.objects.acreate(username='eve')\n"
            "    await limited()\n",
        }
        begin = (
            "import pytest\nfrom mysite.asgi import application\n"
            "from django_ws import connect\n"
            "async def limited():\n"
            "    async with connect(application, '/ws/limited/') as socket:\n"
            "        await socket.send_text('hello')\n"
            "        assert await socket.receive_text() == 'hello'\n"
        )
        command = "-m pytest -p no:cacheprovider"
        command += " test_limited.py" + " mysite/tests.py" * (how == "django")
        if how == "manage.py test":
            needs("selenium")
            paths = [find_program("chromedriver"), find_program("chromium")]
            command = how
            tests = readme.directory / "mysite" / "test_browser.py"
            begin = (
                "options = webdriver.ChromeOptions()\n"
                "for flag in ('headless', 'no-sandbox', 'disable-gpu'):\n"
                "    options.add_argument(f'--{flag}')\n"
                f"options.binary_location = {paths[1]!r}\n"
                f"service = webdriver.ChromeService({paths[0]!r})\n"
                "start = lambda: webdriver.Chrome(options=options, service=service)\n"
            )
            source = tests.read_text()
            assert source.count("webdriver.Chrome()") == 1
            source = source.replace("webdriver.Chrome()", "start()")
            tests.write_text(source.replace("@override", begin + "@override"))
        else:
            needs("pytest_asyncio", *["pytest_django"] * (how == "django"))
            (readme.directory / "test_limited.py").write_text(begin + files[how])
        if how == "django":
            (readme.directory / "conftest.py").unlink()
            [ini] = readme_blocks("ini")
            (readme.directory / "pytest.ini").write_text(ini)
            tests = readme.directory / "mysite" / "tests.py"  # README's own, marked
            mark = (
                "import pytest\npytestmark = pytest.mark.django_db(transaction=True)\n"
            )
            tests.write_text(f"{mark}{tests.read_text()}")
        elif how != "manage.py test":
            command += " -p no:django"
        env = {name: os.environ[name] for name in os.environ if name != "CI"}
        out: Any = {"capture_output": False, "stdout": -1, "stderr": -2}
        said = run("python", *command.split(), cwd=readme.directory, env=env, **out)
        assert re.search(r"Ran [1-9]\d* tests?|[1-9]\d* passed", said)

    def test_a_celery_task(self, redis: Redis, readme: Any) -> None:
        needs("celery")
        address = {"REDIS_URL": redis.url, "PREFIX": "tests"}
        readme.add("settings.py", f"WEBSOCKETS = {address!r}")
        program = (
            "import os, django\n"
            "os.environ['DJANGO_SETTINGS_MODULE'] = 'mysite.settings'\n"
            "django.setup()\n"
            "from celery import shared_task\n"
            "from django.contrib.auth.models import User\n"
            "from mysite.notify import notify\n"
            "@shared_task\n"
            "def report(pk): notify(User.objects.get(pk=pk), 'the report is ready')\n"
            "report.apply(args=[1], throw=True)\n"
        )
        with readme.serve() as server:
            client = server.dial("/ws/account/", **session(readme.ann))
            wait_for(lambda: "1" in redis.ask("pubsub", "numsub", "tests:user-1"))
            run("python", "-c", program, cwd=readme.directory)
            assert seen(client) == {"text": "the report is ready"}

    def test_who_comes_in(self, readme: Any) -> None:
        with readme.serve() as server:
            ann, staff = session(readme.ann), session(readme.staff)
            asked = ann["additional_headers"]
            assert server.handshake("/ws/staff/", **asked).status == 403
            assert server.dial("/ws/staff/", **staff).recv(20) == "welcome"
            assert server.handshake("/ws/room/lobby/").status == 302
            expected = {"room": "lobby", "user": "ann"}
            assert seen(server.dial("/ws/room/lobby/", **ann)) == expected
            good = {"Authorization": f"Bearer {readme.good_token}"}
            client = server.dial("/ws/room/lobby/", additional_headers=good)
            assert seen(client) == expected
            # Of a user who is not active, of one who is deleted, forged, expired.
            assert len(readme.bad_tokens) == 4
            for token in readme.bad_tokens:
                bad = {"Authorization": f"Bearer {token}"}
                refused = server.handshake("/ws/room/lobby/", **bad)
                assert refused.status == 401
                assert refused.body == b"this token is not valid"
            admin = server.get("/static/admin/css/base.css")
            assert admin.status == 404  # README tells what serves it
        assert "Internal Server Error" not in server.output

    def test_a_session_that_ends_while_the_socket_is_open(self, readme: Any) -> None:
        """The view looks again; whatever the reason, nothing is logged."""

        def ask(sql: str) -> None:
            program = (
                f"from django.db import connection as c; c.cursor().execute({sql!r})"
            )
            command = ("python", "manage.py", "shell", "-v0", "-c", program)
            run(*command, cwd=readme.directory)

        ends = (
            "UPDATE auth_user SET is_active = false WHERE username = 'ann'",
            "UPDATE auth_user SET is_active = true, password = 'x'"
            " WHERE username = 'ann'",
            "DELETE FROM auth_user WHERE username = 'staff'",
        )
        views = readme.directory / "mysite" / "views.py"
        source = views.read_text()
        assert source.count("asyncio.timeout(60)") == 1
        views.write_text(source.replace("asyncio.timeout(60)", "asyncio.timeout(1)"))
        with readme.serve() as server:
            for value, sql in zip((readme.ann, readme.ann, readme.staff), ends):
                client = server.dial("/ws/account/", **session(value))
                client.send("hi")
                assert client.recv(20) == "hi"
                if "password" in sql:
                    ask("UPDATE auth_user SET is_active = true")
                    client = server.dial("/ws/account/", **session(value))
                ask(sql)
                assert closed_with(client) == (4001, "your session has ended")
                ask("UPDATE auth_user SET is_active = true")
        assert "Traceback" not in server.output

    def test_logging_out_closes_the_sessions_sockets(
        self, redis: Redis, readme: Any
    ) -> None:
        readme.add("settings.py", f"WEBSOCKETS = {{'REDIS_URL': {redis.url!r}}}")
        readme.add(
            "urls.py",
            "from django.contrib.auth import logout",
            "out = lambda request: logout(request) or HttpResponse('out')",
            "urlpatterns.append(path('out/', out))",
        )
        with readme.serve() as one, readme.serve() as two:
            ann, staff = session(readme.ann), session(readme.staff)
            sites = (one, two)
            clients = [site.dial("/ws/account/", **ann) for site in sites]
            other = one.dial("/ws/account/", **staff)
            asked = ("pubsub", "numsub", f"django_ws:session-{readme.ann}")
            wait_for(lambda: "2" == redis.ask(*asked).split()[-1])
            headers = ann["additional_headers"]
            assert one.get("/out/", **headers).body == b"out"
            for client in clients:
                assert closed_with(client) == (4001, "logged out")
            assert one.handshake("/ws/account/", **headers).status == 302
            other.send("hi")
            assert other.recv(20) == "hi"
            redis.stop()  # users can log out all the same
            headers = staff["additional_headers"]
            assert one.get("/out/", **headers).body == b"out"
            assert one.handshake("/ws/account/", **headers).status == 302

    def test_its_handlers(self, readme: Any) -> None:
        ann, staff = session(readme.ann), session(readme.staff)
        with readme.serve() as server:
            clients = server.dial_all(3, "/ws/talk/lobby/")
            time.sleep(0)
            for number, client in enumerate(clients):
                wait_for(lambda: client.send(f"hello from {number}") is None)
                for other in {*clients} - {client}:
                    assert other.recv(20) == f"hello from {number}"
            seers = [server.dial("/ws/audit/", **one) for one in (ann, staff)]
            seers[0].send("before")
            give = (
                "from django.contrib.auth.models import Permission, User\n"
                "user = User.objects.get(username='staff')\n"
                "permission = Permission.objects.get(codename='view_user')\n"
                "user.user_permissions.add(permission)\n"
            )
            command = ("python", "manage.py", "shell", "-v0", "-c", give)
            run(*command, cwd=readme.directory)
            seers[1].send("after")
            assert seen(seers[1]) == {"user": "staff", "entry": "after"}
            with pytest.raises(TimeoutError):
                seers[0].recv(0)
        assert "Traceback" not in server.output

    def test_who_has_no_socket_gets_an_email(self, readme: Any) -> None:
        mail = "django.core.mail.backends.console.EmailBackend"
        new = f"MAILERS = {{'default': {{'BACKEND': {mail!r}}}}}"
        old = f"EMAIL_BACKEND = {mail!r}"
        readme.add("settings.py", new if django.VERSION > (6, 1) else old)
        ann = session(readme.ann)
        headers = ann["additional_headers"]
        with readme.serve() as server:
            assert server.get("/order/", **headers).body == b"1 order"
            assert server.output.count("Subject: News for you") == 1
            client = server.dial("/ws/account/", **ann)
            client.send("joined")
            assert client.recv(20) == "joined"
            assert server.get("/order/", **headers).body == b"1 order"
            assert seen(client) == {"text": "ordered"}
            assert server.output.count("Subject: News for you") == 1

    def test_htmx(self, readme: Any, browser: Any) -> None:
        needs("django_htmx")
        import django_htmx

        static = pathlib.Path(django_htmx.__path__[0]) / "static" / "django_htmx"
        recipes = readme.directory / "mysite" / "recipes.py"
        source = recipes.read_text()
        readme.add("urls.py", "from django.views.static import serve")
        scripts = {"htmx.org@2": "htmx-2.min.js", "htmx-ext-ws@2": "ext/hx-ws-2.min.js"}
        for name, file in scripts.items():
            address = f"https://cdn.jsdelivr.net/npm/{name}"
            assert address in source
            source = source.replace(address, f"/scripts/{file}")
        recipes.write_text(source)
        root = f"{{'document_root': {str(static)!r}}}"
        route = f"path('scripts/<path:path>', serve, {root})"
        readme.add("urls.py", f"urlpatterns += [{route}]")
        with readme.serve() as server:
            page = f"http://127.0.0.1:{server.port}/live/"
            browser.get(page)
            browser.add_cookie({"name": "sessionid", "value": readme.ann})
            browser.get(page)
            client = server.dial("/ws/live/", **session(readme.staff))
            field = browser.find_element("name", "text")
            lines = browser.find_element("id", "lines")
            wait_for(lambda: field.send_keys("hi", "\ue007") or "You: hi" in lines.text)
            for rubbish in ("[]", "1", "{}", "null", '{"text": "\\ud800"}'):
                client.send(rubbish)  # it ends nobody's socket
            client.send('{"text": "<b>you"}')
            wait_for(lambda: "staff: <b>you" in lines.text)
            assert "ann: hi" not in lines.text
            wait_for(lambda: "You: &lt;b&gt;you" in client.recv(20))

    def test_its_recipes(self, readme: Any) -> None:
        blocks = re.findall(
            r"```python\n# mysite/(?:recipes|orders|test_browser).py\n" r"(.*?)```",
            (HERE / "README.md").read_text(),
            re.S,
        )
        ann, staff = session(readme.ann), session(readme.staff)
        with readme.serve() as server:
            client = server.dial("/ws/clock/")
            assert seen(client)["time"] <= time.time()
            client.send("fast")
            assert [seen(client)["time"] for _ in range(4)]
            client.close()
            writer = server.dial("/ws/news/0/")
            for text in ("a", "b", "c"):
                writer.send(text)
                assert seen(writer)["text"] == text
            late = server.dial("/ws/news/1/")
            assert [seen(late) for _ in "bc"] == [
                {"id": 2, "text": "b"},
                {"id": 3, "text": "c"},
            ]
            late.send("d")
            assert seen(late) == seen(writer) == {"id": 4, "text": "d"}
            stale = (
                "from datetime import datetime, UTC;"
                "from mysite.models import Presence;"
                "Presence.objects.create(name='crashed');"
                "Presence.objects.update(seen=datetime(2020, 1, 1, tzinfo=UTC))"
            )
            command = ("python", "manage.py", "shell", "-v0", "-c", stale)
            run(*command, cwd=readme.directory)
            first = server.dial("/ws/presence/", **ann)
            assert seen(first) == {"here": ["ann"]}
            second = server.dial("/ws/presence/", **staff)
            assert seen(first) == seen(second) == {"here": ["ann", "staff"]}
            second.close()
            assert seen(first) == {"here": ["ann"]}
            client = server.dial("/ws/limited/", max_queue=None)
            for number in range(11):
                client.send(str(number))
            assert [client.recv(20) for _ in range(10)] == [*map(str, range(10))]
            assert closed_with(client) == (1008, "too many messages")
            client = server.dial("/ws/orders/")
            client.send('{"item": "pen", "count": 2}')
            assert seen(client) == {"ordered": "pen", "count": 2}
            for count in ("-2", "NaN", "1e999"):
                client.send(f'{{"item": "pen", "count": {count}}}')
                assert seen(client)["errors"][0]["type"]
        assert "Traceback" not in server.output
        assert len(blocks) == 7 and all(block.count("\n") <= 25 for block in blocks)

    def test_runserver(self, readme: Any) -> None:
        """With daphne: pages, sockets, static files and autoreload; without: a hint."""
        needs("daphne")
        command = (sys.executable, "manage.py", "runserver", "{port}")
        urls = readme.directory / "mysite" / "urls.py"
        with Process(readme.directory, *command) as server:
            assert server.handshake("/ws/limited/").status == 426
            assert "runserver speaks no WebSocket" in server.output
            assert "--reload` in its place, or install daphne" in server.output
        readme.add(
            "settings.py",
            "INSTALLED_APPS.insert(0, 'daphne')",
            "ASGI_APPLICATION = 'mysite.asgi.application'",
        )
        with Process(readme.directory, *command) as server:

            def echoes_again() -> bool:
                with contextlib.suppress(OSError, InvalidStatus):
                    client = server.dial("/ws/limited/")
                    client.send("hi")
                    return bool(client.recv(20) == "hi")
                return False

            wait_for(echoes_again, 60)
            assert server.get("/admin/login/").status == 200
            assert server.get("/static/admin/css/base.css").status == 200
            assert server.get("/new/").status == 404

            def reloaded() -> bool:
                urls.write_text(urls.read_text() + "\n")
                with contextlib.suppress(OSError):
                    return bool(server.get("/new/").status == 200)
                return False

            route = "path('new/', lambda request: HttpResponse('new'))"
            readme.add("urls.py", f"urlpatterns += [{route}]")
            while not reloaded():  # the reloader begins late
                time.sleep(1)
            wait_for(echoes_again, 60)

    def test_gunicorn_with_uvicorn_worker(self, readme: Any) -> None:
        needs("gunicorn", "uvicorn_worker")
        worker = ("-k", "uvicorn_worker.UvicornWorker", "mysite.asgi")
        bind = ("--bind", "127.0.0.1:{port}")
        command = (sys.executable, "-m", "gunicorn", *bind, *worker)
        with Process(readme.directory, *command) as server:
            client = server.dial("/ws/limited/")
            client.send("hi")
            assert client.recv(20) == "hi"

    def test_reload_sees_templates(self, readme: Any) -> None:
        needs("watchfiles")
        template = readme.directory / "mysite" / "templates" / "index.html"
        more = ("--reload", "--reload-include", "*.html")
        command = (*UVICORN, *more, "mysite.asgi:application")
        with Process(readme.directory, *command) as server:

            def seen_change() -> bool:
                template.write_text(template.read_text() + "\n")
                return "Reloading" in server.output

            while not seen_change():  # the reloader begins late
                time.sleep(1)

    def test_behind_its_nginx(self, readme: Any, tmp_path: Path) -> None:
        nginx, openssl = find_program("nginx"), find_program("openssl")
        [configuration] = readme_blocks("nginx")
        port, key, certificate = free_port(), tmp_path / "key", tmp_path / "certificate"
        run(
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        )
        with readme.serve() as server:
            assert "http://127.0.0.1:8000" in configuration
            address = f"127.0.0.1:{server.port}"
            configuration = configuration.replace("127.0.0.1:8000", address)
            before, location = configuration.split("location", 1)
            (tmp_path / "nginx.conf").write_text(
                f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;"
                f"events {{}} http {{ access_log off; {before}"
                f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificate};"
                f"ssl_certificate_key {key}; location {location} }} }}"
            )
            command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
            with Process(tmp_path, *command, port=port):
                context = ssl.create_default_context(cafile=str(certificate))
                options: Any = {"ssl": context, "proxy": None, **session(readme.ann)}
                address = f"wss://localhost:{port}"
                origin = Origin(f"https://localhost:{port}")
                place = f"{address}/ws/room/lobby/"
                with dial(place, origin=origin, **options) as client:
                    assert seen(client) == {"room": "lobby", "user": "ann"}
                for foreign in (f"http://localhost:{port}", "https://evil.example"):
                    with pytest.raises(InvalidStatus, match="403"):
                        dial(place, origin=Origin(foreign), **options)

    def test_it_has_the_commands(self) -> None:
        assert len((HERE / "README.md").read_text().splitlines()) <= 850
        commands = [block for block in readme_blocks("sh") if "--python" in block]
        assert [command.count("\n") for command in commands] == [1, 1, 1]
        ends = ["example.py", "-m pytest", "-m pytest"]
        for command, end in zip(commands, ends):
            assert command.rstrip().endswith(f".venv/bin/python {end}")
        script = (HERE / ".ci" / "run").read_text()
        [packages] = re.findall('packages="(.*)"', script)
        assert f"apt-get install -y {packages} && " in commands[2]
        assert (
            "-r .ci/requirements.txt" in commands[2] and "-r .ci/requirements" in script
        )

    def test_every_public_name_is_in_the_manual_and_in_the_reference(self) -> None:
        """The manual is what pydoc prints, in a shell without any settings."""
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        manual = run("python", "-m", "pydoc", "django_ws", env=environment)
        assert manual.startswith("Help on module django_ws")
        reference = (HERE / "README.md").read_text().split("## Reference")[1]
        reference = reference.split("\n## ")[0]
        for name in django_ws.__all__:
            assert re.search(rf"^    (async |class )?{name}\b", manual, re.M), name
            if name != "WebSocket":  # its methods are
                assert name in reference, name
            if inspect.isfunction(getattr(django_ws, name)):
                assert inspect.getdoc(getattr(django_ws, name))
        for name in set(dir(WebSocket)) - set(dir(object)):
            if not name.startswith("_") and not name.isupper():
                assert name in reference, name
                assert inspect.getdoc(getattr(WebSocket, name)), name

    def test_it_has_the_figures_the_version_and_the_licence(self) -> None:
        readme = (HERE / "README.md").read_text()
        speed = readme.split("## Speed")[1].split("\n## ")[0]
        assert "python .ci/benchmark.py" in speed and speed.count("| 1.00 (") == 5
        changes = readme.split("## Changes\n\n")[1]
        assert changes.startswith(f"{django_ws.__version__} (")
        assert "python .ci/limits.py" in readme and readme.count("| PostgreSQL, ") == 3
        assert "MIT License" in readme
        source = (HERE / "django_ws.py").read_text()
        assert source.startswith("# SPDX-License-Identifier: MIT")


EXAMPLE_PY = (sys.executable, HERE / "example.py")


class TestExample:
    def test_the_page_in_a_browser(self, browser: Any, tmp_path: Path) -> None:
        def text_of(name: str) -> str:
            return str(browser.find_element("id", name).text)

        with Process(tmp_path, *EXAMPLE_PY, "{port}") as server:
            browser.get(f"http://127.0.0.1:{server.port}/")
            wait_for(lambda: text_of("state") == "connected")
            assert text_of("log") == "Your messages will appear here."
            wait_for(lambda: text_of("hellos") != "0")
            # By keyboard alone: the first stop is the field.
            browser.switch_to.active_element.send_keys("\ue004")
            browser.switch_to.active_element.send_keys("Grüße", "\ue007")
            wait_for(lambda: re.search(r"Grüße\s+[0-9.]+ ms", text_of("log")))
            news = browser.find_element("id", "news")
            assert news.get_attribute("aria-live") == "polite"
            assert "Grüße" in news.get_attribute("textContent")
            first = text_of("hellos")
            wait_for(lambda: text_of("hellos") != first)
            assert "hello" not in text_of("log") and "Grüße" in text_of("log")
            browser.find_element("id", "pause").send_keys(" ")
            assert text_of("pause") == "Resume hellos"
            paused = text_of("hellos")
            time.sleep(1.5)  # a hello came every second
            assert int(text_of("hellos")) <= int(paused) + 1
            assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        wait_for(lambda: text_of("state") == "reconnecting")
        with Process(tmp_path, *EXAMPLE_PY, "{port}", port=server.port):
            wait_for(lambda: text_of("state") == "connected", 30)
            browser.find_element("id", "text").send_keys("again", "\ue007")
            wait_for(lambda: "again" in text_of("log"))
        # While the server was down the browser itself says that it found nobody.
        for entry in browser.get_log("browser"):
            assert "WebSocket connection to" in entry["message"], entry
        loaded = "return performance.getEntriesByType('resource').length"
        assert browser.execute_script(loaded) == 0
        assert "Traceback" not in server.output

    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("width", [360, 390, 1280])
    def test_nothing_wraps_alone(
        self, browser: Any, tmp_path: Path, width: int, dark: bool
    ) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": 600, "deviceScaleFactor": 1}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 400}
        )
        with Process(tmp_path, *EXAMPLE_PY, "{port}") as server:
            browser.get(f"http://127.0.0.1:{server.port}/")
            rows = (("h1", "#state"), ("#text", "#send"), ("#beat span", "#pause"))
            middle = (
                "const one = document.querySelector(arguments[0]);"
                "const box = one.getBoundingClientRect();"
                "return box.top + box.height / 2"
            )
            for row in rows:
                places = [browser.execute_script(middle, one) for one in row]
                assert abs(places[0] - places[1]) < 8, row
            assert browser.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth"
            )
            color = browser.find_element("tag name", "body").value_of_css_property(
                "background-color"
            )
            [red] = re.findall(r"rgba?\((\d+)", color)
            assert (int(red) < 100) == dark

    @pytest.mark.parametrize("port", ["abc", "-1", "65536", "٨٠٠٠"])
    def test_what_is_no_port_gets_a_clear_line(self, port: str) -> None:
        said = run(*EXAMPLE_PY, "--", port, fails=True)
        assert said.splitlines()[-1].endswith(f"{port} is not a port from 1 to 65535")

    def test_help_and_what_it_does_not_know(self) -> None:
        assert "usage: example.py [-h] [port]" in run(*EXAMPLE_PY, "--help")
        for arguments in (["8000", "8001"], ["--reload"]):
            said = run(*EXAMPLE_PY, *arguments, fails=True)
            assert "unrecognized arguments" in said

    def test_ctrl_c_ends_it_without_a_traceback(self, tmp_path: Path) -> None:
        with Process(tmp_path, *EXAMPLE_PY, "{port}") as server:
            client = server.dial("/ws/")
            server.process.send_signal(signal.SIGINT)
            assert closed_with(client)[0] == 1012
            assert server.process.wait(20) == 0
        assert "Traceback" not in server.output

    @pytest.mark.parametrize("default", [False, True])
    def test_a_port_in_use_gets_one_clear_line(
        self, default: bool, stack: contextlib.ExitStack
    ) -> None:
        port = 8000 if default else free_port()

        def taken() -> bool:
            """Another run of the tests may hold it for a moment."""
            with contextlib.suppress(OSError):
                stack.enter_context(sockets.create_server(("127.0.0.1", port)))
                return True
            return False

        with contextlib.suppress(AssertionError):  # somebody else's, that is as good
            wait_for(taken, 10)
        said = run(*EXAMPLE_PY, *([] if default else [port]), fails=True)
        [line] = said.splitlines()
        assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in line


class TestTheCard:
    def test_the_top_level_holds_five_files(self) -> None:
        tracked = run("git", "ls-files", cwd=HERE).split()
        assert {name.split("/")[0] for name in tracked if name[0] != "."} == {
            *("README.md", "django_ws.py", "example.py", "setup.cfg"),
            "test_django_ws.py",
        }

    def test_the_module_needs_django_and_asgiref_only(self) -> None:
        program = (
            "import sys, django, django.core.handlers.asgi, django.middleware.csrf;"
            "import django.core.serializers.json, django.urls, asgiref.sync;"
            "import django.conf; django.conf.settings.configure();"
            "before = set(sys.modules); import django_ws;"
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
        )
        used = set(run("python", "-c", program, cwd=HERE).split())
        assert used <= {"django_ws", "django", "asgiref", *sys.stdlib_module_names}

    def test_the_private_names_of_others_that_it_rests_on(self) -> None:
        from asgiref.sync import AsyncToSync, SyncToAsync
        from django.core.handlers.base import BaseHandler
        from django.middleware.csrf import CsrfViewMiddleware

        names: list[tuple[Any, str]] = [
            (CsrfViewMiddleware, "_origin_verified"),
            (CsrfViewMiddleware, "_reject"),
            (BaseHandler, "_get_response"),
            (BaseHandler, "_view_middleware"),
            (HttpResponse(), "_resource_closers"),
            (SyncToAsync, "context_to_thread_executor"),
            (SyncToAsync, "thread_sensitive_context"),
            (AsyncToSync, "executors"),
        ]
        for owner, name in names:
            assert hasattr(owner, name), (owner, name)
