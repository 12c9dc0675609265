"use strict";
// The playground: two answers a turn, from the server that gave this page. No other address is used.

const $ = (id) => document.getElementById(id);
const state = {
  info: null, plans: {}, latents: [], colour: null, turns: [], running: null, heat: 0,
};

// --- the server ------------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askKey();
    return call(path, options);
  }
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

let asking = null;
function askKey() {
  asking ??= new Promise((done) => {
    $("key").addEventListener("close", () => {
      sessionStorage.setItem("key", $("key-value").value);
      $("key-value").value = "";
      asking = null;
      done();
    }, { once: true });
    $("key").showModal();
  });
  return asking;
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const document = JSON.parse(data);
      if (document.error) throw new Error(document.error.message);
      yield document;
    }
  }
}

// --- small helpers ---------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const number = (value, digits = 2) => (value == null ? "–" : Number(value).toFixed(digits));
const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥");

let saidTimer = 0;
function say(text) {
  $("said").textContent = text;
  $("said").hidden = false;
  clearTimeout(saidTimer);
  saidTimer = setTimeout(() => { $("said").hidden = true; }, 6000);
}

// --- what steers -----------------------------------------------------------------------------

function steering() {
  const plans = Object.entries(state.plans).map(([plan, times]) => ({ plan, times }));
  const latents = state.latents.filter((one) => one.dose !== 0).map((one) => (
    { latents: { [one.id]: 1 }, unit: "rel", scale: one.dose }
  ));
  return [...plans.filter((one) => one.times !== 0), ...latents];
}

function planRow(plan) {
  const on = plan.name in state.plans;
  const layers = [...new Set(plan.parts.map((part) => part.layer))];
  const words = [...new Set(plan.parts.map((part) => `${part.method}, ${part.scope}`))].join("; ");
  const where = `layer${layers.length > 1 ? "s" : ""} ${layers.join(", ")} · ${words}`;
  const box = make("input", {
    type: "checkbox", checked: on,
    onchange: (event) => {
      if (event.target.checked) state.plans[plan.name] = 1;
      else delete state.plans[plan.name];
      show();
    },
  });
  const name = make("span", { class: "grow" }, plan.name);
  const row = make("li", { class: on ? "on" : "" }, make("div", { class: "row" }, make("label", { class: "grow" }, box, name)),
    make("div", { class: "detail" }, plan.task && plan.task !== plan.name ? `${plan.task} · ${where}` : where));
  if (on) {
    row.append(slider(`Strength of ${plan.name}, times its own`, state.plans[plan.name], -1, 4, "×", (value) => {
      state.plans[plan.name] = value;
    }));
  }
  return row;
}

function slider(label, value, low, high, unit, change) {
  const shown = make("output", {}, `${unit}${number(value)}`);
  const range = make("input", {
    type: "range", min: low, max: high, step: 0.05, value, "aria-label": label,
    oninput: (event) => {
      change(Number(event.target.value));
      shown.textContent = `${unit}${number(event.target.value)}`;
      showSummary();
    },
  });
  return make("div", { class: "row" }, range, shown);
}

function latentRow(one) {
  const colour = make("input", {
    type: "radio", name: "colour", checked: state.colour === one.id,
    onchange: () => { state.colour = one.id; state.heat = 0; show(); showTurns(); },
  });
  const remove = make("button", {
    type: "button", class: "plain small", "aria-label": `Remove latent ${one.id}`,
    onclick: () => {
      state.latents = state.latents.filter((other) => other !== one);
      if (state.colour === one.id) state.colour = null;
      show();
      showTurns();
    },
  }, "×");
  const reads = state.info.sae.reads;
  const row = make("li", { class: one.dose ? "on" : "" },
    make("div", { class: "row" }, make("strong", { class: "grow" }, `Latent ${one.id}`),
      reads ? make("label", { class: "quiet" }, colour, "colour") : null, remove),
    card(one),
    slider(`Dose of latent ${one.id}, as a share of the residual`, one.dose, -1, 1, "", (value) => {
      one.dose = value;
      row.classList.toggle("on", value !== 0);
    }));
  return row;
}

function card(one) {
  const body = make("div", { class: "detail" });
  if (one.description) body.append(make("div", {}, one.description));
  for (const token of one.tokens.slice(0, 8)) body.append(make("span", { class: "token" }, visible(token)));
  return body;
}

function add(one, colour) {
  if (!state.latents.some((other) => other.id === one.id)) state.latents.push({ ...one, dose: 0.2 });
  if (colour) state.colour = one.id;
  $("query").value = "";
  $("found").replaceChildren();
  show();
}

let searched = 0;
async function search() {
  const query = $("query").value.trim();
  const mine = ++searched;
  if (!query) {
    $("found").replaceChildren();
    return;
  }
  try {
    const response = await call(`v1/steering/latents?limit=20&q=${encodeURIComponent(query)}`);
    const { data } = await response.json();
    if (mine !== searched) return;
    const rows = data.map((one) => make("li", {}, make("div", { class: "row" },
      make("strong", { class: "grow" }, `Latent ${one.id}`),
      make("button", { type: "button", class: "small", "aria-label": `Add latent ${one.id}`, onclick: () => add(one, state.colour === null) }, "Add")),
    card(one)));
    $("found").replaceChildren(...(rows.length ? rows : [make("li", { class: "quiet" }, "No latent has these words.")]));
  } catch (error) {
    say(error.message);
  }
}

// --- what is seen ----------------------------------------------------------------------------

function showSummary() {
  const parts = steering().map((one) => (
    one.plan ? `${one.plan} ×${number(one.times)}` : `latent ${Object.keys(one.latents)[0]} ${number(one.scale)}`
  ));
  $("summary").textContent = parts.length ? `– ${parts.join(", ")}` : "– nothing is on";
  $("measure").disabled = !parts.length;
}

function show() {
  $("plans").replaceChildren(...state.info.plans.map(planRow));
  $("no-plans").hidden = state.info.plans.length > 0;
  $("chosen").replaceChildren(...state.latents.map(latentRow));
  $("no-latents").hidden = state.latents.length > 0;
  $("damage").replaceChildren();
  showSummary();
  showLegend();
}

function showLegend() {
  const shown = state.colour !== null;
  $("legend").hidden = !shown;
  if (shown) {
    $("legend").replaceChildren(make("span", {}, `Coloured by latent ${state.colour}: 0`),
      make("span", { class: "scale", "aria-hidden": "true" }), make("span", {}, number(state.heat)));
  }
}

function paint(answer) {
  answer.view.text.replaceChildren();
  if (!answer.busy && !answer.error && !answer.text.trim()) {
    answer.view.text.append(make("span", { class: "unseen" }, "no text that can be seen"));
    return;
  }
  const values = answer.activations[state.colour];
  if (state.colour === null || !values || !answer.tokens.length) {
    answer.view.text.textContent = answer.text;
    return;
  }
  answer.tokens.forEach((text, index) => {
    const value = values[index];
    const span = make("span", { title: value == null ? "not known: the last token is not run" : `latent ${state.colour}: ${number(value, 3)}` }, text);
    if (value > 0 && state.heat > 0) {
      span.style.background = `rgb(var(--heat) / calc(var(--hottest) * ${(value / state.heat).toFixed(3)}))`;
    }
    answer.view.text.append(span);
  });
}

function paintAll() {
  for (const turn of state.turns) for (const side of ["steered", "plain"]) if (turn[side]) paint(turn[side]);
}

function facts(answer) {
  const said = [];
  const line = answer.view.facts;
  line.classList.toggle("bad", Boolean(answer.error));
  if (answer.error) said.push(answer.error);
  const found = answer.steering;
  if (found) {
    const nats = found.nats_per_token;
    if (found.plans) {
      said.push("dose ", make("b", {}, number(found.relative_dose)), ` on ${found.tokens_touched} tokens`);
      if (found.tokens_gated_off) said.push(`, ${found.tokens_gated_off} gated off`);
      if (nats && nats.unsteered !== null) {
        said.push(" · damage ", make("b", {}, `${number(nats.unsteered - nats.steered)} nats`), " a token");
      }
    } else if (nats && nats.unsteered !== null) {
      said.push(`${number(nats.unsteered)} nats a token`);
    }
    if (answer.end === "length") said.push(" · cut at the longest");
  }
  line.replaceChildren(...said);
  line.title = found && found.plans
    ? "dose: median length of what was added, as a share of the residual. damage: how much less likely, a token, the unsteered model finds this answer than the steered one does"
    : "how surprising the model finds its own answer";
}

function answerView(turn, side, title) {
  const text = make("div", { class: "text" });
  const line = make("p", { class: "facts" });
  turn[side].view = { text, facts: line };
  return make("article", { class: `answer ${side}` }, make("h3", {}, title), text, line);
}

function showTurns() {
  $("turns").replaceChildren(...state.turns.map((turn) => {
    const pair = make("div", { class: "pair" });
    if (turn.steered) pair.append(answerView(turn, "steered", `Steered: ${turn.how}`));
    pair.append(answerView(turn, "plain", "Unsteered"));
    return make("li", {}, make("div", { class: "asked" }, turn.asked), pair);
  }));
  for (const turn of state.turns) {
    for (const side of ["steered", "plain"]) {
      if (!turn[side]) continue;
      paint(turn[side]);
      facts(turn[side]);
      turn[side].view.text.classList.toggle("busy", turn[side].busy);
    }
  }
  $("empty").hidden = state.turns.length > 0;
}

const atEnd = () => {
  const list = $("turns");
  list.scrollTop = list.scrollHeight;
  if (getComputedStyle(list).overflowY === "visible") window.scrollTo(0, document.body.scrollHeight);
};

// --- asking ----------------------------------------------------------------------------------

const newAnswer = () => ({ text: "", tokens: [], activations: {}, steering: null, error: null, end: null, busy: true });

function history(side) {
  const messages = [];
  for (const turn of state.turns) {
    messages.push({ role: "user", content: turn.asked });
    const said = (turn[side] || turn.plain);
    if (said && !said.busy && said.text) messages.push({ role: "assistant", content: said.text });
  }
  return messages;
}

async function ask(turn, side, steer, signal) {
  const answer = turn[side];
  const body = {
    model: state.info.model, stream: true, damage: true, temperature: Number($("temperature").value),
    max_tokens: Number($("length").value), seed: Number($("seed").value), steer,
  };
  const watched = state.info.sae && state.info.sae.reads ? state.latents.slice(0, 16).map((one) => one.id) : [];
  if (watched.length) body.activations = watched;
  let path = "v1/completions";
  if (state.info.chat) {
    path = "v1/chat/completions";
    body.messages = history(side);
  } else body.prompt = turn.asked;
  try {
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
    for await (const document of chunks(response)) {
      const choice = document.choices[0];
      if (!choice) continue;
      answer.text += state.info.chat ? choice.delta.content || "" : choice.text;
      for (const token of choice.tokens || []) answer.tokens[token.index] = token.text;
      for (const one of choice.activations || []) {
        one.values.forEach((value, place) => {
          (answer.activations[watched[place]] ??= [])[one.index] = value;
          if (watched[place] === state.colour && value > state.heat) state.heat = value;
        });
      }
      if (choice.finish_reason) answer.end = choice.finish_reason;
      if (choice.steering) answer.steering = choice.steering;
      if (watched.length) paintAll();
      else paint(answer);
      showLegend();
    }
  } catch (error) {
    answer.error = error.name === "AbortError" ? "stopped" : error.message;
  }
  answer.busy = false;
  answer.view.text.classList.remove("busy");
  paint(answer);
  facts(answer);
  atEnd();
}

async function send(event) {
  event.preventDefault();
  const asked = $("prompt").value;
  if (!asked.trim() || state.running || !state.info) return;
  const steer = steering();
  const how = $("summary").textContent.replace(/^– /, "");
  const turn = { asked, how, plain: newAnswer(), steered: steer.length ? newAnswer() : null };
  state.turns.push(turn);
  $("prompt").value = "";
  showTurns();
  atEnd();
  const control = (state.running = new AbortController());
  $("send").hidden = true;
  $("stop").hidden = false;
  const sides = [ask(turn, "plain", [], control.signal)];
  if (turn.steered) sides.push(ask(turn, "steered", steer, control.signal));
  await Promise.all(sides);
  state.running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
}

async function measure() {
  $("measure").disabled = true;
  $("damage").replaceChildren(make("dt", {}, "measuring…"));
  try {
    const body = JSON.stringify({ steer: steering() });
    const found = await (await call("v1/steering/damage", { method: "POST", body })).json();
    const lines = [
      ["KL from the unsteered model, nats a token", number(found.kl, 3)],
      ["Rise of cross-entropy, nats a token", number(found.delta_ce, 3)],
      ["Same likeliest token", `${Math.round(100 * found.top1_agreement)} %`],
      ["Relative dose", number(found.relative_dose, 3)],
    ];
    $("damage").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  } catch (error) {
    $("damage").replaceChildren();
    say(error.message);
  }
  showSummary();
}

// --- sharing ---------------------------------------------------------------------------------

function packed() {
  const shared = {
    plans: state.plans, latents: state.latents.map((one) => [one.id, one.dose]), colour: state.colour,
    temperature: Number($("temperature").value), length: Number($("length").value), seed: Number($("seed").value),
    prompt: $("prompt").value,
    turns: state.turns.map((turn) => ({
      asked: turn.asked, how: turn.how, plain: kept(turn.plain), steered: kept(turn.steered),
    })),
  };
  const bytes = new TextEncoder().encode(JSON.stringify(shared));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

const kept = (answer) => answer && { text: answer.text, steering: answer.steering, end: answer.end };

async function share() {
  location.hash = packed();
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied. It holds the chat and the settings.");
  } catch {
    say("The link is in the address bar. It holds the chat and the settings.");
  }
}

async function unpack() {
  if (location.hash.length < 2) return;
  try {
    const text = atob(location.hash.slice(1).replace(/-/g, "+").replace(/_/g, "/"));
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    const shared = JSON.parse(new TextDecoder().decode(bytes));
    const known = new Set(state.info.plans.map((plan) => plan.name));
    for (const [name, times] of Object.entries(shared.plans)) if (known.has(name)) state.plans[name] = Number(times);
    const ids = state.info.sae ? shared.latents.map(([id]) => Number(id)) : [];
    if (ids.length) {
      const { data } = await (await call(`v1/steering/latents?ids=${ids.join(",")}`)).json();
      state.latents = data.map((one, place) => ({ ...one, dose: Number(shared.latents[place][1]) }));
      state.colour = ids.includes(shared.colour) ? shared.colour : null;
    }
    for (const name of ["temperature", "length", "seed", "prompt"]) $(name).value = shared[name];
    state.turns = shared.turns.map((turn) => ({
      asked: String(turn.asked), how: String(turn.how),
      plain: { ...newAnswer(), ...turn.plain, busy: false },
      steered: turn.steered && { ...newAnswer(), ...turn.steered, busy: false },
    }));
  } catch {
    say("This link holds no chat that can be read.");
  }
}

// --- beginning -------------------------------------------------------------------------------

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}

async function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
  });
  if (matchMedia("(max-width: 820px)").matches) $("panel").open = false;
  matchMedia("(max-width: 820px)").addEventListener("change", (event) => { if (!event.matches) $("panel").open = true; });
  $("form").addEventListener("submit", send);
  $("stop").addEventListener("click", () => state.running && state.running.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  $("query").addEventListener("input", () => search());
  $("measure").addEventListener("click", measure);
  $("share").addEventListener("click", share);
  $("new").addEventListener("click", () => {
    if (state.running) state.running.abort();
    state.turns = [];
    state.heat = 0;
    location.hash = "";
    showTurns();
    $("prompt").focus();
  });
  try {
    state.info = await (await call("v1/steering")).json();
  } catch (error) {
    $("model").textContent = "no answer";
    say(error.message);
    return;
  }
  $("model").textContent = state.info.model;
  $("length").max = state.info.limits.max_new_tokens;
  $("length").value = Math.min(128, state.info.limits.max_new_tokens);
  if (state.info.sae) {
    $("latents-section").hidden = false;
    $("sae").textContent = `${state.info.sae.d_sae} at layer ${state.info.sae.layer}`;
  }
  await unpack();
  show();
  showTurns();
  document.body.dataset.ready = "yes";
}

begin();
