"""Every failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.errors import (
    BusyError,
    CapacityError,
    NumericsError,
    NybbleError,
    RequestError,
    UnavailableError,
)

# Types of OpenAI's API.
INVALID, AUTHENTICATION, BUSY, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
# OpenAI's clients send a request again after a 429 or 5xx, unless they are told not to.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer that is an error; the message ends in what the client can do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def label(self) -> str:
        """What metrics and logs call it: no word of it comes from a request."""
        return self.code or ("invalid_request" if self.status < 500 else "server_error")


class TooSlowError(NybbleError):
    """A request took longer than the server gives to one."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The answer took longer than {seconds:g} seconds: ask for fewer tokens (max_tokens), "
            "or start the server with more --request-seconds."
        )


def as_api_error(error: NybbleError) -> ApiError:
    """What a client is told when nybble refuses or fails."""
    message = str(error)
    match error:
        case CapacityError():
            return ApiError(400, message, code="context_length_exceeded")
        case BusyError():
            return busy(message)
        case UnavailableError():
            return unavailable(message)
        case NumericsError():
            return ApiError(500, message, kind=SERVER, code="not_finite", headers=NO_RETRY)
        case TooSlowError():
            return ApiError(504, message, kind=SERVER, code="request_timeout", headers=NO_RETRY)
        case RequestError():
            return ApiError(400, message, param=error.param)
    return ApiError(500, message, kind=SERVER)


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """400 for one field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(field: str, hint: str = "leave it out") -> ApiError:
    return refused(
        field, f"{field} is not supported by this server: {hint}.", "unsupported_parameter"
    )


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    return ApiError(
        404,
        f"The model {name!r} is not served here: use {' or '.join(known)}.",
        param="model",
        code="model_not_found",
    )


def unauthorised() -> ApiError:
    return ApiError(
        401,
        "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
        kind=AUTHENTICATION,
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def unknown_host() -> ApiError:
    return ApiError(
        403,
        "Without an API key this server answers to localhost only: use that name, or start it "
        "with --api-key, or with --allow-public.",
        code="unknown_host",
    )


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request is larger than {limit} bytes: send less, or start the server with a larger "
        "--max-body.",
        code="request_too_large",
    )


def busy(message: str) -> ApiError:
    return ApiError(
        429, message, kind=BUSY, code="rate_limit_exceeded", headers={"retry-after": "1"}
    )


def unavailable(message: str, code: str = "unavailable", seconds: int = 5) -> ApiError:
    headers = {"retry-after": str(seconds)}
    return ApiError(503, message, kind=SERVER, code=code, headers=headers)
