// One client for all suites; BASE_URL and MODEL say which server.

import OpenAI from "openai";

const { BASE_URL: baseURL, MODEL } = process.env;
export const model = MODEL;
export const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
export const messages = [{ role: "user", content: "the quick brown fox" }];
export const greedy = { model, messages, temperature: 0, max_tokens: 8 };
export const chat = (options) => client.chat.completions.create({ ...greedy, ...options });

/** All chunks of a stream. */
export async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}
