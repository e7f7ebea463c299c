// The page: one conversation on show, its composer, and whatever answers are being written.

import { Answer } from "./answer.js";
import { ApiError, models } from "./api.js";
import { element } from "./dom.js";
import { askForKey, setUpSettings } from "./settings.js";
import { showConversations } from "./sidebar.js";
import * as store from "./store.js";
import { t } from "./text.js";
import { messageView } from "./view.js";

const $ = (selector) => document.querySelector(selector);
const [input, log, scroller, notice] = ["#input", "#log", "#scroller", "#notice"].map($);
const TITLE_LENGTH = 60;

const running = new Map(); // conversation id -> Answer
let conversation = store.newConversation();
let views = [];
let model = null;
let editing = null; // the index of the message that is being rewritten
let atEnd = true;

// -- showing -------------------------------------------------------------------------------------

function show(other) {
  conversation = other;
  cancelEdit();
  atEnd = true;
  showMessages();
  closeSidebar();
}

function showMessages() {
  views = conversation.messages.map((message, index) =>
    messageView(message, { again: () => answerAgain(index), edit: () => edit(index) }),
  );
  log.replaceChildren(...views.map((view) => view.node));
  for (const view of views) view.update();
  showState();
}

/** Whatever depends on more than one message. */
function showState() {
  const busy = running.has(conversation.id);
  views.at(-1)?.update(busy);
  log.ariaBusy = String(busy);
  $("#send").hidden = busy;
  $("#stop").hidden = !busy;
  $("#send").disabled = model === null;
  $("#model").textContent = model ?? "";
  $("#title").textContent = conversation.title;
  $("#welcome").hidden = views.length > 0;
  document.title = conversation.title ? `${conversation.title} · nybble` : "nybble";
  showConversations($("#conversations"), store.conversations(), {
    current: conversation.id,
    busy: (id) => running.has(id),
    actions: { rename, remove },
  });
  followEnd();
}

function followEnd() {
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  $("#to-end").hidden = atEnd;
}

/** A line at the foot of the page, with a button if `action` is given; "" takes it away. */
function say(text, label, action) {
  notice.replaceChildren(text);
  if (!action) return;
  const press = () => {
    say("");
    action();
  };
  notice.append(element("button", { type: "button", class: "plain", onclick: press }, label));
}

// -- conversations -------------------------------------------------------------------------------

/** The conversation that the address names; what is being answered is newer than what is kept. */
function showAddressed() {
  const id = location.hash.slice(1);
  if (id === conversation.id) return;
  show(running.get(id)?.conversation ?? store.load(id) ?? store.newConversation());
}

function startNew() {
  history.pushState(null, "", location.pathname);
  show(store.newConversation());
  input.focus();
}

function keep(changed) {
  changed.updated = Date.now();
  if (!store.save(changed)) say(t("full"));
}

function rename(renamed, title) {
  const known = running.get(renamed.id)?.conversation;
  for (const copy of [renamed, known, conversation]) {
    if (copy?.id === renamed.id) copy.title = title;
  }
  store.save(renamed.id === conversation.id ? conversation : (known ?? renamed));
  showState();
}

function remove(removed) {
  running.get(removed.id)?.stop();
  store.remove(removed.id);
  if (removed.id === conversation.id) startNew();
  else showState();
  say(t("deleted"), t("undo"), () => {
    store.save(removed);
    showState();
  });
}

// -- answers -------------------------------------------------------------------------------------

function send() {
  const text = input.value.trim();
  if (!text || model === null || running.has(conversation.id)) return;
  if (editing !== null) conversation.messages.length = editing;
  cancelEdit();
  input.value = "";
  fitInput();
  conversation.title ||= text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  conversation.messages.push({ role: "user", content: text });
  history.replaceState(null, "", `#${conversation.id}`);
  answer(conversation);
}

/** Write the answer at `index` anew, and forget what came after it. */
function answerAgain(index) {
  if (running.has(conversation.id)) return;
  conversation.messages.length = index;
  answer(conversation);
}

async function answer(asked) {
  const writing = new Answer(asked, model, store.settings());
  running.set(asked.id, writing);
  say("");
  keep(asked);
  $("#status").textContent = t("writing");
  atEnd = true;
  if (asked === conversation) showMessages();
  let error;
  try {
    error = await writing.run(store.apiKey(), oncePerFrame(asked));
  } finally {
    running.delete(asked.id);
  }
  if (store.load(asked.id)) keep(asked); // unless it was deleted meanwhile
  $("#status").textContent = t(writing.message.end === "stopped" ? "stopped" : "finished");
  showState();
  if (error?.status === 401 && (await askForKey()) && asked === conversation) {
    answerAgain(asked.messages.length - 1);
  }
}

/** A function that shows the last message, at most once for each frame of the screen. */
function oncePerFrame(asked) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      if (asked !== conversation || !running.has(asked.id)) return;
      views.at(-1).update(true);
      followEnd();
    });
  };
}

function stop() {
  running.get(conversation.id)?.stop();
}

// -- composer ------------------------------------------------------------------------------------

function edit(index) {
  if (running.has(conversation.id)) return;
  editing = index;
  $("#editing").hidden = false;
  input.value = conversation.messages[index].content;
  fitInput();
  input.focus();
}

function cancelEdit() {
  if (editing === null) return;
  editing = null;
  $("#editing").hidden = true;
  input.value = "";
  fitInput();
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function onKey(event) {
  // An input method for Chinese uses both keys for its own choice of words.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey && event.target === input) {
    event.preventDefault();
    send();
  }
  if (event.key === "Escape" && !$("dialog[open]")) dismiss();
}

/** Escape: away with what lies on top. */
function dismiss() {
  if (document.body.classList.contains("sidebar")) closeSidebar();
  else if (running.has(conversation.id)) stop();
  else cancelEdit();
}

/** On a phone; a wide screen always shows it. */
function openSidebar() {
  document.body.classList.add("sidebar");
  $("#close-sidebar").focus();
}

function closeSidebar() {
  document.body.classList.remove("sidebar");
}

// -- the server ----------------------------------------------------------------------------------

/** Ask for the model's name until the server has one. */
async function connect() {
  try {
    [model] = await models(store.apiKey());
    say("");
    showState();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) {
      if (await askForKey()) connect();
      else say(error.message, t("continue"), connect);
      return;
    }
    say(error.code === "loading" ? t("loading") : error.message || t("unreachable"));
    setTimeout(connect, 2000);
  }
}

// -- beginning -----------------------------------------------------------------------------------

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("#stop").addEventListener("click", stop);
$("#cancel-edit").addEventListener("click", cancelEdit);
$("#new-chat").addEventListener("click", startNew);
$("#open-sidebar").addEventListener("click", openSidebar);
$("#close-sidebar").addEventListener("click", closeSidebar);
$("#shade").addEventListener("click", closeSidebar);
$("#open-settings").addEventListener("click", closeSidebar);
$("#to-end").addEventListener("click", () => {
  atEnd = true;
  followEnd();
});
input.addEventListener("input", fitInput);
document.addEventListener("keydown", onKey);
scroller.addEventListener("scroll", () => {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  $("#to-end").hidden = atEnd;
});
window.addEventListener("hashchange", showAddressed);
window.addEventListener("popstate", showAddressed);
window.addEventListener("pagehide", () => {
  for (const unfinished of running.values()) {
    unfinished.stop();
    keep(unfinished.conversation);
  }
});
window.addEventListener("storage", (event) => {
  const id = store.changedConversation(event); // by another tab
  if (id === conversation.id && event.newValue && !running.has(id)) show(store.load(id));
  else if (id) showState();
});

setUpSettings(showMessages);
showAddressed();
showMessages();
connect();
