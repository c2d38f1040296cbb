"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from pydantic import model_validator

from jaxllm.prompts import tokenize_chat
from jaxllm.server.body import HasModel, ListOf, TokenId, open_request
from jaxllm.server.chat_messages import Messages, template_messages
from jaxllm.server.errors import ApiError
from jaxllm.text.tokenizer import Tokenizer


class TokenizeRequest(HasModel):
    """A text, or the messages of a chat."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(HasModel):
    """Token ids."""

    tokens: ListOf[TokenId]


def add_routes(app: web.Application) -> None:
    """Registers the routes of this file."""
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)


async def tokenize(request: web.Request) -> web.Response:
    """The token ids of a text or a chat."""
    context, body = await open_request(request, TokenizeRequest)
    engine = context.ready_engine()
    reply = await asyncio.to_thread(_tokenize, body, engine.get_tokenizer())
    reply["max_model_len"] = engine.running.engine.config.max_model_len
    return web.json_response(reply)


def _tokenize(body: TokenizeRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    if body.prompt is not None:
        token_ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        assert body.messages is not None
        token_ids = tokenize_chat(
            template_messages(body.messages),
            tokenizer,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        ).token_ids
    strings = [tokenizer.token_string(i) for i in token_ids] if body.return_token_strs else None
    return {"count": len(token_ids), "tokens": token_ids, "token_strs": strings}


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    context, body = await open_request(request, DetokenizeRequest)
    engine = context.ready_engine()
    vocab_size = engine.running.engine.vocab_size
    for position, token_id in enumerate(body.tokens):
        if not 0 <= token_id < vocab_size:
            raise ApiError(
                400,
                f"token id {token_id} at position {position} is outside the vocabulary of "
                f"{vocab_size}",
                param="tokens",
            )
    text = await asyncio.to_thread(
        engine.get_tokenizer().decode, body.tokens, skip_special_tokens=False
    )
    return web.json_response({"prompt": text})
