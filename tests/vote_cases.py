"""The voting page on a server of its own, and a voter who likes red."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from browser import Browser

REDNESS = """
    const mean = (id) => {
      const image = document.getElementById(id), canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
      let sum = 0;
      for (let i = 0; i < data.length; i += 4) sum += data[i] - (data[i + 1] + data[i + 2]) / 2;
      return sum;
    };
    return [document.body.dataset.pair ?? null, mean("left"), mean("right")];
"""


@contextmanager
def served(folder: Path):
    """The address of the page, served from a thread."""
    import uvicorn

    from trl_leapalign.cli.vote import vote_page

    server = uvicorn.Server(uvicorn.Config(vote_page(folder), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, content=None, **headers):
    """Status, and what JSON says."""
    body = None if content is None else json.dumps(content).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json", **headers}), timeout=10) as response:
            data = response.read()
            return response.status, json.loads(data) if response.headers.get_content_subtype() == "json" else data
    except HTTPError as error:
        return error.code, error.read()


def vote_for_red(browser: Browser, most: int, finished=lambda: False) -> int:
    """Press 1 or 2 for the redder picture, at most so many times or until there is nothing more to come."""
    done, last = 0, None
    while done < most and not finished():
        pair, left, right = browser.run(REDNESS) if browser.run("return !!document.body.dataset.pair") else [None] * 3
        if pair is None or pair == last:
            time.sleep(0.02)
            continue
        browser.press("1" if left > right else "2")
        done, last = done + 1, pair
    return done
