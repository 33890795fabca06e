"""A headless Chromium for tests, through the pipe that its DevTools protocol offers: no driver, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
# Chromium reads commands from descriptor 3 and writes to 4, whatever numbers the pipes have here.
TO_3_AND_4 = (
    "import os, sys; [os.dup2(int(n), t) for n, t in zip(sys.argv[1:3], (3, 4))]; os.execv(sys.argv[3], sys.argv[3:])"
)


class Tab:
    """A page of a running browser. complaints: what its console said as an error, its policy's refusals included."""

    def __init__(self, send: int, receive: int) -> None:
        self.complaints: list[str] = []
        self._send, self._receive, self._rest = send, receive, b""
        self._ids = itertools.count(1)
        self._session: dict[str, str] = {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        id = next(self._ids)
        message = {"id": id, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (told := self._message()).get("id") != id:
            self._listen(told)
        assert "error" not in told, told
        return told["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._receive, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _listen(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["exception"]["description"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a page as a screen of this size would."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        went = self("Page.navigate", url=url)
        assert "errorText" not in went, went
        self.until("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of an expression on the page."""
        told = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def text(self, selector: str) -> str:
        """What an element shows: "" where it is hidden."""
        found = f"document.querySelector({json.dumps(selector)})"
        return str(self.run(f"{found}.checkVisibility() ? {found}.innerText : ''"))

    def until(self, code: str, seconds: float = 120) -> None:
        """Wait for an expression to become true."""
        end = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < end, f"never true: {code}; the page said {self.complaints}"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own, which ends with the block. profile: an empty folder."""
    (read, send), (receive, write) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", TO_3_AND_4, str(read), str(write), PROGRAM, *OPTIONS, f"--user-data-dir={profile}"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=(read, write), stdout=quiet, stderr=quiet)
    os.close(read)
    os.close(write)
    try:
        yield Tab(send, receive)
    finally:
        process.terminate()
        process.wait(60)
        os.close(send)
        os.close(receive)
