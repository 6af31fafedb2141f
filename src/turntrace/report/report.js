"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = Object.keys(figures).map((id) => document.getElementById(id));
  const isNarrow = matchMedia("(max-width: 720px)");
  const hasMouse = matchMedia("(hover: hover) and (pointer: fine)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: hasMouse && "hover", // else they would always lie upon the chart
    // These and no others: plotly's own choice has one that sends the chart to a service of theirs.
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  // --- the charts, in the page's colours ---------------------------------------------------------------------------
  function coloured(value, key, style) {
    if (typeof value === "string") {
      const name = /color(scale)?$/.test(key) && /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, key, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each, name, style)]));
  }

  function draw(plot) {
    const style = getComputedStyle(root);
    const { data, layout } = coloured(figures[plot.id], "", style);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    if (!hasMouse) layout.dragmode = false; // a finger on a chart scrolls the page
    if (isNarrow.matches) fitNarrow(data, layout);
    if ("print" in root.dataset) fitPaper(layout);
    plot.style.height = `${layout.height}px`;
    fitCells(plot, data, layout);
    let drawn = Plotly.react(plot, data, { ...layout }, config);
    for (let again = 0; again < 4 && collide(ticks(plot)); again += 1) {
      fewer(layout.xaxis, ticks(plot).length);
      drawn = Plotly.react(plot, data, { ...layout }, config);
    }
    return drawn;
  }

  // --- labels below a chart that would touch each other --------------------------------------------------------------
  function ticks(plot) {
    const boxes = [...plot.querySelectorAll(".xtick text")].map((text) => text.getBoundingClientRect());
    return boxes.sort((one, other) => one.left - other.left);
  }

  function collide(boxes) {
    return boxes.some((box, at) => at > 0 && box.width > 0 && box.left - boxes[at - 1].right < 8);
  }

  function fewer(axis, shown) {
    if (axis.tickmode === "array") everySecond(axis);
    else if (axis.dtick) axis.dtick *= 2;
    else axis.nticks = Math.max(2, Math.min(shown, axis.nticks ?? shown) - 1);
  }

  function everySecond(axis) {
    const last = axis.tickvals.length - 1; // the last one stays
    const kept = (_, at) => (last - at) % 2 === 0;
    axis.tickvals = axis.tickvals.filter(kept);
    if (axis.ticktext) axis.ticktext = axis.ticktext.filter(kept);
  }

  function fitNarrow(data, layout) {
    fitAlone(layout);
    const mayThin = layout.xaxis.type === "category" || layout.meta?.thin;
    if (mayThin && layout.xaxis.tickvals.length > 5) everySecond(layout.xaxis);
    if (layout.meta?.names) layout.yaxis.ticktext = layout.meta.names;
    if (layout.xaxis.nticks) layout.xaxis.nticks = Math.min(layout.xaxis.nticks, 5);
  }

  function fitPaper(layout) {
    fitAlone(layout);
    layout.autosize = false;
    layout.width = 640; // what a page has room for
    if (!layout.meta?.names) layout.height = Math.min(layout.height, 240); // those with rows are as high as these need
  }

  function fitAlone(layout) {
    if (layout.showlegend !== false) return;
    const spare = Math.max(0, layout.margin.t - 10); // it begins as low as the one with a legend that stood beside it
    layout.margin.t -= spare;
    layout.height -= spare;
  }

  function fitCells(plot, data, layout) {
    for (const trace of data) {
      if (trace.type !== "heatmap") continue;
      const columns = isNarrow.matches ? Math.max(trace.x.length, 5) : layout.xaxis.range[1] + 0.5;
      layout.xaxis.range = [-0.5, columns - 0.5];
      const room = (plot.clientWidth - (isNarrow.matches ? 100 : 150)) / columns; // beside the names of the rows
      if (room > 32) continue;
      delete trace.texttemplate; // there is no room for it in the cells
      trace.showscale = true;
    }
  }

  function drawAll() {
    for (const plot of plots) draw(plot);
  }

  async function begin() {
    for (const plot of plots) {
      await draw(plot);
      plot.on("plotly_relayout", (change) => {
        if (Object.keys(change).some((name) => name.includes(".range"))) pause();
      });
      await new Promise((next) => setTimeout(next)); // the page stays usable between two charts
    }
    root.dataset.ready = "true";
  }

  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // on a phone, the bar of the browser comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 200); // with as many labels as there is room for
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    drawAll();
  });

  // --- the filter over the tables of sessions ----------------------------------------------------------------------
  const filter = document.getElementById("table-filter");
  function applyFilter() {
    const words = filter.querySelector("[name=text]").value.trim().toLowerCase();
    const channel = filter.querySelector("[name=channel]").value;
    const end = filter.querySelector("[name=end]").value;
    let shown = 0;
    let all = 0;
    for (const table of document.querySelectorAll(".sessions")) {
      let here = 0;
      for (const row of table.querySelectorAll("tbody tr")) {
        row.hidden =
          !row.dataset.text.includes(words) ||
          (channel !== "" && row.dataset.channel !== channel) ||
          (end !== "" && row.dataset.end !== end);
        all += 1;
        if (!row.hidden) here += 1;
      }
      shown += here;
      table.querySelector(".none").hidden = here > 0;
    }
    filter.querySelector("output").textContent = shown === all ? "" : `${shown} of ${all} rows`;
  }
  if (filter) filter.addEventListener("input", applyFilter);

  // --- the served page refreshes by itself, unless somebody is at work in it ----------------------------------------
  const refresh = document.getElementById("refresh");
  const form = document.getElementById("filters");
  const kept = "turntrace-report";
  function pause() {
    if (refresh) refresh.checked = false;
  }
  if (isNarrow.matches) {
    for (const table of [...document.querySelectorAll(".sessions")].slice(1)) table.open = false;
  }
  function keep() {
    const open = [...document.querySelectorAll("details[open]")].map((each) => each.id);
    const fields = filter ? [...filter.querySelectorAll("[name]")].map((each) => each.value) : [];
    sessionStorage.setItem(kept, JSON.stringify({ open, fields }));
  }
  function restore() {
    const was = JSON.parse(sessionStorage.getItem(kept) || "null");
    sessionStorage.removeItem(kept);
    if (!was) return;
    for (const each of document.querySelectorAll("details")) each.open = was.open.includes(each.id);
    if (!filter) return;
    filter.querySelectorAll("[name]").forEach((field, at) => {
      field.value = was.fields[at] ?? "";
      if (field.selectedIndex === -1) field.value = "";
    });
    applyFilter();
  }
  if (form) form.addEventListener("input", pause);
  if (refresh) restore();
  begin().finally(() => {
    if (!refresh) return;
    // From now on, when all is drawn: a slow machine would load it again and again, and never get there.
    setInterval(() => {
      if (!refresh.checked || document.hidden) return;
      keep();
      location.reload();
    }, 1000 * Number(refresh.dataset.seconds));
  });
})();
