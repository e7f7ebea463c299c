// The inside of a Markdown paragraph: code, emphasis, links, line breaks -> nodes.
// One pass over the text and a stack of at most one frame for each mark: linear in its length.

import { element } from "./dom.js";

const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };
const TOKEN = new RegExp(
  [
    "\\\\(?<escaped>[`*_~#|<])",
    "(?<ticks>`+)",
    "(?<run>\\*{1,3}|_{1,3}|~~)",
    "(?<link>!?\\[(?<label>[^\\[\\]]{1,500})\\]\\((?<to>[^\\s()]{0,2000}(?:\\([^\\s()]{0,500}\\)[^\\s()]{0,500}){0,5})(?:\\s+\"[^\"]{0,200}\")?\\))",
    "(?<address>https?://[^\\s<>\"'`\\u3000-\\u303f\\uff00-\\uffef]+)",
    "(?<br>\\n|<br ?/?>)",
  ].join("|"),
  "gi",
);

/** Nodes for `text`. */
export function inline(text, links = true) {
  const stack = [{ mark: null, nodes: [] }];
  const put = (...nodes) => extend(stack.at(-1).nodes, nodes);
  const pattern = new RegExp(TOKEN); // its own lastIndex
  let at = 0;
  for (let found = pattern.exec(text); found; found = pattern.exec(text)) {
    put(text.slice(at, found.index));
    at = found.index + found[0].length;
    const { escaped, ticks, run, link, label, to, address, br } = found.groups;
    if (escaped) put(escaped);
    else if (br) put(element("br"));
    else if (run) emphasiseAll(stack, run, text[found.index - 1], text[at]);
    else if (link) put(links ? anchor(to, inline(label, false), link) : link);
    else if (address) at = putAddress(put, address, found.index, links);
    else at = putCode(put, text, ticks, found.index);
    pattern.lastIndex = at;
  }
  put(text.slice(at));
  while (stack.length > 1) unwind(stack);
  return stack[0].nodes;
}

/** A run of three is both marks; the inner one closes first. */
function emphasiseAll(stack, run, before, after) {
  const [one, two] = [run[0], run.slice(0, 2)];
  const marks = run.length < 3 ? [run] : stack.at(-1).mark === two ? [two, one] : [one, two];
  for (const mark of marks) emphasise(stack, mark, before, after);
}

/** A mark closes its own frame if one is open, else opens one, else is text. */
function emphasise(stack, mark, before, after) {
  const word = (char) => char !== undefined && /[A-Za-z0-9]/.test(char);
  const space = (char) => char === undefined || /\s/.test(char);
  const inside = mark.length === 1 || mark === "__" ? word(before) && word(after) : false;
  const open = stack.findIndex((frame) => frame.mark === mark);
  if (open > 0 && !space(before) && !inside) {
    while (stack.length > open + 1) unwind(stack);
    const { nodes } = stack.pop();
    extend(stack.at(-1).nodes, [element(TAGS[mark], {}, nodes)]);
  } else if (open < 0 && !space(after) && !inside) {
    stack.push({ mark, nodes: [] });
  } else {
    extend(stack.at(-1).nodes, [mark]);
  }
}

/** A mark that was never closed is text. */
function unwind(stack) {
  const { mark, nodes } = stack.pop();
  extend(stack.at(-1).nodes, [mark]);
  extend(stack.at(-1).nodes, nodes);
}

/** Texts that meet become one. */
function extend(nodes, more) {
  for (const node of more) {
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + node);
    else if (node !== "") nodes.push(node);
  }
}

function putCode(put, text, ticks, at) {
  const begin = at + ticks.length;
  let end = text.indexOf(ticks, begin);
  while (end >= 0 && text[end + ticks.length] === "`") {
    let past = end;
    while (text[past] === "`") past += 1;
    end = text.indexOf(ticks, past);
  }
  if (end < 0) {
    put(ticks);
    return begin;
  }
  const code = text.slice(begin, end).replaceAll("\n", " ");
  const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
  put(element("code", {}, padded ? code.slice(1, -1) : code));
  return end + ticks.length;
}

function putAddress(put, address, at, links) {
  let end = address.length;
  while (".,;:!?*_~".includes(address[end - 1])) end -= 1;
  if (address[end - 1] === ")" && !address.slice(0, end).includes("(")) end -= 1;
  const url = address.slice(0, end);
  put(links ? anchor(url, [url], url) : url);
  return at + end;
}

/** A link to another site, or `source` as text where the address is not http or https. */
function anchor(to, nodes, source) {
  if (!/^https?:\/\//i.test(to) || !URL.canParse(to)) return source;
  return element("a", { href: to, target: "_blank", rel: "noopener noreferrer" }, nodes);
}
