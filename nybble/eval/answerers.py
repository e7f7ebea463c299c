"""Who answers: a model in this process, or any endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nybble.address import fits_header, is_address
from nybble.errors import ConfigError, RequestError
from nybble.eval.task import Prompt
from nybble.eval.text import words
from nybble.sampling import SamplingParams

if TYPE_CHECKING:
    from nybble.llm import LLM


_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Decoding:
    """Greedy by default, without penalties. max_tokens None: as the benchmark says."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        self.params(Prompt(""), 0)  # refuses what is out of range

    def tokens_for(self, prompt: Prompt) -> int:
        return prompt.max_tokens if self.max_tokens is None else self.max_tokens

    def params(self, prompt: Prompt, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.tokens_for(prompt),
            stop=prompt.stop,
            # A greedy answer does not depend on the seed, so that greedy requests share a batch.
            seed=seed if self.temperature else None,
        )


class Answerer(Protocol):
    """What the runner needs of a model. context: tokens of prompt and answer, None if unknown."""

    @property
    def context(self) -> int | None: ...

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        """One text for each prompt."""

    def option_logprobs(self, prompt: str, options: Sequence[str]) -> list[float]:
        """The log-probability of each option as the prompt's continuation."""

    def tokens(self, text: str) -> list[str]: ...


class LocalModel:
    """An LLM of this process; a whole batch of prompts goes to the engine at once."""

    # Alternatives asked for: the letters of a multiple-choice question are nearly always here.
    _ALTERNATIVES = 256

    def __init__(self, llm: LLM, decoding: Decoding | None = None) -> None:
        self._llm = llm
        self._decoding = decoding or Decoding()

    @property
    def context(self) -> int:
        return self._llm.engine.max_context

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        alike: dict[SamplingParams, list[int]] = defaultdict(list)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            alike[self._decoding.params(prompt, seed)].append(index)
        texts = [""] * len(prompts)
        for params, indices in alike.items():
            ids = [self._ids(prompts[index]) for index in indices]
            for index, completion in zip(indices, self._llm.generate(ids, params), strict=True):
                texts[index] = completion.text
        return texts

    def _ids(self, prompt: Prompt) -> list[int]:
        if not prompt.chat:
            return self._llm.encode(prompt.text)
        return self._llm.chat_ids(prompt.text, system=prompt.system)

    def option_logprobs(self, prompt: str, options: Sequence[str]) -> list[float]:
        prompt_ids = self._llm.encode(prompt)
        option_ids = [self._tokenizer.encode(option) for option in options]
        likely = self._next_logprobs(prompt_ids) if all(len(i) == 1 for i in option_ids) else {}
        if all(ids[0] in likely for ids in option_ids):
            return [likely[ids[0]] for ids in option_ids]
        return [self._exact(prompt_ids, ids) for ids in option_ids]

    def _next_logprobs(self, prompt_ids: list[int]) -> Mapping[int, float]:
        params = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, logprobs=self._ALTERNATIVES
        )
        token = (self._llm.generate(prompt_ids, params).logprobs or [])[0]
        return {token.token_id: token.logprob, **dict(token.top)}

    def _exact(self, prompt_ids: list[int], option_ids: list[int]) -> float:
        logits = self._llm.logits(prompt_ids + option_ids)
        logprobs = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
        return sum(float(row[token]) for row, token in zip(logprobs, option_ids, strict=True))

    def tokens(self, text: str) -> list[str]:
        return [self._tokenizer.decode([token]) for token in self._tokenizer.encode(text)]

    @property
    def _tokenizer(self) -> Any:
        if self._llm.tokenizer is None:
            raise ConfigError(
                "An evaluation needs text, and this model folder has no tokenizer: add its files."
            )
        return self._llm.tokenizer


class Endpoint:
    """POST /chat/completions and /completions below `url`, such as http://localhost:8000/v1.

    workers requests run at a time. The key is read from $OPENAI_API_KEY. Tokens are not known
    here, so lengths are counted in words.
    """

    _ATTEMPTS = 4
    _TIMEOUT = 600
    _TOP = 20
    _TRANSIENT = (408, 429, 500, 502, 503, 504)

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding | None = None,
        workers: int = 8,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = _checked_url(url)
        self._model = model
        self._decoding = decoding or Decoding()
        self._workers = workers
        self._pause = pause
        self._headers = {"Content-Type": "application/json", **_authorization()}

    @property
    def context(self) -> None:
        return None

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        return _side_by_side(self._one, list(zip(prompts, seeds, strict=True)), self._workers)

    def _one(self, prompt: Prompt, seed: int) -> str:
        body: dict[str, Any] = {
            "temperature": self._decoding.temperature,
            "top_p": self._decoding.top_p,
            "max_tokens": self._decoding.tokens_for(prompt),
            "seed": seed,
        }
        if prompt.stop:
            body["stop"] = list(prompt.stop)
        if not prompt.chat:
            return self._post("/completions", body | {"prompt": prompt.text}, _text)
        messages = [{"role": "user", "content": prompt.text}]
        if prompt.system is not None:
            messages.insert(0, {"role": "system", "content": prompt.system})
        return self._post("/chat/completions", body | {"messages": messages}, _message)

    def option_logprobs(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Options must be single tokens; -inf for one that is not among the likeliest."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": self._TOP}
        # A server that ends the text at once, because that is likeliest, tells no alternatives.
        top = self._post("/completions", body, _alternatives) or self._post(
            "/completions", body | {"ignore_eos": True}, _alternatives
        )
        found = [float(top.get(option, -math.inf)) for option in options]
        if max(found) == -math.inf:
            raise RequestError(
                f"{self._url} gave no log-probability of {', '.join(map(repr, options))}: use an "
                "endpoint with logprobs, or ask for answers instead (without --base)."
            )
        return found

    tokens = staticmethod(words)

    def _post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], _Read]) -> _Read:
        """What `read` finds in the first choice of the answer."""
        data = json.dumps({"model": self._model, **body}).encode()
        answer = self._send(urllib.request.Request(self._url + path, data, self._headers))
        try:
            return read(json.loads(answer)["choices"][0])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{self._url}{path} answered {answer[:100]!r}, which is no completion: "
                "give the address that ends in /v1."
            ) from error

    def _send(self, request: urllib.request.Request) -> bytes:
        for attempt in range(1, self._ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=self._TIMEOUT) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {_said(error.read())}"
                if error.code not in self._TRANSIENT:
                    raise RequestError(
                        f"{request.full_url} refused a request for the model {self._model!r} "
                        f"({reason}) What is finished is kept: when that is settled, run the same "
                        "command again."
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error).strip() or type(error).__name__
            if attempt < self._ATTEMPTS:
                self._pause(2.0**attempt)
        raise RequestError(
            f"{request.full_url} failed ({reason}): check that it runs; what is finished is kept, "
            "so run the same command again."
        )


def _checked_url(url: str) -> str:
    if not is_address(url):
        raise ConfigError(f"--endpoint is {url!r}: give a URL such as http://localhost:8000/v1.")
    return url.rstrip("/")


def _authorization() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not fits_header(key):
        raise ConfigError("OPENAI_API_KEY is no key: it has characters that no header can hold.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _text(choice: Any) -> str:
    return str(choice["text"])


def _message(choice: Any) -> str:
    return str(choice["message"]["content"] or "")


def _alternatives(choice: Any) -> dict[str, float]:
    """Token -> log-probability of the first token; {} where the server tells none."""
    top = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    return {token: float(logprob) for token, logprob in (top[0] or {}).items()}


def _side_by_side(
    function: Callable[..., str], jobs: Sequence[tuple[Any, ...]], workers: int
) -> list[str]:
    """function(*job) of every job, in order, in threads that Ctrl-C need not wait for."""
    todo, results = deque(enumerate(jobs)), SimpleQueue[tuple[int, str | BaseException]]()

    def work() -> None:
        with suppress(IndexError):
            while True:
                index, job = todo.popleft()
                try:
                    results.put((index, function(*job)))
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    results.put((index, error))

    for _ in range(min(workers, len(jobs))):
        Thread(target=work, daemon=True).start()
    found: dict[int, str] = {}
    try:
        while len(found) < len(jobs):
            index, result = results.get()
            if isinstance(result, BaseException):
                raise result
            found[index] = result
    finally:
        todo.clear()
    return [found[index] for index in range(len(jobs))]


def _said(body: bytes) -> str:
    """What a server says is wrong: OpenAI's message, or the beginning of whatever it sent."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
    except (ValueError, LookupError, TypeError):
        return text[:300]
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)
