// Making nodes. Text always goes in as text: nothing here or elsewhere parses HTML.

/** A new element; `on...` attributes are listeners, null leaves one out. A child is a node, a text
 * or an array of them: a model's answer can have more of them than a call has arguments. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) node.append(child);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of index.html's symbols. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon; the label is what screen readers say. */
export function iconButton(name, label, onclick) {
  return element(
    "button",
    { type: "button", class: "icon", title: label, "aria-label": label, onclick },
    icon(name),
  );
}

/** Copies `text()` when pressed, and says so for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    if (!(await copy(text()))) return;
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Without https or localhost there is no clipboard API; the old way still works.
  const area = element("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
