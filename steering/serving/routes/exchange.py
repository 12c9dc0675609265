"""One request on its way: from the engine's events to a document or a stream of chunks."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from saesteer.checkpoints.errors import UserError
from saesteer.steering.serving.engine import BusyError, ClosedError, Engine
from saesteer.steering.serving.generation import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Generation,
    Token,
)
from saesteer.steering.serving.routes.answers import Answer
from saesteer.steering.serving.routes.api_errors import ApiError

_QUIET_SECONDS = 15.0
"""After so long without a chunk a comment is sent, so that no proxy takes the stream for dead."""


class GoneError(Exception):
    """The client has closed the connection."""


class Exchange:
    """Runs one request of the engine for one client; it is cancelled when the client goes."""

    def __init__(self, engine: Engine, request: Request, generation: Generation) -> None:
        self._engine, self._request = engine, request
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._ticket = engine.submit(generation, listener)
        except BusyError:
            raise ApiError(
                429,
                f"{engine.waiting} answers wait already, and the queue holds "
                f"{engine.config.queue}: try again later",
                code="queue_full",
                retry_after=1,
            ) from None
        except ClosedError:
            raise ApiError(503, "the server is stopping", code="stopping") from None
        self._gone = asyncio.ensure_future(self._wait_for_end_of_client())

    async def events(self, quiet: float | None = None) -> AsyncIterator[Token | Finished | None]:
        """The events; None after every `quiet` seconds without one.

        Raises ApiError where the request fails, GoneError when the client goes.
        """
        left = len(self._ticket.request.prompts) * self._ticket.request.n
        while left:
            event = asyncio.ensure_future(self._events.get())
            try:
                await asyncio.wait(
                    {event, self._gone}, timeout=quiet, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                if not event.done():
                    event.cancel()
            if event.cancelled() or not event.done():
                if self._gone.done():
                    raise GoneError
                yield None
                continue
            told = event.result()
            if isinstance(told, Failed):
                raise as_api_error(told.error)
            left -= isinstance(told, Finished)
            yield told

    def close(self) -> None:
        """Cancel what is not finished."""
        self._gone.cancel()
        self._engine.cancel(self._ticket)

    async def _wait_for_end_of_client(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlineError):
        return ApiError(504, "the request was not answered before its deadline", code="deadline")
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is stopping", code="stopping")
    if isinstance(error, UserError):
        return ApiError(400, " ".join(str(error).split()), param="steer")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            503, "out of memory: lower `max_batch` or `cache_tokens`", code="out_of_memory"
        )
    return ApiError(500, f"unexpected {type(error).__name__}: {str(error)[:200]}")


async def whole_answer(exchange: Exchange, answer: Answer) -> Response:
    """The answer as one document."""
    try:
        async for event in exchange.events():
            if event is not None:
                answer.take(event)
    except GoneError:
        return Response(status_code=499)  # nobody reads it
    finally:
        exchange.close()
    return JSONResponse(answer.whole())


class EventStream(Response):
    """The answer as server-sent events.

    The status is sent with the first event, so that a request that fails before it has one gets
    the status of its error.
    """

    media_type = "text/event-stream"

    def __init__(
        self, exchange: Exchange, answer: Answer, on_status: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._exchange, self._answer, self._on_status = exchange, answer, on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        started = False

        async def begin() -> None:
            nonlocal started
            started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),
            ]
            self._on_status(200)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for document in self._answer.opening():
                await _send(send, document)

        try:
            async for event in self._exchange.events(_QUIET_SECONDS):
                if event is None:
                    if started:
                        await _send_bytes(send, b": waiting\n\n")
                    continue
                if not started:
                    await begin()
                document = self._answer.chunk(event)
                if document is not None:
                    await _send(send, document)
            if (last := self._answer.closing()) is not None:
                await _send(send, last)
            await _send_bytes(send, b"data: [DONE]\n\n")
        except ApiError as error:
            if not started:
                self._on_status(error.status)
                await error_response(error)(scope, receive, send)
                return
            await _send(send, error.body())
        except (GoneError, OSError):
            return
        finally:
            self._exchange.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: ApiError) -> JSONResponse:
    """The response to a request that failed."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers=headers)


async def _send(send: Send, document: dict[str, Any]) -> None:
    await _send_bytes(send, f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode())


async def _send_bytes(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
