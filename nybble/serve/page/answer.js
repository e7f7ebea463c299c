// One answer being written: the request, its pieces, its clock.

import { ApiError, streamChat } from "./api.js";
import { t } from "./text.js";

const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

export class Answer {
  #controller = new AbortController();
  #begin = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;

  /** Appends the answer's message to the conversation. */
  constructor(conversation, model, settings) {
    this.conversation = conversation;
    this.body = {
      model,
      messages: prompt(settings.system, conversation.messages),
      ...Object.fromEntries(
        SAMPLING.filter((name) => settings[name] != null).map((name) => [name, settings[name]]),
      ),
    };
    this.message = { role: "assistant", content: "" };
    conversation.messages.push(this.message);
  }

  /** Writes into the message until it ends, however it does; returns the ApiError, if any. */
  async run(key, changed) {
    try {
      for await (const chunk of streamChat(this.body, key, this.#controller.signal)) {
        this.#take(chunk);
        changed();
      }
    } catch (error) {
      return this.#fail(error);
    }
    return null;
  }

  stop() {
    this.message.end = "stopped";
    this.#controller.abort();
  }

  #take({ choices, usage }) {
    const { message } = this;
    const choice = choices[0];
    if (choice?.delta.content) {
      message.content += choice.delta.content;
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#pieces += 1;
    }
    if (choice?.finish_reason) message.end = choice.finish_reason;
    if (this.#first) message.speed = this.#speed(usage?.completion_tokens);
  }

  /** Until the server has counted its tokens, pieces stand for them. */
  #speed(tokens) {
    const seconds = (this.#last - this.#first) / 1000;
    const steps = (tokens ?? this.#pieces) - 1;
    return {
      tokens,
      rate: seconds > 0.2 ? steps / seconds : null,
      first: (this.#first - this.#begin) / 1000,
    };
  }

  #fail(error) {
    if (this.#controller.signal.aborted) return null;
    if (!(error instanceof ApiError)) throw error;
    this.message.end = "error";
    this.message.error = error.message || t("unreachable");
    return error;
  }
}

function prompt(system, messages) {
  const turns = messages
    .filter(({ content }) => content !== "") // an answer that failed before its first word
    .map(({ role, content }) => ({ role, content }));
  return system?.trim() ? [{ role: "system", content: system }, ...turns] : turns;
}
