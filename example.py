"""A Django project in one file, with a WebSocket: python example.py [port]"""

import argparse
import contextlib
import socket as sockets
import sys

import uvicorn
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management.utils import get_random_secret_key
from django.http import HttpRequest, HttpResponse
from django.urls import path

from django_ws import WebSocket, websocket, websockets

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>django_ws</title>
<style>
  :root { --ink: #1c2733; --soft: #5b6875; --line: #d9e0e6; --paper: #f4f7f8;
          --card: #fff; --accent: #0c6b4a; --bad: #a8461f }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf2; --soft: #9fadb9; --line: #2c3a46; --paper: #10181f;
            --card: #18232c; --accent: #5fd3a5; --bad: #f0a07c }
  }
  * { box-sizing: border-box }
  body { margin: 0 auto; padding: 2rem 1rem; max-width: 40rem; color: var(--ink);
         background: var(--paper); font: 1rem/1.5 system-ui, sans-serif }
  header { display: flex; align-items: baseline; justify-content: space-between }
  h1 { margin: 0; font-size: 1.5rem; letter-spacing: -.02em }
  #state::before { content: ""; display: inline-block; width: .6em; height: .6em;
                   margin-right: .45em; border-radius: 50%; background: var(--bad) }
  #state.open::before { background: var(--accent) }
  p, small, li.empty { color: var(--soft) }
  form, #beat { display: flex; gap: .5rem; align-items: center; margin: 1rem 0 }
  #beat span { flex: 1; font-variant-numeric: tabular-nums }
  input { flex: 1; min-width: 0 } ::placeholder { color: var(--soft) }
  input, button { padding: .6rem .8rem; border: 1px solid var(--line); font: inherit;
                  border-radius: .5rem; background: var(--card); color: inherit }
  button { cursor: pointer; white-space: nowrap }
  button:disabled { cursor: default; opacity: .5 }
  button.main { border-color: var(--accent); background: var(--accent);
                color: var(--card) }
  :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
  ol { margin: 1rem 0; padding: 0; list-style: none; border-radius: .75rem;
       border: 1px solid var(--line); background: var(--card) }
  li { display: flex; justify-content: space-between; align-items: baseline;
       gap: 1rem; padding: .6rem 1rem; overflow-wrap: anywhere }
  li + li { border-top: 1px solid var(--line) }
  small { white-space: nowrap; font-variant-numeric: tabular-nums }
  #news { position: absolute; width: 1px; height: 1px; overflow: hidden;
          clip-path: inset(50%) }
</style>
<header><h1>django_ws</h1><span id="state" role="status">connecting</span></header>
<p>What you send goes to Django over a WebSocket and comes back.</p>
<form>
  <input id="text" aria-label="Message" placeholder="A message" autocomplete="off">
  <button class="main" id="send" disabled>Send</button>
</form>
<ol id="log" aria-label="Echoes">
  <li class="empty">Your messages will appear here.</li>
</ol>
<div id="beat">
  <span>Hellos echoed: <b id="hellos">0</b></span>
  <button id="pause" type="button">Pause hellos</button>
</div>
<p id="news" aria-live="polite"></p>
<script>
  const [state, text, send, log, hellos, pause, news] = ["state", "text", "send", "log",
    "hellos", "pause", "news"].map(id => document.getElementById(id));
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  let socket, retries = 0, sent = [], paused = false;

  function connect() {
    socket = new WebSocket(`${scheme}//${location.host}/ws/`);
    sent = [];
    socket.onopen = () => { retries = 0; show("connected", true) };
    socket.onmessage = event => {
      const [start, typed] = sent.shift();
      if (typed) list(event.data, `${(performance.now() - start).toFixed(1)} ms`);
      else hellos.textContent = Number(hellos.textContent) + 1;
    };
    socket.onclose = () => {
      // Back-off with jitter, so that a restart is not met by everyone at once.
      const delay = Math.min(10000, 500 * 2 ** retries++) * (0.5 + Math.random() / 2);
      show("reconnecting", false);
      setTimeout(connect, delay);
    };
  }
  function show(words, open) {
    state.textContent = words;
    state.classList.toggle("open", open);
    send.disabled = !open;
  }
  function list(message, took) {
    const line = document.createElement("li"), time = document.createElement("small");
    line.textContent = message;
    time.textContent = took;
    line.append(time);
    log.querySelector(".empty")?.remove();
    log.prepend(line);
    if (log.children.length > 8) log.lastElementChild.remove();
    news.textContent = `${message}, ${took}`;  // for screen readers
  }
  function say(message, typed) {
    if (socket.readyState !== WebSocket.OPEN) return false;
    sent.push([performance.now(), typed]);
    socket.send(message);
    return true;
  }
  document.querySelector("form").onsubmit = event => {
    event.preventDefault();
    if (text.value && say(text.value, true)) text.value = "";
    text.focus();
  };
  pause.onclick = () => {
    paused = !paused;
    pause.textContent = paused ? "Resume hellos" : "Pause hellos";
  };
  setInterval(() => paused || say("hello", false), 1000);
  connect();
</script>
</html>
"""


def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    while True:
        message = await socket.receive_text()
        await socket.send_text(message)


settings.configure(
    DEBUG=True,
    SECRET_KEY=get_random_secret_key(),
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.security.SecurityMiddleware"],
)
urlpatterns = [path("", index), websocket("ws/", echo)]
application = websockets(get_asgi_application())


def port(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a port from 1 to 65535")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a page with a WebSocket.")
    parser.add_argument("port", nargs="?", type=port, default=8000, help="or 8000")
    chosen = parser.parse_args().port
    try:
        listener = sockets.create_server(("127.0.0.1", chosen))
    except OSError as error:
        sys.exit(f"Cannot listen on 127.0.0.1:{chosen}: {error.strerror}")
    print(f"Open http://127.0.0.1:{chosen}/ in a browser; Ctrl-C stops.")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has stopped by then
        uvicorn.Server(uvicorn.Config(application)).run(sockets=[listener])
