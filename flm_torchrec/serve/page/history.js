// The history that is composed by hand: items in order, each with a kind of event and a time if wanted.

import { find, make } from "./elements.js";

export class History {
  events = [];

  constructor(changed) {
    this.changed = changed;
    this.kinds = [];
  }

  add(...items) {
    this.events.push(...items.map(({ key, title }) => ({ key, title, event: this.kinds[0], time: "" })));
    this.#update();
  }

  clear() {
    this.events = [];
    this.show();
  }

  // As /v1/recommend takes it.
  asked() {
    return this.events.map(({ key, event, time }) => ({
      item: key, ...(event && { event }), ...(time && { timestamp: Math.floor(Date.parse(`${time}Z`) / 1000) }),
    }));
  }

  show() {
    find("history-empty").hidden = this.events.length > 0;
    find("history").replaceChildren(...this.events.map((event, place) => this.#row(event, place)));
  }

  #update() {
    this.show();
    this.changed();
  }

  #row(event, place) {
    const button = (text, label, enabled, act) => {
      const made = make("button", { type: "button", textContent: text, disabled: !enabled, "aria-label": `${label} ${event.title}` });
      made.addEventListener("click", () => { act(); this.#update(); this.#focus(place); });
      return made;
    };
    const kind = make("select", { "aria-label": `Kind of event of ${event.title}` },
      ...this.kinds.map((name) => make("option", { value: name, textContent: name, selected: name === event.event })));
    kind.addEventListener("change", () => { event.event = kind.value; this.changed(); });
    const time = make("input", { type: "datetime-local", step: "1", value: event.time, "aria-label": `Time of ${event.title}, UTC, if wanted` });
    time.addEventListener("change", () => { event.time = time.value; this.changed(); });
    const last = this.events.length - 1;
    return make("li", {},
      make("span", { className: "title", dir: "auto", textContent: event.title, title: event.key }),
      make("span", { className: "moves" },
        button("↑", "Move up", place > 0, () => this.#swap(place, place - 1)),
        button("↓", "Move down", place < last, () => this.#swap(place, place + 1)),
        button("✕", "Remove", true, () => this.events.splice(place, 1))),
      make("span", { className: "when" }, kind, time));
  }

  #swap(one, other) {
    [this.events[one], this.events[other]] = [this.events[other], this.events[one]];
  }

  // The rows are built again: the keyboard focus stays where it was.
  #focus(place) {
    const rows = find("history").children;
    const row = rows[Math.min(place, rows.length - 1)];
    (row?.querySelector(".moves button:enabled") ?? find("item")).focus();
  }
}
