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
import re
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
        project = start_project(tmp_path)
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


class TestReadme:
    def test_every_python_block_names_its_file(self) -> None:
        name = r"# (hello|chat|conftest|test_with_\w+|mysite/\w+|project_name/\w+)\.py"
        assert all(re.match(name, block) for block in readme_blocks("python"))

    def test_the_shortest_program(self, tmp_path: Path) -> None:
        [program] = readme_blocks("python", "# hello.py")
        (tmp_path / "hello.py").write_text(program)
        with Process(tmp_path, *UVICORN, "hello:application") as server:
            client = server.dial("/ws/")
            client.send("hi")
            assert client.recv(20) == "hi"

    def test_a_chat_in_ten_minutes(self, browser: Any, tmp_path: Path) -> None:
        [commands, serve_it] = [b for b in readme_blocks("sh") if "mysite" in b]
        assert "django-admin startproject mysite .\n" in commands
        assert serve_it == "uvicorn mysite.asgi:application --reload\n"
        blocks = readme_blocks("python", "# mysite/")
        assert sum(len(block.strip().split("\n")) for block in blocks) <= 60
        project = start_project(tmp_path, "mysite")
        for name, mode, block in zip(("asgi", "urls", "views"), "aww", blocks):
            assert block.startswith(f"# mysite/{name}.py")
            with (project / f"{name}.py").open(mode) as file:
                file.write(block)
        with Process(tmp_path, *UVICORN, "mysite.asgi:application") as server:
            tabs = open_tabs(browser, server, 2)
            for tab, who in zip(tabs, ("Ann", "Ben")):
                browser.switch_to.window(tab)
                browser.find_element("name", "who").send_keys(who)
            chat_in_tabs(browser, tabs, "[name=text]")
            assert "Ben: <b>" in browser.find_element("tag name", "ul").text
            client = server.dial("/ws/lobby/")
            client.send("rubbish")
            assert closed_with(client)[0] == 1007
        assert "Traceback" not in server.output

    def test_the_chat_in_two_tabs(self, browser: Any, tmp_path: Path) -> None:
        [program] = readme_blocks("python", "# chat.py")
        (tmp_path / "chat.py").write_text(program)
        with Process(tmp_path, *UVICORN, "chat:application") as server:
            chat_in_tabs(browser, open_tabs(browser, server, 2), "input")
            said = [entry["message"] for entry in browser.get_log("browser")]
            assert all("favicon" in message for message in said)

    @pytest.mark.parametrize(
        "command",
        ["manage.py test", "-m pytest test_with_pytest.py"]
        + ["-m pytest test_with_pytest_asyncio.py"],
    )
    def test_its_recipes_for_tests(self, readme: Any, command: str) -> None:
        if "asyncio" in command:
            needs("pytest_asyncio")
        env = {name: os.environ[name] for name in os.environ if name != "CI"}
        out: Any = {"capture_output": False, "stdout": -1, "stderr": -2}
        said = run("python", *command.split(), cwd=readme.directory, env=env, **out)
        assert re.search(r"Ran [1-9]\d* tests?|[1-9]\d* passed", said)

    def test_its_celery_task(self, redis: Redis, readme: Any) -> None:
        """On Redis: PUBLISH tells whether somebody heard."""
        needs("celery")
        readme.add("settings.py", f"WEBSOCKETS['REDIS_URL'] = {redis.url!r}")
        program = (
            "import os, django\n"
            "os.environ['DJANGO_SETTINGS_MODULE'] = 'project_name.settings'\n"
            "django.setup()\n"
            "from project_name.tasks import report\n"
            "report.apply(args=[1], throw=True)\n"
        )
        with readme.serve() as server:
            client = server.dial("/notifications/", **session(readme.ann))
            asked = ("pubsub", "numsub", "myproject:user-1")
            wait_for(lambda: "1" in redis.ask(*asked))
            run("python", "-c", program, cwd=readme.directory)
            assert seen(client) == {"text": "the report for 1 is ready"}

    def test_its_handlers(self, readme: Any, browser: Any) -> None:
        needs("django_htmx")
        import django_htmx

        static = f"{django_htmx.__path__[0]}/static/django_htmx"
        scripts = {"htmx.org@2": "htmx-2.min.js", "htmx-ext-ws@2": "ext/hx-ws-2.min.js"}
        views = readme.directory / "project_name" / "views.py"
        source = views.read_text()
        for name, file in scripts.items():
            assert f"https://cdn.jsdelivr.net/npm/{name}" in source
            source = source.replace(
                f"https://cdn.jsdelivr.net/npm/{name}", f"/static/{file}"
            )
        views.write_text(source)
        readme.add("settings.py", f"STATICFILES_DIRS = [{static!r}]")
        ann, staff = session(readme.ann), session(readme.staff)
        with readme.serve() as server:
            clients = server.dial_all(3, "/ws/chat/lobby/")
            for number, client in enumerate(clients):
                client.send(f"hello from {number}")
                for other in {*clients} - {client}:
                    assert other.recv(20) == f"hello from {number}"
            page = f"http://127.0.0.1:{server.port}/live/"
            browser.get(page)
            browser.add_cookie({"name": "sessionid", "value": readme.ann})
            browser.get(page)
            client = server.dial("/ws/live/", **staff)
            field = browser.find_element("name", "text")
            wait_for(lambda: field.send_keys("hi", "\ue007") or "hi" in client.recv(1))
            client.send('{"text": "<b>you"}')
            lines = browser.find_element("id", "lines")
            wait_for(
                lambda: "annTrue: <b>you" in lines.text and "You: hi" in lines.text
            )
            assert "annFalse: hi" not in lines.text
            assert "You: &lt;b&gt;you" in client.recv(20)
            seers = [server.dial("/ws/audit/", **one) for one in (ann, staff)]
            seers[0].send('"before"')
            give = (
                "from django.contrib.auth.models import Permission, User\n"
                "user = User.objects.get(username='annTrue')\n"
                "permission = Permission.objects.get(codename='view_user')\n"
                "user.user_permissions.add(permission)\n"
            )
            run("python", "manage.py", "shell", "-v0", "-c", give, cwd=readme.directory)
            seers[1].send('"after"')
            assert seen(seers[1]) == {"user": "annTrue", "entry": "after"}
            with pytest.raises(TimeoutError):
                seers[0].recv(0)
        assert "Traceback" not in server.output

    def test_who_has_no_socket_gets_an_email(self, readme: Any) -> None:
        mail = "django.core.mail.backends.console.EmailBackend"
        new = f"MAILERS = {{'default': {{'BACKEND': {mail!r}}}}}"
        old = f"EMAIL_BACKEND = {mail!r}"
        readme.add("settings.py", f"{new if django.VERSION > (6, 1) else old}\n")
        headers = session(readme.ann)["additional_headers"]
        with readme.serve() as server:
            assert server.get("/order/", **headers).body == b"1 order"
            assert "Subject: News for you" in server.output

    def test_its_token_middleware(self, readme: Any) -> None:
        with readme.serve() as server:
            good = {"Authorization": f"Bearer {readme.good_token}"}
            client = server.dial("/whoami/", additional_headers=good)
            assert seen(client) == {"user": "annFalse"}
            bad = {"Authorization": f"Bearer {readme.bad_token}"}
            refused = server.handshake("/whoami/", **bad)
            assert (refused.status, refused.body) == (401, b"this token is not valid")
            assert server.handshake("/whoami/").status == 302

    def test_behind_its_nginx(self, readme: Any, tmp_path: Path) -> None:
        nginx, openssl = find_program("nginx"), find_program("openssl")
        [configuration] = readme_blocks("nginx")
        port, key, certificate = free_port(), tmp_path / "key", tmp_path / "certificate"
        run(
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        )
        with readme.serve() as server:
            for here, there in (
                ("listen 443", f"listen 127.0.0.1:{port}"),
                ("/etc/ssl/example.com.pem", str(certificate)),
                ("/etc/ssl/example.com.key", str(key)),
                ("127.0.0.1:8000", f"127.0.0.1:{server.port}"),
            ):
                assert here in configuration
                configuration = configuration.replace(here, there)
            (tmp_path / "nginx.conf").write_text(
                f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;"
                f"events {{}} http {{ access_log off; {configuration} }}"
            )
            command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
            with Process(tmp_path, *command, port=port):
                context = ssl.create_default_context(cafile=str(certificate))
                options: Any = {"ssl": context, "proxy": None, **session(readme.ann)}
                address = f"wss://localhost:{port}"
                origin = Origin(f"https://localhost:{port}")
                with dial(f"{address}/whoami/", origin=origin, **options) as client:
                    assert seen(client) == {"user": "annFalse"}
                for foreign in (f"http://localhost:{port}", "https://evil.example"):
                    with pytest.raises(InvalidStatus, match="403"):
                        dial(f"{address}/ws/", origin=Origin(foreign), **options)

    def test_the_project_that_its_blocks_make(self, readme: Any) -> None:
        with readme.serve() as server:

            def refused(path: str, value: str = "") -> Any:
                return server.handshake(path, Cookie=f"sessionid={value}").status

            ann, staff = session(readme.ann), session(readme.staff)
            assert b"new WebSocket" in server.get("/").body
            assert server.get("/static/admin/css/base.css").status == 200
            client = server.dial("/ws/")
            client.send("hello")
            assert client.recv(20) == "hello"
            assert seen(server.dial("/whoami/", **ann)) == {"user": "annFalse"}
            assert refused("/whoami/") == 302
            assert refused("/staff/", readme.ann) == 403
            client = server.dial("/staff/", **staff)
            client.send("1")
            assert seen(client) == {"staff": 1}
            client = server.dial("/public/", origin="http://evil.org")
            assert client.recv(20) == "for everyone"
            client = server.dial("/careful/")
            client.send('{"a":1}')
            assert seen(client) == {"a": 1}
            client.send("{")
            assert closed_with(client)[0] == 1003
            assert seen(server.dial("/room/lobby/", **ann)) == {"room": "lobby"}
            assert refused("/room/lobby/") == 302
            client = server.dial("/notifications/", **ann)
            headers = ann["additional_headers"]
            wait_for(lambda: b"1" in server.get("/order/", **headers).body)
            assert seen(client) == {"text": "ordered"}
            wait_for(lambda: "closed with 1003" in server.output)
        assert "Internal Server Error" not in server.output

    def test_logging_out_closes_all_sockets(self, redis: Redis, readme: Any) -> None:
        readme.add("settings.py", f"WEBSOCKETS['REDIS_URL'] = {redis.url!r}")
        readme.add(
            "urls.py",
            "from django.contrib.auth import logout",
            "from django.http import HttpResponse",
            "out = lambda request: logout(request) or HttpResponse('out')",
            "urlpatterns.append(path('out/', out))",
        )
        with readme.serve() as one, readme.serve() as two:
            ann = session(readme.ann)
            clients = [site.dial("/notifications/", **ann) for site in (one, two)]
            asked = ("pubsub", "numsub", "myproject:user-1")
            wait_for(lambda: "2" in redis.ask(*asked))
            headers = ann["additional_headers"]
            assert one.get("/out/", **headers).body == b"out"
            for client in clients:
                assert closed_with(client) == (4001, "logged out")
            assert one.handshake("/notifications/", **headers).status == 302

    def test_it_has_the_commands(self) -> None:
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
        assert "python .ci/benchmark.py" in speed and speed.count("| 1.00 (") == 10
        changes = readme.split("### Changes\n\n")[1]
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
            wait_for(lambda: "hello" in text_of("log"))
            # By keyboard alone: the first stop is the field, the third is Pause.
            browser.switch_to.active_element.send_keys("\ue004")
            browser.switch_to.active_element.send_keys("Grüße", "\ue007")
            wait_for(lambda: re.search(r"Grüße\s+[0-9.]+ ms", text_of("log")))
            news = browser.find_element("id", "news")
            assert news.get_attribute("aria-live") == "polite"
            assert "Grüße" in news.get_attribute("textContent")
            browser.find_element("id", "pause").send_keys(" ")
            assert text_of("pause") == "Resume"
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

    @pytest.mark.parametrize("port", ["abc", "-1", "65536"])
    def test_what_is_no_port_gets_one_clear_line(self, port: str) -> None:
        said = run(*EXAMPLE_PY, port, fails=True)
        assert said == f"{port} is no port: python example.py [1-65535]\n"

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
