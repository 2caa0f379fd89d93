import { Failure, command, events, images, models } from "./api.js";
import { ABOUT, Card, element, picture } from "./card.js";

// Numbers of the form, with the methods that use them; no list: all do.
const NUMBERS = { seed: null, n: null, num_iter: null, head_steps: null, cfg: null, gamma: ["cspd"], window: ["lossless"] };
const SHELF = 24;
const NARROW = matchMedia("(max-width: 860px)");
const CALM = matchMedia("(prefers-reduced-motion: reduce)");
const $ = (id) => document.getElementById(id);
let model = null;
let running = null;

function say(text) { $("status").textContent = text; }

function chip(group, value, checked) {
  const input = element("input", { type: "radio", name: group, value, checked });
  return element("label", {}, input, element("span", { textContent: value }));
}

function chosen(group) {
  return document.querySelector(`input[name=${group}]:checked`)?.value;
}

function pick(group, value) {
  const input = [...document.querySelectorAll(`input[name=${group}]`)].find((i) => i.value === value);
  if (input) { input.checked = true; input.dispatchEvent(new Event("change", { bubbles: true })); }
}

/* Errors stand at their field, in the words of the API; all others above the images. */
function show(error) {
  $("error").replaceChildren();
  $("error").hidden = true;
  for (const note of document.querySelectorAll(".problem")) note.hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  if (!error) return;
  if (error.status === 401) $("key-field").hidden = false;
  const note = error.problem?.field && $(`${error.problem.field}-problem`);
  const box = note || $("error");
  box.hidden = false;
  box.replaceChildren(error instanceof Failure ? error.message : "The server cannot be reached.");
  if (error.problem?.id) box.append(element("small", { textContent: `id ${error.problem.id}` }));
  if (note) point(error.problem.field);
}

function point(name) {
  const field = name === "label" && $("label").hidden ? document.querySelector("[name=class]:checked") : $(name);
  field?.closest("details")?.setAttribute("open", "");
  if (field?.id === name) field.setAttribute("aria-invalid", "true");
  field?.focus();
}

/* What the form asks of `method`. */
function request(method) {
  const body = { label: $("label").hidden ? chosen("class") : $("label").value, method };
  for (const [name, users] of Object.entries(NUMBERS)) {
    const field = $(name);
    if (users && !users.includes(method)) continue;
    if (field.validity.badInput) throw new Failure({ field: name, message: `${name}: expected a number` });
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

function reseed() { $("seed").value = Math.floor(Math.random() * 100000); }

async function run(card, signal) {
  card.root.classList.add("active");
  card.say("waiting for its turn");
  try {
    if (card.body.n > 1) {
      card.done(await images(card.body, $("key").value, signal));
    } else {
      for await (const [kind, data] of events(card.body, $("key").value, signal)) {
        if (kind === "started") card.say("decoding");
        if (kind === "step") card.step(data);
        if (kind === "done") card.done([data]);
      }
    }
    shelve(card);
  } catch (error) {
    const known = card.cells ? ` after ${card.known} of ${card.cells.length} tokens` : "";
    card.say(error.name === "AbortError" ? `stopped${known}` : "not finished");
    throw error;
  } finally {
    card.root.classList.remove("active");
  }
}

function add(card) {
  $("cards").append(card.root);
  $("cards").classList.toggle("several", $("cards").children.length > 1);
  card.find(".save").addEventListener("click", () => { card.save(); say("Saved"); });
  card.find(".copy").addEventListener("click", () => copy(card));
  return card;
}

async function copy(card) {
  const text = command(card.body, model);
  card.showCommand(text);
  // Only a secure context has a clipboard; the command is shown and selected in any case.
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  say(copied ? "Command copied" : "Command shown and selected");
}

/* One after the other, so that none takes time from another. */
async function generate(signal) {
  await work(add(new Card(model, request(chosen("method")))), signal);
}

/* All methods, and the honest baseline: the target with as many calls as cspd took. */
async function compare(signal) {
  const cards = {};
  const one = async (name, body, ...words) => {
    cards[name] = add(new Card(model, { ...body, n: 1 }, ...words));
    await work(cards[name], signal);
    if (name !== "target") cards[name].compare(cards.target.seconds);
  };
  for (const method of model.methods) {
    await one(method, request(method));
    if (method !== "cspd") continue;
    const steps = cards.cspd.targetCalls;
    await one("baseline", { ...request("target"), num_iter: steps }, `target, ${steps} steps`, "fewer steps");
    cards.baseline.find(".verdict").append(", with as many calls of the target as cspd");
  }
}

async function work(card, signal) {
  say(`${card.title} started`);
  await run(card, signal);
  say(`${card.title} finished in ${card.seconds.toFixed(1)} seconds`);
}

async function start(job, opener) {
  if (!model || running) return;
  show(null);
  $("cards").replaceChildren();
  if (opener && !$("lock").checked) reseed();
  running = new AbortController();
  const held = opener && document.activeElement === opener;
  busy(true);
  if (held) $("stop").focus({ preventScroll: true });
  let failed = null;
  try {
    const done = job(running.signal);
    if (opener && NARROW.matches) {
      $("stage").scrollIntoView({ behavior: CALM.matches ? "auto" : "smooth", block: "start" });
    }
    await done;
  } catch (error) {
    failed = error;
  }
  const back = document.activeElement === $("stop");
  busy(false);
  running = null;
  if (back) opener?.focus({ preventScroll: true });
  if (failed?.name === "AbortError") say("Stopped");
  else if (failed) { show(failed); say("Not finished"); }
}

function busy(on) {
  $("stop").hidden = !on;
  $("generate").disabled = $("compare").disabled = on;
  $("stage").setAttribute("aria-busy", on);
}

function shelve({ body, answers }) {
  for (const data of answers) {
    const name = `${data.class_name}, ${body.method}, seed ${body.seed}`;
    const image = element("img", { src: picture(data.png), alt: "" });
    image.classList.toggle("small", model.image_size < 128);
    const button = element("button", { type: "button", title: name, ariaLabel: `Use ${name}` }, image);
    button.addEventListener("click", () => use(body, name));
    $("thumbs").prepend(button);
  }
  while ($("thumbs").children.length > SHELF) $("thumbs").lastElementChild.remove();
  $("shelf").hidden = false;
}

function use(body, name) {
  pick("method", body.method);
  if ($("label").hidden) pick("class", body.label);
  else $("label").value = body.label;
  for (const field of Object.keys(NUMBERS)) $(field).value = body[field] ?? "";
  $("lock").checked = true;
  say(`Settings of ${name}`);
}

async function load() {
  [model] = await models($("key").value);
  fill();
  await start(generate);
}

function fill() {
  const many = model.classes.length > 24;
  $("label").hidden = !many;
  if (many) {
    $("class-list").replaceChildren(...model.classes.map((value) => element("option", { value })));
    $("label").value = model.classes[0];
  } else {
    const first = Math.min(7, model.classes.length - 1);
    $("class-chips").replaceChildren(...model.classes.map((c, i) => chip("class", c, i === first)));
  }
  const best = model.methods.includes("cspd") ? "cspd" : "target";
  $("methods").replaceChildren(...model.methods.map((m) => chip("method", m, m === best)));
  explain();
  for (const name of Object.keys(NUMBERS)) bound(name);
  $("model").textContent = `${model.classes.length} classes, ${model.grid} × ${model.grid} tokens, bundle ${model.id.slice(0, 8)}`
    + (model.synthetic ? ", random weights" : "");
}

/* The server's bounds; the form leaves it to the server to refuse. */
function bound(name) {
  const { min, max } = model.bounds[name], field = $(name);
  field.min = min;
  field.max = Math.min(max, Number.MAX_SAFE_INTEGER);
  field.title = `${min} to ${field.max}`;
  const usual = { gamma: 8, window: 8, ...model.defaults }[name];
  if (usual !== undefined) field.placeholder = usual;
}

function explain() {
  const method = chosen("method");
  $("about").textContent = ABOUT[method]?.[1] ?? "";
  for (const [name, users] of Object.entries(NUMBERS)) {
    if (users) $(name).closest("label").hidden = !users.includes(method);
  }
}

$("methods").addEventListener("change", explain);
$("dice").addEventListener("click", reseed);
$("seed").addEventListener("input", () => { $("lock").checked = true; });
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => load().catch(show));
$("compare").addEventListener("click", () => start(compare, $("compare")));
$("form").addEventListener("submit", (event) => { event.preventDefault(); start(generate, $("generate")); });
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
load().catch(show);
