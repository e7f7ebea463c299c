// The official openai client's tools and structured output, against a running server.
// The model may be one with random weights: every answer here is forced into its form.

import assert from "node:assert/strict";
import { test } from "node:test";

import { chat, client, collect, greedy } from "./client.js";

const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a place",
    parameters: {
      type: "object",
      properties: { place: { enum: ["Paris", "北京"] }, days: { type: "integer", minimum: 0, maximum: 9 } },
      required: ["place", "days"],
      additionalProperties: false,
    },
  },
};
const forced = { max_tokens: 300, tools: [weather], tool_choice: "required" };

/**
 * A random model may write blanks until its tokens are used up: one of 6 answers that does not.
 * Choice i has the seed i, so `sampling` alone gives the same answer again.
 */
async function finished(options) {
  const { choices } = await chat({ ...options, temperature: 1, seed: 0, n: 6 });
  const choice = choices.find((one) => one.finish_reason !== "length");
  assert.ok(choice, "every answer was cut off");
  return { choice, sampling: { ...options, temperature: 1, seed: choice.index } };
}

let called;
const forcedCall = () => (called ??= finished(forced));

function assertWeather(found) {
  assert.deepEqual(Object.keys(found), ["place", "days"]);
  assert.ok(["Paris", "北京"].includes(found.place));
  assert.ok(Number.isInteger(found.days) && found.days >= 0 && found.days <= 9);
}

test("a json schema", async () => {
  const schema = weather.function.parameters;
  const format = { type: "json_schema", json_schema: { name: "weather", strict: true, schema } };
  const { sampling } = await finished({ max_tokens: 300, response_format: format });
  const reply = await client.chat.completions.parse({ ...greedy, ...sampling });
  assert.equal(reply.choices[0].finish_reason, "stop");
  assertWeather(reply.choices[0].message.parsed);
});

test("a json object", async () => {
  const { choice } = await finished({ max_tokens: 300, response_format: { type: "json_object" } });
  assert.equal(typeof JSON.parse(choice.message.content), "object");
});

test("a forced tool call, streamed and not", async () => {
  const { choice, sampling } = await forcedCall();
  const [call] = choice.message.tool_calls;
  assert.equal(choice.finish_reason, "tool_calls");
  assert.equal(call.type, "function");
  assert.equal(call.function.name, "weather");
  assertWeather(JSON.parse(call.function.arguments));

  const chunks = await collect(await chat({ ...sampling, stream: true }));
  const deltas = chunks.flatMap((chunk) => chunk.choices[0]?.delta.tool_calls ?? []);
  const first = deltas.filter((delta) => delta.index === 0);
  assert.equal(first[0].function.name, "weather");
  assert.ok(first[0].id);
  assert.ok(first.length > 2, "the arguments come in pieces");
  const streamed = first.map((delta) => delta.function.arguments ?? "").join("");
  assert.deepEqual(JSON.parse(streamed), JSON.parse(call.function.arguments));
  assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");
});

test("a tool's result goes back to the model", async () => {
  const { message } = (await forcedCall()).choice;
  const results = message.tool_calls.map((call) => ({
    role: "tool",
    tool_call_id: call.id,
    content: "Rain.",
  }));
  const answer = await chat({ messages: [...greedy.messages, message, ...results], tools: [weather] });
  assert.equal(answer.choices[0].message.role, "assistant");
});

test("the client's tool runner calls the function", async () => {
  const { sampling } = await forcedCall();
  const asked = [];
  const parse = JSON.parse;
  const run = (found) => {
    asked.push(found);
    return "Rain.";
  };
  const tool = { type: "function", function: { ...weather.function, parse, function: run } };
  const runner = client.chat.completions.runTools(
    { ...greedy, ...sampling, tools: [tool] },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  assert.ok(asked.length > 0);
  asked.forEach(assertWeather);
});

test("no tool is called where none may be", async () => {
  const reply = await chat({ tools: [weather], tool_choice: "none" });
  assert.equal(reply.choices[0].message.tool_calls, undefined);
});
