// What the browser keeps. One entry a conversation, so that two tabs do not undo each other.

const PREFIX = "nybble.chat.";
const SETTINGS = "nybble.settings";
const KEY = "nybble.key";

/** An empty conversation, kept once it has a message. */
export function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: 0, messages: [] };
}

/** All kept conversations, the latest first. */
export function conversations() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => read(localStorage, key))
    .filter((conversation) => Array.isArray(conversation?.messages))
    .sort((a, b) => b.updated - a.updated);
}

export function load(id) {
  return read(localStorage, PREFIX + id);
}

/** False where the browser has no room left. */
export function save(conversation) {
  return write(localStorage, PREFIX + conversation.id, conversation);
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** The id that a storage event is about; null for other entries. */
export function changedConversation(event) {
  return event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
}

export const settings = () => read(localStorage, SETTINGS) ?? {};
export const saveSettings = (values) => write(localStorage, SETTINGS, values);

// The key is a secret: it goes when the tab is closed.
export const apiKey = () => read(sessionStorage, KEY);
export const saveApiKey = (key) => write(sessionStorage, KEY, key);

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // not ours, or cut off: as if it were not there
  }
}

function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // the quota
  }
}
