// The review page: plays one episode after the other and sends what the reader says. Everything comes from this server.
import { drawCursor, drawLines } from "/page/plot.js";

const $ = (id) => document.getElementById(id);
const FILTERS = ["task", "adapter", "session", "state"];
const shown = { episode: null, cameras: [], time: 0, playing: true, viewed: new Set(), total: 0, began: 0, pictures: {} };
const ahead = new Map(); // id -> promise of a loaded episode
const visited = [];
let skipped = [];
const sending = new Set(); // episodes whose label is on its way

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").className = bad ? "bad" : "";
}

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    const error = told.error || { code: `http ${answer.status}`, what: "the server refused" };
    throw new Error(`${error.what} [${error.code}]${error.fix ? " – " + error.fix : ""}`);
  }
  return answer;
}

const annotator = () => $("annotator").value.trim().replace(/\s+/g, " ");

function query(extra = {}) {
  const given = new URLSearchParams({ person: annotator() });
  FILTERS.forEach((name) => given.set(name, $(name).value));
  (extra.skip || []).forEach((id) => given.append("skip", id));
  return given.toString();
}

// Frames come as one block: seconds (float64), length (uint32), JPEG, again and again.
async function frames(id, camera) {
  const data = await (await ask(`/api/episodes/${id}/frames/${encodeURIComponent(camera)}`)).arrayBuffer();
  const view = new DataView(data);
  const found = [];
  for (let at = 0; at < data.byteLength; ) {
    const time = view.getFloat64(at, true), length = view.getUint32(at + 8, true);
    found.push({ time, blob: new Blob([new Uint8Array(data, at + 12, length)], { type: "image/jpeg" }), bitmap: null });
    at += 12 + length;
  }
  if (found.length) found[0].bitmap = await createImageBitmap(found[0].blob);
  return { camera, frames: found };
}

function load(id) {
  if (!ahead.has(id)) {
    ahead.set(id, (async () => {
      const facts = await (await ask(`/api/episodes/${id}?person=${encodeURIComponent(annotator())}`)).json();
      const cameras = await Promise.all(facts.card.cameras.map((camera) => frames(id, camera)));
      return { id, facts, cameras };
    })());
    ahead.get(id).catch(() => ahead.delete(id));
    for (const old of [...ahead.keys()].slice(0, Math.max(ahead.size - 6, 0))) ahead.delete(old);
  }
  return ahead.get(id);
}

async function nextEpisode(also = []) {
  const skip = [...skipped, ...sending, ...also];
  return (await ask(`/api/next?${query({ skip })}`)).json();
}

async function next() {
  if (!annotator()) { say("Enter your name first."); $("annotator").focus(); return; }
  try {
    const { episode, left } = await nextEpisode();
    $("left").textContent = `${left} to label`;
    if (!episode) { clear(); return; }
    await show(episode);
  } catch (error) { say(error.message, true); }
}

function clear() {
  shown.episode = null;
  $("empty").hidden = false;
  document.querySelectorAll("[data-label]").forEach((b) => { b.disabled = true; b.classList.remove("proposed"); });
  $("instruction").textContent = " ";
  ["facts", "proposal", "opinions"].forEach((id) => { $(id).textContent = ""; });
  $("cameras").replaceChildren();
}

async function show(id) {
  const { facts, cameras } = await load(id);
  const { card } = facts;
  Object.assign(shown, { episode: id, facts, cameras, time: 0, playing: true, viewed: new Set(), began: performance.now() });
  shown.total = cameras.reduce((sum, c) => sum + c.frames.length, 0);
  shown.length = Math.max(facts.length, ...cameras.map((c) => (c.frames.length ? c.frames[c.frames.length - 1].time : 0)), 0.01);
  if (visited[visited.length - 1] !== id) visited.push(id);
  $("empty").hidden = true;
  $("instruction").textContent = card.instruction || card.task;
  $("facts").textContent = [card.task, card.robot, card.mode, `${card.seconds.toFixed(1)} s`, `ended: ${card.reason || "?"}`,
    card.adapter_id && `adapter ${card.adapter_id.slice(0, 12)}`, card.session && `session ${card.session}`,
    card.human_share > 0 && `${Math.round(100 * card.human_share)} % human`, card.recovered && "recovered after a crash",
    card.dropped > 0 && `${card.dropped} records dropped`, `episode ${id.slice(0, 12)}`].filter(Boolean).join(" · ");
  $("cameras").replaceChildren(...cameras.map(({ camera, frames: all }) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    caption.textContent = all.length ? camera : `${camera}: no frames`;
    if (all.length) { canvas.width = all[0].bitmap.width; canvas.height = all[0].bitmap.height; }
    figure.append(canvas, caption);
    return figure;
  }));
  cameras.forEach((c, i) => { c.canvas = $("cameras").children[i].firstChild; c.drawn = -1; });
  propose(facts);
  $("note").value = "";
  document.querySelectorAll("[data-label]").forEach((b) => { b.disabled = false; });
  plots();
  draw();
  say("");
  document.body.dataset.episode = id;
  shown.upcoming = null;
  nextEpisode([id]).then(async ({ episode }) => {
    if (!episode) return;
    await load(episode);
    if (shown.episode === id) shown.upcoming = episode;
  }).catch(() => {});
}

function propose({ proposal, standing: status, labels }) {
  document.querySelectorAll("[data-label]").forEach((b) => b.classList.remove("proposed"));
  $("proposal").textContent = proposal
    ? `${proposal.source} says ${proposal.success ? "success" : "failure"}${proposal.score < 1 ? ` (${Math.round(100 * proposal.score)} %)` : ""}`
    : "no proposal: the label is yours to give";
  if (proposal) $(proposal.success ? "success" : "failure").classList.add("proposed");
  const lines = labels.map((l) => `${l.person}: ${l.verdict}${l.note ? ` – ${l.note}` : ""} (${l.time.slice(0, 16).replace("T", " ")})`);
  $("opinions").textContent = (status.state ==== "disputed" ? "Disputed. Your label settles it. " : "") + lines.join(" · ");
}

function plots() {
  const { facts } = shown;
  const colour = { HUMAN: "rgba(59,130,246,.25)", CLIPPED: "rgba(245,158,11,.25)", BLENDED: "rgba(245,158,11,.15)",
    SKIPPED: "rgba(245,158,11,.25)", HELD: "rgba(156,163,175,.35)", RAMPED: "rgba(16,185,129,.15)" };
  const spans = Object.entries(facts.spans).flatMap(([mark, all]) => all.map(([from, to]) => ({ from, to, colour: colour[mark] })));
  const part = (commands) => Object.fromEntries(Object.entries(facts.series)
    .filter(([name]) => name.startsWith("command ") === commands).map(([name, v]) => [name.replace("command ", ""), v]));
  for (const [id, commands] of [["states", false], ["commands", true]]) {
    shown.pictures[id] = drawLines($(id), facts.times, part(commands), spans, facts.events, shown.length);
  }
}

function indexAt(frames, time) {
  let low = 0, high = frames.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (frames[middle].time <= time + 1e-6) low = middle; else high = middle - 1; }
  return low;
}

function draw() {
  for (const camera of shown.cameras) {
    const all = camera.frames;
    if (!all.length) continue;
    const number = indexAt(all, shown.time);
    shown.viewed.add(`${camera.camera} ${number}`);
    // Decode a little ahead, forget what is far behind.
    for (let i = number; i < Math.min(number + 12, all.length); i++) {
      if (!all[i].bitmap && !all[i].waiting) {
        all[i].waiting = createImageBitmap(all[i].blob).then((b) => { all[i].bitmap = b; all[i].waiting = null; });
      }
    }
    if (number >= 40 && all[number - 40].bitmap && number - 40 > 0) { all[number - 40].bitmap.close(); all[number - 40].bitmap = null; }
    if (camera.drawn !== number && all[number].bitmap) {
      camera.canvas.getContext("2d").drawImage(all[number].bitmap, 0, 0);
      camera.drawn = number;
    }
  }
  const share = Math.min(shown.time / shown.length, 1);
  $("scrub").value = Math.round(1000 * share);
  $("clock").textContent = `${shown.time.toFixed(1)} / ${shown.length.toFixed(1)} s`;
  $("play").textContent = shown.time >= shown.length ? "Replay" : shown.playing ? "Pause" : "Play";
  for (const id of ["states", "commands"]) drawCursor($(id), shown.pictures[id], share);
}

let before = performance.now();
function frame(now) {
  const passed = Math.min((now - before) / 1000, 0.2);
  before = now;
  if (shown.episode && shown.playing && shown.time < shown.length) {
    shown.time = Math.min(shown.time + passed * Number($("speed").value), shown.length);
    draw();
    if (shown.time >= shown.length) document.body.dataset.played = shown.episode;
  } else if (shown.episode && shown.cameras.some((c) => c.frames.length && c.drawn !== indexAt(c.frames, shown.time))) draw();
  requestAnimationFrame(frame);
}

// The next episode is shown at once where it is loaded already; should the label not be stored, its episode comes back.
async function label(value) {
  if (!shown.episode || sending.has(shown.episode)) return;
  const id = shown.episode, upcoming = shown.upcoming;
  const body = { person: annotator(), verdict: value, note: $("note").value, settles: shown.facts.standing.state === "disputed",
    share: shown.total ? shown.viewed.size / shown.total : 0, seconds: (performance.now() - shown.began) / 1000 };
  sending.add(id);
  const stored = ask(`/api/episodes/${id}/label?${query()}`, body).then((answer) => answer.json());
  stored.catch(() => {});
  try {
    if (upcoming) await show(upcoming);
    const told = await stored;
    ahead.delete(id);
    skipped = skipped.filter((other) => other !== id);
    if (!upcoming) await next();
    else $("left").textContent = `${told.left} to label`;
    say(`${id.slice(0, 8)}: ${value}, now ${told.standing.state.replace("_", " ")}`);
  } catch (error) {
    if (shown.episode !== id) await show(id).catch(() => {});
    say(`not stored: ${error.message}`, true);
  } finally { sending.delete(id); }
}

function toggle() {
  if (shown.time >= shown.length) shown.time = 0;
  else shown.playing = !shown.playing;
  if (shown.time === 0) shown.playing = true;
  draw();
}

function skip() { if (shown.episode) { skipped.push(shown.episode); next(); } }

async function back() {
  if (visited.length < 2) { say("This is the first one."); return; }
  visited.pop();
  const id = visited.pop();
  ahead.delete(id);
  await show(id).catch((error) => say(error.message, true));
}

const KEYS = { s: () => label("success"), f: () => label("failure"), d: () => label("discard"), j: skip, k: back, " ": toggle,
  r: () => { shown.time = 0; shown.playing = true; }, n: () => $("note").focus(),
  ",": () => { shown.playing = false; shown.time = Math.max(shown.time - 0.05, 0); draw(); },
  ".": () => { shown.playing = false; shown.time = Math.min(shown.time + 0.05, shown.length); draw(); },
  "+": () => { $("speed").selectedIndex = Math.min($("speed").selectedIndex + 1, 4); },
  "-": () => { $("speed").selectedIndex = Math.max($("speed").selectedIndex - 1, 0); } };

document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName) && document.activeElement.id !== "scrub";
  if (typing) { if (event.key === "Escape" || (event.key === "Enter" && document.activeElement.id === "note")) document.activeElement.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const act = KEYS[event.key.toLowerCase()];
  if (act) { event.preventDefault(); act(); }
});
document.querySelectorAll("[data-label]").forEach((b) => b.addEventListener("click", () => { label(b.dataset.label); b.blur(); }));
$("play").addEventListener("click", () => { toggle(); $("play").blur(); });
$("skip").addEventListener("click", skip);
$("back").addEventListener("click", back);
$("scrub").addEventListener("input", () => { shown.playing = false; shown.time = ($("scrub").value / 1000) * shown.length; draw(); });
window.addEventListener("resize", () => { if (shown.episode) { plots(); draw(); } });
$("annotator").value = localStorage.getItem("person") || "";
$("annotator").addEventListener("change", () => { localStorage.setItem("person", annotator()); ahead.clear(); $("annotator").blur(); next(); });
FILTERS.forEach((name) => $(name).addEventListener("change", () => { skipped = []; ahead.clear(); $(name).blur(); next(); }));

(async () => {
  try {
    const told = await (await ask("/api/summary")).json();
    for (const [name, all] of [["task", told.tasks], ["adapter", told.adapters], ["session", told.sessions]]) {
      $(name).replaceChildren(new Option("all", ""), ...all.map((text) => new Option(text, text)));
    }
    await next();
  } catch (error) { say(error.message, true); }
  requestAnimationFrame(frame);
})();
