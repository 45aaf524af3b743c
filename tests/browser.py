"""A real headless Chromium, driven by chromedriver over the W3C's WebDriver protocol, which is JSON over HTTP."""

import json
import re
import shutil
import subprocess
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=800,600"]


class Browser:
    """One window; close it, as by `with`."""

    def __enter__(self) -> "Browser":
        self.driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if match := re.search(r"started successfully on port (\d+)", line):
                self.address = f"http://127.0.0.1:{match[1]}/session"
                break
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": ARGUMENTS}}
        self.session = self._send("POST", "", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        return self

    def __exit__(self, *error: Any) -> None:
        self._send("DELETE", f"/{self.session}")
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()

    def open(self, url: str) -> None:
        self._send("POST", f"/{self.session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns; if it returns a promise, what that comes to."""
        return self._send("POST", f"/{self.session}/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._send("POST", f"/{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def _send(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=60) as response:
                return json.loads(response.read())["value"]
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
