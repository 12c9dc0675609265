"""The routes of the server."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.damage import NeutralProbe, neutral_questions
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.engine import ClosedError, Engine
from saesteer.steering.serving.latent_search import LatentCard, LatentSearch
from saesteer.steering.serving.metrics import Figures
from saesteer.steering.serving.routes.answers import Answer
from saesteer.steering.serving.routes.api_errors import ApiError, wrong
from saesteer.steering.serving.routes.exchange import (
    EventStream,
    Exchange,
    as_api_error,
    error_response,
    whole_answer,
)
from saesteer.steering.serving.routes.guard import check_request, read_body
from saesteer.steering.serving.routes.requests import Reader, read_json
from saesteer.steering.serving.routes.shelf import Shelf, as_one_plan

Handler = Callable[[Request], Awaitable[Response]]

_STOP_SECONDS = 10.0
"""How long running answers may take when the server stops."""
_QUESTIONS = 8
_QUESTION_TOKENS = 16
_MOST_FOUND = 100
_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'"
)
_ASSETS = {"playground.css": "text/css", "playground.js": "text/javascript"}


class SteeringApp:
    """A model, its engine and what requests may ask of them.

    Args:
        name: what the model is called in `/v1/models`.
        search: cards of the latents of the shelf's SAE, where there are any.
    """

    def __init__(
        self,
        lm: LanguageModel,
        shelf: Shelf,
        config: ServeConfig,
        *,
        name: str,
        search: LatentSearch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lm, self.shelf, self.config, self.name = lm, shelf, config, name
        self._search = search
        self._figures = Figures()
        self.engine = Engine(
            lm,
            config,
            sae=shelf.reads,
            saes=shelf.saes,
            force=shelf.force,
            observer=self._figures,
            clock=clock,
        )
        self._figures.watch(self.engine)
        self._reader = Reader(lm, shelf, config, name)
        self._started = int(time.time())
        self._probe: NeutralProbe | None = None

    def app(self) -> Starlette:
        """The application for an ASGI server. The engine works while the application does."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.stop, _STOP_SECONDS)

        routes = [
            Route("/v1/chat/completions", self._answered(self._chat), methods=["POST"]),
            Route("/v1/completions", self._answered(self._complete), methods=["POST"]),
            Route("/v1/models", self._answered(self._models)),
            Route("/v1/models/{model:path}", self._answered(self._model)),
            Route("/v1/steering", self._answered(self._steering)),
            Route("/v1/steering/latents", self._answered(self._latents)),
            Route("/v1/steering/damage", self._answered(self._damage), methods=["POST"]),
            Route("/health", self._answered(self._health)),
            Route("/metrics", self._answered(self._metrics)),
            Route("/", self._answered(self._page)),
            *(Route(f"/{asset}", self._answered(self._asset)) for asset in _ASSETS),
        ]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={HTTPException: _not_there, Exception: _unexpected},
        )

    def _answered(self, handler: Handler) -> Handler:
        """A handler behind the checks of every request; its errors become responses."""

        async def answered(request: Request) -> Response:
            try:
                check_request(request, self.config)
                response = await handler(request)
            except ApiError as error:
                response = error_response(error)
            except UserError as error:
                response = error_response(as_api_error(error))
            if not isinstance(response, EventStream):
                self._count(request, response.status_code)
            return response

        return answered

    def _count(self, request: Request, status: int) -> None:
        path = request.url.path
        known = path if not path.startswith("/v1/models/") else "/v1/models/{model}"
        self._figures.requests.labels(known, str(status)).inc()
        if status == 429:
            self._figures.refused.inc()

    # --- answers ---

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, chat=True)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, chat=False)

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        begun = time.monotonic()
        document = read_json(await read_body(request, self.config.body_bytes))
        read = self._reader.chat if chat else self._reader.completion
        # Rendering and tokenizing a long conversation takes longer than others should wait.
        asked = await asyncio.to_thread(read, document, self.engine.clock())
        answer = _Timed(self.lm, asked, chat=chat, begun=begun, figures=self._figures)
        exchange = Exchange(self.engine, request, asked.generation)
        if asked.stream:
            return EventStream(exchange, answer, lambda status: self._count(request, status))
        return await whole_answer(exchange, answer)

    # --- what there is ---

    async def _models(self, request: Request) -> Response:
        data = [self._described(name) for name in self._reader.models]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._reader.models:
            known = ", ".join(self._reader.models)
            raise ApiError(
                404,
                f"'model' {name!r} is not served here; there are {known}",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "saesteer"}

    async def _steering(self, request: Request) -> Response:
        config = self.config
        return JSONResponse(
            {
                "model": self.name,
                "fingerprint": self.lm.fingerprint,
                "chat": self.lm.has_chat_template,
                **self.shelf.describe(),
                "latents": None
                if self._search is None
                else {"count": len(self._search), "from": self._search.source},
                "limits": {
                    "max_new_tokens": config.max_new_tokens,
                    "positions": self.lm.positions,
                    "deadline": config.deadline,
                },
            }
        )

    async def _latents(self, request: Request) -> Response:
        if self._search is None:
            raise ApiError(404, "the server has no latents to search: start it with `sae`")
        query = request.query_params
        for name in query:
            if name not in ("q", "ids", "limit"):
                raise ApiError(400, f"unknown query {name!r}: known are q, ids, limit", param=name)
        limit = query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= _MOST_FOUND:
            raise wrong("limit", f"an integer in 1..{_MOST_FOUND}", limit)
        if "ids" in query:
            assert self.shelf.sae is not None
            d_sae = self.shelf.sae.spec.d_sae
            numbers = query["ids"].split(",")
            wanted = f"up to {_MOST_FOUND} latents in 0..{d_sae - 1}, with commas"
            if len(numbers) > _MOST_FOUND or not all(
                one.isdecimal() and int(one) < d_sae for one in numbers
            ):
                raise wrong("ids", wanted, query["ids"])
            found = self._search.cards([int(one) for one in numbers])
        else:
            found = self._search.find(query.get("q", ""), int(limit))
        return JSONResponse({"from": self._search.source, "data": [_shown(card) for card in found]})

    async def _damage(self, request: Request) -> Response:
        """What a plan does to answers that have nothing to do with it; other answers wait."""
        document = read_json(await read_body(request, self.config.body_bytes))
        plans = self._reader.plans(document)
        if not plans:
            raise wrong("steer", "plans that do something", document.get("steer"))
        plan = as_one_plan(plans)
        try:
            future = self.engine.call(lambda: self._neutral().measure(plan))
        except ClosedError as error:
            raise as_api_error(error) from None
        try:
            damage = await asyncio.wrap_future(future)
        except Exception as error:
            raise as_api_error(error) from error
        return JSONResponse(
            {
                "kl": damage.kl,
                "delta_ce": damage.delta_ce,
                "top1_agreement": damage.top1_agreement,
                "relative_dose": damage.relative_dose,
                "norm_ratio": damage.norm_ratio,
                "questions": _QUESTIONS,
                "tokens": _QUESTION_TOKENS,
            }
        )

    def _neutral(self) -> NeutralProbe:
        if self._probe is None:
            questions = neutral_questions()[:_QUESTIONS]
            self._probe = NeutralProbe(self.lm, questions, max_new_tokens=_QUESTION_TOKENS)
        return self._probe

    # --- how it is ---

    async def _health(self, request: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse(
            {
                "status": "ok" if alive else "stopped",
                "model": self.name,
                "running": self.engine.running,
                "waiting": self.engine.waiting,
            },
            200 if alive else 503,
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self._figures.text(), media_type="text/plain; version=0.0.4")

    # --- the playground ---

    async def _page(self, request: Request) -> Response:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return Response(_asset("index.html"), media_type="text/html", headers=headers)

    async def _asset(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return Response(_asset(name), media_type=_ASSETS[name], headers=headers)


class _Timed(Answer):
    """An answer that notes when its first token and its end come."""

    def __init__(self, *args: Any, begun: float, figures: Figures, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._begun, self._figures, self._waits = begun, figures, True

    def take(self, event: Any) -> None:
        """See `Answer`."""
        super().take(event)
        past = time.monotonic() - self._begun
        if self._waits:
            self._waits = False
            self._figures.first_tokens.observe(past)
        if self.complete:
            self._figures.answers.observe(past)


def _shown(card: LatentCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "description": card.description,
        "tokens": list(card.tokens),
        "max": card.largest,
        "density": card.density,
    }


def _asset(name: str) -> bytes:
    return files("saesteer.steering.serving.playground").joinpath(name).read_bytes()


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    said = (
        f"{path} does not take {request.method}"
        if error.status_code == 405
        else (
            f"there is no {path} here: see /v1/models, /v1/chat/completions, /v1/completions, "
            "/v1/steering, /health, /metrics"
        )
    )
    return error_response(ApiError(error.status_code, said))


async def _unexpected(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error))
