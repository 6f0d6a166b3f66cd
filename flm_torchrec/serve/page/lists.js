// Recommendations of each head side by side, and why each item is there.

import { make, tags } from "./elements.js";

const NAMES = { fused: "Fused", content: "Content", collaborative: "Collaborative", sequential: "Sequential" };
const SAYS = {
  fused: "all heads together",
  content: "by features alone",
  collaborative: "by who did what",
  sequential: "by what came after what",
};
export const headName = (head) => NAMES[head] ?? head;

export function column(head, ...children) {
  const made = make("article", { id: `list-${head}`, className: `panel list head-${head}`, "aria-label": `${headName(head)} head` },
    make("header", {}, make("h2", { textContent: headName(head) }), make("p", { className: "muted small", textContent: SAYS[head] ?? "" })),
    ...children);
  made.dataset.head = head;
  return made;
}

export const waiting = (head) =>
  column(head, make("div", { className: "bones", "aria-label": "Loading" }, ...Array.from({ length: 5 }, () => make("i"))));

// did: what to do when the user did something with the item, or null where no user is picked.
export function list(answer, did) {
  if (!answer.items.length) return column(answer.head, make("p", { className: "muted", textContent: "No items are left: loosen the filters, or keep what was seen." }));
  const scores = answer.items.map((item) => item.score);
  const [top, low] = [Math.max(...scores), Math.min(...scores)];
  const rows = answer.items.map((item, place) => {
    const id = `why-${answer.head}-${place}`;
    const open = make("button", { type: "button", className: "quiet", textContent: "Why", "aria-expanded": "false", "aria-controls": id, "aria-label": `Why ${item.title}` });
    const reasons = make("div", { id, className: "why", hidden: true });
    open.addEventListener("click", () => {
      reasons.hidden = !reasons.hidden;
      open.setAttribute("aria-expanded", String(!reasons.hidden));
      if (!reasons.childElementCount) reasons.append(...why(item.why));
    });
    const buttons = make("span", { className: "acts" }, open);
    if (did) {
      const done = make("button", { type: "button", className: "quiet", textContent: "Did this", "aria-label": `The user did this: ${item.title}` });
      done.addEventListener("click", () => did(item));
      buttons.append(done);
    }
    const bar = make("meter", { min: 0, max: 1, value: top > low ? 0.15 + (0.85 * (item.score - low)) / (top - low) : 1, "aria-label": "Score within this list" });
    return make("li", {},
      make("div", { className: "head" }, make("span", { className: "title", dir: "auto", textContent: item.title, title: item.item }), make("span", { className: "score", textContent: item.score.toFixed(3) })),
      bar, make("div", { className: "foot" }, tags(item.attributes), buttons), reasons);
  });
  return column(answer.head, make("ol", {}, ...rows));
}

function why(reason) {
  const parts = [];
  const most = Math.max(...reason.shares.map((s) => Math.abs(s.share ?? s.score)), 1e-9);
  const weighted = reason.shares[0]?.share !== null;
  parts.push(make("h3", { textContent: weighted ? "Shares of the fused score" : "Score by each head" }),
    make("dl", { className: "shares" }, ...reason.shares.flatMap((s) => {
      const value = s.share ?? s.score;
      const said = weighted ? `${s.weight.toFixed(2)} × ${s.score.toFixed(3)} = ${value.toFixed(3)}` : value.toFixed(3);
      return [make("dt", { textContent: headName(s.head) }),
        make("dd", {}, make("meter", { className: `head-${s.head}`, min: 0, max: 1, value: Math.abs(value) / most, "aria-hidden": "true" }), make("span", { textContent: said }))];
    })));
  if (weighted) {
    const sum = reason.shares.reduce((total, s) => total + s.share, 0);
    parts.push(make("p", { className: "muted small", textContent: `weight × the head's score; together the fused score ${sum.toFixed(3)}` }));
  }
  if (reason.history.length)
    parts.push(make("h3", { textContent: "Nearest in the history" }), make("ul", { className: "plain" }, ...reason.history.map((near) =>
      make("li", {}, make("span", { dir: "auto", textContent: near.title, title: near.item }), make("span", { className: "score", textContent: near.similarity.toFixed(2), title: "cosine of the two items' vectors" })))));
  else parts.push(make("p", { className: "muted small", textContent: "There is no history: this is what the model says of someone it knows nothing of." }));
  const common = Object.entries(reason.in_common);
  if (common.length)
    parts.push(make("h3", { textContent: "In common with the history" }), make("p", { className: "tags" }, ...common.flatMap(([name, values]) =>
      values.map((v) => make("span", { className: "tag", dir: "auto", title: name, textContent: `${v.value} × ${v.items}` })))));
  return parts;
}
