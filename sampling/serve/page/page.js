"use strict";
// One prompt, a lane for each mode, all decoded at once: every lane is a request of its own, and reads the server's events.
const $ = id => document.getElementById(id);
const ABOUT = {
  ar: "left to right", block: "in blocks", diffusion: "all at once", speculative: "drafts, verified",
  infill: "gaps, by the rule", leftmost: "gaps, left to right",
};
// What the number beside the rule is, by rule; those that are not here count steps, or have nothing.
const VALUES = {
  threshold: ["confidence_threshold", "sure above"], capped: ["confidence_threshold", "sure above"],
  quota: ["confidence_threshold", "sure above"], factor: ["confidence_factor", "factor"],
  entropy_bound: ["entropy_bound", "nats at most"], first_hitting: [null, "(no number)"],
};
let card = null, running = [], talk = [];

function say(text) { if ($("status").textContent !== text) $("status").textContent = text; }

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

// --- What the server has -------------------------------------------------------------------------

async function meet() {
  const reply = await fetch("v1/models", { headers: headers() });
  if (reply.status === 401) {
    document.querySelector("details").open = true;
    say("This server asks for its key: enter it below.");
    return;
  }
  if (!reply.ok) throw new Error(`the server answers ${reply.status}`);
  card = (await reply.json()).data[0];
  const own = card.hybrid;
  $("model").textContent = `${card.id} · ${own.context} tokens of context · ${own.mode} where nothing is said`;
  document.title = `${card.id} · hybrid`;
  $("max").max = own.limits.max_tokens;
  $("samples").max = Math.min(8, own.limits.n);
  document.querySelector("[value=chat]").disabled = !own.chat;
  document.querySelector("[value=gaps]").disabled = !own.infill || !own.tokenizer;
  if (!$("rule").options.length) {
    for (const rule of own.reveal) $("rule").add(new Option(rule, rule, rule === "threshold", rule === "threshold"));
  }
  $("base").textContent = `${location.origin}/v1`;
  $("curl").textContent = `curl ${location.origin}/v1/completions -H 'content-type: application/json' \\\n`
    + `  -d '{"model": ${JSON.stringify(card.id)}, "prompt": "Once", "max_tokens": 32, "hybrid": {"mode": "${own.modes[0]}"}}'`;
  if (!$("prompt").value) $("prompt").value = own.chat ? "" : "def main():\n";
  change();
  say("");
}

const task = () => document.querySelector("[name=task]:checked").value;
const waysOf = () => task() === "gaps" ? ["infill", "leftmost"] : card ? card.hybrid.modes : [];

function change() {
  const now = task(), ways = waysOf();
  $("prompt-label").textContent = { continue: "Text to be continued", chat: "Your message", gaps: "Text with gaps" }[now];
  $("gap-tools").hidden = now !== "gaps";
  $("talk").hidden = now !== "chat" || !talk.length;
  $("max").disabled = now === "gaps";
  const old = new Set([...document.querySelectorAll("#ways input")].filter(box => !box.checked).map(box => box.value));
  for (const label of document.querySelectorAll("#ways label")) label.remove();
  for (const way of ways) {
    const label = document.createElement("label"), box = document.createElement("input");
    Object.assign(box, { type: "checkbox", value: way, checked: !old.has(way) });
    label.append(box, ` ${way === "leftmost" ? "infill" : way} (${ABOUT[way]})`);
    $("ways").append(label);
  }
  named();
}

function named() {
  const [name, words] = VALUES[$("rule").value] ?? ["steps_per_block", "drafts a window"];
  $("value-label").textContent = words;
  $("value").disabled = name === null;
}

// --- One lane -------------------------------------------------------------------------------------

function asked(way) {
  const now = task(), mode = way === "leftmost" ? "infill" : way, own = { mode, drafts: true };
  const drafts = mode === "block" || mode === "diffusion" || mode === "infill", rule = way === "leftmost" ? way : $("rule").value;
  if (drafts) {
    own.reveal = rule;
    const [name] = VALUES[rule] ?? ["steps_per_block"];
    if (name && way !== "leftmost" && number("value") !== undefined) own[name] = number("value");
  }
  if (mode === "block" || mode === "speculative") {
    if (number("window") !== undefined && card.hybrid.clean_attention !== "block") own.block_size = number("window");
  }
  if (mode === "speculative" && $("fused").checked) own.fused = true;
  const body = {
    model: card.id, stream: true, stream_options: { include_usage: true }, n: number("samples") ?? 1,
    temperature: number("temperature") ?? 0, top_p: number("top-p") ?? 1, seed: number("seed") ?? 0, hybrid: own,
  };
  if (now !== "gaps") body.max_tokens = number("max") ?? 64;
  if (now === "chat") body.messages = [...talk, { role: "user", content: $("prompt").value }];
  else body.prompt = $("prompt").value;
  return body;
}

class Sample {
  // A text as it comes about: cells of tokens, each with the forward that showed it.
  constructor(root, before) {
    this.canvas = document.createElement("div");
    this.canvas.className = "canvas";
    this.canvas.setAttribute("aria-busy", "true");
    if (before) {
      const span = document.createElement("span");
      span.className = "given";
      span.textContent = before;
      this.canvas.append(span);
    }
    this.cells = [];
    this.base = null;
    this.text = "";
    this.tokens = 0;
    root.append(this.canvas);
  }

  take(event, forward) {
    this.base ??= event.given ? event.place : 0;
    const at = event.place - this.base, pieces = [...event.settled, ...event.window];
    pieces.forEach((piece, i) => {
      const state = event.given?.[i] ? "given" : i < event.settled.length ? "final" : piece === null ? "hidden" : "draft";
      this.put(at + i, piece ?? "·", state, forward, event.confidence[i]);
    });
    while (this.cells.length > at + pieces.length) this.cells.pop().span.remove();
    if (event.settled.length) this.tokens = at + event.settled.length;
  }

  put(place, text, state, forward, chance) {
    let cell = this.cells[place];
    if (!cell) {
      cell = this.cells[place] = { span: document.createElement("span"), forward, state: "", text: null };
      this.canvas.append(cell.span);
    }
    if (cell.text === text && cell.state === state) return;
    // What was drafted before and stays what it was keeps the forward that showed it.
    if (cell.text !== text && cell.state !== "final") cell.forward = forward;
    const fresh = cell.text !== text;
    Object.assign(cell, { text, state });
    cell.span.textContent = text;
    cell.span.className = `token ${state}${fresh ? " fresh" : ""}`;
    cell.span.style.setProperty("--h", hue(cell.forward));
    if (state === "final" || state === "draft") cell.span.title = `forward ${cell.forward}, probability ${chance}`;
  }

  end() {
    this.canvas.setAttribute("aria-busy", "false");
    for (const cell of this.cells) if (cell.state === "draft" || cell.state === "hidden") cell.span.remove();
    this.cells = this.cells.filter(cell => cell.state === "final" || cell.state === "given");
  }
}

const hue = forward => (forward * 137.5 + 200) % 360; // neighbours differ, whichever they are

class Lane {
  constructor(way) {
    this.way = way;
    this.root = $("lane").content.firstElementChild.cloneNode(true);
    this.root.dataset.way = way;
    const title = this.root.querySelector("h2");
    title.textContent = `${way === "leftmost" ? "infill" : way} (${ABOUT[way]})`;
    title.id = `way-${way}`;
    this.root.setAttribute("aria-labelledby", title.id);
    this.stopper = new AbortController();
    this.forwards = new Map();
    $("lanes").append(this.root);
  }

  figure(name, value) { this.root.querySelector(`[data-figure=${name}]`).textContent = value; }

  fail(message) {
    const error = this.root.querySelector(".error");
    error.textContent = message;
    error.hidden = false;
  }

  async run(body) {
    const begun = performance.now(), path = body.messages ? "v1/chat/completions" : "v1/completions";
    const before = body.hybrid.mode === "infill" ? body.prompt.split("<mask", 1)[0] : "";
    this.samples = Array.from({ length: body.n }, () => new Sample(this.root.querySelector(".samples"), before));
    let lost = false;
    try {
      const reply = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: this.stopper.signal });
      if (!reply.ok) {
        const said = await reply.json().catch(() => null);
        throw Object.assign(new Error(said?.error?.message ?? `the server answers ${reply.status}`), { told: true });
      }
      let first = null;
      for await (const [kind, data] of events(reply.body)) {
        if (data.error) throw Object.assign(new Error(data.error.message), { told: true });
        if (kind === "draft") {
          if (!this.forwards.has(data.forward)) this.forwards.set(data.forward, this.forwards.size + 1);
          this.samples[data.index].take(data, this.forwards.get(data.forward));
          if (data.settled.length && first === null) {
            first = performance.now();
            this.figure("first", `${Math.round(first - begun)} ms`);
          }
          const tokens = this.samples.reduce((sum, sample) => sum + sample.tokens, 0);
          if (first !== null && performance.now() > first && body.hybrid.mode !== "infill") {
            this.figure("speed", (tokens * 1000 / (performance.now() - begun)).toFixed(0));
            this.figure("tokens", tokens);
          }
        } else {
          for (const choice of data.choices) this.samples[choice.index].text += choice.delta?.content ?? choice.text ?? "";
          if (data.usage) this.finish(data.usage, Boolean(body.messages));
        }
      }
    } catch (error) {
      if (error.name === "AbortError") this.fail("Stopped.");
      else {
        this.fail(error.told ? error.message : "The connection was lost.");
        lost = !error.told;
      }
    }
    for (const sample of this.samples) sample.end();
    return !lost;
  }

  finish(usage, chat) {
    const own = usage.hybrid, count = usage.completion_tokens;
    this.figure("tokens", count);
    this.figure("speed", (count / own.seconds).toFixed(own.seconds > 0 && count / own.seconds < 10 ? 1 : 0));
    this.figure("gain", own.tokens_per_forward === null ? "–" : own.tokens_per_forward.toFixed(2));
    if (own.time_to_first_token !== null) this.figure("first", `${Math.round(own.time_to_first_token * 1000)} ms`);
    if (chat) {
      const keep = this.root.querySelector(".keep");
      keep.hidden = false;
      keep.onclick = () => goOn(this.samples[0].text);
    }
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      let kind = "message", data = "";
      for (const line of part.split(/\r?\n/)) {
        if (line.startsWith("event: ")) kind = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data && data !== "[DONE]") yield [kind, JSON.parse(data)];
    }
  }
}

// --- What the buttons do --------------------------------------------------------------------------

async function decode(event) {
  event?.preventDefault();
  if (running.length) return;
  if (!card) return meet().catch(wait);
  const ways = [...document.querySelectorAll("#ways input:checked")].map(box => box.value).slice(0, 4);
  if (!ways.length) return say("Choose a mode.");
  $("lanes").replaceChildren();
  running = ways.map(way => new Lane(way));
  lock(true);
  say(`Decoding in ${ways.length} mode${ways.length > 1 ? "s" : ""}.`);
  const good = await Promise.all(running.map(lane => lane.run(asked(lane.way))));
  running = [];
  lock(false);
  if (good.every(Boolean)) say("Done.");
  else wait();
}

function lock(busy) {
  $("run").disabled = busy;
  $("stop").disabled = !busy;
}

function stop() { for (const lane of running) lane.stopper.abort(); }

// The server may be started anew: the page stays, and goes on when it is back.
async function wait() {
  say("The server does not answer. This page tries again every second.");
  for (;;) {
    await new Promise(done => setTimeout(done, 1000));
    try {
      if ((await fetch("health")).ok) {
        await meet();
        return say("The server is back.");
      }
    } catch { /* not yet */ }
  }
}

function goOn(answer) {
  talk.push({ role: "user", content: $("prompt").value }, { role: "assistant", content: answer });
  $("talk").replaceChildren(...talk.map(message => {
    const item = document.createElement("li"), who = document.createElement("b");
    who.textContent = message.role === "user" ? "You: " : "Model: ";
    item.append(who, message.content);
    return item;
  }));
  $("talk").hidden = false;
  $("lanes").replaceChildren();
  $("prompt").value = "";
  $("prompt").focus();
  say("Kept. Write what comes next.");
}

function gap() {
  const text = $("prompt"), [from, to] = [text.selectionStart, text.selectionEnd];
  const size = number("gap-size") ?? Math.max(1, Math.round((to - from) / 3));
  text.setRangeText(`<mask:${size}>`, from, to, "end");
  text.focus();
  say(`A gap of ${size} token${size > 1 ? "s" : ""}.`);
}

for (const sample of document.querySelectorAll("[data-sample]")) sample.style.setProperty("--h", hue(+sample.dataset.sample));
$("form").addEventListener("submit", decode);
$("stop").addEventListener("click", stop);
$("gap").addEventListener("click", gap);
$("tasks").addEventListener("change", change);
$("rule").addEventListener("change", named);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  meet().catch(wait);
});
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decode();
  if (event.key === "Escape") stop();
});
meet().catch(wait);
