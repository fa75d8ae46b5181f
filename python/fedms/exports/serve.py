"""`fedms serve`: an endpoint on this machine in the form of OpenAI's chat completions. `model` names the client.

    GET  /v1/models             the clients, and "global" if they share an expert
    POST /v1/chat/completions   messages, model, max_tokens, temperature, top_p, seed, stream

It listens on the loopback address alone, and answers only who knows the token.
"""
from __future__ import annotations

import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedms.data.conversations import ROLES
from fedms.errors import ConfigError, DataError
from fedms.exports.language_model import GLOBAL, LanguageModel
from fedms.models.generation import Sampling

LARGEST_REQUEST = 2**20     # bytes


class _Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, Field(max_length=LARGEST_REQUEST)]


class _Question(BaseModel):
    """The fields of a request. Further fields of OpenAI's interface are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200)]
    messages: Annotated[list[_Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=2**15)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**15)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Literal[1] | None = None
    stream: bool = False

    def sampling(self) -> Sampling:
        most = self.max_completion_tokens or self.max_tokens or 256
        return Sampling(most, self.temperature, self.top_p, time.time_ns() % 2**63 if self.seed is None else self.seed)


_QUESTION = TypeAdapter(_Question)
assert set(ROLES) == {"system", "user", "assistant", "tool"}


def endpoint(language: LanguageModel, token: str) -> Starlette:
    """Return the application.

    Args:
        language: The language model that answers.
        token: The token that each request must bring as `Authorization: Bearer TOKEN`.
    """
    async def models(request: Request) -> Response:
        if (refused := _refusal(request, token)) is not None:
            return refused
        return JSONResponse({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "fedms"} for name in language.names]})

    async def complete(request: Request) -> Response:
        if (refused := _refusal(request, token)) is not None:
            return refused
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_REQUEST:
                return _error(413, f"the request is larger than {LARGEST_REQUEST} bytes")
        try:
            question = _QUESTION.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return _error(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        messages = [message.model_dump() for message in question.messages]
        client = None if question.model == GLOBAL else question.model
        try:
            language.trained.client(client)
        except ConfigError as error:
            shared = f"; {GLOBAL!r} is the expert of all clients" if language.shares_expert else ""
            return _error(404, f"model: {str(error).removeprefix('client: ')}{shared}")
        try:
            language.prompt(messages)
            if question.stream:
                pieces = language.stream(messages, client, question.sampling())
                return StreamingResponse(_events(question.model, pieces), media_type="text/event-stream")
            found = await run_in_threadpool(language.answer, messages, client, question.sampling())
        except ConfigError as error:
            return _error(404, str(error))
        except (DataError, ValueError) as error:
            return _error(400, str(error))
        used = len(language.prompt(messages))
        return JSONResponse({**_head(question.model, "chat.completion"), "choices": [{
            "index": 0, "message": {"role": "assistant", "content": found.text},
            "finish_reason": "stop" if found.stopped else "length"}],
            "usage": {"prompt_tokens": used, "completion_tokens": found.tokens, "total_tokens": used + found.tokens}})

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", complete, methods=["POST"])])


def _refusal(request: Request, token: str) -> Response | None:
    said = request.headers.get("authorization", "")
    if hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
        return None
    return _error(401, "the token is missing or another one; give the one that `fedms serve` showed as the API key")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status)


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


async def _events(model: str, pieces: Iterator[str]) -> AsyncIterator[str]:
    head = _head(model, "chat.completion.chunk")

    def event(delta: dict[str, str], reason: str | None) -> str:
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"
    yield event({"role": "assistant", "content": ""}, None)
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield event({"content": piece}, None)
    except ValueError as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'invalid_request_error'}})}\n\n"
        return
    yield event({}, "stop")
    yield "data: [DONE]\n\n"
