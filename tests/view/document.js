// As much of a browser's document as page.js uses; the page's text comes on standard input.
class Element {
  constructor(name) { this.name = name; this.children = []; this.own = ""; this.className = ""; this.dataset = {};
    this.attributes = {}; this.heard = {};
    this.style = { setProperty: (key, value) => { this.style[key] = value; } }; this.value = "confidence"; }
  get textContent() { return this.own + this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join(""); }
  set textContent(text) { this.own = String(text); this.children = []; }
  append(...nodes) { this.children.push(...nodes.map((n) => (typeof n === "object" ? n : String(n)))); }
  replaceChildren(...nodes) { this.own = ""; this.children = []; this.append(...nodes); }
  setAttribute(key, value) { this.attributes[key] = value; }
  addEventListener(kind, act) { this.heard[kind] = act; }
  focus() {}
  all() { return this.children.filter((c) => typeof c === "object").flatMap((c) => [c, ...c.all()]); }
  querySelectorAll(selector) { return this.all().filter((c) => c.className.split(" ").includes(selector.slice(1))); }
}
const found = {}, PAGE = require("fs").readFileSync(0, "utf8");
const part = (id) => { if (!PAGE.includes(`id="${id}"`)) throw new Error(`no ${id}`); };
const document = {
  getElementById: (id) => { part(id); return (found[id] = found[id] || new Element(id)); },
  createElement: (name) => new Element(name), addEventListener: () => {},
};
const Option = function (text, value) { const made = new Element("option"); made.textContent = text; made.value = value; return made; };
found.data = new Element("script");
found.data.textContent = /<script id="data"[^>]*>(.*?)<\/script>/s.exec(PAGE)[1];
