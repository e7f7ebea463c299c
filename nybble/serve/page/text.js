// Every word of the page, in English and Chinese.

const WORDS = {
  en: {
    otherLanguage: "中文",
    newChat: "New chat",
    conversations: "Conversations",
    settings: "Settings",
    close: "Close",
    cancel: "Cancel",
    messages: "Messages",
    welcome: "What would you like to know?",
    yourMessage: "Your message",
    hint: "Enter sends · Shift+Enter starts a new line · Esc stops",
    send: "Send",
    stop: "Stop",
    you: "You",
    assistant: "Assistant",
    thinking: "Thinking",
    thought: "Thoughts",
    copy: "Copy",
    copyCode: "Copy the code",
    edit: "Edit",
    editing: "Editing: what follows the message will be replaced.",
    again: "Answer again",
    toEnd: "To the end",
    rename: "Rename",
    remove: "Delete",
    untitled: "New chat",
    deleted: "Deleted.",
    undo: "Undo",
    system: "System prompt",
    systemDefault: "The model's own",
    temperature: "Temperature",
    topP: "Top-p",
    topK: "Top-k",
    maxTokens: "Max tokens",
    seed: "Seed",
    modelDefault: "default",
    noLimit: "no limit",
    random: "random",
    language: "Language",
    theme: "Colours",
    asBrowser: "Automatic",
    asSystem: "Automatic",
    light: "Light",
    dark: "Dark",
    reset: "Reset the settings",
    kept: "Conversations and settings are kept in this browser alone.",
    keyTitle: "The server wants a key",
    keyField: "API key",
    keyKept: "Kept until this tab is closed.",
    continue: "Continue",
    loading: "The model is loading …",
    writing: "Writing an answer.",
    finished: "The answer is complete.",
    stopped: "Stopped.",
    length: "Cut off at the limit of tokens.",
    unreachable: "The connection to the server was lost: check that it runs, then answer again.",
    full: "The browser has no room left to keep this: delete old conversations.",
    speed: (rate) => `${rate} tokens/s`,
    tokens: (count) => (count === 1 ? "1 token" : `${count} tokens`),
    first: (seconds) => `first after ${seconds} s`,
  },
  zh: {
    otherLanguage: "English",
    newChat: "新对话",
    conversations: "对话列表",
    settings: "设置",
    close: "关闭",
    cancel: "取消",
    messages: "消息",
    welcome: "想了解什么？",
    yourMessage: "输入消息",
    hint: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    send: "发送",
    stop: "停止",
    you: "你",
    assistant: "助手",
    thinking: "正在思考",
    thought: "思考过程",
    copy: "复制",
    copyCode: "复制代码",
    edit: "编辑",
    editing: "正在编辑：此消息之后的内容将被替换。",
    again: "重新回答",
    toEnd: "回到底部",
    rename: "重命名",
    remove: "删除",
    untitled: "新对话",
    deleted: "已删除。",
    undo: "撤销",
    system: "系统提示词",
    systemDefault: "使用模型自带的",
    temperature: "温度",
    topP: "Top-p",
    topK: "Top-k",
    maxTokens: "最大 token 数",
    seed: "随机种子",
    modelDefault: "默认",
    noLimit: "不限",
    random: "随机",
    language: "语言",
    theme: "外观",
    asBrowser: "自动",
    asSystem: "自动",
    light: "浅色",
    dark: "深色",
    reset: "恢复默认设置",
    kept: "对话和设置只保存在这个浏览器里。",
    keyTitle: "服务器需要密钥",
    keyField: "API 密钥",
    keyKept: "只保留到此标签页关闭。",
    continue: "继续",
    loading: "模型正在加载……",
    writing: "正在回答。",
    finished: "回答完毕。",
    stopped: "已停止。",
    length: "已达到 token 上限，回答被截断。",
    unreachable: "与服务器的连接已断开：请确认服务器正在运行，然后重新回答。",
    full: "浏览器存储空间已满：请删除旧对话。",
    speed: (rate) => `${rate} token/秒`,
    tokens: (count) => `${count} 个 token`,
    first: (seconds) => `首个用时 ${seconds} 秒`,
  },
};

/** "en" or "zh": the wanted one, else what the browser prefers. */
export function language(wanted) {
  if (wanted in WORDS) return wanted;
  const known = navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag in WORDS);
  return known ?? "en";
}

/** The words of the page's present language; `values` fill the places of a phrase. */
export function t(name, ...values) {
  const word = WORDS[document.documentElement.lang.slice(0, 2)][name];
  return typeof word === "function" ? word(...values) : word;
}

/** Put the words into index.html's elements. */
export function translate(lang) {
  document.documentElement.lang = lang === "zh" ? "zh-CN" : lang;
  for (const node of document.querySelectorAll("[data-text]")) {
    node.textContent = t(node.dataset.text);
  }
  for (const node of document.querySelectorAll("[data-placeholder]")) {
    node.placeholder = t(node.dataset.placeholder);
  }
  for (const node of document.querySelectorAll("[data-label]")) {
    node.ariaLabel = t(node.dataset.label);
    if (node.tagName === "BUTTON") node.title = node.ariaLabel;
  }
}
