"use strict";
// A uPlot plugin: two fingers zoom into the steps, and one finger moves along them where they are zoomed into.
const touchZoom = (whole, apply) => ({
  hooks: {
    ready: [
      (chart) => {
        const area = chart.over;
        area.style.touchAction = "pan-y"; // one finger up and down scrolls the page
        const down = new Map();
        let before = null; // fingers and scale when the last finger came or went
        const begin = () => {
          const { min, max } = chart.scales.x;
          before = { at: [...down.values()], min, max };
        };
        const change = () => {
          const { at, min, max } = before;
          const now = [...down.values()];
          const width = area.clientWidth;
          if (now.length === 1 && (max - min < whole.max - whole.min)) {
            const shift = ((at[0] - now[0]) / width) * (max - min);
            move(min + shift, max + shift);
          } else if (now.length === 2) {
            const [from, to] = [at, now].map(([a, b]) => ({ middle: (a + b) / 2, apart: Math.max(20, Math.abs(a - b)) }));
            const span = Math.min((max - min) * (from.apart / to.apart), whole.max - whole.min);
            const held = min + (from.middle / width) * (max - min); // the step between the fingers stays there
            move(held - (to.middle / width) * span, held + (1 - to.middle / width) * span);
          }
        };
        const move = (min, max) => {
          const shift = Math.max(0, whole.min - min) - Math.max(0, max - whole.max);
          if (max - min >= 1) apply({ min: min + shift, max: max + shift });
        };
        const place = (event) => event.clientX - area.getBoundingClientRect().left;
        area.addEventListener("pointerdown", (event) => {
          if (event.pointerType !== "touch" || down.size === 2) return;
          down.set(event.pointerId, place(event));
          begin();
        });
        area.addEventListener("pointermove", (event) => {
          if (!down.has(event.pointerId)) return;
          down.set(event.pointerId, place(event));
          change();
        });
        for (const name of ["pointerup", "pointercancel", "pointerleave"])
          area.addEventListener(name, (event) => {
            if (down.delete(event.pointerId)) begin();
          });
      },
    ],
  },
});
