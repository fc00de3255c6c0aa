"""A headless Chromium for tests, driven by its DevTools protocol over a pipe: no driver, no further
package.

with Browser() as browser:
    browser.open(page, width=390)
    browser.run("document.title")
    browser.problems, browser.requests
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    " --hide-scrollbars --remote-debugging-pipe"
)


class Browser:
    """One browser with one page.

    problems: errors and warnings of the page's console, and exceptions. requests: addresses that
    the page requested, without its own.
    """

    def __enter__(self) -> Browser:
        chromium = shutil.which("chromium")
        if chromium is None:
            pytest.skip(
                "no chromium on PATH; install it (apt-get install chromium) to test the report in a"
                " browser"
            )
        self.profile = tempfile.mkdtemp(prefix="jaxre-browser-")
        down, up = os.pipe(), os.pipe()
        command = (
            f"exec {shlex.quote(chromium)} {FLAGS} --user-data-dir={self.profile} about:blank"
            f" 3<&{down[0]} 4>&{up[1]}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(down[0], up[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(down[0])
        os.close(up[1])
        self.down, self.up = os.fdopen(down[1], "wb", buffering=0), os.fdopen(up[0], "rb")
        self.waiting, self.number, self.session, self.page = b"", 0, None, ""
        self.events: list[dict] = []
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.down.close()
        self.up.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> dict[str, Any]:
        """Sends a command of the protocol and returns its result."""
        self.number += 1
        message = {
            "id": self.number,
            "method": method,
            "params": parameters,
            **({"sessionId": self.session} if self.session else {}),
        }
        self.down.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Loads a file at this size and waits until it is drawn."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.problems.clear()
        self.requests.clear()
        self.page = page.resolve().as_uri()
        self.call("Page.navigate", url=self.page)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._note(self._next())
        self.settle()

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def settle(self) -> None:
        """Waits two frames, so that callbacks that need a layout have run."""
        self.run(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>"
            " done(1))))"
        )

    def run(self, script: str) -> Any:
        """Awaits a JavaScript expression and returns its value."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key in the focused element."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Enter": 13, "Tab": 9}[key],
                **text,
            )

    def shoot(self, path: Path, whole: bool = True) -> Path:
        """Saves a screenshot of the page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _next(self) -> dict:
        while b"\0" not in self.waiting:
            chunk = os.read(self.up.fileno(), 1 << 16)
            if not chunk:
                raise RuntimeError("the browser ended")
            self.waiting += chunk
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        if "method" not in event:
            return
        self.events.append(event)
        method, parameters = event["method"], event["params"]
        if method == "Network.requestWillBeSent" and parameters["request"]["url"] != self.page:
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.problems.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(
                f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"
            )
