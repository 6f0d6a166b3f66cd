// On a narrow screen one head at a time, chosen by a tab, after the ARIA pattern of tabs. On a wide one all stand side by side.

import { find, make } from "./elements.js";

export const narrow = matchMedia("(max-width: 640px)");
let shown = null;

const panels = () => [...find("lists").querySelectorAll(".list")];

// Call this whenever the lists were built again: the head that was shown stays shown.
export function arrange() {
  const heads = panels().map((panel) => panel.dataset.head);
  if (!heads.includes(shown)) shown = heads[0];
  find("tabs").replaceChildren(...panels().map((panel) => tab(panel)));
  mark();
}

function tab(panel) {
  const button = make("button", { type: "button", role: "tab", className: `head-${panel.dataset.head}`,
    textContent: panel.querySelector("h2").textContent, "aria-controls": panel.id });
  button.dataset.head = panel.dataset.head;
  button.addEventListener("click", () => { shown = panel.dataset.head; mark(); });
  button.addEventListener("keydown", (event) => move(event));
  return button;
}

function move(event) {
  const tabs = [...find("tabs").children];
  const here = tabs.indexOf(event.currentTarget);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const chosen = tabs[(next + tabs.length) % tabs.length];
  shown = chosen.dataset.head;
  mark();
  chosen.focus();
}

function mark() {
  for (const button of find("tabs").children) {
    const chosen = button.dataset.head === shown;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
  for (const panel of panels()) {
    panel.classList.toggle("shown", panel.dataset.head === shown);
    if (narrow.matches) panel.setAttribute("role", "tabpanel");
    else panel.removeAttribute("role");
  }
}

narrow.addEventListener("change", mark);
