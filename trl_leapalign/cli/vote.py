"""The page on which people vote on pairs of pictures."""

import asyncio
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rewards.votes import Pair, VoteFolder

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).with_name("vote.html")
LOCAL = ("127.0.0.1", "localhost", "::1")


def vote_page(folder: str | Path, host: str = "127.0.0.1") -> "Starlette":
    """Make the page.

    Args:
        folder (str | Path): of the pictures and votes; see `VoteFolder`.
        host (str): address that it is served on. Under a local one, requests by other names are refused, so that no
            other web page can vote.

    Returns:
        Starlette: the application, for any ASGI server.

    Raises:
        ImportError: if Starlette or uvicorn is not installed.
        ValueError: if the folder is a file.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ImportError(f'The voting page needs {" and ".join(missing)}: pip install "trl-leapalign[vote]".')
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse
    from starlette.routing import Route

    votes = VoteFolder(folder)
    one_at_a_time = asyncio.Lock()

    async def page(request: "Request") -> "Response":
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def pair(request: "Request") -> "Response":
        return JSONResponse(next_pair(votes), headers={"Cache-Control": "no-store"})

    async def picture(request: "Request") -> "Response":
        name = request.path_params["name"]
        if not re.fullmatch("[0-9a-f]{16}", name) or not votes.picture(name).exists():
            raise HTTPException(404)
        return FileResponse(votes.picture(name), media_type="image/png")

    async def vote(request: "Request") -> "Response":
        # Another site's page cannot send this type without asking, and is not allowed to.
        if request.headers.get("content-type") != "application/json":
            raise HTTPException(415)
        try:
            content = await request.json()
            chosen, winner = votes.pairs()[content["pair"]], content["winner"]
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(404, f"There is no such pair: {error}") from error
        async with one_at_a_time:
            try:
                votes.vote(chosen, winner)
            except ValueError as error:
                raise HTTPException(409, str(error)) from error
        return JSONResponse(next_pair(votes))

    routes = [
        Route("/", page),
        Route("/pair", pair),
        Route("/pictures/{name}.png", picture),
        Route("/vote", vote, methods=["POST"]),
    ]
    hosts = [*LOCAL[:2], "[::1]"] if host in LOCAL else ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def next_pair(votes: VoteFolder) -> dict[str, Any]:
    """Return the oldest pair without a vote, and how many there are with one and without.

    Args:
        votes (VoteFolder): the folder.

    Returns:
        dict[str, Any]: "done" and "open", numbers of pairs; "pair", its id, or None if all have a vote; and "prompt",
            "left" and "right". Which picture is on the left follows from the id, as if by chance.
    """
    decided = votes.votes()
    waiting: list[tuple[str, Pair]] = [item for item in votes.pairs().items() if item[0] not in decided]
    answer: dict[str, Any] = {"done": len(decided), "open": len(waiting), "pair": None}
    if waiting:
        name, pair = waiting[0]
        left, right = (pair.first, pair.second) if int(name, 16) % 2 else (pair.second, pair.first)
        answer |= {"pair": name, "prompt": pair.prompt, "left": left, "right": right}
    return answer


def serve(folder: str | Path, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until the process is stopped.

    Args:
        folder (str | Path): of the pictures and votes.
        host (str): address to listen on; "0.0.0.0" lets the whole network see the pictures and vote.
        port (int): to listen on.

    Raises:
        ImportError: if Starlette or uvicorn is not installed.
        ValueError: if the folder is a file.
    """
    application = vote_page(folder, host)
    import uvicorn

    uvicorn.run(application, host=host, port=port, log_level="warning")
