"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from jaxllm.server.context import CONTEXT, ServerContext


def add_routes(app: web.Application) -> None:
    """Registers the routes of this file."""
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{id:.+}", get_model)  # a name may be org/name


async def list_models(request: web.Request) -> web.Response:
    """All names of the one model."""
    context = request.app[CONTEXT]
    cards = [_card(context, name) for name in context.model_names]
    return web.json_response({"object": "list", "data": cards})


async def get_model(request: web.Request) -> web.Response:
    """One of its names."""
    context, name = request.app[CONTEXT], request.match_info["id"]
    context.check_model(name)
    return web.json_response(_card(context, name))


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    card = {
        "id": name, "object": "model", "created": context.created, "owned_by": "jaxllm",
        "root": context.model_name,
    }  # fmt: skip
    if context.engine is not None:
        card["max_model_len"] = context.engine.running.engine.config.max_model_len
    return card
