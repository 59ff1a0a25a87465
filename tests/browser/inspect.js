// Evaluated in a page of the book once its formulas are set and its folds are open: a list of what
// is wrong with it. tests/browser/test_rendered.py wants that list to be empty.
() => {
  const article = document.querySelector("#main-content");
  const all = (selector) => [...document.querySelectorAll(selector)];
  const show = (element) => element.outerHTML.slice(0, 120).replace(/\s+/g, " ");
  const wrong = [];
  const report = (what, found) => found.forEach((item) => wrong.push(`${what}: ${item}`));

  // Formulas. MathJax marks bad TeX with merror and sets macros it does not know in red.
  report("not typeset", all(".math").filter((e) => !e.querySelector("mjx-container")).map(show));
  const bad = "mjx-merror, mjx-container [data-mjx-error], mjx-mtext[style*='red']";
  report("not valid TeX", all(bad).map((e) => show(e.closest("mjx-container").parentElement)));
  const fonts = [...document.fonts].filter((font) => font.family.startsWith("MJX"));
  if (all(".math").length && !fonts.some((font) => font.status === "loaded"))
    wrong.push("no font for formulas is loaded");

  // Figures. Without an alternative text Sphinx puts the file name in its place.
  const named = (image) => image.alt.trim() && !/\.(png|svg|jpe?g|gif)$/i.test(image.alt.trim());
  report("figure without alt text", all("img").filter((image) => !named(image)).map(show));
  report("image not loaded", all("img").filter((image) => !image.naturalWidth).map(show));

  // Width: the window, and the column of text, which would scroll on its own.
  for (const box of [document.scrollingElement, document.querySelector(".bd-article-container")]) {
    const room = box === document.scrollingElement ? innerWidth : box.clientWidth;
    if (box.scrollWidth > room) wrong.push(`${show(box)} is ${box.scrollWidth} wide, not ${room}`);
  }
  const cut = (e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1;
  const hides = (e) =>
    ["hidden", "clip"].includes(getComputedStyle(e).overflowX) && !e.closest("mjx-assistive-mml");
  report("cut off", all(".bd-article *").filter((e) => cut(e) && hides(e)).map(show));

  // Folds.
  if (all(".admonition.dropdown").length !== all(".toggle-button").length)
    wrong.push("some dropdowns have no button");
  const folded = all(".toggle > :not(.admonition-title), .bd-article details > :not(summary)");
  report("still folded", folded.filter((e) => !e.checkVisibility() || !e.offsetHeight).map(show));

  // Text: no TeX outside code, and every color readable on what lies behind it.
  const rgba = (color) => color.match(/[\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  const backgrounds = new Map([[null, [255, 255, 255]]]);
  const background = (element) => {
    if (!backgrounds.has(element)) {
      const own = rgba(getComputedStyle(element).backgroundColor);
      backgrounds.set(element, over(own, background(element.parentElement)));
    }
    return backgrounds.get(element);
  };
  const luminance = (color) => {
    const [r, g, b] = color
      .map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element) => {
    const below = background(element);
    const pair = [over(rgba(getComputedStyle(element).color), below), below].map(luminance);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const tex = /\$\$|\\[a-zA-Z()[\]]|\$[^$\s][^$]*\$/;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (walker.currentNode.data.trim()) texts.push(walker.currentNode);
  report(
    "TeX in the text",
    texts
      .filter((t) => article.contains(t) && tex.test(t.data))
      .filter((t) => !t.parentElement.closest("pre, code, script, style, mjx-container"))
      .map((t) => t.data.trim().slice(0, 80)),
  );
  const shown = { opacityProperty: true, visibilityProperty: true };
  const parents = texts.map((text) => text.parentElement);
  const elements = new Set(parents.filter((element) => element.checkVisibility(shown)));
  const faint = [...elements].filter((element) => contrast(element) < 4.5);
  report("hard to read", faint.map((e) => `${contrast(e).toFixed(2)} ${show(e)}`));
  return wrong;
}
