"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const T = data.tokens.length;
const weights = bytes(data.weights);
const read = data.read && bytes(data.read);
const selected = data.read && bytes(data.selected);
const best = data.read && bytes(data.best);
const byId = (id) => document.getElementById(id);
const canvases = ["read", "true"].map(byId).filter(Boolean);
let head = data.head;
let query = T - 1;

const selection = () => Math.floor(head / (data.heads / data.selections));
const weight = (t, s) => weights[(head * T + t) * T + s] / 255;
const isRead = (t, s) =>
  Boolean(read) && s <= t &&
  read[(selection() * T + t) * data.blocks + Math.floor(s / data.blockSize)] === 1;

const blend = (base, share) => [22, 78, 160].map((c, i) => base[i] + (c - base[i]) * share);

const pictures = new Map(); // of each canvas and head, painted once

function picture(canvas, context) {
  const key = `${canvas.id} ${head}`;
  if (pictures.has(key)) return pictures.get(key);
  const image = context.createImageData(T, T);
  const all = canvas.id === "true";
  for (let t = 0; t < T; t++) {
    for (let s = 0; s < T; s++) {
      const inside = isRead(t, s);
      const base = s > t ? [244, 246, 249] : !all && inside ? [250, 214, 170] : [255, 255, 255];
      const color = s <= t && (all || inside) ? blend(base, weight(t, s)) : base;
      image.data.set([...color, 255], 4 * (t * T + s));
    }
  }
  pictures.set(key, image);
  return image;
}

function draw(canvas) {
  canvas.width = T;
  canvas.height = T;
  const context = canvas.getContext("2d");
  context.putImageData(picture(canvas, context), 0, 0);
  context.fillStyle = "rgba(28, 36, 48, .55)";
  context.fillRect(query + 1, query, T - query - 1, 1);
}

const spans = data.tokens.map((token, s) => {
  const span = document.createElement("span");
  span.textContent = token.replaceAll("\n", "\u21b5\n");
  span.addEventListener("click", () => show(s));
  byId("text").append(span);
  return span;
});

function mark() {
  spans.forEach((span, s) => {
    const seen = s <= query;
    span.className = s === query ? "query" : seen && isRead(query, s) ? "selected" : "";
    span.style.background = seen ? `rgba(22, 78, 160, ${0.55 * weight(query, s)})` : "";
    span.style.opacity = seen ? "" : ".35";
  });
  const at = (values) => Math.round((100 * values[selection() * T + query]) / 255);
  byId("said").textContent = `token ${query}` + (read
    ? `: reads ${at(selected)} % of the true attention; as many blocks could hold ${at(best)} %`
    : "");
}

function show(token) {
  query = Math.min(Math.max(token, 0), T - 1);
  byId("query").value = query;
  canvases.forEach(draw);
  mark();
}

for (let h = 0; h < data.heads; h++) byId("head").append(new Option(String(h), String(h)));
byId("head").value = String(head);
byId("head").addEventListener("change", (event) => { head = Number(event.target.value); show(query); });
byId("query").addEventListener("input", (event) => show(Number(event.target.value)));
for (const canvas of canvases) {
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientY - box.top) / box.height) * T));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step) { event.preventDefault(); show(query + step); }
  });
}
show(query);
