"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "path", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const minus = (text) => text.replace("-", "−");
function show(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size === 0) return "0";
  return minus(size >= 1e5 || size < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3))));
}
const sum = (numbers) => numbers.reduce((total, x) => total + (x ?? 0), 0);

// The numbers of a token. `zero` of a scale with two hues is what lies between them; `bend` makes
// small differences visible beside large ones.
const log = (x) => Math.log(Math.max(x, 1e-9));
const MEASURES = {
  logprob: { label: "log-prob.", name: "log-probability", unit: "nats", says: "white is certain, violet a surprise", size: (x) => -x, least: 1 },
  entropy: { label: "entropy", name: "entropy", unit: "nats", says: "violet where much was possible", size: (x) => x, least: 0.1 },
  kl: { label: "KL", name: "KL from the reference", unit: "nats", says: "orange: likelier than under the reference model", zero: 0 },
  ratio: { label: "ratio", name: "ratio, new to old", unit: "", says: "orange: the update made it likelier", zero: 1, map: log, back: Math.exp, least: 0.01 },
  value: { label: "value", name: "value", unit: "reward's units", says: "from the lowest to the highest", between: true },
  advantage: { label: "advantage", name: "advantage", unit: "", says: "orange: better than expected", zero: 0 },
  reward: { label: "reward", name: "reward", unit: "reward's units", says: "orange: above 0; hues grow with the root", zero: 0, bend: Math.sqrt },
};

function quantile(sorted, share) {
  return sorted.length ? sorted[Math.round(share * (sorted.length - 1))] : 0;
}

/** From a number to {p: 0 to 100, hue}, with the ends of the legend. Outliers do not stretch it. */
function scale(name) {
  const m = MEASURES[name];
  const all = data.episodes.flatMap((e) => e[name].filter((x, i) => x !== null && owns(e, i)));
  const clip = (x) => Math.max(0, Math.min(x, 1));
  if (m.zero === undefined) {
    const sorted = all.map(m.size ?? Number).sort((a, b) => a - b);
    const low = m.between ? quantile(sorted, 0.02) : 0;
    const high = Math.max(quantile(sorted, 0.98), low + (m.least ?? 1e-6));
    const sign = m.size && m.size(1) < 0 ? -1 : 1;
    return { of: (x) => ({ p: 100 * clip(((m.size ?? Number)(x) - low) / (high - low)), hue: "" }), ticks: [sign * low, (sign * (low + high)) / 2, sign * high], hues: ["", ""] };
  }
  const map = m.map ?? ((x) => x), back = m.back ?? ((x) => x), bend = m.bend ?? ((x) => x);
  const middle = map(m.zero);
  const sizes = all.map((x) => Math.abs(map(x) - middle)).sort((a, b) => a - b);
  const end = Math.max(m.bend ? quantile(sizes, 1) : quantile(sizes, 0.98), m.least ?? 1e-6);
  return {
    of: (x) => { const away = map(x) - middle; return { p: 100 * bend(clip(Math.abs(away) / end)), hue: away > 0 ? "more" : "less" }; },
    ticks: [back(middle - end), m.zero, back(middle + end)], hues: ["less", "more"],
  };
}

/** Whether the policy wrote the token itself; in dialogues, others write some. */
const owns = (episode, i) => !episode.own || Boolean(episode.own[i]);

// Episodes.

function wordOf(text) {
  return text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}

function span(text) {
  if (text === "") return make("span", { class: "unseen", title: "part of a character" }, "·");
  const special = /^<\|.*\|>$|^<\/?\w+>$/.test(text);
  return make("span", special ? { class: "special" } : {}, wordOf(text));
}

const FOLD = 300; // tokens of a prompt
function promptOf(episode) {
  const tokens = make("div", { class: "tokens prompt" });
  const hidden = episode.prompt.length - FOLD;
  const add = (texts) => texts.map(span);
  if (hidden <= 0) { tokens.append(...add(episode.prompt)); return tokens; }
  const button = make("button", { class: "fold" }, `show ${hidden} tokens before`);
  button.onclick = () => button.replaceWith(...add(episode.prompt.slice(0, hidden)));
  tokens.append(button, ...add(episode.prompt.slice(hidden)));
  return tokens;
}

function episodeOf(episode, number) {
  const article = make("article", { class: "episode", "data-number": number });
  const components = Object.entries(episode.components).filter(([name]) => name !== "score");
  const endings = { eos: "ended by itself", length: "cut off", stop: "stop string", done: "done", overflow: "no room for a reply" };
  const facts = [["score", show(episode.score)], ["KL", show(episode.klSum)], ["tokens", episode.length], ...components.map(([name, x]) => [name, show(x)])];
  article.append(make("p", { class: "facts" }, ...facts.map(([name, x]) => make("span", {}, `${name} `, make("b", {}, String(x)))), make("span", {}, endings[episode.finish_reason] ?? episode.finish_reason)));
  article.append(make("p", { class: "role" }, "prompt"), promptOf(episode));
  let block = null, role = null;
  episode.spans = episode.text.map((text, i) => {
    const now = owns(episode, i) ? (episode.own ? "assistant" : "response") : "environment";
    if (now !== role) {
      role = now;
      block = make("div", { class: now === "environment" ? "tokens given" : "tokens" });
      article.append(make("p", { class: "role" }, role), block);
    }
    const token = span(text);
    token.removeAttribute("title");
    token.classList.add("t");
    token.tabIndex = -1;
    token.dataset.i = i;
    block.append(token);
    return token;
  });
  if (!episode.text.length) article.append(make("p", { class: "quiet" }, "an empty response"));
  episode.article = article;
  return article;
}

function sortBy(order) {
  const key = { score: (e) => e.score, kl: (e) => e.klSum, length: (e) => e.length }[order.slice(0, -1)];
  const sign = order.endsWith("+") ? 1 : -1;
  const sorted = [...data.episodes].sort((a, b) => sign * (key(a) - key(b)));
  $("episodes").append(...sorted.map((e) => e.article));
}

let measure = "logprob";
function colour(name) {
  measure = name;
  const by = scale(name), m = MEASURES[name];
  for (const episode of data.episodes)
    episode.spans.forEach((token, i) => {
      const x = episode[name][i];
      const { p, hue } = x === null || x === undefined || !owns(episode, i) ? { p: 0, hue: "" } : by.of(x);
      token.style.setProperty("--p", p.toFixed(1));
      token.classList.toggle("more", hue === "more");
      token.classList.toggle("less", hue === "less");
    });
  const end = { "": "var(--size)", more: "var(--more)", less: "var(--less)" };
  const stops = by.hues[0] ? `${end.less}, var(--paper), ${end.more}` : `var(--paper), ${end[""]}`;
  const bar = make("div", { class: "bar", style: `background: linear-gradient(in oklab to right, ${stops})` });
  const ticks = make("div", { class: "ticks" }, ...by.ticks.map((x) => make("span", {}, show(x))));
  $("legend").replaceChildren(bar, ticks, make("div", { class: "says" }, [m.name, m.unit && `, ${m.unit}`, `: ${m.says}`].join("")));
  document.querySelector(`#measures input[value=${name}]`).checked = true;
  if (shown) fill(...shown);
}

// The card of a token.

let shown = null, pinned = null;
function fill(episode, i) {
  const numbers = Object.entries(MEASURES).flatMap(([name, m]) => {
    const on = name === measure ? "on" : "";
    return [make("span", { class: on, title: m.name }, m.label), make("span", { class: on }, show(episode[name][i]))];
  });
  const p = 100 * Math.exp(episode.logprob[i]);
  const quoted = (text) => (text === "" ? "part of a character" : JSON.stringify(text).slice(1, -1));
  const likely = (episode.alternatives[i] ?? []).flatMap(([text, logprob]) => {
    const share = 100 * Math.exp(logprob);
    const chosen = text === episode.text[i] && Math.abs(logprob - episode.logprob[i]) < 1e-2;
    return [make("code", {}, quoted(text).replaceAll(" ", "␣")), make("i", { class: chosen ? "chosen" : "", style: `width: ${Math.max(share, 0.5)}%` }), make("span", {}, `${show(share)} %`)];
  });
  const card = $("card");
  card.replaceChildren(
    make("div", { class: "word" }, quoted(episode.text[i]).replaceAll(" ", "␣")),
    make("div", { class: "quiet" }, `token ${i + 1} of ${episode.text.length}, id ${episode.ids[i]}`),
    ...(owns(episode, i)
      ? [make("div", { class: "numbers" }, ...numbers), make("div", { class: "quiet" }, `probability ${show(p)} %; most probable here:`), make("div", { class: "likely" }, ...likely)]
      : [make("div", { class: "quiet" }, "written by the environment, not by the policy")]),
  );
}

function open(token) {
  const episode = data.episodes[token.closest(".episode").dataset.number];
  const i = Number(token.dataset.i), card = $("card");
  shown = [episode, i];
  fill(episode, i);
  card.hidden = false;
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - card.offsetWidth - 8);
  const below = at.bottom + 8, fits = below + card.offsetHeight < innerHeight;
  card.style.left = `${Math.max(left, 8)}px`;
  card.style.top = `${fits ? below : Math.max(at.top - card.offsetHeight - 8, 8)}px`;
  mark(episode);
}

function close() {
  $("card").hidden = true;
  shown = null;
  pin(null);
}

function pin(token) {
  pinned?.classList.remove("pinned");
  pinned = token;
  pinned?.classList.add("pinned");
}

$("episodes").addEventListener("mouseover", (event) => {
  const token = event.target.closest(".t");
  if (token && !pinned) open(token);
});
$("episodes").addEventListener("mouseout", (event) => {
  if (event.target.closest(".t") && !pinned && !document.activeElement?.matches(".t")) { $("card").hidden = true; shown = null; }
});
$("episodes").addEventListener("click", (event) => {
  const token = event.target.closest(".t");
  if (!token) return;
  if (token === pinned) { close(); token.blur(); return; }
  pin(token);
  token.focus({ preventScroll: true });
  open(token);
});
$("episodes").addEventListener("focusin", (event) => { if (event.target.matches(".t") && (!pinned || pinned === event.target)) open(event.target); });
addEventListener("scroll", () => { if (shown && !pinned && !document.activeElement?.matches(".t")) close(); }, { passive: true });

function step(by) {
  const here = document.activeElement?.matches(".t") ? document.activeElement : null;
  const tokens = [...document.querySelectorAll(".t")];
  const next = here ? tokens[tokens.indexOf(here) + by] : tokens[0];
  if (next) { pin(null); next.focus(); open(next); }
}
function leap(by) {
  const articles = [...document.querySelectorAll(".episode")].filter((a) => a.querySelector(".t"));
  const here = articles.indexOf(document.activeElement?.closest(".episode"));
  const next = articles[Math.max(0, Math.min(here + by, articles.length - 1))];
  if (next) { pin(null); next.scrollIntoView({ block: "nearest" }); next.querySelector(".t").focus(); }
}

function turnTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}
function turnHelp() {
  $("keys").hidden = !$("keys").hidden;
  $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
}
$("theme").onclick = turnTheme;
$("help").onclick = turnHelp;
$("sort").onchange = () => sortBy($("sort").value);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=text]")) return;
  const names = Object.keys(MEASURES), key = event.key;
  const actions = {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), j: () => leap(1), k: () => leap(-1),
    Escape: () => { close(); document.activeElement?.blur(); }, d: turnTheme, "?": turnHelp,
    Enter: () => document.activeElement?.matches(".t") && pin(pinned === document.activeElement ? null : document.activeElement),
    s: () => { const s = $("sort"); s.selectedIndex = (s.selectedIndex + 1) % s.options.length; s.onchange(); },
  };
  const inRadios = event.target.matches("input[type=radio]") && key.startsWith("Arrow");
  if (key >= "1" && key <= String(names.length)) colour(names[key - 1]);
  else if (actions[key] && !inRadios && !(key === "Enter" && event.target.matches("button"))) { actions[key](); if (key.startsWith("Arrow")) event.preventDefault(); }
});

// Charts.

const WIDTH = 280, HEIGHT = 64, FOOT = 14;
function frame(title, unit, low, high, label) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + FOOT}`, role: "img", "aria-label": label });
  svg.append(make("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }));
  [[low, 0, "start"], [(low + high) / 2, WIDTH / 2, "middle"], [high, WIDTH, "end"]].forEach(([x, at, anchor]) =>
    svg.append(make("text", { x: at, y: HEIGHT + 11, "text-anchor": anchor }, show(x))));
  const chart = make("div", { class: "chart" }, make("h3", {}, title, " ", make("span", { class: "unit" }, unit)), svg);
  return { chart, svg, at: (x) => (WIDTH * (x - low)) / (high - low || 1) };
}

function histogram(title, unit, edges, counts, what, limits = []) {
  const low = edges[0], high = edges.at(-1), most = Math.max(...counts, 1);
  const { chart, svg, at } = frame(title, unit, low, high, `Histogram: ${title}, from ${show(low)} to ${show(high)}`);
  counts.forEach((count, i) => {
    const tall = (HEIGHT - 2) * (count / most), x = at(edges[i]);
    const column = make("rect", { class: "column", x: x + 0.5, width: Math.max(at(edges[i + 1]) - x - 1, 0.5), y: HEIGHT - tall, height: tall });
    column.append(make("title", {}, `${show(edges[i])} to ${show(edges[i + 1])}: ${count} ${what}`));
    svg.append(column);
  });
  limits.forEach((x) => svg.append(make("line", { class: "limit", x1: at(x), x2: at(x), y1: 0, y2: HEIGHT })));
  chart.at = at; chart.svg = svg;
  return chart;
}

function ofValues(title, unit, values, whole = false) {
  const finite = values.filter((x) => x !== null);
  const low = Math.min(...finite, whole ? 0 : Infinity), high = Math.max(...finite, low + 1e-6);
  const bins = whole ? Math.min(high - low, 24) || 1 : 24;
  const edges = Array.from({ length: bins + 1 }, (_, i) => low + ((high - low) * i) / bins);
  const counts = new Array(bins).fill(0);
  finite.forEach((x) => counts[Math.min(Math.floor((bins * (x - low)) / (high - low)), bins - 1)]++);
  return histogram(title, unit, edges, counts, "episodes");
}

function lines(title, unit, series) {
  const points = series.flat();
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const low = Math.min(...ys), high = Math.max(...ys, low + 1e-9);
  const { chart, svg, at } = frame(title, unit, Math.min(...xs), Math.max(...xs), `Curve: ${title}`);
  const up = (y) => 4 + (HEIGHT - 8) * (1 - (y - low) / (high - low));
  series.forEach((one, i) => {
    const path = one.map(([x, y], k) => `${k ? "L" : "M"}${at(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
    if (one.length) svg.append(make("path", { class: i ? "second" : "first", d: one.length > 1 ? path : `${path}h3` }));
  });
  svg.append(make("text", { x: 0, y: 9 }, show(high)), make("text", { x: 0, y: HEIGHT - 3 }, show(low)));
  return chart;
}

const byEpisode = {};
function mark(episode) {
  for (const [name, chart] of Object.entries(byEpisode)) {
    const x = chart.at({ score: episode.score, kl: episode.klSum, length: episode.length }[name]);
    chart.svg.querySelector(".here")?.remove();
    chart.svg.append(make("line", { class: "here", x1: x, x2: x, y1: HEIGHT - 8, y2: HEIGHT }));
  }
}

function drawBatch() {
  const { batch, distributions } = data, charts = make("div");
  const count = batch.score.length;
  byEpisode.score = ofValues("Score", `of ${count} episodes`, batch.score);
  byEpisode.kl = ofValues("KL from the reference", "nats a response", batch.kl);
  byEpisode.length = ofValues("Length", "tokens", batch.length, true);
  charts.append(...Object.values(byEpisode));
  for (const { title, unit, edges, counts, limits } of distributions.histograms) charts.append(histogram(title, unit, edges, counts, "tokens", limits));
  for (const { title, unit, values } of distributions.by_position) {
    const points = values.map((y, i) => [i + 1, y]).filter(([, y]) => y !== null);
    if (points.length > 1) charts.append(lines(title, unit, [points]));
  }
  $("batch").append(charts);
}

function drawCurves() {
  if (!data.curves.length) return;
  $("curves").hidden = false;
  document.querySelector("#curves .runs").append(...data.runs.map((name) => make("span", {}, name)));
  document.querySelector("#curves .grid").append(...data.curves.map((c) => lines(c.title, c.unit, c.series)));
}

function drawAnswers() {
  if (!data.answers.length) return;
  $("answers").hidden = false;
  document.querySelector("#answers .list").append(...data.answers.map(({ prompt, rows }) =>
    make("div", { class: "answer" }, make("div", { class: "tokens prompt" }, prompt),
      make("table", {}, make("tbody", {}, ...rows.map((r) =>
        make("tr", {}, make("th", { scope: "row" }, `${data.runs[r.run]}, ${r.decoding}`), make("th", {}, show(r.score)), make("td", {}, r.completion))))))));
}

// All together.

$("name").textContent = `${data.runs[0]}, iteration ${data.iteration}`;
$("facts").append(...data.facts.map(([name, x]) => make("span", {}, `${name} `, make("b", {}, show(x)))));
$("note").textContent = data.note;
$("measures").append(...Object.entries(MEASURES).map(([name, m], i) => {
  const radio = make("input", { type: "radio", name: "measure", value: name });
  radio.onchange = () => colour(name);
  return make("label", { title: `${m.name} (${i + 1})` }, radio, m.label);
}));
data.episodes.forEach((episode, number) => {
  episode.length = episode.own ? sum(episode.own) : episode.text.length;
  episode.klSum = sum(episode.kl);
  episodeOf(episode, number);
});
sortBy("score-");
colour(measure);
drawBatch();
drawCurves();
drawAnswers();
