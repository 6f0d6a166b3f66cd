// What is wrong with a page to look at, read from the DOM: the whole file is one function, which returns a line a fault.
() => {
  const found = new Set();
  const wide = document.documentElement.clientWidth;
  const total = document.documentElement.scrollWidth;
  if (total > wide) found.add(`the page is ${total} wide`);

  const channels = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, under) => [0, 1, 2].map((c) => top[c] * top[3] + under[c] * (1 - top[3])).concat(1);
  // The background that text is seen on, from the page up to its own element.
  const behind = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.unshift(channels(getComputedStyle(one).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  // Relative luminance and contrast as in WCAG 2.
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => 0.2126 * linear(colour[0] / 255) + 0.7152 * linear(colour[1] / 255) + 0.0722 * linear(colour[2] / 255);
  const contrast = (ink, under) => {
    const [low, high] = [light(over(ink, under)), light(under)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  const boxes = [];
  const look = (node, element) => {
    const name = node.textContent.trim().slice(0, 30);
    const style = getComputedStyle(element);
    const ancestors = [];
    for (let one = element; one !== document.body; one = one.parentElement) if (!(one instanceof SVGElement)) ancestors.push(one);
    const scroller = ancestors.find((one) => /auto|scroll/.test(getComputedStyle(one).overflowX));
    for (const one of ancestors) {
      if (one === scroller) break;
      if (/hidden|clip/.test(getComputedStyle(one).overflowX) && one.scrollWidth > one.clientWidth + 1) found.add(`cut: ${name}`);
    }
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.width <= 1 || box.height <= 1) continue;
      if (!scroller && (box.left < -0.5 || box.right > wide + 0.5)) found.add(`outside: ${name}`);
      boxes.push({ node, name, scroller, box });
    }
    if (element.closest("[disabled]")) return;
    const ratio = contrast(channels(element instanceof SVGElement ? style.fill : style.color), behind(element));
    if (ratio < 4.5) found.add(`contrast ${ratio.toFixed(2)}: ${name}`);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    // A link to skip to the content is outside until it has the focus; options are drawn by the browser itself.
    if (node.textContent.trim() && seen && !element.closest("script, style, option, .skip")) look(node, element);
  }

  boxes.sort((a, b) => a.box.top - b.box.top);
  boxes.forEach((one, n) => {
    for (const other of boxes.slice(n + 1)) {
      if (other.box.top > one.box.bottom) break;
      if (other.node === one.node || other.scroller !== one.scroller) continue;
      const across = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
      const down = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
      if (across > 1.5 && down > 3) found.add(`overlap: ${one.name} | ${other.name}`);
    }
  });
  return [...found];
}
