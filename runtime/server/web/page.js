"use strict";

const EVERY_MS = 2000;
const SPAN_MS = 120000;
const TIMES = [
  ["time_to_first_token_seconds", "first token"],
  ["inter_token_latency_seconds", "between tokens"],
  ["request_time_per_output_token_seconds", "per token"],
  ["request_queue_time_seconds", "in the queue"],
  ["e2e_request_latency_seconds", "whole answer"],
  ["embedding_seconds", "vectors"],
];
const ANSWERS = ["time_to_first_token_seconds", "embedding_seconds"];

const $ = (id) => document.getElementById(id);

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function row(cells, tag = "td") {
  const made = element("tr");
  made.append(...cells.map(([text, kind]) => element(tag, text, kind)));
  return made;
}

// --- asking the server ---------------------------------------------------------------------------

let key = sessionStorage.getItem("pared-key") || "";

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...options, headers, signal });
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) throw new Error((await told(response)) || `the server answered ${response.status}`);
  return response;
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "";
  }
}

function trouble(error) {
  $("trouble").hidden = !error;
  $("trouble").textContent = error ? error.message : "";
}

// --- numbers for people --------------------------------------------------------------------------

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) (count /= 1000), at++;
  return `${at ? count.toFixed(1) : count} ${units[at]}`;
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString());

// --- metrics -------------------------------------------------------------------------------------

// Prometheus' text: values by name, buckets of histograms as [upper bound, count below it].
function parse(text) {
  const sample = { at: performance.now(), values: {}, buckets: {}, labelled: {} };
  for (const line of text.split("\n")) {
    const found = /^pared:(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found;
    const bound = labels && /(?:^|,)le="([^"]+)"/.exec(labels);
    if (bound) (sample.buckets[name.slice(0, -7)] ??= []).push([bound[1] === "+Inf" ? Infinity : +bound[1], +value]);
    else sample.values[name] = (sample.values[name] || 0) + +value;
    if (labels && !bound) (sample.labelled[name] ??= []).push([labels, +value]);
  }
  return sample;
}

// As Prometheus' histogram_quantile: the bucket that holds the share, linear within. Buckets count what is below.
function quantile(share, buckets) {
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!total) return null;
  const at = buckets.findIndex(([, count]) => count >= share * total);
  const [low, before] = at ? buckets[at - 1] : [0, 0];
  const [high, count] = buckets[at];
  return high === Infinity ? low : low + ((high - low) * (share * total - before)) / (count - before);
}

const since = (now, then) => now.map(([bound, count], at) => [bound, count - (then ? then[at][1] : 0)]);

let samples = [];
const lines = { output: [], running: [], kv: [], asleep: [] };

function draw(name, value) {
  const line = lines[name];
  line.push(value);
  if (line.length > SPAN_MS / EVERY_MS) line.shift();
  const most = name === "kv" || name === "asleep" ? 1 : Math.max(1, ...line);
  const step = 100 / (SPAN_MS / EVERY_MS - 1);
  const points = line.map((v, at) => `${(100 - step * (line.length - 1 - at)).toFixed(2)},${(29 - 28 * (v / most)).toFixed(2)}`);
  $(`${name}-line`).firstElementChild.setAttribute("points", points.join(" "));
}

function show(sample) {
  const before = samples[samples.length - 1];
  samples = [...samples.filter((old) => sample.at - old.at <= SPAN_MS), sample];
  const { values } = sample;
  const generates = "num_requests_running" in values;
  for (const id of ["tile-output", "tile-requests", "tile-kv"]) $(id).hidden = !generates;
  if (generates) showEngine(sample, before);
  $("tile-ffns").hidden = !("ffn_groups_total" in values);
  if ("ffn_groups_total" in values) showFfns(sample, before);
  if ("weights_bytes" in values) $("weights").textContent = bytes(values.weights_bytes);
  showLatency(sample);
  const slower = (sample.labelled.kernel_fallback_total || []).filter(([, count]) => count);
  $("fallbacks").hidden = !slower.length;
  $("fallbacks").textContent = `Slower paths taken: ${slower.map(([labels, count]) => `${labels} ${count} times`).join("; ")}`;
}

function showEngine({ at, values }, before) {
  const grown = (name) => (before ? (1000 * (values[name] - before.values[name])) / (at - before.at) : 0);
  const known = values.prefix_cache_queries_total ? values.prefix_cache_hits_total / values.prefix_cache_queries_total : 0;
  $("output-rate").textContent = rate(grown("generation_tokens_total"));
  $("prompt-rate").textContent = rate(grown("prompt_tokens_total"));
  $("running").textContent = values.num_requests_running;
  $("waiting").textContent = values.num_requests_waiting;
  $("answered").textContent = values.request_success_total || 0;
  $("kv").textContent = percent(values.kv_cache_usage_perc);
  $("known").textContent = percent(known);
  draw("output", grown("generation_tokens_total"));
  draw("running", values.num_requests_running);
  draw("kv", values.kv_cache_usage_perc);
}

// The share of FFN groups that slept since another sample, in all layers and in each; null where no row has come.
function asleep({ labelled }, before) {
  const grown = (name) => labelled[name].map(([, count], layer) => count - (before ? before.labelled[name][layer][1] : 0));
  const sum = (counts) => counts.reduce((all, count) => all + count, 0);
  const groups = grown("ffn_groups_total");
  const slept = grown("ffn_groups_asleep_total");
  return sum(groups) ? { all: sum(slept) / sum(groups), each: slept.map((count, layer) => count / groups[layer]) } : null;
}

function showFfns(sample, before) {
  const recent = asleep(sample, samples[0]) || asleep(sample);
  $("asleep").textContent = recent ? percent(recent.all) : "–";
  $("asleep-layers").textContent = recent
    ? `${percent(Math.min(...recent.each))} to ${percent(Math.max(...recent.each))} by layer`
    : "no token yet";
  draw("asleep", (before && asleep(sample, before)?.all) ?? lines.asleep.at(-1) ?? recent?.all ?? 0);
}

function showLatency(sample) {
  const count = (name, from) => since(sample.buckets[name] || [], from?.[name]).at(-1)?.[1] || 0;
  const counted = (from) => ANSWERS.reduce((all, name) => all + count(name, from), 0);
  const recent = counted(samples[0].buckets);
  const from = recent ? samples[0].buckets : {};
  const rows = TIMES.filter(([name]) => count(name)).map(([name, text]) => {
    const buckets = since(sample.buckets[name], from[name]);
    return row([[text], ...[0.5, 0.9, 0.99].map((share) => [seconds(quantile(share, buckets))])]);
  });
  $("latency").replaceChildren(...rows);
  const all = counted();
  const answers = (count) => `${count} answer${count === 1 ? "" : "s"}`;
  const span = recent ? `${answers(recent)} begun in the last two minutes` : `${answers(all)} since the server started`;
  $("latency-span").textContent = all ? `${span}; interpolated within histogram buckets` : "no answer yet";
}

async function look() {
  try {
    const [metrics, ready] = await Promise.all([ask("metrics"), fetch("ready")]);
    show(parse(await metrics.text()));
    $("state").textContent = ready.ok ? "ready" : await told(ready);
    $("state").className = ready.ok ? "good" : "bad";
  } catch {
    $("state").textContent = "the server does not answer";
    $("state").className = "bad";
  }
}

// --- the model -----------------------------------------------------------------------------------

let model = null;

async function introduce() {
  const info = await (await ask("info")).json();
  model = info.model;
  $("key-form").hidden = true;
  document.title = `${info.model} – pared`;
  $("model").textContent = info.model;
  const runs = info.device && `${info.dtype} on ${info.device}`;
  const facts = [info.family, runs, info.context && `context ${info.context}`, `pared ${info.version}`];
  $("about").textContent = facts.filter(Boolean).join(", ");
  $("talk").hidden = !info.does.includes("generator");
  $("vectors").hidden = !info.does.includes("embedder");
  if (!info.chat) $("plain").checked = $("plain").disabled = true;
  if (info.folder) showFolder(info.folder);
}

function showFolder({ kinds, total, stock, disk_bytes: disk, provenance }) {
  const share = total.compact_bytes / total.dense_bytes;
  $("weights-bar").style.width = `${100 * Math.min(1, share)}%`;
  $("weights-share").textContent = stock
    ? "dense, as every engine loads them"
    : `${percent(share)} of ${bytes(total.dense_bytes)} dense in the same dtype`;
  const methods = provenance.methods.map((method) => `${method.name} ${options(method.params)}`.trim());
  $("made").textContent = `From ${provenance.source.name}${methods.length ? `: ${methods.join(", then ")}` : ", without loss"}; ${bytes(disk)} on disk.`;
  const compared = [provenance.original, provenance.measured].filter(Boolean);
  $("measured").replaceChildren(...measured(compared));
  $("kinds").replaceChildren(...stored(kinds, total));
  $("conversion").hidden = false;
}

function options(params) {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== "");
  return given.length ? `(${given.map(([name, value]) => `${name}=${value}`).join(", ")})` : "";
}

function measured(rows) {
  const tasks = [...new Set(rows.flatMap((one) => Object.keys(one.accuracy || {})))];
  const perplexity = rows.some((one) => one.perplexity) ? ["perplexity"] : [];
  const size = (one, name) => [one[name] ? bytes(one[name]) : "–"];
  const number = (value, digits) => [value === null || value === undefined ? "–" : value.toFixed(digits)];
  const head = ["at conversion", "disk", "memory", "read per token", "tokens/s", ...perplexity, ...tasks];
  const body = rows.map((one) => row([
    [one.name], size(one, "disk_bytes"), size(one, "memory_bytes"), size(one, "bytes_per_token"),
    number(one.tokens_per_second, 1), ...perplexity.map((name) => number(one[name], 2)),
    ...tasks.map((task) => [task in (one.accuracy || {}) ? percent(one.accuracy[task]) : "–"]),
  ]));
  return [row(head.map((text) => [text]), "th"), ...body];
}

// One column each: heading, what it says of a kind, whether it is words. Those that say nothing anywhere are left out.
const STORED = [
  ["matrix", (one) => one.kind, true],
  ["format", (one) => `${one.format} ${one.form}`.trim(), true],
  ["count", (one) => one.count],
  ["shapes", (one) => several(one.shapes)],
  ["rank", (one) => several(one.ranks)],
  ["zeros", (one) => several(one.weights)],
  ["dense", (one) => bytes(one.dense_bytes)],
  ["stored", (one) => bytes(one.compact_bytes)],
  ["share", (one) => percent(one.compact_bytes / one.dense_bytes)],
];

function several(counts) {
  const all = Object.entries(counts);
  const shown = all.slice(0, 3).map(([what, count]) => (all.length > 1 ? `${what} (${count})` : what));
  return shown.join(", ") + (all.length > 3 ? `, ${all.length - 3} more` : "");
}

function stored(kinds, total) {
  const rows = [...kinds.filter((one) => one.dense_bytes), total];
  const columns = STORED.filter(([, says]) => rows.some((one) => says(one) !== ""));
  const body = rows.map((one) => row(columns.map(([, says, words]) => [says(one), words ? "left" : ""])));
  body.at(-1).className = "total";
  return [row(columns.map(([name, , words]) => [name, words ? "left" : ""]), "th"), ...body];
}

// --- talking -------------------------------------------------------------------------------------

let messages = [];
let stopping = null;

function request(text) {
  const sampling = { max_tokens: +$("max-tokens").value || 256, stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value !== "") sampling.temperature = +$("temperature").value;
  if ($("plain").checked) return ["v1/completions", { model, prompt: text, ...sampling }];
  return ["v1/chat/completions", { model, messages: [...messages, { role: "user", content: text }], ...sampling }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

function note(kind, text = "") {
  const made = element("p", text, kind);
  $("log").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function say(text) {
  const [path, body] = request(text);
  note("user", text);
  const answer = note("assistant");
  const begun = performance.now();
  let first = 0;
  let usage = null;
  try {
    for await (const event of events(await ask(path, body, stopping.signal))) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const piece = event.choices[0]?.text ?? event.choices[0]?.delta?.content ?? "";
      first ||= piece && performance.now();
      answer.textContent += piece;
      $("log").scrollTop = $("log").scrollHeight;
    }
  } finally {
    if (answer.textContent) messages.push({ role: "user", content: text }, { role: "assistant", content: answer.textContent });
    else answer.remove();
  }
  if (usage && first) note("quiet", pace(usage.completion_tokens, first - begun, performance.now() - first));
}

function pace(tokens, firstMs, restMs) {
  const speed = tokens > 1 ? `, then ${rate((1000 * (tokens - 1)) / restMs)} tokens/s` : "";
  return `${tokens} tokens, the first after ${seconds(firstMs / 1000)}${speed}`;
}

async function send(event) {
  event.preventDefault();
  const text = $("say").value.trim();
  if (!text || stopping) return;
  stopping = new AbortController();
  $("send").disabled = !($("stop").disabled = false);
  trouble(null);
  $("say").value = "";
  try {
    await say(text);
  } catch (error) {
    if (error.name !== "AbortError") trouble(error), ($("say").value = text);
  }
  stopping = null;
  $("send").disabled = !($("stop").disabled = true);
}

// --- vectors -------------------------------------------------------------------------------------

const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);

async function compare(event) {
  event.preventDefault();
  const texts = $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!texts.length) return;
  trouble(null);
  try {
    const told = await (await ask("v1/embeddings", { model, input: texts, encoding_format: "float" })).json();
    const vectors = told.data.map(({ embedding }) => embedding.map((value) => value / Math.sqrt(dot(embedding, embedding))));
    const table = element("table");
    table.append(row([["cosine"], ...texts.map((_, at) => [at + 1])], "th"));
    table.append(...texts.map((text, at) => row([[`${at + 1} ${text.slice(0, 40)}`], ...vectors.map((other) => [dot(vectors[at], other).toFixed(3)])])));
    const tokens = `${vectors[0].length} dimensions, ${told.usage.prompt_tokens} tokens`;
    $("alike").replaceChildren(table, element("p", tokens, "quiet"));
  } catch (error) {
    trouble(error);
  }
}

// --- to begin with -------------------------------------------------------------------------------

$("talk-form").addEventListener("submit", send);
$("vectors-form").addEventListener("submit", compare);
$("stop").addEventListener("click", () => stopping?.abort());
$("afresh").addEventListener("click", () => {
  messages = [];
  $("log").replaceChildren();
  trouble(null);
});
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("pared-key", (key = $("key").value.trim()));
  trouble(null);
  introduce().catch(trouble);
});

introduce().catch(trouble);
look();
setInterval(() => document.hidden || look(), EVERY_MS);
