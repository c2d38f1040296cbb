"""GET /openapi.json: the routes as OpenAPI 3.1 says them, from the models that check requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import jaxllm
from jaxllm.server import chat, completions, embeddings, tokens
from jaxllm.server.context import CONTEXT
from jaxllm.server.messages_body import MessageRequest, PromptFields
from jaxllm.server.responses_body import ResponseRequest

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
OBJECT: dict[str, Any] = {"type": "object"}
STRING: dict[str, Any] = {"type": "string"}
EVENT = {**OBJECT, "required": ["data"], "properties": {"data": STRING}}  # each of the stream
REF = "#/components/schemas/{model}"
KEY = "key"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": STRING,
                "type": STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": STRING, "message": STRING},
        },
        "request_id": STRING,
    },
}


@dataclass(frozen=True)
class Operation:
    """One route. body: the model of its JSON body. required: of a JSON answer, the fields that are
    always there. streams: whether it can answer with events. content_type: of a success. also:
    further statuses, with what they mean, whose body is that of a success. error: the schema of
    errors."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    required: tuple[str, ...] = ()
    streams: bool = False
    content_type: str = JSON
    also: dict[str, str] = field(default_factory=dict)
    is_open: bool = False  # takes no API key
    error: str = "Error"


OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "Answers a conversation.", chat.ChatRequest,
        ("id", "object", "created", "model", "choices", "usage"), streams=True,
    ),
    Operation(
        "post", "/v1/completions", "Goes on with texts.", completions.CompletionRequest,
        ("id", "object", "created", "model", "choices", "usage"), streams=True,
    ),
    Operation(
        "post", "/v1/responses", "Answers input items with output items.", ResponseRequest,
        ("id", "object", "created_at", "status", "model", "output", "usage"), streams=True,
    ),
    Operation(
        "post", "/v1/messages", "Answers a conversation, as Anthropic does.", MessageRequest,
        ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
        streams=True, error="AnthropicError",
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "Counts the tokens of a conversation.", PromptFields,
        ("input_tokens",), error="AnthropicError",
    ),
    Operation(
        "post", "/v1/embeddings", "Embeds texts.", embeddings.EmbeddingRequest,
        ("object", "data", "model", "usage"),
    ),
    Operation(
        "post", "/tokenize", "Tokens of a text or a conversation.", tokens.TokenizeRequest,
        ("count", "max_model_len", "tokens"),
    ),
    Operation(
        "post", "/detokenize", "The text of tokens.", tokens.DetokenizeRequest, ("prompt",)
    ),
    Operation("get", "/v1/models", "The models served.", required=("object", "data")),
    Operation("get", "/v1/models/{id}", "One model.", required=("id", "object", "created")),
    Operation(
        "get", "/health", "Whether requests are answered.", required=("status",), is_open=True,
        also={"503": "They are not; reason says why."},
    ),
    Operation(
        "get", "/ready", "The same as /health.", required=("status",), is_open=True,
        also={"503": "They are not; reason says why."},
    ),
    Operation("get", "/version", "The server's version.", required=("version",)),
    Operation(
        "get", "/load", "How busy the engine is.",
        required=("running", "waiting", "kv_cache_usage", "live_requests", "age_seconds"),
    ),
    Operation(
        "get", "/metrics", "Metrics for Prometheus.",
        content_type=TEXT,
    ),
    Operation(
        "get", "/debug/engine", "The engine's blocks and sequences.",
        required=("num_blocks", "block_size", "blocks", "running", "waiting", "kv_usage"),
    ),
    Operation("get", "/openapi.json", "This description.", required=("openapi", "paths")),
)  # fmt: skip


def describe(
    operations: tuple[Operation, ...], has_keys: bool, model_names: Sequence[str] = ()
) -> dict[str, Any]:
    """The OpenAPI document. has_keys: whether the server asks for API keys.
    model_names: those that are served."""
    bodies = [operation.body for operation in operations if operation.body is not None]
    references, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=REF
    )
    body_schemas = {body: references[body, "validation"] for body in bodies}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _describe(operation, has_keys)
        if operation.body is not None:
            schema = body_schemas[operation.body]
            described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        paths.setdefault(operation.path, {})[operation.method] = described
    errors = {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
    for schema in schemas.get("$defs", {}).values():
        if model_names and "model" in schema.get("properties", {}):
            is_needed = "model" in schema.get("required", ())
            schema["properties"]["model"] = {"enum": [*model_names, *([] if is_needed else [None])]}
    components: dict[str, Any] = {"schemas": {**errors, **schemas.get("$defs", {})}}
    if has_keys:
        components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": jaxllm.__version__},
        "paths": paths,
        "components": components,
    }


def _describe(operation: Operation, has_keys: bool) -> dict[str, Any]:
    success = _success(operation)
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path.translate(_NAMES)}",
        "responses": {
            "200": {"description": "Success.", "content": success},
            **{
                status: {"description": text, "content": success}
                for status, text in operation.also.items()
            },
            "default": {
                "description": "An error.",
                "content": {JSON: {"schema": {"$ref": REF.format(model=operation.error)}}},
            },
        },
    }
    if "{id}" in operation.path:
        parameter = {"name": "id", "in": "path", "required": True, "schema": STRING}
        found["parameters"] = [parameter]
    if has_keys and not operation.is_open:
        found["security"] = [{KEY: []}]
    return found


_NAMES = str.maketrans({"/": "_", ".": "_", "{": None, "}": None})


def _success(operation: Operation) -> dict[str, Any]:
    if operation.content_type != JSON:
        return {operation.content_type: {"schema": STRING}}
    content: dict[str, Any] = {JSON: {"schema": {**OBJECT, "required": [*operation.required]}}}
    if operation.streams:
        content[EVENTS] = {"schema": EVENT}
    return content


def add_routes(app: web.Application) -> None:
    """Registers the route of this file."""
    context = app[CONTEXT]
    text = json.dumps(describe(OPERATIONS, bool(context.keys), context.model_names))

    async def get_description(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type=JSON)

    app.router.add_get("/openapi.json", get_description)
