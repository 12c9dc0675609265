"""Bodies of requests, checked field by field and turned into what the engine runs."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saesteer.checkpoints.errors import UserError, meant
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, check_text, encode_prompt
from saesteer.steering.hooking.chats import encode_chat
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.generation import Generation
from saesteer.steering.serving.routes.api_errors import ApiError, Fields, shown, wrong
from saesteer.steering.serving.routes.shelf import Shelf
from saesteer.steering.serving.sampling import Sampling

_SHARED = {
    "model", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "max_tokens",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs",
    # ours
    "steer", "activations", "damage", "deadline", "ignore_eos",
    # taken and not used: they say who asks, and for which account
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
_CHAT = _SHARED | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions",
    "function_call", "parallel_tool_calls", "response_format", "modalities",
}  # fmt: skip
_COMPLETION = _SHARED | {"prompt", "echo", "best_of", "suffix"}
_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_MOST_ANSWERS = 128
_LARGEST_SEED = 2**53
_COMPLETION_TOKENS = 16
"""The length of a completion where none is asked for, as OpenAI has it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, and how it is to be answered."""

    generation: Generation
    model: str
    """As the request names it."""
    stream: bool
    include_usage: bool
    echo: bool = False
    wants_logprobs: bool = False


def read_json(body: bytes) -> Mapping[str, Any]:
    """The JSON object of a body. Raises ApiError 400."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        document = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"the body must be a JSON object, got {shown(document)}")
    return document


class Reader:
    """Reads the bodies of requests to one server."""

    def __init__(self, lm: LanguageModel, shelf: Shelf, config: ServeConfig, name: str) -> None:
        self._lm, self._shelf, self._config, self.name = lm, shelf, config, name

    @property
    def models(self) -> list[str]:
        """The names that `model` may have: the model's, and one for it with each plan."""
        return [self.name, *(f"{self.name}:{plan}" for plan in self._shelf.plans)]

    def chat(self, document: Mapping[str, Any], now: float) -> Asked:
        """A body of `/v1/chat/completions`; `now` is the engine's time. Raises ApiError."""
        fields = Fields(document, _CHAT)
        for field, neutral in (
            ("tools", [[]]),
            ("functions", [[]]),
            ("tool_choice", ["none", "auto"]),
            ("function_call", ["none", "auto"]),
            ("response_format", [{"type": "text"}]),
            ("modalities", [["text"]]),
        ):
            if fields.has(field) and fields.raw(field) not in neutral:
                allowed = (
                    f"left out or {json.dumps(neutral[0])}, because answers are plain text here"
                )
                raise wrong(field, allowed, fields.raw(field))
        wanted = fields.boolean("logprobs")
        top = fields.whole("top_logprobs", 0, _MOST_LOGPROBS)
        if top is not None and not wanted:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' true", param="top_logprobs")
        prompt = self._conversation(fields.raw("messages"))
        asked = [fields.raw(name) for name in ("max_tokens", "max_completion_tokens")]
        if None not in asked and asked[0] != asked[1]:
            raise ApiError(
                400,
                f"'max_tokens' {asked[0]} and 'max_completion_tokens' {asked[1]} differ: give one",
                param="max_tokens",
            )
        field = "max_tokens" if asked[1] is None else "max_completion_tokens"
        room = self._config.max_new_tokens
        length = self._length(fields, field, [prompt], room)
        return self._asked(fields, [prompt], length, now, logprobs=(top or 0) if wanted else None)

    def completion(self, document: Mapping[str, Any], now: float) -> Asked:
        """A body of `/v1/completions`. Raises ApiError."""
        fields = Fields(document, _COMPLETION)
        logprobs = fields.whole("logprobs", 0, _MOST_LOGPROBS)
        echo = fields.boolean("echo")
        if echo and logprobs is not None:
            raise ApiError(
                400, "'echo' and 'logprobs' cannot be joined: leave one out", param="echo"
            )
        if fields.text("suffix"):
            raise wrong(
                "suffix", "left out, because text is only written forwards", document["suffix"]
            )
        best_of = fields.raw("best_of")
        if best_of is not None and best_of != (document.get("n") or 1):
            raise wrong("best_of", "left out or equal to 'n'", best_of)
        prompts = self._prompts(fields.raw("prompt"))
        length = self._length(fields, "max_tokens", prompts, _COMPLETION_TOKENS)
        return self._asked(fields, prompts, length, now, logprobs=logprobs, echo=echo)

    def plans(self, document: Mapping[str, Any]) -> Any:
        """The plans of a body that holds nothing but `steer`. Raises ApiError."""
        Fields(document, ["steer"])
        return self._shelf.steering(document.get("steer"))

    def _asked(
        self,
        fields: Fields,
        prompts: Sequence[EncodedPrompt],
        length: int,
        now: float,
        *,
        logprobs: int | None,
        echo: bool = False,
    ) -> Asked:
        model, own = self._model(fields)
        n = fields.whole("n", 1, _MOST_ANSWERS, 1) or 1
        most = min(_MOST_ANSWERS, self._config.max_batch + self._config.queue)
        if n * len(prompts) > most:
            raise wrong("n", f"such that a request has at most {most} answers", n)
        stream = fields.boolean("stream")
        options = fields.mapping("stream_options")
        if options is not None and not stream:
            raise ApiError(400, "'stream_options' needs 'stream' true", param="stream_options")
        usage = Fields(options or {}, ["include_usage", "include_obfuscation"], "stream_options.")
        deadline = fields.number("deadline", 0.001, self._config.deadline, self._config.deadline)
        assert deadline is not None
        seed = fields.whole("seed", 0, _LARGEST_SEED)
        generation = Generation(
            prompts=prompts,
            n=n,
            plans=[*own, *self._shelf.steering(fields.raw("steer"))],
            sampling=self._sampling(fields, logprobs),
            seed=secrets.randbelow(2**31) if seed is None else seed,
            max_new_tokens=length,
            stops=self._stops(fields.raw("stop")),
            ignore_end=fields.boolean("ignore_eos"),
            watched=self._shelf.watched(fields.raw("activations")),
            measured=fields.boolean("damage"),
            deadline=now + deadline,
        )
        return Asked(
            generation=generation,
            model=model,
            stream=stream,
            include_usage=usage.boolean("include_usage"),
            echo=echo,
            wants_logprobs=logprobs is not None,
        )

    def _model(self, fields: Fields) -> tuple[str, list[Any]]:
        """The name that the request gives the model, and the plan that is a part of it."""
        name = fields.text("model")
        if name is None:
            raise ApiError(400, f"'model' is missing: give {shown(self.name)}", param="model")
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"'model' {shown(name)} is not served here{meant(name, self.models)}; there are "
                f"{known}",
                param="model",
                code="model_not_found",
            )
        if name == self.name:
            return name, []
        plan = name.removeprefix(f"{self.name}:")
        return name, self._shelf.steering({"plan": plan}, "model")

    def _sampling(self, fields: Fields, logprobs: int | None) -> Sampling:
        bias: dict[int, float] = {}
        rows = int(self._lm.model.get_input_embeddings().weight.shape[0])
        for name, value in (fields.mapping("logit_bias") or {}).items():
            if not name.isdecimal() or int(name) >= rows:
                raise wrong("logit_bias", f"named by token ids in 0..{rows - 1}", name)
            own = Fields({name: value}, [name], "logit_bias.")
            bias[int(name)] = own.number(name, -100.0, 100.0, 0.0) or 0.0
        top_p = fields.number("top_p", 0.0, 1.0, 1.0)
        if top_p == 0:
            raise wrong("top_p", "a number in (0, 1]", 0)
        return Sampling(
            temperature=_given(fields.number("temperature", 0.0, 2.0, 1.0)),
            top_p=_given(top_p),
            presence_penalty=_given(fields.number("presence_penalty", -2.0, 2.0, 0.0)),
            frequency_penalty=_given(fields.number("frequency_penalty", -2.0, 2.0, 0.0)),
            logit_bias=bias,
            logprobs=logprobs,
        )

    def _stops(self, asked: Any) -> list[str]:
        stops = [asked] if isinstance(asked, str) else asked
        if stops is None:
            return []
        texts = isinstance(stops, list) and all(isinstance(one, str) and one for one in stops)
        if not texts or len(stops) > _MOST_STOPS:
            raise wrong("stop", f"a text, or at most {_MOST_STOPS} of them, none empty", asked)
        return list(stops)

    def _length(
        self, fields: Fields, field: str, prompts: Sequence[EncodedPrompt], default: int
    ) -> int:
        """The longest that an answer may be, checked against the model and the server."""
        longest = max(len(prompt) for prompt in prompts)
        most = self._config.max_new_tokens
        room = self._config.cache_tokens - longest
        if self._lm.positions is not None:
            room = min(room, self._lm.positions - longest)
        asked = fields.whole(field, 1, most)
        if room < (asked or 1):
            raise ApiError(
                400,
                f"the prompt has {longest} tokens, which leaves room for {max(0, room)} more"
                + (f", and '{field}' is {asked}" if asked else "")
                + ": shorten it, or ask for less",
                param=field,
                code="context_length_exceeded",
            )
        return min(default, most, room) if asked is None else asked

    def _conversation(self, messages: Any) -> EncodedPrompt:
        if not isinstance(messages, list) or not messages:
            raise wrong("messages", "a list of at least one message", messages)
        if not self._lm.has_chat_template:
            raise ApiError(
                400, f"{self._lm.name} has no chat template: use /v1/completions", param="messages"
            )
        turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if turns[-1]["role"] != "user":
            raise wrong("messages", "ended by a message of the role user", turns[-1]["role"])
        try:
            if len(turns) == 1:  # as 'steer' encodes a prompt
                return encode_prompt(self._lm, turns[0]["content"], chat=True)
            return encode_chat(self._lm, turns)
        except Exception as error:
            of_template = type(error).__module__.startswith("jinja2")
            if not (isinstance(error, UserError) or of_template):
                raise
            reason = " ".join(str(error).split())
            raise ApiError(400, f"'messages': {reason}", param="messages") from error

    def _prompts(self, asked: Any) -> list[EncodedPrompt]:
        what = "a text, a list of texts, or token ids"
        if asked is None or asked == []:
            raise wrong("prompt", what, asked)
        several = isinstance(asked, list) and not isinstance(asked[0], int)
        given = asked if several else [asked]
        if len(given) > _MOST_ANSWERS:
            raise wrong("prompt", f"at most {_MOST_ANSWERS} prompts", f"{len(given)} of them")
        return [self._prompt(one, what) for one in given]

    def _prompt(self, one: Any, what: str) -> EncodedPrompt:
        if isinstance(one, str):
            try:
                return encode_prompt(self._lm, one, chat=False)
            except UserError as error:
                raise ApiError(400, f"'prompt': {error}", param="prompt") from error
        rows = int(self._lm.model.get_input_embeddings().weight.shape[0])
        if not isinstance(one, list) or not one:
            raise wrong("prompt", what, one)
        for token in one:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
                raise wrong("prompt", f"{what}; ids are in 0..{rows - 1}", token)
        return EncodedPrompt("", "", list(one), [], 0)


def _given(value: float | None) -> float:
    assert value is not None
    return value


def _turn(message: Any, where: str) -> dict[str, str]:
    """A message with its role and its text."""
    if not isinstance(message, dict):
        raise wrong(where, "an object with 'role' and 'content'", message)
    fields = Fields(message, ["role", "content", "name", "refusal"], f"{where}.")
    role = fields.text("role")
    if role not in _ROLES:
        raise wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    content = fields.raw("content")
    parts = [content] if isinstance(content, str | dict) else content
    if not isinstance(parts, list) or not parts:
        raise wrong(f"{where}.content", "a text, or a list of parts of type text", content)
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        is_text = not isinstance(part, dict) or part.get("type", "text") == "text"
        if not isinstance(text, str) or not is_text:
            raise wrong(f"{where}.content", "a text, or a list of parts of type text", part)
        try:
            check_text(text, f"'{where}.content'")
        except UserError as error:
            raise ApiError(400, str(error), param=f"{where}.content") from error
        texts.append(text)
    return {"role": "system" if role == "developer" else str(role), "content": "".join(texts)}
