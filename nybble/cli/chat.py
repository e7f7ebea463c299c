"""`nybble chat`: one answer, or a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.cli import console, reading
from nybble.cli.conversation import Conversation
from nybble.cli.folders import expanded
from nybble.cli.loading import load
from nybble.cli.options import Running, Sampling
from nybble.cli.speed import speed_line
from nybble.errors import NybbleError, RequestError

if TYPE_CHECKING:
    from nybble.llm import LLM
    from nybble.outputs import TextStream
    from nybble.sampling import SamplingParams

_HELP = '''\
A line is a message. End it in \\ to go on in the next line, or put a block between """ and """.
/clear         forget the conversation
/system TEXT   set the system prompt and forget the conversation; without TEXT, show it
/history       show the conversation
/save FILE     write the conversation to a new JSON file, as OpenAI messages
/help          show this
/exit          leave; so does Ctrl-D
Ctrl-C stops an answer.'''


def run(
    model: str,
    prompt: str | None,
    system: str | None,
    sampling: Sampling,
    running: Running,
    quiet: bool,
) -> None:
    if prompt is not None:
        prompt = _some(reading.prompt_text(prompt))
    llm = load(model, running, quiet)
    params = sampling.params(llm.default_params)
    interactive = prompt is None and sys.stdin.isatty()
    chat = Chat(llm, params, Conversation(system), quiet=quiet, interactive=interactive)
    if prompt is not None:
        chat.answer(prompt)
        return
    if interactive:
        reading.enable_line_editing()
        console.note("/help shows the commands, Ctrl-D leaves.")
    chat.session(reading.terminal_line)


class Chat:
    """A conversation with a loaded model.

    interactive: a person sits there, so an error is shown and the session goes on; the messages
    of a pipe end at the first error or Ctrl-C, which is raised.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        conversation: Conversation,
        *,
        quiet: bool = False,
        interactive: bool = True,
    ) -> None:
        self.llm = llm
        self.params = params
        self.conversation = conversation
        self.quiet = quiet
        self.interactive = interactive
        self.commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/system": self._system,
            "/history": self._history,
            "/save": self._save,
            "/help": lambda _: console.show(_HELP),
        }

    # -- answers -----------------------------------------------------------------------------

    def answer(self, query: str) -> None:
        """Stream the answer to stdout and add it to the conversation."""
        stream = self.llm.stream(self._prompt_ids(query), sampling_params=self.params)
        text = ""
        try:
            for piece in stream:
                text += piece
                console.write(piece)
        finally:
            # An answer that was stopped counts as far as it was seen.
            stream.close()
            if text:
                console.write("\n")
                self.conversation.turns.append((query, text))
        self._after(stream)

    def _prompt_ids(self, query: str) -> list[int]:
        """The prompt, which leaves room for an answer: a long chat loses its oldest turns."""
        context = self.llm.engine.max_context
        wanted = min(self.params.max_tokens or context, context // 4)
        checked = _some(reading.checked(query))
        ids, dropped = self.conversation.prompt(checked, self.llm.chat_ids, context - wanted)
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            console.note(
                f"The context of {context} tokens is full: the oldest {turns} dropped. /clear "
                "starts anew."
            )
        return ids

    def _after(self, stream: TextStream) -> None:
        completion = stream.completion
        if completion.finish_reason == "length":
            console.note(self._why_cut(len(completion.token_ids)))
        if not self.quiet:
            console.note(speed_line(completion.timing))

    def _why_cut(self, tokens: int) -> str:
        if tokens == self.params.max_tokens:
            return f"The answer was cut after {tokens} tokens; --max-tokens allows more."
        return "The answer was cut because the context is full; --max-context may allow more."

    # -- a session -----------------------------------------------------------------------------

    def session(self, read_line: reading.ReadLine) -> None:
        """Answer message after message until the input ends or /exit."""
        while True:
            if self.interactive:
                console.show("")
            try:
                text = reading.read_message(read_line)
            except EOFError:
                if self.interactive:
                    console.show("")
                return
            except KeyboardInterrupt:
                console.note("\nCtrl-D or /exit leaves.")
                continue
            if text.strip() in ("/exit", "/quit"):
                return
            self._handle(text)

    def _handle(self, text: str) -> None:
        """One message or command."""
        name, _, argument = text.strip().partition(" ")
        try:
            if name in self.commands:
                self.commands[name](argument.strip())
            elif name.startswith("/") and name[1:].isalpha():
                raise RequestError(f"There is no command {name}: /help shows them.")
            elif text.strip():
                self.answer(text)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            console.note("\nStopped.")
        except NybbleError as error:
            if not self.interactive:
                raise
            console.error(str(error))

    # -- commands ------------------------------------------------------------------------------

    def _clear(self, _: str) -> None:
        self.conversation.turns.clear()
        console.note("The conversation is forgotten.")

    def _system(self, text: str) -> None:
        if not text:
            console.show(self.conversation.system or "The model's own system prompt is used.")
            return
        self.conversation = Conversation(reading.checked(text))
        console.note("The system prompt is set, the conversation forgotten.")

    def _history(self, _: str) -> None:
        messages = self.conversation.messages()
        for message in messages:
            console.show(f"{message['role']}: {message['content']}")
        if not messages:
            console.note("Nothing has been said yet.")

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a file's name: /save chat.json, say.")
        path = expanded("/save", Path(name))
        self.conversation.save(path)
        console.note(f"Saved to {path}.")


def _some(message: str) -> str:
    if not message.strip():
        raise RequestError("The message is empty: write something.")
    return message
