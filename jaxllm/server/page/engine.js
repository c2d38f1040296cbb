// The live view of the engine: figures, the block pool as a map of cells, running requests.

import { call } from "./api.js";

const POLL_MS = 500;
const SILENT_SECONDS = 3; // an engine that says nothing for so long is busy with one step
const KEPT_SPEEDS = 120; // a minute of them
const LARGEST_CELL = 14; // CSS pixels, the gap between cells included
const SMALLEST_CELL = 3;
const MAP_HEIGHT = 240;
const MOST_SHOWN_REQUESTS = 12;
const RANK = { free: 0, cached: 1, used: 2 };

/** A hue for each request, far from the ones before it, kept as long as the request lives. */
class Hues {
  constructor() {
    this.hueOf = new Map();
    this.next = 165;
  }

  keepOnly(ids) {
    for (const id of this.hueOf.keys()) if (!ids.has(id)) this.hueOf.delete(id);
  }

  of(id) {
    if (!this.hueOf.has(id)) {
      this.hueOf.set(id, this.next);
      this.next = (this.next + 137.5) % 360; // the golden angle
    }
    return this.hueOf.get(id);
  }
}

/** Columns and cell size with which `count` cells fit; with too many, a cell stands for several. */
export function layout(count, width, height) {
  for (let size = LARGEST_CELL; size >= SMALLEST_CELL; size--) {
    const columns = Math.floor(width / size);
    if (columns * Math.floor(height / size) >= count) return { size, columns, perCell: 1 };
  }
  const columns = Math.floor(width / SMALLEST_CELL);
  const cells = columns * Math.floor(height / SMALLEST_CELL);
  return { size: SMALLEST_CELL, columns, perCell: Math.ceil(count / cells) };
}

/** Runs [state, count, index into running] as one entry a cell; of several blocks the busiest. */
export function cellsOf({ blocks, running }, perCell) {
  const cells = [];
  let block = 0;
  for (const [state, count, index] of blocks) {
    const request = state === "used" ? running[index].id : null;
    const end = block + count;
    for (let cell = Math.floor(block / perCell); cell * perCell < end; cell++) {
      const shown = cells[cell];
      if (!shown || RANK[state] > RANK[shown.state]) cells[cell] = { state, request };
    }
    block = end;
  }
  return cells;
}

export function countStates(runs) {
  const counts = { free: 0, cached: 0, used: 0 };
  for (const [state, count] of runs) counts[state] += count;
  return counts;
}

/** Sets a canvas to its width on the page in device pixels; drawing is in CSS pixels. */
function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

export class EngineView {
  constructor(byId, showStatus) {
    this.byId = byId;
    this.showStatus = showStatus;
    this.hues = new Hues();
    this.speeds = [];
    this.timer = null;
    this.isPolling = false;
    this.canvas = byId("blocks");
  }

  /** Polls while the page can be seen. */
  start() {
    document.addEventListener("visibilitychange", () => this.pollNow());
    window.addEventListener("resize", () => this.snapshot && this.draw());
    const scheme = window.matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", () => this.snapshot && this.draw());
    this.canvas.addEventListener("mousemove", (event) => this.showBlockAt(event));
    this.canvas.addEventListener("mouseleave", () => this.write("block-hover", ""));
    this.pollNow();
  }

  async pollNow() {
    clearTimeout(this.timer);
    if (document.hidden || this.isPolling) return;
    this.isPolling = true;
    try {
      this.snapshot = await (await call("/debug/engine")).json();
      const age = this.snapshot.age_seconds;
      const isFresh = age < SILENT_SECONDS;
      this.showStatus(isFresh ? "ready" : `no answer for ${Math.round(age)} s`, isFresh);
      this.write("engine-note", isFresh ? "" : "as it was last seen");
      this.draw();
    } catch (error) {
      // a fetch that reaches nobody is a TypeError, whose words help no reader
      const message = error.status ? error.message : "the server cannot be reached";
      this.showStatus(message, false);
      this.write("engine-note", this.snapshot ? "as it was last seen" : "");
    } finally {
      this.isPolling = false;
      this.timer = setTimeout(() => this.pollNow(), POLL_MS);
    }
  }

  write(id, text) {
    this.byId(id).textContent = text;
  }

  draw() {
    const { snapshot } = this;
    this.styles = getComputedStyle(document.documentElement);
    this.hues.keepOnly(new Set(snapshot.running.map(({ id }) => id)));
    this.speeds = [...this.speeds, snapshot.tokens_per_second ?? 0].slice(-KEPT_SPEEDS);
    this.drawFigures(snapshot);
    this.drawSpeed();
    this.drawBlocks(snapshot);
    this.drawRequests(snapshot.running);
  }

  drawFigures(snapshot) {
    const ttft = snapshot.ttft_ms;
    this.write("num-running", snapshot.running.length);
    this.write("num-waiting", snapshot.waiting);
    this.write("tokens-per-second", (snapshot.tokens_per_second ?? 0).toFixed(0));
    this.write("ttft", ttft == null ? "–" : `${ttft.toFixed(ttft < 10 ? 1 : 0)} ms`);
    this.write("kv-usage", `${(100 * snapshot.kv_usage).toFixed(1)} %`);
    this.write("preemptions", snapshot.preemptions);
    const counts = countStates(snapshot.blocks);
    for (const state of Object.keys(counts)) this.write(`num-${state}`, counts[state]);
  }

  drawSpeed() {
    const height = 44;
    const context = prepare(this.byId("speed"), height);
    const step = this.byId("speed").clientWidth / (KEPT_SPEEDS - 1);
    const most = Math.max(...this.speeds, 1);
    const first = KEPT_SPEEDS - this.speeds.length;
    context.beginPath();
    context.moveTo(first * step - 1, height);
    this.speeds.forEach((speed, i) => {
      context.lineTo((first + i) * step, height - 2 - (speed / most) * (height - 6));
    });
    context.lineTo(KEPT_SPEEDS * step, height);
    context.fillStyle = this.styles.getPropertyValue("--accent-soft");
    context.fill();
    context.strokeStyle = this.styles.getPropertyValue("--accent");
    context.lineWidth = 1.5;
    context.stroke();
    context.fillStyle = this.styles.getPropertyValue("--muted");
    context.font = "11px sans-serif";
    context.fillText(`most in a minute: ${most.toFixed(0)} tokens/s`, 0, 10);
  }

  drawBlocks(snapshot) {
    const { size, columns, perCell } = this.layoutOf(snapshot);
    const cells = cellsOf(snapshot, perCell);
    const context = prepare(this.canvas, Math.ceil(cells.length / columns) * size);
    const gap = size > 5 ? 2 : 1;
    cells.forEach((cell, i) => {
      context.fillStyle = this.colourOf(cell);
      const x = (i % columns) * size;
      context.fillRect(x, Math.floor(i / columns) * size, size - gap, size - gap);
    });
  }

  layoutOf(snapshot) {
    return layout(snapshot.num_blocks, this.canvas.clientWidth, MAP_HEIGHT);
  }

  colourOf({ state, request }) {
    if (state === "used") return this.colourOfRequest(request);
    return this.styles.getPropertyValue(state === "cached" ? "--cached" : "--free");
  }

  colourOfRequest(id) {
    return `hsl(${this.hues.of(id)} 62% ${this.styles.getPropertyValue("--request-lightness")})`;
  }

  drawRequests(running) {
    const rows = running.slice(0, MOST_SHOWN_REQUESTS).map((request) => {
      const row = document.createElement("li");
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = this.colourOfRequest(request.id);
      const tokens = `${request.num_prompt_tokens} + ${request.num_output_tokens} tokens`;
      const figures = document.createElement("span");
      figures.textContent = tokens;
      row.append(swatch, request.id.slice(0, 18), figures);
      return row;
    });
    if (running.length > MOST_SHOWN_REQUESTS) {
      const row = document.createElement("li");
      row.textContent = `and ${running.length - MOST_SHOWN_REQUESTS} more`;
      rows.push(row);
    }
    this.byId("requests").replaceChildren(...rows);
  }

  showBlockAt(event) {
    if (!this.snapshot) return;
    const { size, columns, perCell } = this.layoutOf(this.snapshot);
    const column = Math.floor(event.offsetX / size);
    const index = Math.floor(event.offsetY / size) * columns + column;
    const cell = column < columns ? cellsOf(this.snapshot, perCell)[index] : undefined;
    if (!cell) return this.write("block-hover", "");
    const first = index * perCell;
    const last = Math.min(first + perCell, this.snapshot.num_blocks) - 1;
    const name = first === last ? `block ${first}` : `blocks ${first} to ${last}`;
    const state = cell.state === "used" ? `in use by ${cell.request}` : cell.state;
    return this.write("block-hover", `${name}: ${state}`);
  }
}
