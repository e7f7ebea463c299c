// Markdown as models write it, into DOM nodes: headings, lists, quotes, tables, code, emphasis,
// links. Single line breaks are kept. Every character of the text ends up in a text node, and a
// link goes to http or https or is no link, so an answer can show anything and run nothing.
// Unlike CommonMark, emphasis may touch Chinese punctuation, and HTML is plain text.

import { element } from "./dom.js";
import { inline } from "./inline.js";

// Deeper lists and quotes stay text: nobody writes them, and recursion must end.
const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const DELIMITER = /^:?-+:?$/;

/**
 * Shows a growing text in `container`; only blocks that changed are made again.
 * codeBlock(language, source) makes the node of a block of code.
 */
export function markdownInto(container, codeBlock) {
  let shown = [];
  return (text) => {
    const blocks = split(text.split("\n").map(expandTabs), 0);
    const keys = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < keys.length && keys[same] === shown[same]) same += 1;
    while (container.children.length > same) container.lastChild.remove();
    for (const block of blocks.slice(same)) container.append(render(block, codeBlock));
    shown = keys;
  };
}

// -- lines -> blocks -----------------------------------------------------------------------------

function split(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (FENCE.test(line)) return readFence(lines, at);
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at) {
  const [, mark, info] = FENCE.exec(lines[at]);
  const margin = indent(lines[at]);
  const code = [];
  let end = at + 1;
  for (; end < lines.length && !closes(lines[end], mark); end += 1) {
    code.push(unindent(lines[end], margin));
  }
  return [{ kind: "code", language: info.trim(), source: code.join("\n") }, end + 1];
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => QUOTE.exec(line)[1]);
  return [{ kind: "quote", blocks: split(inner, depth + 1) }, end];
}

function readList(lines, at, depth) {
  const [, space, marker] = ITEM.exec(lines[at]);
  const list = { kind: "list", start: ordered(marker) ? parseInt(marker, 10) : null, items: [] };
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || RULE.test(lines[end])) break;
    if (item[1].length > space.length + 1 || ordered(item[2]) !== ordered(marker)) break;
    const next = itemEnd(lines, end, item[1].length);
    const margin = item[1].length + item[2].length + 1;
    const inner = lines.slice(end + 1, next).map((line) => unindent(line, margin));
    list.items.push(split([item[4], ...inner], depth + 1));
    end = next;
  }
  return [list, end];
}

/** Where an item's lines end: those indented below it are its own, and so are lazy ones. */
function itemEnd(lines, at, margin) {
  let end = at + 1;
  for (let next = end; next < lines.length; next += 1) {
    if (blank(lines[next])) continue;
    const lazy = next === end && !startsBlock(lines[next]) && !blank(lines[next - 1]);
    if (!lazy && indent(lines[next]) < margin + 2) break;
    end = next + 1;
  }
  while (end < lines.length && blank(lines[end])) end += 1;
  return end;
}

function readTable(lines, at) {
  const align = cells(lines[at + 1]).map(alignment);
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at + 2, end).map(cells);
  return [{ kind: "table", head: cells(lines[at]), align, rows }, end];
}

function alignment(cell) {
  if (!cell.endsWith(":")) return null;
  return cell.startsWith(":") ? "middle" : "right";
}

function startsTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return false;
  const rule = cells(lines[at + 1]);
  return rule.length === cells(lines[at]).length && rule.every((cell) => DELIMITER.test(cell));
}

function cells(line) {
  const parts = line.trim().replaceAll("\\|", "\u0000").split("|");
  if (parts[0] === "") parts.shift();
  if (parts.at(-1) === "") parts.pop();
  return parts.map((part) => part.trim().replaceAll("\u0000", "|"));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !startsBlock(lines[end])) {
    if (startsTable(lines, end)) break;
    end += 1;
  }
  const text = lines.slice(at, end).map((line) => line.trim());
  return [{ kind: "paragraph", text: text.join("\n") }, end];
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

// Only before items: in code a tab stays a tab.
const expandTabs = (line) =>
  /^\t+([-*+]|\d{1,9}[.)]) /.test(line) ? line.replaceAll("\t", "    ") : line;
const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;
const unindent = (line, width) => line.slice(Math.min(indent(line), width));
const ordered = (marker) => marker.length > 1;

// -- blocks -> nodes -----------------------------------------------------------------------------

function render(block, codeBlock) {
  const inner = (blocks) => blocks.map((child) => render(child, codeBlock));
  switch (block.kind) {
    case "heading": // the page has its own h1
      return element(`h${Math.min(block.level + 1, 6)}`, {}, inline(block.text));
    case "code":
      return codeBlock(block.language, block.source);
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, inner(block.blocks));
    case "list":
      return renderList(block, inner);
    case "table":
      return renderTable(block);
    default:
      return element("p", {}, inline(block.text));
  }
}

function renderList({ start, items }, inner) {
  const nodes = items.map(([first, ...rest]) => {
    if (first?.kind !== "paragraph") return element("li", {}, inner(first ? [first, ...rest] : []));
    return element("li", {}, inline(first.text), inner(rest));
  });
  return start === null ? element("ul", {}, nodes) : element("ol", { start }, nodes);
}

function renderTable({ head, align, rows }) {
  const row = (tag, texts) =>
    element(
      "tr",
      {},
      texts.map((text, i) => element(tag, { class: align[i] }, inline(text))),
    );
  const table = element(
    "table",
    {},
    element("thead", {}, row("th", head)),
    element("tbody", {}, rows.map((texts) => row("td", texts))),
  );
  return element("div", { class: "table", tabindex: "0" }, table);
}
