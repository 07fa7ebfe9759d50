"use strict";
// Draws a diff twice, before and after, with every part at one place in both. Parts are numbered; part 0 is the whole model.

const WIDTH = 184, HEIGHT = 44, ACROSS = 26, DOWN = 30, HEAD = 26, PADDING = 16, BEND = 10;
const ENTRY = -1, EXIT = -2; // where edges come into a module and leave it, beside its children
const SIDES = { before: 1, after: 2 };
const $ = (id) => document.getElementById(id);

async function unpacked() {
  const bytes = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const signed = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Math.abs(number).toLocaleString("en");
const shaped = (shape) => (shape === null ? "none" : shape.join("×") || "scalar");

/** Parameter names as they are called inside the module. */
const within = (text, module) =>
  module ? text.replace(new RegExp(`(?<![\\w.])${module.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}\\.`, "g"), "") : text;

const brush = document.createElement("canvas").getContext("2d");
const widthOf = (text) => brush.measureText(text).width;

/** The text with its middle left out, where it is wider than there is room. */
function fitted(text, room = WIDTH - 12) {
  let length = text.length;
  const cut = () => text.slice(0, Math.ceil(length * 0.4)) + "…" + text.slice(text.length - Math.floor(length * 0.6));
  if (widthOf(text) <= room) return text;
  while (length > 1 && widthOf(cut()) > room) length--;
  return cut();
}

const tag = (kind, text = kind) =>
  element("span", { class: `tag ${["added", "removed", "changed", "renamed"].includes(kind) ? kind : "site"}` }, text);

// ---- where parts are

/** Places what is visible: for each part shown its centre and size, for each unfolded module the layers of its children. */
function arranged(parts, open, headOf) {
  const shown = new Map();
  const inner = new Map();

  function measure(module) {
    const { points, routes } = parts[module];
    const small = { width: BEND, height: 0 };
    const entries = points.map(([part, [at, layer]]) =>
      ({ part, at, layer, ...(part < 0 ? small : open.has(part) ? measure(part) : { width: WIDTH, height: HEIGHT }) }));
    const bends = routes.flatMap(([source, target, way]) =>
      way.map(([at, layer]) => ({ key: `${source} ${target} ${layer}`, at, layer, ...small })));
    const all = [...entries, ...bends].sort((a, b) => a.at - b.at);
    const heights = [];
    for (const entry of all) heights[entry.layer] = Math.max(heights[entry.layer] ?? 0, entry.height);
    let column = 0, left = 0;
    const last = new Map(); // of each layer, the entry placed last: columns keep their order and give way to what is wide
    for (let from = 0, to; from < all.length; from = to) {
      for (to = from; to < all.length && all[to].at === all[from].at; to++);
      let x = from ? column + (all[from].at - all[from - 1].at) * (WIDTH + ACROSS) : 0;
      for (const entry of all.slice(from, to)) {
        const beside = last.get(entry.layer);
        if (beside) x = Math.max(x, beside.x + (beside.width + entry.width) / 2 + (beside.height && entry.height ? ACROSS : ACROSS / 2));
      }
      for (const entry of all.slice(from, to)) {
        entry.x = x;
        last.set(entry.layer, entry);
        left = Math.min(left, x - entry.width / 2);
      }
      column = x;
    }
    let right = Math.max(...all.map((entry) => entry.x + entry.width / 2));
    const ends = Object.fromEntries(entries.map((entry) => [entry.part, entry]));
    const middle = ends[ENTRY]?.x ?? (left + right) / 2;
    const lacking = module ? Math.max(0, widthOf(headOf(module)) + PADDING - (middle - left)) : 0; // the heading stands left of what enters
    [left, right] = [left - lacking, right + lacking];
    const tops = [];
    let y = ENTRY in ends ? HEAD / 2 : HEAD;
    for (let layer = 0; layer < heights.length; layer++) {
      tops[layer] = y;
      y += heights[layer] + DOWN;
    }
    const size = { width: right - left + 2 * PADDING, height: y - (EXIT in ends ? 1.5 : 1) * DOWN + PADDING };
    inner.set(module, { entries, ends, bends: new Map(bends.map((bend) => [bend.key, bend])), heights, tops, left, ...size });
    return size;
  }

  function put(module, left, top) {
    const it = inner.get(module);
    it.x = left + PADDING - it.left;
    it.y = top;
    for (const entry of it.entries.filter(({ part }) => part >= 0)) {
      const box = {
        x: it.x + entry.x, y: top + it.tops[entry.layer] + it.heights[entry.layer] / 2,
        width: entry.width, height: entry.height,
      };
      shown.set(entry.part, box);
      if (open.has(entry.part)) put(entry.part, box.x - box.width / 2, box.y - box.height / 2);
    }
  }

  measure(0);
  put(0, 0, 0);
  return { shown, inner };
}

/** The points that an edge passes between two visible parts: out of modules, along, and into modules; null if it has no way of its own. */
function way(parts, { inner }, source, target) {
  const chain = (part) => { const found = [part]; while (part > 0) found.push(part = parts[part].parent); return found; };
  const above = chain(source), below = chain(target);
  while (above.length > 1 && below.length > 1 && above.at(-2) === below.at(-2)) { above.pop(); below.pop(); }
  const legs = [];
  for (let step = 0; step < above.length - 2; step++) legs.push([above[step + 1], above[step], EXIT]);
  legs.push([above.at(-1), above.at(-2), below.at(-2)]);
  for (let step = below.length - 3; step >= 0; step--) legs.push([below[step + 1], ENTRY, below[step]]);
  const points = [];
  for (const [module, first, second] of legs) {
    const it = inner.get(module);
    const [a, b] = [it.ends[first], it.ends[second]];
    if (!a || !b || a.layer >= b.layer) return null;
    const across = (end, side) => { // an edge meets an unfolded module where that has its entry or exit
      const box = inner.get(end.part);
      return box?.ends[side] ? box.x + box.ends[side].x : it.x + end.x;
    };
    const top = (layer) => it.y + it.tops[layer], bottom = (layer) => top(layer) + it.heights[layer];
    points.push([across(a, EXIT), bottom(a.layer)]);
    for (let layer = a.layer + 1; layer < b.layer; layer++) {
      const bend = it.bends.get(`${first} ${second} ${layer}`);
      if (!bend) return null;
      points.push([it.x + bend.x, top(layer)], [it.x + bend.x, bottom(layer)]);
    }
    points.push([across(b, ENTRY), top(b.layer)]);
  }
  const same = (p, q) => p !== undefined && q !== undefined && Math.abs(p[0] - q[0]) < 1;
  return points.filter((point, step) => !(same(points[step - 1], point) && same(point, points[step + 1])));
}

/** What Cytoscape wants: bends as distances from the straight line between two centres. */
function bent(points, source, target) {
  const dx = target.x - source.x, dy = target.y - source.y, length = Math.hypot(dx, dy);
  const weights = [], distances = [];
  for (const [x, y] of points) {
    weights.push(((x - source.x) * dx + (y - source.y) * dy) / length ** 2);
    distances.push(((y - source.y) * dx - (x - source.x) * dy) / length);
  }
  return distances.every((distance) => Math.abs(distance) < 1) ? null : { weights, distances };
}

// ---- the two panes

function styles() {
  brush.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const marked = (name) => ({ "background-color": color(name), "border-color": color(`${name}-line`), "border-width": 1.5 });
  return [
    { selector: "node", style: {
      shape: "round-rectangle", "corner-radius": 6, width: "data(width)", height: "data(height)", "background-color": color("node"),
      "border-width": 1, "border-color": color("module-line"), label: "data(label)", color: color("ink"), "font-size": 12,
      "font-family": getComputedStyle(document.body).fontFamily, "text-wrap": "wrap", "text-max-width": 400, "text-valign": "center", "line-height": 1.25,
      "min-zoomed-font-size": 5, "z-index-compare": "manual", "z-index": "data(depth)", "overlay-opacity": 0 } },
    { selector: ".module", style: { "background-color": color("module") } },
    { selector: ".holds", style: { "background-color": color("holds"), "border-color": color("changed-line") } },
    { selector: ".open", style: {
      "background-color": color("edge"), "background-opacity": 0.07, "text-valign": "top", "text-margin-y": HEAD - 5,
      "text-margin-x": (node) => (widthOf(node.data("label")) - node.data("width")) / 2 + 8 } },
    { selector: ".changed", style: marked("changed") },
    { selector: ".added", style: marked("added") },
    { selector: ".removed", style: marked("removed") },
    { selector: ".shared", style: { "border-color": color("shared"), "border-width": 2.5 } },
    { selector: ".group", style: { "underlay-color": color("shared"), "underlay-opacity": 0.3, "underlay-padding": 6, "underlay-shape": "round-rectangle" } },
    { selector: ".selected", style: { "outline-color": color("focus"), "outline-width": 3, "outline-offset": 2 } },
    { selector: "edge", style: {
      width: 1.3, "line-color": color("edge"), "target-arrow-color": color("edge"), "target-arrow-shape": "triangle", "arrow-scale": 0.8,
      "curve-style": "straight", "source-endpoint": "0% 50%", "target-endpoint": "0% -50%", "z-index-compare": "manual", "z-index": 50,
      events: "no", "overlay-opacity": 0 } },
    { selector: ".bent", style: {
      "curve-style": "round-segments", "segment-radii": 12, "segment-weights": (edge) => edge.data("weights"),
      "segment-distances": (edge) => edge.data("distances"), "edge-distances": "node-position" } },
    { selector: ".around", style: {
      "curve-style": "unbundled-bezier", "control-point-distances": (edge) => edge.data("distance"), "control-point-weights": 0.5, opacity: 0.7,
      "source-endpoint": "50% 0%", "target-endpoint": "50% 0%" } },
    { selector: ".edge-added", style: { "line-color": color("added-line"), "target-arrow-color": color("added-line"), width: 2 } },
    { selector: ".edge-removed", style: { "line-color": color("removed-line"), "target-arrow-color": color("removed-line"), width: 2 } },
    { selector: ".link", style: {
      "line-style": "dashed", "line-color": color("shared"), "target-arrow-color": color("shared"), width: 1.8, opacity: 0.9, "z-index": 60 } },
  ];
}

function viewerOf(data) {
  const { parts, diff } = data;
  const open = new Set(data.opened);
  const groupOf = new Map();
  Object.entries(diff.shared).forEach(([source, views]) => {
    for (const name of [source, ...views]) groupOf.set(name, (groupOf.get(name) ?? new Set()).add(source));
  });
  const readers = { before: new Map(), after: new Map() };
  const groups = parts.map(() => new Set());
  parts.forEach((part, number) => {
    for (const side of Object.keys(SIDES)) {
      for (const [, names] of part[side]?.operands ?? []) {
        for (const name of names) {
          if (!readers[side].has(name)) readers[side].set(name, []);
          readers[side].get(name).push(number);
          for (const source of groupOf.get(name) ?? []) groups[number].add(source);
        }
      }
    }
  });
  const sources = parts.map(() => []), users = parts.map(() => []);
  for (const [source, target] of data.edges) { users[source].push(target); sources[target].push(source); }
  const depth = [];
  parts.forEach((part, number) => depth.push(number ? depth[part.parent] + 1 : 0));
  const panes = {};
  let selected = null, current = -1, geometry = null, shownAs = [];

  function chain(part) {
    const found = [];
    for (let around = parts[part].parent; around >= 0; around = parts[around].parent) found.push(around);
    return found;
  }

  function labelOf(number, side) {
    const { name, detail } = parts[number][side];
    if (!parts[number].children) return [fitted(name), fitted(detail)].filter(Boolean).join("\n");
    return open.has(number) ? headOf(number, side) : `${fitted(`▸ ${name}`)}\n${fitted(detail)}`;
  }

  function headOf(number, side = parts[number].before ? "before" : "after") {
    const { name } = parts[number][side];
    return `▾ ${fitted(name, 2 * WIDTH)}`;
  }

  function classesOf(number, side) {
    const part = parts[number];
    const classes = part.children ? ["module"] : [];
    if (open.has(number)) classes.push("open");
    else if (part.children && part.changes.length) classes.push("holds");
    if (part.edit) classes.push(part.edit.kind);
    if (!part.children && groups[number].size && side === "after") classes.push("shared");
    return classes.join(" ");
  }

  function edgesOf(side) {
    const bit = SIDES[side], found = new Map();
    for (const [source, target, sides] of data.edges) {
      const a = shownAs[source], b = shownAs[target];
      if (!(sides & bit) || a === b) continue;
      found.set(`${a} ${b}`, (found.get(`${a} ${b}`) ?? 0) | sides);
    }
    return [...found].map(([key, sides]) => {
      const [a, b] = key.split(" ").map(Number);
      const classes = sides === 3 ? [] : sides === 1 ? ["edge-removed"] : ["edge-added"];
      const points = way(parts, geometry, a, b);
      const bends = points && bent(points, geometry.shown.get(a), geometry.shown.get(b));
      if (bends) classes.push("bent");
      if (!points) classes.push("around");
      return { group: "edges", classes: classes.join(" "), data: { id: `${a}-${b}`, source: `${a}`, target: `${b}`, distance: bulge(a, b), ...bends } };
    });
  }

  /** How far an edge that goes around what is between leaves the straight line, to the right. */
  function bulge(source, target) {
    const down = geometry.shown.get(Number(target)).y - geometry.shown.get(Number(source)).y;
    return -Math.sign(down || 1) * (WIDTH / 2 + 40 + Math.min(160, Math.abs(down) / 8));
  }

  function linksOf() {
    const found = new Set();
    for (const [source, target] of data.links) {
      const a = shownAs[source], b = shownAs[target];
      if (a !== b && parts[a].after && parts[b].after) found.add(`${a} ${b}`);
    }
    return [...found].map((key) => {
      const [source, target] = key.split(" ");
      return { group: "edges", classes: "around link", data: { id: `link ${key}`, source, target, distance: bulge(source, target) } };
    });
  }

  /** Draws what is visible; `anchor` stays where it is on the screen. */
  function draw(anchor = null) {
    const held = anchor !== null && geometry?.shown.get(anchor);
    const was = held && { x: held.x, y: held.y - held.height / 2 };
    geometry = arranged(parts, open, headOf);
    shownAs = [];
    parts.forEach((part, number) => {
      shownAs[number] = number === 0 || (open.has(part.parent) && shownAs[part.parent] === part.parent) ? number : shownAs[part.parent];
    });
    for (const [side, pane] of Object.entries(panes)) {
      const nodes = [...geometry.shown].filter(([number]) => parts[number][side]).map(([number, box]) => ({
        group: "nodes", classes: classesOf(number, side), position: { x: box.x, y: box.y },
        data: { id: `${number}`, label: labelOf(number, side), width: box.width, height: box.height, depth: open.has(number) ? depth[number] : 100 },
      }));
      pane.batch(() => {
        pane.elements().remove();
        pane.add([...nodes, ...edgesOf(side), ...(side === "after" ? linksOf() : [])]);
      });
    }
    mark();
    if (was) {
      const box = geometry.shown.get(anchor), zoom = panes.after.zoom(), pan = panes.after.pan();
      panes.after.pan({ x: pan.x + (was.x - box.x) * zoom, y: pan.y + (was.y - (box.y - box.height / 2)) * zoom });
    }
  }

  /** Outlines what is selected, and what has a matrix in common with it. */
  function mark() {
    const alike = new Set();
    if (selected !== null) {
      for (const source of groups[selected]) groups.forEach((of, number) => of.has(source) && alike.add(shownAs[number]));
    }
    for (const pane of Object.values(panes)) {
      pane.batch(() => {
        pane.nodes().removeClass("selected group");
        if (selected !== null) pane.getElementById(`${shownAs[selected]}`).addClass("selected");
        for (const number of alike) pane.getElementById(`${number}`).addClass("group");
      });
    }
  }

  function toggle(part) {
    if (!parts[part].children || part === 0) return;
    if (!open.delete(part)) open.add(part);
    draw(part);
  }

  function select(part) {
    selected = part;
    mark();
    $("details").replaceChildren(...(part === null ? introduction() : detailsOf(part)));
    $("details").scrollTop = 0;
  }

  function reveal(numbers) {
    const around = numbers.flatMap(chain).filter((part) => !open.has(part));
    around.forEach((part) => open.add(part));
    if (around.length) draw();
  }

  function show(numbers) {
    const boxes = numbers.map((number) => geometry.shown.get(shownAs[number])).filter(Boolean);
    if (!boxes.length) return;
    const edge = (pick, of) => pick(...boxes.map(of));
    frame(edge(Math.min, (b) => b.x - b.width / 2), edge(Math.min, (b) => b.y - b.height / 2),
      edge(Math.max, (b) => b.x + b.width / 2), edge(Math.max, (b) => b.y + b.height / 2), 0.6, 1.1);
  }

  /** Shows a region; what is too high to be read at once is shown from its top. */
  function frame(left, top, right, bottom, least, most) {
    const pane = panes.after, margin = 24;
    const zoom = Math.max(least, Math.min(most, (pane.width() - 2 * margin) / (right - left), (pane.height() - 2 * margin) / (bottom - top)));
    const room = pane.height() - (bottom - top) * zoom;
    pane.viewport({ zoom, pan: { x: pane.width() / 2 - zoom * (left + right) / 2, y: (room > 2 * margin ? room / 2 : margin) - zoom * top } });
  }

  function fit(least = 0.02) {
    const whole = geometry.inner.get(0);
    frame(0, HEAD, whole.width, whole.height - PADDING, least, 1.1);
  }

  function goto(part) {
    reveal([part]);
    select(part);
    show([part]);
  }

  function gotoChange(number) {
    current = (number + diff.changes.length) % diff.changes.length;
    const change = diff.changes[current];
    const held = partsOf(current);
    const module = parts.findIndex((part) => part.children && part.before?.path === change.module);
    const shown = held.length ? held.slice(0, 40) : module > 0 ? [module] : [];
    reveal(shown);
    select(shown[0] ?? null);
    if (!held.length) $("details").replaceChildren(...changeDetails(current));
    show(shown);
    document.querySelectorAll("#changes button").forEach((button) => {
      const isCurrent = Number(button.dataset.change) === current, fold = button.closest("details");
      button.setAttribute("aria-current", isCurrent);
      if (!isCurrent) return;
      if (fold) fold.open = true;
      button.scrollIntoView({ block: "nearest" });
    });
  }

  function partsOf(change) {
    const found = [];
    parts.forEach((part, number) => part.edit && part.changes.includes(change) && found.push(number));
    return found;
  }

  // ---- the panel

  const pathOf = (number) => { const part = parts[number].after ?? parts[number].before; return part.path; };
  const opOf = (number) => (parts[number].after ?? parts[number].before).op ?? "";
  const jump = (number, text) => element("button", { class: "jump", onclick: () => goto(number) }, text);
  const jumps = (title, numbers) => (!numbers.length ? [] : [element("h4", {}, title),
    element("ul", {}, ...numbers.slice(0, 30).map((number) => element("li", {}, jump(number, `${pathOf(number)} ${opOf(number)}`.trim())))),
    ...(numbers.length > 30 ? [element("p", {}, `… and ${numbers.length - 30} more`)] : [])]);

  function introduction() {
    return [element("h3", {}, diff.changes.length ? "Select a part to see its details" : "No differences"),
      element("p", {}, "Click a module to expand it, its heading to collapse it. Both panes move in step. Press ? for keys.")];
  }

  function rows(table) {
    return table.filter(([, before, after]) => before || after).map(([name, before, after]) =>
      before === after ? element("tr", {}, element("th", {}, name), element("td", { colspan: 2 }, before))
        : element("tr", {}, element("th", {}, name), element("td", {}, before || "–"), element("td", {}, after || "–")));
  }

  function detailsOf(number) {
    const part = parts[number], { before, after } = part;
    const head = [element("h3", {}, pathOf(number) || (part.children ? diff.before.name : opOf(number))),
      ...(part.edit ? [element("p", {}, tag(part.edit.kind), part.edit.what.length ? ` in ${part.edit.what.join(", ")}` : "")] : [])];
    if (part.children) {
      head.push(element("table", {}, ...rows([["class", before?.class, after?.class], ["path", before?.path, after?.path]])));
      if (part.delta) head.push(element("p", {}, `${signed(part.delta)} parameters`));
      if (number) head.push(element("p", {}, element("button", { onclick: () => toggle(number) }, "expand or collapse")));
      return [...head, ...(part.changes.length ? [element("h4", {}, "changes inside"), element("ul", {}, ...part.changes.slice(0, 40).map((change) =>
        element("li", {}, element("button", { class: "jump", onclick: () => gotoChange(change) }, `${diff.changes[change].kind} ${diff.changes[change].module}`))))] : [])];
    }
    const operands = (side) => side && side.operands.map(([text, , shape]) => `${within(text, side.path)} ${shape}`).join(", ");
    head.push(element("table", {}, element("tr", {}, element("th"), element("th", {}, "before"), element("th", {}, "after")),
      ...rows([["operation", before?.op, after?.op], ["weights", operands(before), operands(after)], ["settings", before?.settings, after?.settings],
        ["shape", before?.shape, after?.shape], ["dtype", before?.dtype, after?.dtype], ["node", before?.id, after?.id]])));
    const members = [...groups[number]].flatMap((source) => [source, ...diff.shared[source]]);
    const others = [...new Set(members.flatMap((name) => readers.before.get(name) ?? readers.after.get(name) ?? []))].filter((other) => other !== number);
    return [...head, ...(part.edit ? part.changes.flatMap(changeDetails) : []), ...jumps("shares its weight with", others),
      ...jumps("inputs", sources[number]), ...jumps("read by", users[number])];
  }

  function changeDetails(number) {
    const change = diff.changes[number];
    const weight = ({ name, before, after, view }) => {
      const same = JSON.stringify(before) === JSON.stringify(after);
      const now = same ? "" : [after === null ? (view ? "" : "none") : shaped(after), view].filter(Boolean).join(", ");
      return element("li", {}, within(`${name} ${shaped(before)}${now ? ` → ${now}` : ""}`, change.module));
    };
    const kind = change.treatment ? `${change.kind} (${change.treatment})` : change.kind;
    return [element("h4", {}, "change"),
      element("p", {}, tag(change.kind, kind),
        ` ${change.module}${change.module_after ? ` → ${change.module_after}` : ""} `, element("small", {}, signed(change.delta))),
      element("ul", {}, ...change.weights.map(weight)),
      change.shared_with.length ? element("p", {}, element("small", {}, "one matrix with: "), change.shared_with.join(", ")) : null].filter(Boolean);
  }

  function lists() {
    $("tab-changes").textContent = `Changes (${diff.changes.length})`;
    $("tab-misses").textContent = `Near misses (${diff.misses.length})`;
    const titled = (change) => (change.module || "the model") + (change.module_after ? ` → ${change.module_after}` : "");
    const cells = (name, { kind, delta }, times = "") => {
      const last = name.lastIndexOf(".") + 1;
      return [tag(kind),
        element("span", { class: "where", title: name }, element("span", {}, name.slice(0, last)), element("span", {}, name.slice(last))),
        element("span", { class: "delta" }, delta ? times + signed(delta) : "")];
    };
    const row = (number) => element("li", {}, element("button", { "data-change": number, onclick: () => gotoChange(number) },
      ...cells(titled(diff.changes[number]), diff.changes[number])));
    $("changes").replaceChildren(...data.folds.map(({ changes, name }) => changes.length < 2 ? row(changes[0]) :
      element("li", {}, element("details", {},
        element("summary", {}, ...cells(name, diff.changes[changes[0]], `${changes.length} × `)), element("ol", {}, ...changes.map(row))))));
    $("misses").replaceChildren(...diff.misses.map((miss) => {
      const found = parts.findIndex((part) => (part.before ?? part.after).path === miss.name);
      return element("li", {}, found > 0 ? jump(found, miss.name) : element("b", {}, miss.name || "the model"), " ", element("small", {}, miss.kind),
        element("br"), miss.reason);
    }));
    const tabs = { changes: $("tab-changes"), misses: $("tab-misses") };
    for (const [name, tab] of Object.entries(tabs)) {
      tab.addEventListener("click", () => {
        for (const [other, button] of Object.entries(tabs)) {
          button.setAttribute("aria-selected", other === name);
          $(other).hidden = other !== name;
        }
      });
    }
  }

  // ---- search

  const texts = parts.map((part, number) => number === 0 ? "" : [part.before, part.after].filter(Boolean).map((side) =>
    [side.path, side.op, side.id, side.class, ...(side.operands ?? []).map(([text]) => text)].join(" ")).join(" ").toLowerCase());

  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length ? parts.map((_, number) => number).filter((number) => number && words.every((word) => texts[number].includes(word))) : [];
    const option = (number, place) => element("li", { role: "option", id: `result-${place}`, "aria-selected": place === 0, "data-part": number, onmousedown: (event) => {
      event.preventDefault();
      choose(number);
    } }, pathOf(number), " ", element("small", {}, opOf(number) || (parts[number].after ?? parts[number].before).class));
    const more = found.length > 100 ? [element("li", {}, element("small", {}, `… and ${found.length - 100} more`))] : [];
    const none = words.length && !found.length ? [element("li", {}, element("small", {}, "nothing found"))] : [];
    $("results").replaceChildren(...found.slice(0, 100).map(option), ...more, ...none);
    $("results").hidden = !words.length;
    $("search").setAttribute("aria-expanded", words.length > 0);
  }

  function choose(part) {
    $("results").hidden = true;
    $("search").setAttribute("aria-expanded", false);
    goto(part);
    $("after").focus();
  }

  function searchKey(event) {
    const options = [...$("results").querySelectorAll("[role=option]")];
    const place = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && options.length) {
      event.preventDefault();
      const next = (place + step + options.length) % options.length;
      options[place]?.setAttribute("aria-selected", false);
      options[next].setAttribute("aria-selected", true);
      options[next].scrollIntoView({ block: "nearest" });
      $("search").setAttribute("aria-activedescendant", options[next].id);
    } else if (event.key === "Enter" && options[place]) choose(Number(options[place].dataset.part));
    else if (event.key === "Escape") { $("search").value = ""; search(); $("after").focus(); }
  }

  // ---- keys

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function beside([dx, dy]) {
    const boxes = [...geometry.shown].filter(([number]) => !open.has(number));
    const from = geometry.shown.get(shownAs[selected ?? -1]);
    if (!from) return boxes[0]?.[0];
    let best = null, least = Infinity;
    for (const [number, box] of boxes) {
      const along = (box.x - from.x) * dx + (box.y - from.y) * dy, off = Math.abs((box.x - from.x) * dy) + Math.abs((box.y - from.y) * dx);
      const far = along + 2 * off;
      if (along > 1 && far < least) [best, least] = [number, far];
    }
    return best;
  }

  function keep(part) {
    const box = geometry.shown.get(part), pane = panes.after, { x1, x2, y1, y2 } = pane.extent();
    if (box.x - box.width / 2 < x1 || box.x + box.width / 2 > x2 || box.y - box.height / 2 < y1 || box.y + box.height / 2 > y2) {
      pane.pan({ x: pane.width() / 2 - box.x * pane.zoom(), y: pane.height() / 2 - box.y * pane.zoom() });
    }
  }

  function zoomBy(factor) {
    const pane = panes.after;
    pane.zoom({ level: pane.zoom() * factor, renderedPosition: { x: pane.width() / 2, y: pane.height() / 2 } });
  }

  function theme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    for (const pane of Object.values(panes)) pane.style(styles());
  }

  const collapse = () => { open.clear(); open.add(0); draw(); fit(0.4); };
  const keys = {
    n: () => diff.changes.length && gotoChange(current + 1),
    p: () => diff.changes.length && gotoChange(current < 0 ? -1 : current - 1),
    "/": () => $("search").focus(), f: () => fit(), c: collapse, "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8),
    t: () => theme(document.documentElement.dataset.theme !== "dark"), "?": () => $("keys").showModal(), Escape: () => select(null),
  };

  function key(event) {
    if (event.target.closest("input, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    const onCanvas = event.target.closest(".canvas");
    const step = onCanvas && STEPS[event.key];
    if (step && event.shiftKey) panes.after.panBy({ x: -80 * step[0], y: -80 * step[1] });
    else if (step) { const part = beside(step); if (part !== null && part !== undefined) { select(part); keep(part); } }
    else if (onCanvas && (event.key === "Enter" || event.key === " ") && selected !== null) toggle(selected);
    else if (onCanvas && event.key === "Backspace" && selected !== null) {
      const around = parts[selected].parent;
      if (around > 0) { toggle(around); select(around); keep(around); }
    } else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  }

  // ---- start

  function start() {
    document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => theme(event.matches));
    $("summary").textContent = data.summary;
    for (const side of Object.keys(SIDES)) {
      const { name, nodes, parameters } = diff[side];
      $(`title-${side}`).replaceChildren(`${side}: ${name} `, element("small", {}, `${nodes.toLocaleString("en")} nodes, ${parameters.toLocaleString("en")} parameters`));
      const pane = panes[side] = cytoscape({
        container: $(side), style: styles(), layout: { name: "preset" }, autoungrabify: true, autounselectify: true, boxSelectionEnabled: false, minZoom: 0.02, maxZoom: 4 });
      pane.on("tap", (event) => {
        $(side).focus({ preventScroll: true });
        if (event.target === pane) return select(null);
        const part = Number(event.target.id()), box = geometry.shown.get(part);
        const onHead = event.position.y < box.y - box.height / 2 + HEAD;
        select(part);
        if (parts[part].children && (!open.has(part) || onHead)) toggle(part);
      });
      const cursor = (of) => { $(side).style.cursor = of; };
      pane.on("mouseover", "node", (event) => cursor(event.target.hasClass("open") ? "default" : "pointer"));
      pane.on("mouseout", "node", () => cursor("grab"));
    }
    let following = false; // one pane moves the other, which must not move the first in turn
    for (const [side, other] of [["before", "after"], ["after", "before"]]) {
      panes[side].on("viewport", () => {
        if (following) return;
        following = true;
        panes[other].viewport({ zoom: panes[side].zoom(), pan: { ...panes[side].pan() } });
        following = false;
      });
    }
    lists();
    select(null);
    draw();
    fit(0.55);
    $("search").addEventListener("input", search);
    $("search").addEventListener("keydown", searchKey);
    $("search").addEventListener("blur", () => { $("results").hidden = true; });
    for (const [id, name] of [["previous", "p"], ["next", "n"], ["fold", "c"], ["fit", "f"], ["theme", "t"], ["help", "?"]]) $(id).addEventListener("click", keys[name]);
    document.addEventListener("keydown", key);
  }

  start();
  return { data, panes, open, goto, gotoChange, toggle, select, get selected() { return selected; }, get geometry() { return geometry; } };
}

unpacked().then((data) => {
  window.viewer = viewerOf(data);
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.drawn = Math.round(performance.now()); }));
}, (error) => { $("summary").textContent = `This page needs a newer browser: ${error}`; });
