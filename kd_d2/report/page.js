"use strict";
/* What the page shows without this is complete; this adds: curves that can be hidden, values under
   the pointer, and the threshold of scores. */
(function () {
  const SVG = "http://www.w3.org/2000/svg";
  const hidden = new Set();
  const names = [];

  function all(selector, root) {
    return Array.from((root || document).querySelectorAll(selector));
  }

  /* legend */
  all("[data-toggle]").forEach(function (box) {
    const run = Number(box.dataset.toggle);
    names[run] = box.parentNode.querySelector("span").textContent;
    box.hidden = false;
    box.addEventListener("change", function () {
      if (box.checked) hidden.delete(run); else hidden.add(run);
      all('.curve[data-run="' + run + '"]').forEach(function (curve) {
        curve.style.display = box.checked ? "" : "none";
      });
    });
  });

  /* values under the pointer */
  function nearest(xs, x) {
    let best = 0;
    for (let i = 1; i < xs.length; i++) {
      if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    }
    return best;
  }

  function hover(svg) {
    const scale = JSON.parse(svg.dataset.scale);
    const low = scale[0], high = scale[1], left = scale[2], right = scale[3];
    const curves = JSON.parse(svg.dataset.curves);
    const card = svg.parentNode;
    const cursor = document.createElementNS(SVG, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", scale[4]);
    cursor.setAttribute("y2", scale[5]);
    const tip = document.createElement("div");
    tip.className = "tip";

    function leave() {
      cursor.remove();
      tip.remove();
    }

    function move(event) {
      const frame = svg.getBoundingClientRect();
      const width = svg.viewBox.baseVal.width;
      const inside = (event.clientX - frame.left) / frame.width * width;
      const wanted = low + (inside - left) / (right - left) * (high - low);
      const shown = curves.filter(function (curve) { return !hidden.has(curve.run); });
      if (!shown.length) { leave(); return; }
      let at = null;
      shown.forEach(function (curve) {
        const x = curve.x[nearest(curve.x, wanted)];
        if (at === null || Math.abs(x - wanted) < Math.abs(at - wanted)) at = x;
      });
      const place = left + (at - low) / (high - low) * (right - left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      svg.appendChild(cursor);
      tip.textContent = "iteration " + at;
      shown.forEach(function (curve) {
        const i = nearest(curve.x, at);
        const line = document.createElement("div");
        const swatch = svg.querySelector('.curve[data-run="' + curve.run + '"]').cloneNode(false);
        const mark = document.createElementNS(SVG, "svg");
        mark.setAttribute("class", "swatch " + swatch.getAttribute("class").replace("curve ", ""));
        mark.setAttribute("viewBox", "0 0 18 10");
        const stroke = document.createElementNS(SVG, "line");
        stroke.setAttribute("x2", "18");
        stroke.setAttribute("y1", "5");
        stroke.setAttribute("y2", "5");
        mark.appendChild(stroke);
        line.appendChild(mark);
        const apart = curve.x[i] === at ? "" : " (at " + curve.x[i] + ")";
        line.appendChild(document.createTextNode(curve.y[i] + apart + "  " + names[curve.run]));
        tip.appendChild(line);
      });
      card.appendChild(tip);
      const box = card.getBoundingClientRect();
      const x = event.clientX - box.left;
      const space = box.width - tip.offsetWidth;
      tip.style.left = Math.max(0, Math.min(space, x < box.width / 2 ? x + 14 : x - 14 - tip.offsetWidth)) + "px";
      tip.style.top = (svg.offsetTop + 12) + "px";
    }

    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
  }
  all("svg.chart").forEach(hover);

  /* threshold of scores */
  const slider = document.getElementById("threshold");
  if (slider) {
    const panels = all(".panel-figure");
    const update = function () {
      const lowest = Number(slider.value);
      document.getElementById("threshold-value").textContent = lowest.toFixed(2);
      panels.forEach(function (panel) {
        const counts = { right: 0, wrong: 0, missed: 0 };
        all(".box", panel).forEach(function (box) {
          let show = true;
          if (box.dataset.score) show = Number(box.dataset.score) >= lowest;
          else if (box.classList.contains("missed")) {
            show = !(Number(box.dataset.found || -1) >= lowest);
          }
          box.classList.toggle("off", !show);
          Object.keys(counts).forEach(function (kind) {
            if (show && box.classList.contains(kind)) counts[kind] += 1;
          });
        });
        const text = panel.querySelector(".counts");
        if (text) {
          text.textContent = counts.right + " right, " + counts.wrong + " wrong, "
            + counts.missed + " missed";
        }
      });
    };
    slider.addEventListener("input", update);
    slider.parentNode.hidden = false;
    slider.hidden = false;
    update();  // a browser may have kept the position of an earlier visit
  }
})();
