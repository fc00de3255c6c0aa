"use strict";
// The report's own script: sorting, filters, charts, slices, confusion. Data comes from #findings and goes in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("findings").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
  const f1 = (value) => value.toFixed(3);
  const byId = (id) => document.getElementById(id);

  // Sorting. A cell's data-sort is its value; where nothing was measured it is empty and goes last in either direction.
  const sortTable = (table, heads, column) => {
    const head = heads[column];
    const numeric = head.classList.contains("number");
    const first = head.dataset.first ?? (numeric ? "descending" : "ascending");
    const now = head.getAttribute("aria-sort");
    const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
    for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [row, row.cells[column].dataset.sort ?? row.cells[column].textContent.trim()]);
    rows.sort(([, a], [, b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    table.tBodies[0].append(...rows.map(([row]) => row));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortTable(table, heads, column)));
  }

  // Filters. A control of the field X keeps the items whose data-X is its value; that of "text" those that contain it.
  for (const controls of document.querySelectorAll("[data-filters]")) {
    const items = [...document.querySelectorAll(controls.dataset.filters)];
    const output = controls.querySelector("output");
    const apply = () => {
      const wanted = [...controls.querySelectorAll("[data-field]")].filter((one) => one.value !== "" && (one.type !== "radio" || one.checked));
      const keeps = (item, one) => one.dataset.field === "text"
        ? item.textContent.toLowerCase().includes(one.value.trim().toLowerCase()) : item.dataset[one.dataset.field] === one.value;
      for (const item of items) item.hidden = !wanted.every((one) => keeps(item, one));
      output.textContent = `${items.filter((item) => !item.hidden).length} of ${items.length} shown`;
    };
    controls.addEventListener("input", apply);
    apply();
  }
  byId("intervals")?.addEventListener("change", (event) => byId("headline-table").classList.toggle("hide-intervals", !event.target.checked));

  // Charts: drawn at the width of their box, so that text keeps its size on a phone. A shape per kind; published ones are hollow.
  const SHAPES = {
    tuned: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", adapted: "M-5,-5h10v10h-10z", encoder: "M0,-6l6,10h-12z", untuned: "M0,-6l6,6l-6,6l-6,-6z",
    baseline: "M-6,-2h12v4h-12z", frontier: "M0,6l6,-10h-12z",
  };
  const linearTicks = (low, high) => {
    const unit = 10 ** Math.floor(Math.log10((high - low) / 5));
    const step = unit * [1, 2, 5, 10].find((one) => one * unit >= (high - low) / 5);
    const count = Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
    return Array.from({ length: count }, (_, index) => (Math.ceil(low / step - 1e-9) + index) * step);
  };
  const logTicks = (low, high) => {
    const powers = Array.from({ length: Math.ceil(Math.log10(high)) - Math.floor(Math.log10(low)) + 1 }, (_, index) => 10 ** (Math.floor(Math.log10(low)) + index));
    const inside = (steps) => powers.flatMap((power) => steps.map((step) => step * power)).filter((tick) => tick >= low && tick <= high);
    return [[1, 2, 5], [1, 3], [1]].map(inside).find((ticks) => ticks.length <= 7) ?? inside([1]);
  };
  const short = (value) => {
    const [unit, factor] = [["B", 1e9], ["M", 1e6], ["K", 1e3]].find(([, one]) => value >= one) ?? ["", 1];
    return `${+(value / factor).toPrecision(3)}${unit}`;
  };
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const drawChart = (box, points) => {
    if (!points.length) {
      box.replaceChildren(html("p", { class: "empty" }, "No system of this study has both figures."));
      return;
    }
    const width = Math.max(260, box.clientWidth), height = Math.min(430, Math.max(270, width * 0.6));
    const margin = { left: 50, right: 14, top: 14, bottom: 44 };
    const xs = points.map((one) => one.x);
    const log = Math.min(...xs) > 0;
    const [x0, x1] = log ? [Math.min(...xs) / 1.6, Math.max(...xs) * 1.6] : [0, Math.max(...xs) * 1.1 || 1];
    const y0 = Math.max(0, Math.floor(Math.min(...points.map((one) => one.low ?? one.y)) * 10 - 0.01) / 10);
    const y1 = Math.min(1, Math.ceil(Math.max(...points.map((one) => one.high ?? one.y)) * 10 + 0.01) / 10);
    const place = (value) => log ? Math.log(value) : value;
    const left = (value) => margin.left + (place(value) - place(x0)) / (place(x1) - place(x0)) * (width - margin.left - margin.right);
    const top = (value) => height - margin.bottom - (value - y0) / (y1 - y0 || 1) * (height - margin.top - margin.bottom);
    const floor = height - margin.bottom;
    const title = `${box.dataset.x}${log ? " (log scale)" : ""}`;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Mean F1 against ${title}; the table has the figures` });
    for (const tick of linearTicks(y0, y1))
      root.append(svg("line", { x1: margin.left, x2: width - margin.right, y1: top(tick), y2: top(tick) }),
        svg("text", { class: "tick", x: margin.left - 7, y: top(tick) + 4, "text-anchor": "end" }, tick.toFixed(y1 - y0 > 0.25 ? 1 : 2)));
    for (const tick of log ? logTicks(x0, x1) : linearTicks(x0, x1))
      root.append(svg("line", { x1: left(tick), x2: left(tick), y1: floor, y2: floor + 5 }),
        svg("text", { class: "tick", x: left(tick), y: floor + 18, "text-anchor": "middle" }, short(tick)));
    root.append(svg("text", { class: "axis", x: (margin.left + width - margin.right) / 2, y: height - 6, "text-anchor": "middle" }, title),
      svg("text", { class: "axis", transform: `translate(11 ${(margin.top + floor) / 2}) rotate(-90)`, "text-anchor": "middle" }, "mean F1"));
    const taken = points.map((one) => [left(one.x) - 6, top(one.y) - 6, left(one.x) + 6, top(one.y) + 6]);
    const free = (a) => a[0] >= margin.left && a[2] <= width && a[1] >= 0 && a[3] <= floor && !taken.some((b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1]);
    for (const one of [...points].sort((a, b) => (a.source === "measured") - (b.source === "measured"))) {
      const interval = one.low === null ? "" : `, 95% interval ${f1(one.low)} to ${f1(one.high)}`;
      const mark = svg("g", { class: `kind-${one.kind}` }, svg("title", {}, `${one.name} (${one.source}): F1 ${f1(one.y)}${interval}; ${box.dataset.x} ${short(one.x)}`));
      if (one.low !== null) mark.append(svg("line", { class: "bar", x1: left(one.x), x2: left(one.x), y1: top(one.low), y2: top(one.high) }));
      mark.append(svg("path", { class: one.source, d: SHAPES[one.kind], transform: `translate(${left(one.x)} ${top(one.y)})` }));
      root.append(mark);
    }
    // Names of measured systems where there is room, beside their point, never over another; the others tell theirs when pointed at.
    for (const one of points.filter((point) => point.source === "measured")) {
      const name = one.name.length > 28 ? `${one.name.slice(0, 27)}…` : one.name;
      const long = pen.measureText(name).width, x = left(one.x), y = top(one.y);
      for (const [dx, dy] of [[9, 4], [-9 - long, 4], [9, -8], [-9 - long, -8], [9, 16], [-9 - long, 16], [-long / 2, -13], [-long / 2, 22]]) {
        const area = [x + dx, y + dy - 11, x + dx + long, y + dy + 3];
        if (!free(area)) continue;
        taken.push(area);
        root.append(svg("text", { class: "name", x: x + dx, y: y + dy }, name));
        break;
      }
    }
    const kinds = Object.entries(data.kinds).flatMap(([kind, words]) => ["measured", "published"].map((source) => [kind, words, source]));
    const legend = kinds.filter(([kind, , source]) => points.some((one) => one.kind === kind && one.source === source)).map(([kind, words, source]) =>
      html("li", { class: `kind-${kind}` }, svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, svg("path", { class: source, d: SHAPES[kind] })),
        html("span", {}, source === "published" ? `${words}, published (hollow)` : words)));
    box.replaceChildren(html("ul", { class: "legend" }, ...legend), root);
  };
  const redraw = (box) => {
    const group = box.dataset.control ? byId(box.dataset.control).value : box.dataset.group;
    drawChart(box, data.charts[box.dataset.chart].filter((one) => one.group === group));
  };
  const widths = new Map();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (widths.get(target) === target.clientWidth) continue;
      widths.set(target, target.clientWidth);
      redraw(target);
    }
  });
  for (const box of document.querySelectorAll(".chart")) {
    redraw(box);
    widths.set(box, box.clientWidth);
    observer.observe(box);
    if (box.dataset.control) byId(box.dataset.control).addEventListener("change", () => redraw(box));
  }

  // Slices: a domain opens to its datasets, a dataset to its relations, entity types, lengths and distances.
  const WITHIN = { "relation": "Relations", "entity types": "Entity types", "sentence length": "Sentence length", "entity distance": "Distance between the entities" };
  const described = (one) => {
    const figures = `${one.measure} ${f1(one.value)} (${f1(one.low)}–${f1(one.high)}), ${one.n.toLocaleString("en")} ${one.n === 1 ? "example" : "examples"}`;
    const parts = [html("bdi", {}, one.name), html("span", { class: "value" }, figures)];
    if (one.status === "hole") parts.push(" ", html("span", { class: "hole" }, `⚠ hole: the whole has ${f1(one.whole)}`));
    if (one.status === "too small") parts.push(" ", html("span", { class: "muted small" }, "too few to judge"));
    return parts;
  };
  const drawSlices = () => {
    const { fields, worded, words, systems } = data.slices;
    const read = (row) => Object.fromEntries(fields.map((field, index) => [field, worded.includes(field) ? words[row[index]] : row[index]]));
    const table = systems[byId("slice-system").value].map(read);
    const onlyHoles = byId("only-holes").checked;
    const holes = (rows) => rows.filter((one) => one.status === "hole").length;
    const inside = (rows) => holes(rows) ? [" ", html("span", { class: "hole" }, `⚠ ${holes(rows)} ${holes(rows) === 1 ? "hole" : "holes"} inside`)] : [];
    const branch = (open, head, children) => {
      const node = html("details", {}, html("summary", {}, ...head), ...children);
      node.open = open;
      return node;
    };
    const level = (name, title, parts) => {
      const all = parts.filter((one) => one.level === name), rows = onlyHoles ? all.filter((one) => one.status === "hole") : all;
      return rows.length ? [branch(onlyHoles, [title, html("span", { class: "value" }, `${all.length} parts`), ...inside(all)],
        [html("ul", {}, ...rows.map((one) => html("li", {}, ...described(one))))])] : [];
    };
    const dataset = (one) => {
      const parts = table.filter((part) => part.dataset === one.dataset && part.level !== "dataset");
      if (onlyHoles && one.status !== "hole" && !holes(parts)) return [];
      return [branch(onlyHoles, [...described(one), ...inside(parts)], Object.entries(WITHIN).flatMap(([name, title]) => level(name, title, parts)))];
    };
    const domain = (one) => {
      const parts = table.filter((part) => part.domain === one.domain && part.level !== "domain");
      if (onlyHoles && one.status !== "hole" && !holes(parts)) return [];
      return [branch(true, [...described(one), ...inside(parts)], parts.filter((part) => part.level === "dataset").flatMap(dataset))];
    };
    const trees = table.filter((one) => one.level === "domain").flatMap(domain);
    byId("slices-tree").replaceChildren(...(trees.length ? trees : [html("p", { class: "empty" }, "No hole in this system's results.")]));
  };
  if (byId("slice-system")) {
    for (const id of ["slice-system", "only-holes"]) byId(id).addEventListener("change", drawSlices);
    drawSlices();
  }

  // Confusion: one matrix at a time.
  const drawConfusion = () => {
    const found = data.confusions.find((one) => one.system === byId("confusion-system").value && one.dataset === byId("confusion-dataset").value);
    if (!found) {
      byId("confusion-box").replaceChildren(html("p", { class: "empty" }, "This system was not asked about this dataset."));
      return;
    }
    const counts = found.rows.map(() => found.columns.map(() => 0));
    for (const [row, column, value] of found.counts) counts[row][column] = value;
    const cell = (value, sum, row, column) => {
      const node = html("td", { class: row === column ? "right" : null }, value ? String(value) : "");
      if (value) {
        node.style.background = `color-mix(in srgb, var(--tuned) ${Math.round(8 + 84 * value / sum)}%, var(--paper))`;
        if (value / sum > 0.5) node.style.color = "var(--paper)";
        node.title = `gold ${found.rows[row]}, predicted ${found.columns[column]}: ${value} of ${sum}`;
      }
      return node;
    };
    const head = html("tr", { class: "pinned" }, html("td", { class: "corner" }, "gold ↓ predicted →"), ...found.columns.map((label) => html("th", { scope: "col" }, html("bdi", {}, label))));
    const body = counts.map((values, row) => html("tr", { class: "pinned" }, html("th", { scope: "row" }, html("bdi", {}, found.rows[row])),
      ...values.map((value, column) => cell(value, values.reduce((a, b) => a + b), row, column))));
    const table = html("table", { class: "confusion" }, html("caption", {}, `${found.system} on ${found.title}`), html("thead", {}, head), html("tbody", {}, ...body));
    byId("confusion-box").replaceChildren(html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Confusion matrix" }, table));
  };
  if (byId("confusion-system")) {
    for (const id of ["confusion-system", "confusion-dataset"]) byId(id).addEventListener("change", drawConfusion);
    drawConfusion();
  }
})();
