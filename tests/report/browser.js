/* Loads a page in frames of several widths and says what a reader would meet there. The browser of
   kaleido calls Plotly.toImage; other browsers load this in a page whose body has the settings. */
"use strict";

async function load(url, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.style.height = "900px";
  frame.style.border = "0";
  frame.src = url;
  const loaded = new Promise(function (resolve) { frame.onload = resolve; });
  document.body.appendChild(frame);
  await loaded;
  return { page: frame.contentWindow, root: frame.contentDocument };
}

/* Elements that reach beyond the window although nothing around them scrolls. */
function overflowing(page, root, width) {
  return Array.from(root.body.querySelectorAll("*")).filter(function (element) {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.right <= width + 0.5) return false;
    for (let node = element; node && node !== root.body; node = node.parentElement) {
      const style = page.getComputedStyle(node);
      if (/auto|scroll|hidden/.test(style.overflowX)) return false;
      if (node instanceof page.SVGElement && node.ownerSVGElement) return false;
    }
    return true;
  }).map(function (element) { return element.tagName + "." + element.getAttribute("class"); });
}

function visible(page, element) {
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && page.getComputedStyle(element).visibility === "visible";
}

function all(root, selector) {
  return Array.from(root.querySelectorAll(selector));
}

function change(page, input, type) {
  input.dispatchEvent(new page.Event(type, { bubbles: true }));
}

async function inspect(url, width) {
  const { page, root } = await load(url, width);
  const facts = { width: width, agent: page.navigator.userAgent, problems: page.problems };
  facts.window = page.innerWidth;
  facts.scrollWidth = root.documentElement.scrollWidth;
  facts.overflowing = overflowing(page, root, page.innerWidth);
  facts.requests = page.performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("data:"));
  facts.sections = all(root, "main > section").map((s) => [s.id, visible(page, s)]);
  facts.charts = all(root, "#curves .cards > .card > svg.chart").filter((c) => visible(page, c)).length;
  facts.textSize = parseFloat(page.getComputedStyle(root.body).fontSize);

  /* every picture is decoded and as large as its place */
  const uses = all(root, ".panel use");
  facts.pictures = uses.filter(function (use) { return use.getBoundingClientRect().width > 50; }).length;
  facts.panels = uses.length;

  /* headings of a table stay in sight */
  const frame = root.querySelector("#scores .scroll");
  if (frame) {
    frame.style.maxHeight = "120px";
    frame.scrollTop = 60;
    frame.scrollLeft = 40;
    const box = frame.getBoundingClientRect();
    const corner = frame.querySelector("th").getBoundingClientRect();
    facts.sticky = [corner.top - box.top, corner.left - box.left];
    frame.style.maxHeight = "";
  }

  /* a curve is switched off and on */
  const boxes = all(root, "[data-toggle]");
  facts.toggles = boxes.filter((b) => visible(page, b)).length;
  const curve = root.querySelector('.curve[data-run="0"]');
  if (boxes.length && curve) {
    const states = [];
    [false, true].forEach(function (checked) {
      boxes[0].checked = checked;
      change(page, boxes[0], "change");
      states.push(page.getComputedStyle(curve).display !== "none");
    });
    facts.toggled = states;
  }

  /* values under the pointer */
  const chart = root.querySelector('svg.chart[data-curves*="\\"x\\""]');
  if (chart) {
    const area = chart.getBoundingClientRect();
    chart.dispatchEvent(new page.PointerEvent("pointermove", {
      bubbles: true, clientX: area.left + area.width - 4, clientY: area.top + 40,
    }));
    const tip = root.querySelector(".tip");
    facts.tip = tip ? tip.textContent : null;
    facts.chart = chart.querySelector("title").textContent;
    facts.curves = JSON.parse(chart.dataset.curves);
    facts.tipInside = tip ? tip.getBoundingClientRect().right <= page.innerWidth : null;
    chart.dispatchEvent(new page.PointerEvent("pointerleave", {}));
    facts.tipGone = root.querySelector(".tip") === null;
  }

  /* the threshold of scores */
  const slider = root.getElementById("threshold");
  if (slider) {
    const drawn = (selector) => all(root, selector)
      .filter((box) => page.getComputedStyle(box).display !== "none").length;
    const shown = () => drawn(".box[data-score]"), missed = () => drawn(".box.missed");
    facts.slider = [["start", shown(), missed(), root.querySelector(".counts").textContent]];
    ["0.05", "0.95"].forEach(function (value) {
      slider.value = value;
      change(page, slider, "input");
      const counts = root.querySelector(".counts").textContent;
      facts.slider.push([root.getElementById("threshold-value").textContent, shown(), missed(), counts]);
    });
  }
  return facts;
}

async function inspectAll(settings) {
  const result = [];
  for (const width of settings.widths) result.push(await inspect(settings.url, width));
  return result;
}

window.Plotly = {
  version: "1.58.4",
  toImage: async function (figure) { return JSON.stringify(await inspectAll(figure.layout)); },
};

const settings = document.body && document.body.dataset.settings;
if (settings) {
  inspectAll(JSON.parse(settings)).then(JSON.stringify, String).then(function (text) {
    const result = document.createElement("pre");
    result.id = "facts";
    result.textContent = text;
    document.body.replaceChildren(result);
  });
}
