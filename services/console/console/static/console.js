// Behaviour of the pages: charts, dialogs, theme, and the notice of interrupted live updates. All pages are readable
// and all actions work without it.
"use strict";

const LINES = [["available", "Available", "--good"], ["allocated", "Leased", "--accent"],
  ["pending_deletion", "Being deleted", "--violet"], ["waiting", "Waiting", "--warn"]];
const charts = new Set();

function drawCharts() {
  for (const chart of charts) {
    if (!chart.root.isConnected) { chart.destroy(); charts.delete(chart); }
  }
  for (const element of document.querySelectorAll(".chart")) {
    if (element.firstChild || typeof uPlot === "undefined") continue;
    const data = JSON.parse(element.dataset.chart);
    const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const day = { day: "numeric", month: "short" };
    const clock = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
    const length = data.at.at(-1) - data.at[0];
    const format = length > 2 * 86400 ? day : length < 600 ? { ...clock, second: "2-digit" } : clock;
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px Inter, sans-serif" };
    charts.add(new uPlot({
      width: element.clientWidth, height: 280,
      cursor: { points: { size: 7 } },
      axes: [{ ...axis, values: (_, times) => times.map(at => new Date(at * 1000).toLocaleString([], format)) }, { ...axis, size: 52 }],
      scales: { y: { range: (_, __, high) => [0, Math.max(5, high * 1.08)] } },
      // Without the pointer on the chart, the legend has the latest values.
      series: [{ value: (_, at) => new Date((at ?? data.at.at(-1)) * 1000).toLocaleString([], { ...day, ...clock }) },
        ...LINES.map(([name, label, tone], index) => ({ label, value: (_, number) => (number ?? data[name].at(-1)).toLocaleString(), stroke: colour(tone), width: 2, fill: index === 0 ? colour(tone) + "1c" : undefined, points: { show: false } }))],
    }, [data.at, ...LINES.map(([name]) => data[name])], element));
  }
}

function redrawCharts() {
  for (const chart of charts) chart.destroy();
  charts.clear();
  drawCharts();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.cookie = `theme=${name}; path=/; max-age=31536000; samesite=lax`;
  redrawCharts();
}

const dialog = document.getElementById("dialog");

document.addEventListener("click", event => {
  const control = event.target.closest("[data-action]");
  if (control === null) return;
  if (control.dataset.action === "close" && dialog.open) {
    event.preventDefault();
    dialog.close();
  }
  if (control.dataset.action === "theme") {
    const theme = document.documentElement.dataset.theme ||
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    setTheme(theme === "dark" ? "light" : "dark");
  }
});

document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    document.getElementById("search")?.focus();
  }
});

document.addEventListener("htmx:afterSwap", event => {
  if (event.detail.target === dialog && dialog.firstElementChild !== null) {
    dialog.showModal();
    dialog.querySelector("input:not([type=hidden]), textarea")?.focus();
  }
  drawCharts();
});

// A page that refreshes itself would close an open dialog, or move the text that a person selects.
document.addEventListener("htmx:beforeRequest", event => {
  const isRefresh = event.detail.target.id === "live";
  if (isRefresh && (dialog.open || String(getSelection()) !== "" || document.hidden)) event.preventDefault();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) document.querySelectorAll("[sse-connect]").forEach(element => htmx.trigger(element, "sse:change"));
});

const offline = document.getElementById("offline");
document.addEventListener("htmx:sseOpen", () => { if (offline) offline.hidden = true; });
document.addEventListener("htmx:sseError", () => { if (offline) offline.hidden = false; });
document.addEventListener("htmx:sendError", () => { if (offline) offline.hidden = false; });
// Without this, the browser reports the stream that it closes itself as an error.
addEventListener("pagehide", () => { if (offline) offline.hidden = true; });

let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redrawCharts(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);

document.querySelectorAll("[data-action=theme]").forEach(button => { button.hidden = false; });
drawCharts();
