// The list of conversations: choose, rename, delete.

import { element, iconButton } from "./dom.js";
import { t } from "./text.js";

/**
 * Fills `list`. current: the shown conversation's id; busy(id): whether it is being answered;
 * actions: rename(conversation, title), remove(conversation).
 */
export function showConversations(list, conversations, { current, busy, actions }) {
  list.replaceChildren(
    ...conversations.map((conversation) => {
      const { id, title } = conversation;
      const link = element(
        "a",
        { href: `#${id}`, "aria-current": id === current ? "page" : null, title },
        title || t("untitled"),
      );
      const item = element(
        "li",
        { class: busy(id) ? "busy" : null },
        link,
        iconButton("edit", `${t("rename")}: ${title}`, () => renameIn(item, conversation, actions)),
        iconButton("delete", `${t("remove")}: ${title}`, () => actions.remove(conversation)),
      );
      return item;
    }),
  );
}

/** Enter or leaving the field keeps the new title, Escape the old one. */
function renameIn(item, conversation, actions) {
  const field = element("input", { "aria-label": t("rename"), maxlength: "200" });
  field.value = conversation.title;
  let done = false;
  const finish = (title) => {
    if (done) return;
    done = true;
    actions.rename(conversation, title.trim() || conversation.title);
  };
  field.addEventListener("blur", () => finish(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") finish(field.value);
    if (event.key !== "Escape") return;
    event.stopPropagation();
    finish(conversation.title);
  });
  item.replaceChildren(field);
  field.select();
}
