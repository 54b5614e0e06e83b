"""The camera's page: one file that loads nothing but the stream and the numbers beside it.

Numbers (`Stream.publish`): "fps", "stages_ms" {stage: ms}, "people", "frames", "dropped", "temperature_c",
"power_w"; null is shown as not measured. Two engines side by side: "engines", a list of {"name", "fps",
"people", "stages_ms"}.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Camera · edgeprune</title>
<style>
:root {
  --page: #fbfaf7; --card: #ffffff; --ink: #1c2326; --muted: #5d696f; --line: #e1e4e1; --accent: #0b6b80;
  --warn: #a84b12; --wash: #dfeaea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121618; --card: #191e21; --ink: #e7eaea; --muted: #9ba6ab; --line: #2d3539; --accent: #62c3d5;
    --warn: #efa26f; --wash: #24343a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main {
  max-width: 1600px; margin: 0 auto; padding: 20px; display: grid; gap: 16px 20px; align-items: start;
  grid-template-columns: minmax(0, 1fr) 320px;
}
header { grid-column: 1 / -1; display: flex; gap: 14px; align-items: baseline; flex-wrap: wrap; }
h1 { font-size: 1.25rem; font-weight: 650; margin: 0; }
h2 { font-size: .875rem; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
#state { color: var(--muted); font-size: .9375rem; }
#state.warn { color: var(--warn); font-weight: 600; }
figure { margin: 0; background: #0b0e0f; border-radius: 10px; overflow: hidden; min-height: 180px; }
img { display: block; width: 100%; height: auto; max-height: calc(100vh - 100px); object-fit: contain; }
aside { display: grid; gap: 12px; min-width: 0; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0;
}
.facts { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 16px; }
.fact b { display: block; font-size: 1.25rem; line-height: 1.25; font-weight: 600; }
.fact.main b { font-size: 2.25rem; line-height: 1.1; color: var(--accent); letter-spacing: -.02em; }
.fact b.unmeasured { font-size: 1rem; font-weight: 500; color: var(--muted); letter-spacing: 0; line-height: 1.6; }
.fact span { font-size: .875rem; color: var(--muted); }
section > .facts { margin-bottom: 12px; }
.stage { display: grid; grid-template-columns: 1fr auto; font-size: .875rem; padding: 3px 0; }
.stage i { grid-column: 1 / -1; height: 4px; border-radius: 2px; background: var(--wash); margin: 2px 0 4px; }
.stage i::before {
  content: ""; display: block; height: 100%; width: var(--share); border-radius: 2px; background: var(--accent);
}
.stage.sum { border-top: 1px solid var(--line); padding-top: 8px; margin-top: 4px; font-weight: 600; }
@media (max-width: 800px) {
  main { grid-template-columns: minmax(0, 1fr); padding: 14px; gap: 12px; }
  img { max-height: none; }
}
</style>
</head>
<body>
<main>
<header><h1>Camera</h1><span id="state" role="status">connecting</span></header>
<figure><img id="picture" alt="The camera's picture with boxes around people" src="stream.mjpg"></figure>
<aside id="numbers"></aside>
</main>
<script>
"use strict";
const byId = (id) => document.getElementById(id);
const element = (name, className, ...children) => {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
};
const measured = (value, digits, unit) => value == null ? null : value.toFixed(digits) + unit;
const fact = (label, value, kind = "") => element("div", "fact " + kind,
  element("b", value === null ? "unmeasured" : "", value === null ? "not measured" : value),
  element("span", "", label));
const stage = (name, ms) => [element("span", "", name), element("span", "", ms.toFixed(1) + " ms")];

function detection(engine, rate) {
  const stages = Object.entries(engine.stages_ms || {});
  const total = stages.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = stages.map(([name, ms]) => {
    const bar = element("i", "");
    bar.style.setProperty("--share", (total ? 100 * ms / total : 0) + "%");
    return element("div", "stage", ...stage(name.replaceAll("_", " "), ms), bar);
  });
  const facts = element("div", "facts",
    fact(rate, measured(engine.fps, 1, ""), "main"), fact("people in view", measured(engine.people, 0, ""), "main"));
  return element("section", "", element("h2", "", engine.name || "Detection"), facts, ...rows,
    element("div", "stage sum", ...stage("latency", total)));
}

function show(numbers) {
  const facts = element("section", "facts",
    fact("temperature", measured(numbers.temperature_c, 0, " °C")),
    fact("power", measured(numbers.power_w, 1, " W")),
    fact("frames", measured(numbers.frames, 0, "")),
    fact("frames dropped", measured(numbers.dropped, 0, "")));
  const detections = numbers.engines
    ? numbers.engines.map((engine) => detection(engine, "FPS alone")) : [detection(numbers, "FPS")];
  byId("numbers").replaceChildren(...detections, facts);
}

function tell(text, warn) {
  byId("state").textContent = text;
  byId("state").className = warn ? "warn" : "";
}

// A page that nobody looks at costs the device nothing.
function look() {
  if (document.hidden) byId("picture").removeAttribute("src");
  else byId("picture").src = "stream.mjpg?" + Date.now();
}
document.addEventListener("visibilitychange", look);

let frames, newAt = Date.now(), lost = false;
async function poll() {
  try {
    const answer = await fetch("numbers.json", {signal: AbortSignal.timeout(4000)});
    if (!answer.ok) throw new Error(answer.status);
    const numbers = await answer.json();
    if (lost) look();
    lost = false;
    if (numbers.frames !== frames) newAt = Date.now();
    frames = numbers.frames;
    const waited = Math.round((Date.now() - newAt) / 1000);
    tell(waited > 3 ? "no new picture for " + waited + " s" : "live", waited > 3);
    if ("frames" in numbers) show(numbers);
  } catch {
    lost = true;
    tell("the device does not answer; trying again", true);
  }
  setTimeout(poll, 1000);
}
poll();
</script>
</body>
</html>
"""
