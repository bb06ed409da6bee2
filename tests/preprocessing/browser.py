"""A headless Chromium driven over its own pipe (the DevTools protocol), without a driver or another package."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe", "--hide-scrollbars",
]  # fmt: skip
SECONDS = 60


def chromium() -> str | None:
    """The browser's program, if this machine has one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a Chromium with an empty profile. `requests` and `complaints` gather what the page does."""

    def __init__(self, profile: Path) -> None:
        profile.mkdir(parents=True)
        commands, answers = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and writes to 4; ours must not have these numbers.
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
        start = f'exec "$@" 3<&{ours[0]} 4>&{ours[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, "bash", str(chromium()), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )  # fmt: skip
        for end in (*ours, commands[0], answers[1]):
            os.close(end)
        self._commands, self._answers = os.fdopen(commands[1], "wb", 0), os.fdopen(answers[0], "rb")
        self._number, self._session, self._buffer = 0, None, b""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        """A command of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            piece = self._answers.read1(1 << 20)
            assert piece, f"Chromium ended with {self._process.wait()}"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method: str | None, params) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" or (method == "Log.entryAdded"):
            self.complaints.append(str(params.get("entry", params)))

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of so many pixels; a narrow one is a phone."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, expression: str):
        """The value of a JavaScript expression, awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(expression):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.05)

    def screenshot(self, path: Path, *, full: bool = True) -> Path:
        """Save the whole page as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        self._commands.close()
        self._answers.close()
