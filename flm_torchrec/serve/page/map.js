// Items on a canvas: where the model puts them, flattened to two directions. Pan by dragging or arrow keys, zoom by wheel.

import { find, make } from "./elements.js";

const COLOURS = ["#4f46e5", "#0d9488", "#d97706", "#db2777", "#0284c7", "#65a30d", "#9333ea", "#dc2626", "#0891b2", "#a16207"];
const OTHER = "#94a3b8";
const PLACED = {
  pca: ({ variance }) => `Placed by PCA: the two directions hold ${Math.round(100 * variance)} % of how the vectors differ.`,
  umap: () => "Placed by UMAP: items that are near are alike; how far apart groups are says little.",
};
const NEAR = 12; // pixels within which the pointer finds an item

export class ItemMap {
  data = null;
  codes = null;
  view = { x: 0, y: 0, zoom: 1 };
  history = new Set();
  recommended = new Set();

  constructor() {
    this.canvas = find("map");
    this.tip = find("tip");
    this.canvas.addEventListener("pointerdown", (event) => { this.drag = [event.clientX, event.clientY]; this.canvas.setPointerCapture(event.pointerId); });
    this.canvas.addEventListener("pointerup", () => { this.drag = null; });
    this.canvas.addEventListener("pointermove", (event) => this.#pointer(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.offsetX, event.offsetY); }, { passive: false });
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    find("closer").addEventListener("click", () => this.zoom(1.5));
    find("farther").addEventListener("click", () => this.zoom(1 / 1.5));
    find("whole").addEventListener("click", () => this.#look({ x: 0, y: 0, zoom: 1 }));
    find("colour").addEventListener("change", () => this.#colour());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  load(data) {
    this.data = data;
    this.place = new Map(data.items.map((key, n) => [key, n]));
    const names = Object.keys(data.features);
    find("colour").replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })), make("option", { value: "", textContent: "nothing" }));
    this.#colour();
  }

  highlight(history, recommended) {
    this.history = new Set(history);
    this.recommended = new Set(recommended);
    this.draw();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const zoom = Math.min(Math.max(this.view.zoom * factor, 0.5), 60);
    const [wide, high] = [x - this.canvas.clientWidth / 2, y - this.canvas.clientHeight / 2];
    const ratio = zoom / this.view.zoom; // what is under the pointer stays there
    this.#look({ x: wide - (wide - this.view.x) * ratio, y: high - (high - this.view.y) * ratio, zoom });
  }

  draw() {
    const { clientWidth: wide, clientHeight: high } = this.canvas;
    const sharp = window.devicePixelRatio || 1;
    this.canvas.width = wide * sharp;
    this.canvas.height = high * sharp;
    if (!this.data) return;
    const pen = this.canvas.getContext("2d");
    pen.scale(sharp, sharp);
    const style = getComputedStyle(this.canvas);
    const size = Math.min(2 + Math.sqrt(this.view.zoom), 6) * (this.data.items.length > 5000 ? 0.6 : 1);
    const dot = (n, radius) => { const [x, y] = this.#at(n); pen.beginPath(); pen.arc(x, y, radius, 0, 7); };
    pen.globalAlpha = 0.55;
    for (let n = 0; n < this.data.items.length; n += 1) {
      pen.fillStyle = COLOURS[this.codes?.[n]] ?? OTHER;
      dot(n, size);
      pen.fill();
    }
    pen.globalAlpha = 1;
    const marked = (keys, radius, fill, line) => {
      for (const n of [...keys].map((key) => this.place.get(key)).filter((found) => found !== undefined)) {
        dot(n, radius);
        pen.fillStyle = fill ?? COLOURS[this.codes?.[n]] ?? OTHER;
        pen.fill();
        pen.lineWidth = 2.5;
        pen.strokeStyle = line;
        pen.stroke();
      }
    };
    marked(this.history, size + 3, style.getPropertyValue("--ink"), style.getPropertyValue("--paper"));
    marked(this.recommended, size + 4, null, style.getPropertyValue("--ink"));
    this.#say();
  }

  #say() {
    const shown = (keys) => [...keys].filter((key) => this.place.has(key)).length;
    const some = this.data.items.length < this.data.of ? `${this.data.items.length} of ${this.data.of} items, drawn at random` : `${this.data.of} items`;
    const text = `${some}; ${shown(this.history)} of ${this.history.size} of the history (filled) and ${shown(this.recommended)} of ${this.recommended.size} recommended by fusion (ringed). ` +
      PLACED[this.data.method](this.data);
    find("map-note").textContent = text;
    this.canvas.setAttribute("aria-label", `Map of items: ${text}`);
  }

  #colour() {
    const feature = this.data?.features[find("colour").value];
    this.codes = feature?.codes ?? null;
    const entry = (text, colour) => {
      const swatch = make("i");
      swatch.style.background = colour;
      return make("li", {}, swatch, text);
    };
    find("legend").replaceChildren(...(feature?.values ?? []).map((value, n) => entry(value, COLOURS[n])), ...(feature?.codes.includes(-1) ? [entry("others", OTHER)] : []));
    this.draw();
  }

  #look(view) {
    this.view = view;
    this.tip.hidden = true;
    this.draw();
  }

  #at(n) {
    const { clientWidth: wide, clientHeight: high } = this.canvas;
    const scale = 0.46 * this.view.zoom;
    return [wide / 2 + this.view.x + this.data.x[n] * wide * scale, high / 2 + this.view.y - this.data.y[n] * high * scale];
  }

  #pointer(event) {
    if (!this.data) return;
    if (this.drag) {
      const [x, y] = this.drag;
      this.drag = [event.clientX, event.clientY];
      this.#look({ ...this.view, x: this.view.x + event.clientX - x, y: this.view.y + event.clientY - y });
      return;
    }
    let [best, nearest] = [NEAR ** 2, -1];
    for (let n = 0; n < this.data.items.length; n += 1) {
      const [x, y] = this.#at(n);
      const away = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (away < best) [best, nearest] = [away, n];
    }
    this.tip.hidden = nearest < 0;
    if (nearest < 0) return;
    const [x, y] = this.#at(nearest);
    this.tip.textContent = this.data.titles[nearest] || this.data.items[nearest];
    this.tip.style.left = `${Math.min(Math.max(x, 70), this.canvas.clientWidth - 70)}px`;
    this.tip.style.top = `${y}px`;
  }

  #key(event) {
    const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (step) this.#look({ ...this.view, x: this.view.x + step[0], y: this.view.y + step[1] });
    else if (event.key === "+" || event.key === "=") this.zoom(1.3);
    else if (event.key === "-") this.zoom(1 / 1.3);
    else return;
    event.preventDefault();
  }
}
