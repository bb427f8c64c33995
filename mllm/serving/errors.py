"""Writes what a client is told when its request is not answered.

Knows statuses and messages. Does not know requests or models.
"""

import math
import re

from mllm.media import MediaError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
}
SAMPLE_ID = "request"
"""What the conversation of a request is called, until a message about it reaches the client."""


class RequestError(Exception):
    """Says that a request is refused.

    Args:
        status: of the HTTP answer.
        message: what is wrong and what is allowed; it reaches the client as it is.
        param: the key that is wrong, as the client wrote it.
        code: for programs.
        retry_after_seconds: when asking again may help.
        challenge: how a client that is not known (401) may say who it is.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
        challenge: str = "Bearer",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.challenge = challenge

    @property
    def body(self) -> dict[str, object]:
        """Return the JSON body of the answer, in OpenAI's form."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that go with the status."""
        headers = {} if self.retry_after_seconds is None else {"retry-after": str(math.ceil(self.retry_after_seconds))}
        return headers | ({"www-authenticate": self.challenge} if self.status == 401 else {})


def bad_request(message: str, param: str | None = None) -> RequestError:
    """Make the refusal of something that the client can mend."""
    return RequestError(400, message, param=param)


def refusal_of(error: ValueError, param: str | None = None) -> RequestError:
    """Make the refusal that a `ValueError` about a request stands for.

    Of a `MediaError` only the reason is told: its path is a name of ours. What a decoder said is its cause, which is
    told to nobody.
    """
    if isinstance(error, MediaError):
        message = f"{error.reason} ({error.kind})"
    else:
        message = re.sub(rf"^sample '{SAMPLE_ID}'(:?)", lambda match: "" if match[1] else "the request", str(error))
    return bad_request(message.strip(), param)
