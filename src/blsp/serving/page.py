"""Files of the web page, with a policy for the browser.

In:  the folder web/, and the recordings of its example questions. Out: the files under `/` and `/questions`; the page
     loads nothing from other hosts.
Try: `mount_page(app)`
Flow: app.py → **page.py** → web/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Scope

WEB = Path(__file__).parent / "web"
PACKAGE = Path(__file__).resolve().parents[1]
QUESTIONS = (PACKAGE.parents[1] / "examples" / "speech" / "questions", PACKAGE / "_questions")  # checkout, wheel
POLICY = (
    "default-src 'self'; style-src 'self'; script-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'; object-src 'none'"
)


class Page(StaticFiles):
    """The files of the page, with a policy that forbids loading from other hosts."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file; 404 for a path without a file, with any method."""
        if scope["method"] not in ("GET", "HEAD"):
            await super().get_response(path, {**scope, "method": "HEAD"})  # raises 404 where there is no such file
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        return await super().get_response(path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["content-security-policy"] = POLICY
        return response


def mount_page(app: FastAPI) -> None:
    """Serve the page, and the recordings of its example questions."""
    questions = next((folder for folder in QUESTIONS if folder.is_dir()), None)
    if questions:
        app.mount("/questions", Page(directory=questions))
    app.mount("/", Page(directory=WEB, html=True))
