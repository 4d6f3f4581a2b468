"""A headless Chromium of this machine, over its debugging pipe: for pages that people look at."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One tab; `events` are messages of the browser that answer no command, such as errors and requests."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._left, self._number, self._session = to, back, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._read()).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, found
        result: dict[str, Any] = found["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            chunk = os.read(self._back, 1 << 16)
            if not chunk:
                raise EOFError("the browser has ended")
            self._left += chunk
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def show(self, url: str, width: int = 1280, *, scheme: str = "light") -> None:
        """Load a page, and wait until it is loaded."""
        self.events.clear()
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def faults(self, url: str, width: int = 1280, *, scheme: str = "light") -> list[str]:
        """Load a page, and return its errors, its requests to others, and its width where the screen is narrower."""
        self.show(url, width, scheme=scheme)
        bad = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        found = [str(event) for event in self.events if event.get("method") in bad]
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        found += [other for other in asked if other != url and not other.startswith("data:")]
        wide = self.value("document.documentElement.scrollWidth")
        return [*found, f"it is {wide} pixels wide"] if wide > width else found

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def pdf(self, path: Path) -> None:
        """Write the page as it is printed."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a browser, with its profile in a folder; it is ended with the block."""
    (ours_in, to), (back, ours_out) = os.pipe(), os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe"
    command = f'exec "$0" {flags} "--user-data-dir=$1" about:blank 3<&{ours_in} 4>&{ours_out}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, str(CHROMIUM), str(folder / "profile")],
        pass_fds=(ours_in, ours_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(ours_in)
    os.close(ours_out)
    try:
        try:
            tab = Browser(to, back)
        except (EOFError, BrokenPipeError):  # a stub that asks to install it, or libraries are missing
            pytest.skip(f"{CHROMIUM} does not start here")
        yield tab
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)


if __name__ == "__main__":  # python tests/support/browser.py PAGE.html FOLDER: pictures to look at
    url, target = Path(sys.argv[1]).resolve().as_uri(), Path(sys.argv[2])
    with browser(target) as tab:
        for name, width, scheme in (("wide", 1280, "light"), ("dark", 1280, "dark"), ("phone", 400, "light")):
            tab.show(url, width, scheme=scheme)
            tab.picture(target / f"{name}.png")
        tab.pdf(target / "paper.pdf")
