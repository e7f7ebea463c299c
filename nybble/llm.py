"""LLM: a model folder ready to answer. Joins the engine, which knows ids, and the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast, overload

import torch

from nybble.checkpoint import Checkpoint, read_json
from nybble.config import EngineConfig, JsonReader, ModelConfig, token_ids
from nybble.engine.engine import Engine
from nybble.engine.threads import ThreadCount
from nybble.errors import RequestError
from nybble.kernels import select_backend, self_test
from nybble.kernels.device import find_device
from nybble.memory import STEP_TOKENS, MemoryPlan, plan_memory, weigh
from nybble.model import read_model_config
from nybble.model.loader import load_decoder
from nybble.model.names import NAMES
from nybble.outputs import Completion, TextStream, no_tokenizer
from nybble.resolve import resolve
from nybble.sampling import SamplingParams
from nybble.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

logger = logging.getLogger("nybble")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
History = Sequence[tuple[str, str]]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What the first generation's own software keeps of a history, where its file does not say.
_MAX_WINDOW = 6144


class LLM:
    """A loaded model.

    model: a folder, "demo", or a hub repository id ("Qwen/Qwen-72B-Chat-Int4"; with the prefix
    "modelscope:" from ModelScope). device: "auto", "cpu", "cuda". dtype: "auto" takes the
    fastest kernels; "float32" computes everything exactly as the reference does. max_context
    bounds prompt and answer together; None takes what the model advertises. max_running: how
    many requests run at a time, in steps of at most prefill_chunk tokens (None: 512 on a CPU,
    8,192 on a GPU); cache_tokens: how many tokens the cache holds for all of them, None: a full
    context, or 2 GiB if that is more.

    On a GPU `memory_plan` says what goes where, and the cache is the finest kind of which a full
    context fits, of that length or, with fill_memory, of what max_running requests could use,
    where it is free. Raises CapacityError where no kind fits.
    """

    def __init__(  # noqa: PLR0913, all settings stand here once
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        max_context: int | None = None,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        max_running: int = 64,
        cache_tokens: int | None = None,
        fill_memory: bool = False,
        progress: Progress | None = None,
    ) -> None:
        options = EngineConfig(
            device,
            dtype,
            kv_dtype,
            max_context,
            prefill_chunk,
            threads=threads,
            max_running=max_running,
            cache_tokens=cache_tokens,
            fill_memory=fill_memory,
        )
        self.folder = resolve(model, progress)
        self.config: ModelConfig = read_model_config(self.folder)
        self.tokenizer: Tokenizer | None = (
            load_tokenizer(self.folder) if has_tokenizer(self.folder) else None
        )
        self._defaults = _GenerationDefaults.read(self.folder)
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = self._load(options, progress)
        self.default_params = self._defaults.params

    def _load(self, options: EngineConfig, progress: Progress | None) -> Engine:
        def loading(done: int, total: int) -> None:
            if progress is not None:
                progress("Loading", done, total)

        exact, dtype = options.dtype == "float32", _DTYPES.get(options.dtype)
        checkpoint = Checkpoint.open(self.folder)
        device = find_device(options.device)
        self.backend = select_backend(
            device, exact=exact, dtype=dtype or self._stored_dtype(checkpoint)
        )
        logger.info("Running on %s", self.backend.name)
        max_context = options.max_context or self.config.max_context
        step_tokens = options.prefill_chunk or STEP_TOKENS[device.type]
        kinds = self._kv_kinds(options)
        plan = self.memory_plan = self._plan(checkpoint, kinds, options, max_context, step_tokens)
        kv_dtype = plan.kv_dtype if plan else kinds[0]
        self_test(self.backend, self.config, kv_dtype)
        decoder = load_decoder(
            checkpoint,
            self.config,
            self.backend,
            self.backend.dtype if plan else dtype,
            loading,
            host_embedding=plan is not None and plan.host_embedding,
        )
        tokenizer = self.tokenizer
        return Engine(
            decoder,
            vocab_size=min(self.config.vocab_size, tokenizer.vocab_size)
            if tokenizer
            else self.config.vocab_size,
            unused_ids=sorted(tokenizer.unused_ids) if tokenizer else (),
            eos_ids=self._eos_ids(),
            max_context=max_context,
            kv_dtype=kv_dtype,
            prefill_chunk=step_tokens,
            max_running=options.max_running,
            cache_tokens=plan.cache_tokens if plan else options.cache_tokens,
            threads=self._threads(options),
        )

    def _threads(self, options: EngineConfig) -> ThreadCount | None:
        """On the CPU all threads that torch has, or fewer while others need the cores."""
        most = torch.get_num_threads()
        free = options.threads is None and most > 1 and self.backend.device.type == "cpu"
        return ThreadCount(most) if free else None

    def _stored_dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        """The 16-bit type that the model was made in: that of its norms."""
        stored = checkpoint.info(NAMES[self.config.family].norm + ".weight").dtype
        return torch.bfloat16 if stored == torch.bfloat16 else torch.float16

    def _kv_kinds(self, options: EngineConfig) -> tuple[str, ...]:
        """The kinds of cache to choose from, the finest first."""
        if options.kv_dtype != "auto":
            return (options.kv_dtype,)
        if options.dtype == "float32":
            return ("float32",)
        stored = "bfloat16" if self.backend.dtype == torch.bfloat16 else "float16"
        return (stored, "int8", "int6", "int4")

    def _plan(
        self,
        checkpoint: Checkpoint,
        kinds: Sequence[str],
        options: EngineConfig,
        max_context: int,
        step_tokens: int,
    ) -> MemoryPlan | None:
        """What goes where on a GPU; elsewhere memory grows with need."""
        if self.backend.name != "cuda":
            return None
        tensors = {name: checkpoint.info(name) for name in checkpoint.names()}
        weights = weigh(self.config, tensors, self.backend.dtype.itemsize)
        free = torch.cuda.mem_get_info(self.backend.device)[0]
        least = options.cache_tokens or max_context
        many = max_context * options.max_running if options.fill_memory else 0
        most = options.cache_tokens or max(max_context, many)
        tokens, running = (least, most), options.max_running
        plan = plan_memory(self.config, weights, kinds, tokens, step_tokens, free, running)
        logger.info("Memory: %s", plan)
        return plan

    def _eos_ids(self) -> frozenset[int]:
        ids = frozenset(self.config.eos_token_ids) | self._defaults.eos_token_ids
        return ids | self.tokenizer.eos_token_ids if self.tokenizer else ids

    # -- raw prompts -----------------------------------------------------------------------

    @overload
    def generate(
        self, prompts: str | list[int], sampling_params: SamplingParams | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]], sampling_params: SamplingParams | None = None
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | list[int] | list[str] | list[list[int]],
        sampling_params: SamplingParams | None = None,
    ) -> Completion | list[Completion]:
        """Continue a text or token ids, as they are: no chat format.

        A list gives a list, and its prompts run together; an error in one of them ends all.
        """
        if isinstance(prompts, str) or _is_ids(prompts):
            return _drain(self._stream_ids(self.encode(prompts), sampling_params))
        many = cast("list[str] | list[list[int]]", prompts)
        streams = [self._stream_ids(self.encode(prompt), sampling_params) for prompt in many]
        return _drain_together(streams)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """fp32 (tokens, vocab): what the model predicts after each token. Any length."""
        return self.engine.logits(token_ids)

    # -- chats -------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages | str,
        *,
        history: History | None = None,
        system: str | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> Completion:
        """Answer a user's text, or a list of {"role", "content"} messages.

        history: earlier (user, assistant) pairs; system: None takes the model's own default.
        Both go with a text only; messages carry theirs inside.
        """
        return _drain(
            self.stream(messages, history=history, system=system, sampling_params=sampling_params)
        )

    def stream(
        self,
        messages: Messages | str | Sequence[int],
        *,
        history: History | None = None,
        system: str | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> TextStream:
        """`chat`, piece by piece. Token ids are taken as the whole prompt."""
        ids = self.chat_ids(messages, history=history, system=system)
        return self._stream_ids(ids, sampling_params)

    def chat_ids(
        self,
        messages: Messages | str | Sequence[int],
        *,
        history: History | None = None,
        system: str | None = None,
    ) -> list[int]:
        """The prompt's ids for `chat`. No text in it can become a control token."""
        if _is_ids(messages) and len(messages) > 0:
            return list(messages)
        tokenizer = self._tokenizer()
        if isinstance(messages, str):
            if not messages.strip():
                raise RequestError("The message is empty: write something.")
            return tokenizer.make_context(messages, history, system, self._window())
        if history is not None or system is not None:
            raise RequestError(
                "history and system go with a text: put them into the messages, as roles."
            )
        return tokenizer.apply_chat(cast(Messages, messages))

    def _window(self) -> int:
        """How much history to keep: as much as the model's own software, and room to answer."""
        room = max(self.engine.max_context * 7 // 8, 1)
        own = self._defaults.max_window_size
        if own is None and self.config.family == "qwen":
            own = _MAX_WINDOW
        return min(own or room, room)

    # -- text ----------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a raw prompt, its beginning-of-text token included where the model has one."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self._tokenizer()
        if not prompt:
            raise RequestError("The prompt is empty: give at least one character.")
        return [*tokenizer.prompt_prefix_ids, *tokenizer.encode(prompt)]

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise no_tokenizer()
        return self.tokenizer

    def _stream_ids(self, ids: list[int], params: SamplingParams | None) -> TextStream:
        generation = self.engine.generate(ids, params or self.default_params)
        return TextStream(generation, self.tokenizer)


class _GenerationDefaults:
    """generation_config.json: the sampling that the model's authors recommend."""

    def __init__(self, reader: JsonReader) -> None:
        sample = reader.boolean("do_sample", False)
        # Transformers' rule: without do_sample the answer is greedy, whatever else stands there.
        self.params = SamplingParams(
            temperature=reader.number("temperature", 1.0) if sample else 0.0,
            top_p=reader.number("top_p", 1.0) if sample else 1.0,
            top_k=reader.integer("top_k", 0, least=0) if sample else 0,
            min_p=reader.number("min_p", 0.0, least=0.0) if sample else 0.0,
            repetition_penalty=reader.number("repetition_penalty", 1.0),
            max_tokens=reader.optional_integer("max_new_tokens"),
        )
        self.eos_token_ids = frozenset(token_ids(reader, "eos_token_id"))
        self.max_window_size = reader.optional_integer("max_window_size")

    @classmethod
    def read(cls, folder: Path) -> _GenerationDefaults:
        path = folder / "generation_config.json"
        data = read_json(path) if path.exists() else {}
        return cls(JsonReader(data, str(path)))


def _is_ids(value: object) -> TypeGuard[Sequence[int]]:
    """A sequence of ints (an empty one counts: it is refused later, with a reason)."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return False
    return all(isinstance(item, int) for item in value)


def _drain(stream: TextStream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def _drain_together(streams: Sequence[TextStream]) -> list[Completion]:
    """All at a time: each in turn gives a piece, so that none runs far beyond a stop string."""
    try:
        for stream in streams:
            stream.start()
        running = list(streams)
        while running:
            running = [stream for stream in running if next(stream, None) is not None]
    finally:
        for stream in streams:
            stream.close()
    return [stream.completion for stream in streams]
