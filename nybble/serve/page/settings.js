// The dialogs: settings, and the key that a server may want.

import { saveApiKey, saveSettings, settings } from "./store.js";
import { language, translate } from "./text.js";

const dialog = document.querySelector("#settings");
const form = dialog.querySelector("form");
const keyDialog = document.querySelector("#key");

/** Show and keep the settings; changed() runs when the language is another one. */
export function setUpSettings(changed) {
  document.querySelector("#open-settings").addEventListener("click", () => dialog.showModal());
  document.querySelector("#reset").addEventListener("click", () => use({}, changed));
  document.querySelector("#language").addEventListener("click", () => {
    const other = document.documentElement.lang === "en" ? "zh" : "en";
    use({ ...settings(), language: other }, changed);
  });
  form.addEventListener("change", () => use(read(), changed));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // outside of it
  });
  use(settings(), () => {});
}

function use(values, changed) {
  saveSettings(values);
  for (const field of form.elements) {
    if (field.name) field.value = values[field.name] ?? "";
  }
  const before = document.documentElement.lang;
  translate(language(values.language));
  document.documentElement.dataset.theme = values.theme ?? "";
  if (document.documentElement.lang !== before) changed();
}

/** What the fields hold; empty and impossible ones are left out. */
function read() {
  const fields = [...form.elements].filter((field) => field.name && field.value.trim());
  const good = fields.filter((field) => field.reportValidity());
  return Object.fromEntries(
    good.map((field) => [field.name, field.type === "number" ? field.valueAsNumber : field.value]),
  );
}

/** Ask for the server's key; false when the dialog was left without one. */
export function askForKey() {
  const field = keyDialog.querySelector("input");
  field.value = "";
  keyDialog.returnValue = "";
  keyDialog.showModal();
  return new Promise((resolve) => {
    keyDialog.addEventListener(
      "close",
      () => {
        if (field.value) saveApiKey(field.value);
        resolve(field.value !== "");
      },
      { once: true },
    );
  });
}
