(() => {
  const { spectra } = JSON.parse(document.getElementById("data").textContent);
  if (!spectra) return;
  const { layers, ranks, places, groups, steps, effective, largest, decades } = spectra;
  const packed = Uint8Array.from(atob(spectra.values), (one) => one.charCodeAt(0));
  const starts = [0];
  ranks.forEach((rank, number) => starts.push(starts[number] + places[rank].length));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const rankText = (hundredths) => (hundredths < 0 ? "not finite" : (hundredths / 100).toFixed(2));
  const known = effective.flat().filter((rank) => rank > 0);
  const low = known.reduce((a, b) => Math.min(a, b), known[0] ?? 100);
  const high = known.reduce((a, b) => Math.max(a, b), low);
  document.getElementById("rank-low").textContent = (low / 100).toFixed(1);
  document.getElementById("rank-high").textContent = (high / 100).toFixed(1);

  // A point is shown from its step to that of the next one; the last one as wide as one of the others.
  const end = steps[steps.length - 1];
  const span = Math.max(1, end - steps[0]) * (steps.length > 1 ? steps.length / (steps.length - 1) : 1);
  const left = (point) => (steps[point] === undefined ? 1 : (steps[point] - steps[0]) / span);
  let chosen = 0;

  const maps = groups.map(({ name, members }) => {
    const part = document.createElement("div");
    const title = document.createElement("div");
    title.innerHTML = "<b></b> <small></small>";
    const cut = name.lastIndexOf(".");
    title.firstChild.textContent = name.slice(cut + 1);
    title.lastChild.textContent = name.slice(0, Math.max(0, cut));
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `effective rank of ${name} over the training, ${members.length} layers`);
    const ends = document.createElement("div");
    ends.className = "ends";
    ends.innerHTML = "<span></span><span></span>";
    ends.firstChild.textContent = `step ${steps[0].toLocaleString("en-US")}`;
    ends.lastChild.textContent = end.toLocaleString("en-US");
    part.append(title, canvas, ends);
    document.getElementById("rank-maps").append(part);
    const tall = Math.max(5, Math.min(18, Math.round(160 / members.length)));

    const paint = () => {
      const ratio = window.devicePixelRatio || 1;
      const wide = canvas.clientWidth;
      canvas.style.height = `${tall * members.length}px`;
      canvas.width = Math.round(wide * ratio);
      canvas.height = Math.round(tall * members.length * ratio);
      const pen = canvas.getContext("2d");
      const heat = color("--heat");
      members.forEach((layer, row) => {
        const [top, bottom] = [row, row + 1].map((edge) => Math.round(edge * tall * ratio));
        steps.forEach((_, point) => {
          const rank = effective[point][layer];
          const [from, to] = [left(point), left(point + 1)].map((edge) => Math.round(edge * canvas.width));
          const width = Math.max(1, to - from);
          pen.clearRect(from, top, width, bottom - top); // of a point that was too short to be seen
          if (rank === 0) return;
          const share = high > low ? (rank - low) / (high - low) : 1;
          pen.fillStyle = rank < 0 ? color("--c1") : `rgba(${heat}, ${(0.1 + 0.9 * share).toFixed(3)})`;
          pen.fillRect(from, top, width, bottom - top);
        });
        if (layer === chosen) {
          pen.strokeStyle = color("--ink");
          pen.lineWidth = 1.5 * ratio;
          pen.strokeRect(ratio, top + ratio / 2, canvas.width - 2 * ratio, bottom - top - ratio);
        }
      });
    };
    const under = (event) => {
      const box = canvas.getBoundingClientRect();
      const row = Math.floor((event.clientY - box.top) / tall);
      const at = (event.clientX - box.left) / box.width;
      const point = steps.findLastIndex((_, number) => left(number) <= at);
      return { layer: members[Math.max(0, Math.min(members.length - 1, row))], point: Math.max(0, point) };
    };
    canvas.addEventListener("pointermove", (event) => tell(under(event)));
    canvas.addEventListener("click", (event) => {
      tell(under(event));
      choose(under(event).layer);
    });
    return { canvas, paint };
  });

  const tell = ({ layer, point }) => {
    document.getElementById("rank-value").textContent =
      `${layers[layer]}, step ${steps[point].toLocaleString("en-US")}: ${rankText(effective[point][layer])} of ${ranks[layer]}`;
  };

  const figure = document.getElementById("spectrum");
  const select = figure.querySelector("select");
  layers.forEach((name, number) => select.add(new Option(name, number)));
  select.onchange = () => choose(Number(select.value));
  let chart = null;

  const spectrum = () => {
    const plot = figure.querySelector(".plot");
    chart?.destroy();
    const x = places[ranks[chosen]].map((place) => place + 1);
    const learned = steps.map((_, point) => point).filter((point) => largest[point][chosen] > 0);
    const most = Math.min(5, learned.length);
    const shown = [...new Set(Array.from({ length: most }, (_, n) => learned[Math.round((n * (learned.length - 1)) / Math.max(1, most - 1))]))];
    const rows = shown.map((point) => {
      const from = point * starts[layers.length] + starts[chosen];
      return Array.from(packed.subarray(from, from + x.length), (byte) =>
        byte ? largest[point][chosen] * 10 ** (decades * (byte / 255 - 1)) : null,
      );
    });
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 } };
    const number = (value) => (value == null ? "–" : value >= 1e-3 ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace(".0e", "e"));
    // Of a logarithm's lines the powers of ten.
    const filter = (_, lines) => lines.map((value) => (Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6 ? value : null));
    const powers = { ...axis, filter, grid: { ...axis.grid, filter }, ticks: { ...axis.ticks, filter } };
    chart = new uPlot(
      {
        width: plot.clientWidth,
        height: 260,
        cursor: { drag: { x: false, y: false }, hover: { prox: 30 }, points: { size: 7, fill: (self, n) => self.series[n].stroke(self, n) } },
        scales: { x: { time: false, range: [0.5, ranks[chosen] + 0.5] }, y: { distr: 3 } },
        axes: [
          { ...axis, size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")) },
          { ...powers, size: 64, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : number(tick))) },
        ],
        series: [
          { label: "singular value no.", value: (_, value) => value ?? "–" },
          ...shown.map((point, n) => ({
            label: `step ${steps[point].toLocaleString("en-US")}`,
            stroke: color(`--c${n}`),
            width: 1.75,
            points: { show: x.length <= 32, size: 5, fill: color("--page") },
            value: (_, value) => number(value),
          })),
        ],
      },
      [x, ...rows],
      plot,
    );
    figure.dataset.curves = shown.length;
  };

  const choose = (layer) => {
    chosen = layer;
    select.value = String(layer);
    maps.forEach(({ paint }) => paint());
    spectrum();
  };
  const redraw = () => choose(chosen);
  new ResizeObserver(() => maps.forEach(({ paint }) => paint())).observe(document.getElementById("rank-maps"));
  new ResizeObserver(() => chart?.setSize({ width: figure.querySelector(".plot").clientWidth, height: 260 })).observe(figure);
  dark.addEventListener("change", redraw);
  redraw();
  document.documentElement.dataset.cells = layers.length * steps.length;
})();
