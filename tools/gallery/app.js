"use strict";

const ABOUT = {
  target: ["exact", "The large model alone, one step after the other."],
  cspd: ["approximate", "A small model drafts tokens, the large one judges many at once."],
  lossless: ["exact", "The large model drafts its own denoising steps: same law, fewer calls."],
  draft: ["the draft's law", "The small model alone."],
};
const OPTIONS = { num_iter: Number, head_steps: Number, cfg: Number, gamma: Number };
const COMPARED = ["target", "cspd", "lossless"];
const SHELF = 24;
const $ = (id) => document.getElementById(id);
let model = null;
let running = null;

function say(text) { $("status").textContent = text; }

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function chip(group, value, checked) {
  const input = element("input", { type: "radio", name: group, value, checked });
  return element("label", {}, input, element("span", { textContent: value }));
}

function chosen(group) {
  return document.querySelector(`input[name=${group}]:checked`)?.value;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

class Failure extends Error {
  constructor(problem, status) { super(problem.message); this.problem = problem; this.status = status; }
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  return new Failure(body.error ?? { message: `The server answered ${response.status}.` }, response.status);
}

function show(error) {
  const box = $("error");
  box.replaceChildren();
  box.hidden = !error;
  if (!error) return;
  if (error.status === 401) $("key-field").hidden = false;
  box.append(error instanceof Failure ? error.message : "The server cannot be reached.");
  if (error.problem?.id) box.append(element("small", { textContent: `id ${error.problem.id}` }));
}

/* One method at work: the picture, the map of its tokens, its counters. */
class Card {
  constructor(method) {
    const root = $("card").content.cloneNode(true).firstElementChild;
    this.root = root;
    this.method = method;
    this.find = (selector) => root.querySelector(selector);
    root.dataset.method = method;
    this.find("h2").textContent = method;
    this.find(".law").textContent = ABOUT[method][0];
    const map = this.find(".map");
    map.style.gridTemplateColumns = `repeat(${model.grid}, 1fr)`;
    map.classList.toggle("fine", model.grid > 10);
    this.cells = Array.from({ length: model.grid ** 2 }, () => element("i", { className: "cell" }));
    map.append(...this.cells);
    this.find(".bar").setAttribute("aria-label", `${method}: progress`);
    this.judged = this.accepted = 0;
  }

  draw(png, alt) {
    const image = this.find("img");
    image.src = `data:image/png;base64,${png}`;
    image.classList.toggle("small", model.image_size < 128);
    image.alt = alt;
    image.hidden = false;
  }

  step(data) {
    const accepted = new Set(data.accepted), rejected = new Set(data.rejected);
    for (const cell of this.cells) cell.classList.remove("new");
    for (const position of data.new) {
      const kind = accepted.has(position) ? "accepted" : rejected.has(position) ? "rejected" : "exact";
      this.cells[position].className = `cell new ${kind}`;
    }
    this.accepted += accepted.size;
    this.judged += accepted.size + rejected.size;
    this.column(accepted.size, rejected.size, data.new.length - accepted.size - rejected.size);
    this.draw(data.preview, `${this.method}: unfinished, ${data.known} of ${data.total} tokens`);
    this.numbers(data);
  }

  column(accepted, rejected, exact) {
    const counts = { accepted, rejected, exact };
    const column = element("span");
    for (const [kind, count] of Object.entries(counts)) {
      if (!count) continue;
      const part = element("i", { className: kind });
      part.style.height = `${Math.max(3, count * 3)}px`;
      column.append(part);
    }
    this.find(".history").append(column);
  }

  numbers(data) {
    const share = Math.round(100 * data.known / data.total);
    const rate = this.judged ? `${Math.round(100 * this.accepted / this.judged)} %` : "–";
    this.find(".known").textContent = `${data.known}/${data.total}`;
    this.find(".rate").textContent = rate;
    this.find(".target").textContent = data.target_calls;
    this.find(".draft").textContent = data.draft_calls;
    this.find(".time").textContent = `${data.seconds.toFixed(2)} s`;
    this.find(".bar").setAttribute("aria-valuenow", share);
    this.find(".bar i").style.width = `${share}%`;
    this.find(".map").setAttribute("aria-label",
      `${data.known} of ${data.total} tokens, ${this.accepted} accepted, ${this.judged - this.accepted} rejected`);
  }

  done(data) {
    this.seconds = data.seconds;
    this.draw(data.png, `${data.class_name}, made with ${this.method}`);
    this.find(".time").textContent = `${data.seconds.toFixed(2)} s`;
    this.find(".verdict").textContent = `${data.class_name}, finished`;
  }
}

/* Server-sent events of a POST request, one object at a time. */
async function* events(body, signal) {
  const response = await fetch("/v1/images/stream",
    { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [, kind, data] = /^event: (.*)\ndata: (.*)$/s.exec(block);
      yield [kind, JSON.parse(data)];
    }
  }
}

async function run(card, body, signal) {
  card.root.classList.add("active");
  card.find(".verdict").textContent = "waiting for its turn";
  let finished = false;
  try {
    for await (const [kind, data] of events(body, signal)) {
      if (kind === "started") card.find(".verdict").textContent = "decoding";
      if (kind === "step") card.step(data);
      if (kind === "error") throw new Failure(data);
      if (kind === "done") { finished = true; card.done(data); shelve(body, data); }
    }
    if (!finished) throw new Failure({ message: "The server ended the answer too early." });
  } finally {
    card.root.classList.remove("active");
    if (!finished) card.find(".verdict").textContent = "not finished";
  }
}

function shelve(body, data) {
  const name = `${data.class_name}, ${body.method}, seed ${body.seed}`;
  const image = element("img", { src: `data:image/png;base64,${data.png}`, alt: "" });
  image.classList.toggle("small", model.image_size < 128);
  const button = element("button", { type: "button", title: name, ariaLabel: `Use ${name}` }, image);
  button.addEventListener("click", () => {
    $("seed").value = body.seed;
    pick("method", body.method);
    choose(body.label);
    say(`Settings of ${name}`);
  });
  $("thumbs").prepend(button);
  if ($("thumbs").children.length > SHELF) $("thumbs").lastElementChild.remove();
  $("shelf").hidden = false;
}

function pick(group, value) {
  const input = [...document.querySelectorAll(`input[name=${group}]`)].find((i) => i.value === value);
  if (input) { input.checked = true; input.dispatchEvent(new Event("change", { bubbles: true })); }
}

function choose(label) {
  if ($("class-name").hidden) pick("class", label);
  else $("class-name").value = label;
}

function request(method) {
  const body = { label: $("class-name").hidden ? chosen("class") : $("class-name").value,
    seed: Number($("seed").value), method };
  for (const [name, parse] of Object.entries(OPTIONS)) {
    if (name === "gamma" && method !== "cspd") continue;
    if ($(name).value !== "") body[name] = parse($(name).value);
  }
  return body;
}

/* Run the methods one after the other, so that none takes time from another. */
async function start(methods) {
  if (!$("form").reportValidity()) return;
  show(null);
  const cards = methods.map((method) => new Card(method));
  $("cards").replaceChildren(...cards.map((card) => card.root));
  $("cards").classList.toggle("several", cards.length > 1);
  running = new AbortController();
  busy(true);
  try {
    for (const card of cards) {
      say(`${card.method} started`);
      await run(card, request(card.method), running.signal);
      say(`${card.method} finished in ${card.seconds.toFixed(1)} seconds`);
      judge(cards);
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped");
    else show(error);
  } finally {
    busy(false);
  }
}

function judge(cards) {
  const base = cards.find((card) => card.method === "target")?.seconds;
  if (!base || cards.length < 2) return;
  for (const card of cards.filter((c) => c.seconds && c.method !== "target")) {
    const ratio = element("b", { textContent: `${(base / card.seconds).toFixed(2)}×` });
    card.find(".verdict").replaceChildren(ratio, " the speed of the target");
  }
}

function busy(on) {
  $("generate").disabled = $("compare").disabled = on;
  $("stop").hidden = !on;
  $("stage").setAttribute("aria-busy", on);
}

async function load() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  [model] = (await response.json()).data;
  fill();
  show(null);
}

function fill() {
  const many = model.classes.length > 24;
  $("class-name").hidden = !many;
  if (many) {
    $("class-list").replaceChildren(...model.classes.map((value) => element("option", { value })));
    $("class-name").value = model.classes[0];
  } else {
    const first = Math.min(7, model.classes.length - 1);
    $("class-chips").replaceChildren(...model.classes.map((c, i) => chip("class", c, i === first)));
  }
  const best = model.methods.includes("cspd") ? "cspd" : "target";
  $("methods").replaceChildren(...model.methods.map((m) => chip("method", m, m === best)));
  explain();
  for (const name of Object.keys(OPTIONS)) {
    if (name in model.defaults) $(name).placeholder = model.defaults[name];
  }
  $("model").textContent = `${model.classes.length} classes, ${model.grid} × ${model.grid} tokens, bundle ${model.id.slice(0, 8)}`
    + (model.synthetic ? ", random weights" : "");
  $("cards").replaceChildren(new Card(best).root);
}

function explain() { $("about").textContent = ABOUT[chosen("method")]?.[1] ?? ""; }

$("methods").addEventListener("change", explain);
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 100000); });
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => load().catch(show));
$("compare").addEventListener("click", () => start(COMPARED.filter((m) => model?.methods.includes(m))));
$("form").addEventListener("submit", (event) => { event.preventDefault(); start([chosen("method")]); });
load().catch(show);
