"""The web application: routes, what stands before them, and errors in one shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from nybble.errors import NybbleError
from nybble.serve import chat, completions, models, page
from nybble.serve.errors import SERVER, ApiError, as_api_error, refused, unsupported
from nybble.serve.host import Host, Loader, record_of
from nybble.serve.metrics import Metrics
from nybble.serve.responses import ErrorReply
from nybble.serve.security import BodyLimit, HostCheck, KeyCheck, Recorder, refusal
from nybble.serve.settings import ServerSettings
from nybble.serve.sse import ClientGoneError

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer."},
}
# With stream: true the same status brings events instead of one object.
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def create_app(
    load: Loader,
    settings: ServerSettings,
    *,
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """The application. Its lifespan loads the model by `load`, in a thread, and runs its engine.

    on_failure is called when loading failed; `app.state.host` says why.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Host(load, settings, metrics, on_failure) as app.state.host:
            yield

    app = FastAPI(title="nybble", docs_url=None, redoc_url=None, lifespan=lifespan)
    for part in (chat, completions):
        app.include_router(part.router, responses=_ERRORS | _STREAMED)
    app.include_router(models.router, responses=_ERRORS)
    app.include_router(page.router)
    _guard(app, settings, metrics)
    _shape_errors(app)
    return app


def _guard(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """What stands before the routes; what is added last is met first."""
    app.add_middleware(BodyLimit, most=settings.max_body)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, key=settings.api_key)
    elif not settings.allow_public:
        app.add_middleware(HostCheck)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Recorder, metrics=metrics)


# -- errors --------------------------------------------------------------------------------------


def _shape_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refusal(request.scope, error)

    @app.exception_handler(NybbleError)
    async def nybble_error(request: Request, error: NybbleError) -> Response:
        return refusal(request.scope, as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(request.scope, invalid_request(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return refusal(request.scope, _from_http(request, error))

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # The server's own log has the traceback; it is raised again after this.
        message = "The server failed in a way that nobody foresaw: its log says how."
        answer = refusal(request.scope, ApiError(500, message, kind=SERVER, code="internal_error"))
        answer.headers["x-request-id"] = record_of(request).id
        return answer


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """What Starlette refuses by itself: no such path, no such method, a body it cannot read."""
    path, method = request.url.path, request.method
    messages = {
        404: f"There is nothing at {path}: the API is under /v1.",
        405: f"{path} does not take {method}: see the header Allow.",
        400: "The body is no valid JSON: send one JSON object in UTF-8.",
    }
    message = messages.get(error.status_code, error.detail)
    code = "not_found" if error.status_code == 404 else None
    return ApiError(error.status_code, message, code=code, headers=error.headers)


def invalid_request(detail: Mapping[str, Any]) -> ApiError:
    """400 for a body that is not as the API describes; `detail` is one of pydantic's errors."""
    param = _param(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unsupported(param)
    if detail["type"] == "json_invalid":
        return ApiError(400, "The body is no valid JSON: send one JSON object in UTF-8.")
    if not param and detail["type"] != "value_error":
        return ApiError(
            400, "The body is no JSON object: send one, with Content-Type: application/json."
        )
    if detail["type"] == "missing":
        return refused(param, f"{param} is missing: add it.")
    reason = _NO_OBJECT.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    reason = reason[:1].lower() + reason[1:]
    where = f"{param}: " if param else ""
    return ApiError(400, f"{where}{reason}.", param=param or None)


# Pydantic's words name classes of ours.
_NO_OBJECT = dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "give an object")


def _param(location: Sequence[str | int]) -> str:
    """("body", "messages", 0, "role") -> messages[0].role."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:])
    return "".join(parts).removeprefix(".")
