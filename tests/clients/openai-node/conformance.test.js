// The official openai client against a running server: node --test, with BASE_URL and MODEL set.
// The model may be one with random weights: what it says is never looked at, only how.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

import { chat, client, collect, greedy, model } from "./client.js";

const textOf = (chunks, index = 0) =>
  chunks
    .flatMap((chunk) => chunk.choices)
    .filter((choice) => choice.index === index)
    .map((choice) => choice.delta.content ?? "")
    .join("");

test("models", async () => {
  const page = await client.models.list();
  assert.deepEqual(page.data.map((found) => found.id), [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("chat and usage", async () => {
  const reply = await chat();
  assert.equal(reply.object, "chat.completion");
  assert.equal(reply.choices[0].message.role, "assistant");
  assert.equal(typeof reply.choices[0].message.content, "string");
  assert.equal(reply.usage.completion_tokens, 8);
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + 8);
});

test("a stream says the same, role first and usage last", async () => {
  const whole = await chat();
  const chunks = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(textOf(chunks), whole.choices[0].message.content);
  assert.equal(chunks.at(-2).choices[0].finish_reason, "length");
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.deepEqual(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
});

test("the client's own stream helper", async () => {
  const stream = client.chat.completions.stream(greedy);
  let heard = "";
  stream.on("content", (delta) => (heard += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, heard);
  assert.equal(final.choices[0].finish_reason, "length");
});

test("leaving a stream ends it", async () => {
  const stream = await chat({ stream: true, max_tokens: 100 });
  for await (const _ of stream) break;
  assert.equal(stream.controller.signal.aborted, true);
});

test("logprobs", async () => {
  const reply = await chat({ logprobs: true, top_logprobs: 3 });
  const { content } = reply.choices[0].logprobs;
  assert.equal(content.length, 8);
  for (const token of content) {
    assert.ok(token.logprob <= 0);
    assert.equal(token.top_logprobs.length, 3);
    assert.equal(token.top_logprobs[0].logprob, token.logprob); // greedy
    assert.ok(token.bytes.every((byte) => byte >= 0 && byte < 256));
  }
});

test("n choices, streamed and not", async () => {
  const options = { n: 3, temperature: 1, seed: 5 };
  const reply = await chat(options);
  assert.deepEqual(reply.choices.map((choice) => choice.index), [0, 1, 2]);
  const chunks = await collect(await chat({ ...options, stream: true }));
  for (const choice of reply.choices) {
    assert.equal(textOf(chunks, choice.index), choice.message.content);
  }
  assert.equal(reply.usage.completion_tokens, 24);
});

test("a stop string is left out", async () => {
  const { content } = (await chat()).choices[0].message;
  const [stop] = content.slice(2);
  const reply = await chat({ stop: [stop] });
  assert.equal(reply.choices[0].finish_reason, "stop");
  assert.equal(reply.choices[0].message.content, content.slice(0, content.indexOf(stop)));
});

test("completions, many prompts, echo", async () => {
  const options = { model, max_tokens: 4, temperature: 0 };
  const reply = await client.completions.create({ ...options, prompt: ["the quick", "lazy dog"] });
  assert.equal(reply.object, "text_completion");
  assert.deepEqual(reply.choices.map((choice) => choice.index), [0, 1]);
  const echoed = await client.completions.create({ ...options, prompt: "the quick", echo: true });
  assert.ok(echoed.choices[0].text.startsWith("the quick"));
  const chunks = await collect(
    await client.completions.create({ ...options, prompt: "the quick", stream: true }),
  );
  const text = chunks.map((chunk) => chunk.choices[0]?.text ?? "").join("");
  assert.equal(text, reply.choices[0].text);
});

test("errors come as the client's own classes", async () => {
  const cases = [
    [OpenAI.NotFoundError, { model: "gpt-4" }, "model_not_found"],
    [OpenAI.BadRequestError, { temperature: -1 }, undefined],
    [OpenAI.BadRequestError, { no_such_field: 1 }, undefined],
    [
      OpenAI.BadRequestError,
      { messages: [{ role: "user", content: "the lazy dog ".repeat(2000) }] },
      "context_length_exceeded",
    ],
  ];
  for (const [kind, options, code] of cases) {
    const error = await chat(options).then(assert.fail, (caught) => caught);
    assert.ok(error instanceof kind, `${error}`);
    if (code) assert.equal(error.code, code);
    assert.ok(error.message.length > 20);
    assert.ok(error.requestID);
  }
  const streamed = await chat({ stream: true, temperature: -1 }).then(assert.fail, (e) => e);
  assert.ok(streamed instanceof OpenAI.BadRequestError);
});

test("embeddings are refused", async () => {
  const wanted = client.embeddings.create({ model, input: "fox" });
  await assert.rejects(wanted, (error) => error.status === 501);
});
