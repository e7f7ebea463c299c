// How messages look. A message is {role, content, end?, error?, speed?}, as it is kept.

import { copyButton, element, iconButton } from "./dom.js";
import { markdownInto } from "./markdown.js";
import { t } from "./text.js";

// Models that think aloud do it first, between these marks.
const THOUGHT = /^\s*<think>([\s\S]*?)(?:<\/think>|$)/;

/**
 * A message on the page: `node`, and `update()` for when the message has grown.
 * actions: again() answers anew, edit() takes the message back into the composer.
 */
export function messageView(message, actions) {
  return message.role === "user" ? userView(message, actions) : assistantView(message, actions);
}

function userView(message, { edit }) {
  const node = element(
    "article",
    { class: "message user" },
    element("h2", { class: "unseen" }, t("you")),
    element("div", { class: "body" }, message.content),
    element(
      "div",
      { class: "meta" },
      copyButton(t("copy"), () => message.content),
      iconButton("edit", t("edit"), edit),
    ),
  );
  return { node, update() {} };
}

function assistantView(message, { again }) {
  const thought = element("div", { class: "markdown" });
  const details = element("details", { class: "thought" }, element("summary"), thought);
  const body = element("div", { class: "body markdown" });
  const end = element("div", { class: "end" });
  const meta = element("div", { class: "meta" });
  const node = element(
    "article",
    { class: "message assistant" },
    element("h2", { class: "unseen" }, t("assistant")),
    details,
    body,
    end,
    meta,
  );
  const showThought = markdownInto(thought, codeBlock);
  const showBody = markdownInto(body, codeBlock);
  const copy = copyButton(t("copy"), () => message.content);
  const retry = iconButton("again", t("again"), again);
  const speed = element("span", { class: "speed" });

  function update(writing = false) {
    const thinking = THOUGHT.exec(message.content);
    const rest = message.content.slice(thinking?.[0].length ?? 0);
    details.hidden = !thinking?.[1].trim();
    details.firstChild.textContent = writing && !rest ? t("thinking") : t("thought");
    if (thinking) showThought(thinking[1].trim());
    showBody(rest);
    node.classList.toggle("writing", writing);
    end.replaceChildren(...ending(message));
    speed.textContent = speedText(message.speed);
    meta.replaceChildren(...(writing ? [] : [...(message.content ? [copy] : []), retry]), speed);
  }
  return { node, update };
}

/** Why an answer ended, where it did not end by itself. */
function ending({ end, error }) {
  if (end === "error") return [element("p", { class: "error", role: "alert" }, error)];
  if (end === "stopped" || end === "length") return [element("p", { class: "note" }, t(end))];
  return [];
}

function speedText(speed) {
  if (!speed) return "";
  const parts = [];
  if (speed.rate) parts.push(t("speed", speed.rate.toFixed(speed.rate < 10 ? 1 : 0)));
  if (speed.tokens) parts.push(t("tokens", speed.tokens));
  if (speed.first) parts.push(t("first", speed.first.toFixed(speed.first < 1 ? 2 : 1)));
  return parts.join(" · ");
}

function codeBlock(language, source) {
  return element(
    "figure",
    { class: "code" },
    element(
      "figcaption",
      {},
      element("span", {}, language),
      copyButton(t("copyCode"), () => source),
    ),
    element("pre", { tabindex: "0" }, element("code", {}, source)),
  );
}
