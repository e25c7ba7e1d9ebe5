"""Files of the web page, with a policy for the browser.

In:  the folder web/. Out: its files under `/`; the page loads nothing from other hosts.
Try: `app.mount("/", Page(directory=WEB, html=True))`
Flow: app.py → **page.py** → web/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Scope

WEB = Path(__file__).parent / "web"
POLICY = (
    "default-src 'self'; style-src 'self'; script-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'; object-src 'none'"
)


class Page(StaticFiles):
    """The files of the page, with a policy that lets it load nothing from other hosts."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A path that is no file is 404, whatever the method."""
        if scope["method"] not in ("GET", "HEAD"):
            await super().get_response(path, {**scope, "method": "HEAD"})  # raises 404 where there is no such file
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        return await super().get_response(path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["content-security-policy"] = POLICY
        return response
