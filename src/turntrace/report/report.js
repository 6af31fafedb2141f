"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = Object.keys(figures).map((id) => document.getElementById(id));
  const isNarrow = matchMedia("(max-width: 720px)");
  const isCoarse = matchMedia("(pointer: coarse)").matches;
  const zooming = ["zoomIn2d", "zoomOut2d", "resetScale2d"];
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    // These and no others: plotly's own choice has one that sends the chart to a service of theirs.
    modeBarButtons: isCoarse ? [zooming] : [["toImage"], ["zoom2d", "pan2d"], zooming],
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

  function draw(plot, more) {
    const style = getComputedStyle(root);
    const { data, layout } = coloured(figures[plot.id], "", style);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    if (isCoarse) {
      layout.dragmode = false; // a finger on a chart scrolls the page
      layout.margin.t = layout.showlegend === false ? 30 : 58; // the buttons are always there, above the legend
      layout.height += layout.margin.t - figures[plot.id].layout.margin.t;
      plot.style.height = `${layout.height}px`;
    }
    if (isNarrow.matches) fitNarrow(data, layout);
    fitCells(plot, data, layout);
    return Plotly.react(plot, data, { ...layout, ...more }, config);
  }

  function fitNarrow(data, layout) {
    const mayThin = layout.xaxis.type === "category" || layout.meta?.thin;
    if (mayThin && layout.xaxis.tickvals.length > 5) {
      const last = layout.xaxis.tickvals.length - 1; // every second label, the last one too
      const kept = (_, at) => (last - at) % 2 === 0;
      layout.xaxis.tickvals = layout.xaxis.tickvals.filter(kept);
      layout.xaxis.ticktext = layout.xaxis.ticktext.filter(kept);
    }
    if (layout.meta?.names) layout.yaxis.ticktext = layout.meta.names;
    if (layout.xaxis.nticks) layout.xaxis.nticks = Math.min(layout.xaxis.nticks, 5);
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

  isNarrow.addEventListener("change", drawAll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    for (const plot of plots) draw(plot, { width: 640, autosize: false }); // what a page of paper has
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
  if (refresh) {
    restore();
    setInterval(() => {
      if (!refresh.checked || document.hidden) return;
      keep();
      location.reload();
    }, 1000 * Number(refresh.dataset.seconds));
  }

  begin();
})();
