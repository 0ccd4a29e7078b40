"use strict";
const at = (id) => document.getElementById(id);
const MOST_SENTENCES = 2000; // shown; the rest is counted
let writing = null; // the AbortController of the request under way
let model = "";

function say(text, isWrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", isWrong);
}

function headers() {
  const token = at("token").value;
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function findModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      at("token_label").hidden = false;
      at("model").textContent = "wants a bearer token";
      return false;
    }
    if (!response.ok) throw new Error(await told(response));
    model = (await response.json()).data[0].id;
    at("model").textContent = model;
    return true;
  } catch (error) {
    at("model").textContent = "not connected";
    say(`No connection to the server: ${error.message}`, true);
    return false;
  }
}

function request() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return {
    model,
    prompt: at("prompt").value,
    stream: true,
    stream_options: { include_usage: true },
    return_context: true,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
    stop: at("stop").value === "" ? undefined : at("stop").value,
    session: at("session").value === "" ? undefined : at("session").value,
  };
}

function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 10 * size ? 0 : 1)} ${unit}`;
  }
  return `${count} B`;
}

class Context {
  constructor() {
    this.list = at("sentences");
    this.list.replaceChildren();
    this.open = this.entry("", true);
    for (const id of ["held", "plain", "closed", "open_tokens", "first", "rate", "cached"]) at(id).textContent = "–";
    for (const id of ["bar_held", "bar_plain"]) at(id).style.width = "0";
  }
  entry(text, isOpen) {
    const item = document.createElement("li");
    item.textContent = text;
    item.className = isOpen ? "open" : "";
    this.list.append(item);
    return item;
  }
  begin({ kept, sentences, open }) {
    if (kept) this.list.insertBefore(this.entry(kept, true), this.open);
    const shown = sentences.slice(-MOST_SENTENCES);
    if (shown.length < sentences.length) this.fold(`${sentences.length - shown.length} earlier sentences`);
    for (const sentence of shown) this.fold(sentence);
    this.open.textContent = open;
  }
  fold(text) {
    this.open.textContent = text.trim() || "(start)";
    this.open.title = text;
    this.open.className = "";
    this.open = this.entry("", true);
  }
  add(text) {
    this.open.textContent += text;
  }
  take(context) {
    if (context.closes_sentence) this.fold(this.open.textContent);
    if (context.folded !== null) {
      // What stays in full before it, the first time.
      const before = this.open.textContent.indexOf(context.folded);
      if (before > 0) this.list.insertBefore(this.entry(this.open.textContent.slice(0, before), true), this.open);
      this.fold(context.folded);
      this.open.textContent = context.rest;
    }
    at("held").textContent = bytes(context.held_bytes);
    at("plain").textContent = `${bytes(context.plain_bytes)} (${(context.plain_bytes / context.held_bytes).toFixed(1)}×)`;
    at("closed").textContent = context.closed_sentences;
    at("open_tokens").textContent = context.open_tokens;
    const most = Math.max(context.plain_bytes, context.held_bytes);
    at("bar_plain").style.width = `${(100 * context.plain_bytes) / most}%`;
    at("bar_held").style.width = `${(100 * context.held_bytes) / most}%`;
    this.list.scrollTop = this.list.scrollHeight;
  }
}

// The data of each server-sent event, as text comes in.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

async function write(event) {
  event?.preventDefault();
  if (writing) return;
  if (!model && !(await findModel())) return;
  writing = new AbortController();
  at("write").disabled = true;
  at("stop_writing").disabled = false;
  at("output").textContent = "";
  const context = new Context();
  const started = performance.now();
  let first = null;
  let count = 0;
  let isDone = false;
  say("Reading …");
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: writing.signal,
    });
    if (response.status === 401) at("token_label").hidden = false;
    if (!response.ok) throw new Error(await told(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") { isDone = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) {
        at("cached").textContent = `${chunk.usage.prompt_tokens_details.cached_tokens} of ${chunk.usage.prompt_tokens}`;
        continue;
      }
      if (chunk.context?.sentences) { context.begin(chunk.context); continue; }
      if (first === null) {
        first = performance.now();
        at("first").textContent = `${(first - started).toFixed(0)} ms`;
        say("Writing …");
      }
      count += 1;
      const text = chunk.choices[0].text;
      at("output").textContent += text;
      context.add(text);
      if (chunk.context) context.take(chunk.context);
      if (count > 1) at("rate").textContent = ((1000 * (count - 1)) / (performance.now() - first)).toFixed(1);
      if (chunk.choices[0].finish_reason) say(chunk.choices[0].finish_reason === "stop" ? "Done." : "Done: as long as asked for.");
    }
    if (!isDone) throw new Error("the connection broke off");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error instanceof TypeError ? `No connection to the server: ${error.message}` : error.message, true);
  } finally {
    writing = null;
    at("write").disabled = false;
    at("stop_writing").disabled = true;
  }
}

at("form").addEventListener("submit", write);
at("stop_writing").addEventListener("click", () => writing?.abort());
at("token").addEventListener("change", findModel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") writing?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
});
findModel();
