(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dashes = [[], [6, 3], [2, 3]]; // for more curves than there are colours

  const text = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-4)) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  };

  // Every panel shows the same steps, so that one zooms as the other.
  const all = data.panels.flatMap(({ series }) => series.flatMap(({ x }) => [x[0], x[x.length - 1]]));
  const first = Math.min(0, ...all);
  const last = Math.max(1, ...all);
  const whole = { min: first, max: last };

  // All curves of a panel over the union of their steps; a logarithm takes positive values only.
  const aligned = (series, log) =>
    uPlot.join(series.map(({ x, y }) => [x, log ? y.map((value) => (value > 0 ? value : null)) : y]));

  const draw = (figure, panel, zoomed) => {
    const log = figure.querySelector("[data-log]").getAttribute("aria-pressed") === "true";
    const plot = figure.querySelector(".plot");
    const reset = figure.querySelector("[data-reset]");
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
    plot.replaceChildren();
    reset.hidden = true;
    const chart = new uPlot(
      {
        width: plot.clientWidth,
        height: 240,
        plugins: [touchZoom(whole, (scale) => charts.forEach((one) => one.setScale("x", scale)))],
        cursor: {
          sync: { key: "steps" },
          hover: { prox: 30 }, // pixels: no value of a step that is far away
          points: { size: 8, fill: (self, number) => self.series[number].stroke(self, number) },
          bind: { dblclick: () => () => charts.forEach((one) => one.setScale("x", whole)) },
        },
        scales: { x: { time: false, ...zoomed }, y: { distr: log ? 3 : 1 } },
        axes: [
          { ...axis, space: 70, size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en-US") : "")) },
          { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : text(tick))) },
        ],
        series: [
          { label: "step", value: (_, step) => (step == null ? "–" : step.toLocaleString("en-US")) },
          ...panel.series.map(({ name, x }, number) => ({
            label: name,
            stroke: color(`--c${number % 8}`),
            dash: dashes[Math.floor(number / 8) % dashes.length],
            width: 1.75,
            spanGaps: true,
            points: { show: x.length <= 60, size: x.length === 1 ? 9 : 5, fill: color("--page") },
            value: (_, value) => text(value),
          })),
        ],
        hooks: {
          setScale: [
            (self, scale) => {
              if (scale === "x") reset.hidden = self.scales.x.min <= first && self.scales.x.max >= last;
            },
          ],
        },
      },
      aligned(panel.series, log),
      plot,
    );
    reset.onclick = () => charts.forEach((one) => one.setScale("x", whole));
    return chart;
  };

  const figures = [...document.querySelectorAll("figure[data-panel]")];
  const charts = [];
  const redraw = (number) => {
    const { min, max } = charts[number]?.scales.x ?? whole;
    charts[number]?.destroy();
    charts[number] = draw(figures[number], data.panels[number], { min, max });
  };
  figures.forEach((figure, number) => {
    const button = figure.querySelector("[data-log]");
    button.disabled = !data.panels[number].series.some(({ y }) => y.some((value) => value > 0));
    button.onclick = () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      redraw(number);
    };
    redraw(number);
    new ResizeObserver(() => charts[number].setSize({ width: figure.querySelector(".plot").clientWidth, height: 240 })).observe(figure);
  });
  dark.addEventListener("change", () => figures.forEach((_, number) => redraw(number)));
  document.documentElement.dataset.points = charts.map((chart) => chart.data.slice(1).flat().filter((value) => value != null).length);
})();
