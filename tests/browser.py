"""Pages in a real browser: what it complains about, what it asks the network for, how large things come out.

Talks the DevTools protocol over a pair of pipes, so that no port is opened and no other package needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
MISSING = f"no browser: none of {', '.join(NAMES)} is installed"

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)

PIPED = """
import os, sys
os.dup2(os.dup2(int(sys.argv[1]), 100), 3)
os.dup2(os.dup2(int(sys.argv[2]), 101), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the browser, which reads commands from 3 and writes answers to 4."""

PICTURES = """
[...document.images].map(i => [i.alt || i.src.slice(0, 60), i.complete ? i.naturalWidth * i.naturalHeight : 0,
    i.getBoundingClientRect().width * i.getBoundingClientRect().height])
.concat([...document.querySelectorAll('svg')].map(s => [s.getAttribute('aria-label') || 'svg',
    s.viewBox.baseVal ? s.viewBox.baseVal.width * s.viewBox.baseVal.height : s.width.baseVal.value,
    s.getBoundingClientRect().width * s.getBoundingClientRect().height]))
"""
"""Name, natural size and size on the screen of every picture."""

OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"

HIDDEN = "[...document.querySelectorAll('details')].filter(d => d.open).forEach(d => d.open = false)"

SUMMARIES = "document.querySelectorAll('summary').length"

FOCUSED = "[document.activeElement.tagName, [...document.querySelectorAll('summary')].indexOf(document.activeElement)]"

BEYOND = """
[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll, pre')).slice(0, 5).map(e => e.tagName + '.' + e.className)
"""
"""What stands out of the window and cannot be scrolled to by itself."""


@dataclass
class Seen:
    """What a browser found of a page."""

    messages: list[str]
    """Of the console, errors and warnings."""
    requests: list[str]
    """Everything but the page itself and data that is in it."""
    pictures: list[tuple[str, float, float]]
    """Name, natural size, size on the screen."""
    width: int
    """Of the window."""
    scrolled: int
    """Width that the page wants."""
    beyond: list[str]
    """Elements that stand out of it."""
    background: str

    def faults(self) -> list[str]:
        """Whatever is not as it should be."""
        found = [*self.messages, *(f"request: {url}" for url in self.requests)]
        found += [f"no picture: {name}" for name, natural, _ in self.pictures if not natural]
        found += [f"not shown: {name}" for name, _, size in self.pictures if not size]
        if self.scrolled > self.width:
            found.append(f"{self.scrolled} pixels wide in a window of {self.width}: {', '.join(self.beyond)}")
        return found


class Tab:
    """A page of the browser, by commands and events of the DevTools protocol."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive = send, receive
        self.count, self.session, self.buffer = 0, None, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            found = self.read(end)
            if found is None:
                raise TimeoutError(f"{method}: no answer from the browser")
            if found.get("id") == self.count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def read(self, end: float) -> dict[str, Any] | None:
        """The next message; None if there is none in time."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive], [], [], max(0.0, end - time.monotonic()))
            content = os.read(self.receive, 1 << 20) if ready else b""
            if not content:
                return None
            self.buffer += content
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def wait(self, method: str, seconds: float = 60) -> None:
        """Until an event of this name."""
        end = time.monotonic() + seconds
        while not any(event.get("method") == method for event in self.events):
            found = self.read(end)
            if found is None:
                raise TimeoutError(f"{method} did not happen")
            self.events.append(found)

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression; works on pages that allow no scripts of their own."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def look(self, url: str, width: int, scheme: str = "light", then: str = OPEN) -> Seen:
        """Open a page in a window of this width and do something there: open all its details, unless told else."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")
        self.value(then)
        self.value("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => 1)")
        self.value("new Promise(done => setTimeout(done, 100))")  # for what a page does after it is loaded
        return Seen(
            messages=self._messages(),
            requests=self._requests(url),
            pictures=[(name, natural, shown) for name, natural, shown in self.value(PICTURES)],
            width=width,
            scrolled=self.value("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"),
            beyond=self.value(BEYOND),
            background=self.value("getComputedStyle(document.body).backgroundColor"),
        )

    def reached(self, presses: int) -> set[int]:
        """Which summaries of closed details the tabulator key comes to."""
        self.value(HIDDEN)
        self.value("document.activeElement.blur()")
        found = set()
        for _ in range(presses):
            self.press("Tab", 9)
            tag, place = self.value(FOCUSED)
            found |= {place} if tag == "SUMMARY" else set()
        return found

    def screenshot(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def _messages(self) -> list[str]:
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(
                    f"console.{params['type']}: {[a.get('value', a.get('description')) for a in params['args']]}"
                )
            elif event.get("method") == "Runtime.exceptionThrown":
                found.append(f"exception: {params['exceptionDetails']['text']}")
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
        return found

    def _requests(self, url: str) -> list[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [one for one in asked if one != url and not one.startswith(("data:", "blob:"))]


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A browser with a profile of its own in ``folder``, and one tab."""
    assert BROWSER, MISSING
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", PIPED, str(theirs_in), str(theirs_out), BROWSER, *flags],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=(theirs_in, theirs_out),
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        tab = Tab(ours_out, ours_in)
        yield tab
        tab.session = None
        tab.call("Browser.close")
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
