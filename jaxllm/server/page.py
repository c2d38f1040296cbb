"""GET /: a page to chat with the model and to watch the engine, in plain HTML and JavaScript.

Its files are part of the package and need no network. They hold nothing secret, so they are served
without an API key; what they show comes from routes that ask for one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "page"
FILES = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "chat.js": "text/javascript",
    "engine.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
ROUTES = {"/" if name == "index.html" else f"/page/{name}": name for name in FILES}

# Scripts and styles come from here only, and no text becomes HTML: Trusted Types without a policy
# make the browser refuse it, whatever a later change of the scripts may do.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a newer version of the package has newer files
}


def add_routes(app: web.Application) -> None:
    """Registers the page and its files, which are read now."""
    for route, name in ROUTES.items():
        app.router.add_get(route, _handler((FOLDER / name).read_text("utf-8"), FILES[name]))


def _handler(
    text: str, content_type: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def serve(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type=content_type, headers=HEADERS, charset="utf-8")

    return serve
