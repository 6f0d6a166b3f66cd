// The page: whom to recommend to, what each head answers, and where that lies on the map.

import { get, Latest, post } from "./api.js";
import { combobox, find, make } from "./elements.js";
import { History } from "./history.js";
import { list, waiting } from "./lists.js";
import { ItemMap } from "./map.js";
import { arrange, narrow } from "./tabs.js";

const latest = new Latest();
const map = new ItemMap();
const history = new History(() => refresh());
let catalogue = null;
let user = "";

function say(error) {
  find("error").hidden = !error;
  find("error").textContent = error ?? "";
}

async function start() {
  catalogue = await get("/v1/catalogue");
  const health = await get("/health");
  find("model").textContent = `${health.items.toLocaleString("en")} items · ${health.users.toLocaleString("en")} users · model ${health.model_version}`;
  history.kinds = catalogue.events;
  history.show();
  const before = chosen();
  find("filters").replaceChildren(...Object.entries(catalogue.features).filter(([, values]) => values.length).map(([name, values]) =>
    make("label", {}, name, make("select", { name }, make("option", { value: "", textContent: "any" }),
      ...values.map((value) => make("option", { value, textContent: value, selected: before[name]?.[0] === value }))))));
  get("/v1/map").then((data) => map.load(data)).catch((error) => { find("map-note").textContent = error.message; });
}

function chosen() {
  const selects = [...find("filters").querySelectorAll("select")].filter((select) => select.value);
  return Object.fromEntries(selects.map((select) => [select.name, [select.value]]));
}

// fused first, then the heads it is made of
const heads = () => [...catalogue.heads].sort((a, b) => (b === "fused") - (a === "fused"));

function fill(columns) {
  find("lists").replaceChildren(...columns);
  arrange();
}

// Ask all heads in one request, so that all lists are of one state of one model.
async function refresh() {
  const signal = latest.next();
  say(null);
  find("status").textContent = "Asking…";
  find("lists").setAttribute("aria-busy", "true");
  try {
    if (!find("k").checkValidity()) throw new Error(`Items: give 1 … ${find("k").max}.`);
    if (!catalogue) await start();
    if (!find("lists").childElementCount) fill(heads().map(waiting));
    const common = { history: history.asked(), k: find("k").valueAsNumber, exclude_seen: find("exclude").checked, filter: chosen(), explain: true, ...(user && { user }) };
    const [answer, known] = await Promise.all([
      post("/v1/recommend/batch", { requests: heads().map((head) => ({ ...common, head })) }, signal),
      user ? get("/v1/events", { user }, signal) : [],
    ]);
    if (signal.aborted) return;
    if (answer.answers[0].model_version !== catalogue.model_version) await start(); // another export is served now
    if (signal.aborted) return;
    show(answer.answers, known);
  } catch (error) {
    if (signal.aborted) return;
    fill([]);
    map.highlight([], []);
    find("status").textContent = "";
    say(error.message);
  } finally {
    if (!signal.aborted) find("lists").setAttribute("aria-busy", "false");
  }
}

function show(answers, known) {
  fill(answers.map((answer) => list(answer, user ? (item) => did(item) : null)));
  find("known").hidden = !user;
  find("known-title").textContent = `${known.length} last ${known.length === 1 ? "event" : "events"} of ${user}`;
  find("known-events").replaceChildren(...[...known].reverse().map((event) =>
    make("li", {}, make("span", { dir: "auto", textContent: event.title, title: event.item }), make("span", { className: "muted", textContent: event.event }))));
  const seen = [...known.map((event) => event.item), ...history.events.map((event) => event.key)];
  map.highlight(seen, answers[0].items.map((item) => item.item));
  find("status").textContent = user ? `For ${user}` : history.events.length ? "For someone new with this history" : "For someone nothing is known of";
}

// What a picked user has just done changes the next answer, with no training.
async function did(item) {
  try {
    await post("/v1/events", { user, item: item.item });
    await refresh();
    find("results").focus({ preventScroll: true });
  } catch (error) {
    say(error.message);
  }
}

function pick(key) {
  user = key;
  find("user").value = key;
  find("known").hidden = true;
  refresh();
}

const quietly = (search) => search.catch((error) => { say(error.message); return []; });
const named = ({ item, title }) => ({ key: item, title: title || item });

combobox(find("user"), find("user-options"),
  (text) => quietly(get("/v1/users", { query: text, limit: 12 }).then((keys) => keys.map((key) => ({ key, title: key })))),
  (found) => pick(found.key));
combobox(find("item"), find("item-options"),
  (text) => quietly(get("/v1/items", { query: text, limit: 12 }).then((items) => items.map(named))),
  (found) => { find("item").value = ""; history.add(found); });

find("user").addEventListener("change", () => {
  if (find("user").value.trim()) find("user").value = user; // typed but not taken: the box names whom the lists are for
  else if (user) pick("");
});
find("paste").addEventListener("click", () => {
  const keys = find("keys").value.split("\n").map((key) => key.trim()).filter(Boolean);
  find("keys").value = "";
  if (keys.length) history.add(...keys.map((key) => ({ key, title: key })));
});
find("k").addEventListener("change", refresh);
find("exclude").addEventListener("change", refresh);
find("filters").addEventListener("change", refresh);
find("clear").addEventListener("click", () => {
  find("asked").reset();
  history.clear();
  pick("");
});
// On a narrow screen the lists come sooner.
const fold = () => { for (const part of document.querySelectorAll("details.part")) part.open = !narrow.matches; };
if (narrow.matches) fold();
narrow.addEventListener("change", () => { if (!narrow.matches) fold(); });
find("asked").addEventListener("submit", (event) => event.preventDefault());
refresh();
