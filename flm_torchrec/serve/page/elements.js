// Building blocks of the page. Text from the server only ever becomes text, never markup.

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Each value once, also where two features have it.
export const tags = (attributes) => {
  const names = new Map();
  for (const [name, values] of Object.entries(attributes))
    for (const value of values) names.set(value, [...(names.get(value) ?? []), name]);
  return make("p", { className: "tags" }, ...[...names].map(([value, from]) =>
    make("span", { className: "tag", dir: "auto", title: from.join(", "), textContent: value })));
};

// A text box with a list of what the server finds, after the ARIA pattern of a combobox.
// search(text) → [{key, title}]; choose(found) is called with the one taken.
export function combobox(input, list, search, choose) {
  let shown = [];
  let active = -1;
  let turn = 0;
  let timer;
  for (const [name, value] of Object.entries({
    role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": list.id,
  })) input.setAttribute(name, value);
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Found");

  const close = () => {
    turn += 1;
    clearTimeout(timer);
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const take = (found) => { close(); choose(found); };
  const mark = (place) => {
    active = place;
    [...list.children].forEach((option, n) => option.setAttribute("aria-selected", String(n === active)));
    if (active < 0) return;
    input.setAttribute("aria-activedescendant", list.children[active].id);
    list.children[active].scrollIntoView({ block: "nearest" });
  };
  const open = async () => {
    const mine = ++turn;
    const found = await search(input.value.trim());
    if (mine !== turn || document.activeElement !== input) return;
    shown = found;
    active = -1;
    list.replaceChildren(...shown.map((one, place) => {
      const option = make("li", { id: `${list.id}-${place}`, role: "option", "aria-selected": "false" },
        make("span", { dir: "auto", textContent: one.title }));
      if (one.key !== one.title) option.append(make("span", { className: "muted", dir: "auto", textContent: one.key }));
      option.addEventListener("pointerdown", (event) => { event.preventDefault(); take(one); });
      return option;
    }));
    if (!shown.length) list.append(make("li", { className: "muted", textContent: "Nothing found" }));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  };
  input.addEventListener("input", () => {
    turn += 1; // what is shown was found for another text: not to be taken by a key
    shown = [];
    active = -1;
    input.removeAttribute("aria-activedescendant");
    clearTimeout(timer);
    timer = setTimeout(open, 120);
  });
  input.addEventListener("focus", open);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) open();
      else if (shown.length) mark((active + (event.key === "ArrowDown" ? 1 : shown.length + (active < 0 ? 0 : -1))) % shown.length);
    }
    if (event.key === "Enter") {
      event.preventDefault();
      if (active >= 0) take(shown[active]);
      else if (input.value.trim()) take({ key: input.value.trim(), title: input.value.trim(), typed: true });
    }
  });
}
