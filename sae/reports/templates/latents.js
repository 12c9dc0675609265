// The list of latents, and keys on their pages. No library, and nothing is fetched.
"use strict";

const typing = (target) => /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName);

// On a latent's page each link with data-key is opened by that key.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  const link = document.querySelector(`a[data-key="${CSS.escape(event.key)}"]`);
  if (link) { event.preventDefault(); link.click(); }
});

if (window.LATENTS) {
  const AT_ONCE = 100;
  const rows = window.LATENTS.map((row, order) => {
    const [id, density, max, mean, detection, tasks, description, before, peak, after, more] = row;
    const hay = [id, tasks.join(" "), description, before + peak + after, more].join("\n").toLowerCase();
    return { id, density, max, mean, detection, tasks, description, before, peak, after, hay, order };
  });
  const field = (name) => document.getElementById(name);
  const body = document.querySelector("#latents tbody");
  let found = [], shown = 0, chosen = -1;

  const number = (value) => value === null ? "–" : Number(value.toPrecision(3)).toString();
  const percent = (value) => value === 0 ? "0" : `${Number((100 * value).toPrecision(2))} %`;

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function line(row, place) {
    const made = element("tr", undefined, { "data-place": place });
    const first = element("td");
    first.append(element("a", row.id, { href: `latents/${row.id}.html` }));
    const second = element("td");
    for (const task of row.tasks) second.append(element("span", task, { class: "task" }));
    second.append(row.description);
    const context = element("span", undefined, { class: "line", dir: "auto" });
    context.append(row.before);
    if (row.peak) context.append(element("b", row.peak, { style: "--A:.7" }));
    context.append(row.after);
    second.append(context);
    made.append(first, second);
    for (const [name, text] of [["density", percent(row.density)], ["max", number(row.max)],
                                ["mean", number(row.mean)], ["detection", number(row.detection)]]) {
      made.append(element("td", text, { "data-name": name }));
    }
    return made;
  }

  function show(upTo) {
    const part = document.createDocumentFragment();
    for (; shown < Math.min(upTo, found.length); shown++) part.append(line(found[shown], shown));
    body.append(part);
    field("more").hidden = shown >= found.length;
  }

  function settings() {
    const set = {};
    for (const name of ["search", "density", "detection", "sort"]) {
      if (field(name).value && field(name).value !== "order") set[name] = field(name).value;
    }
    for (const name of ["down", "tasks"]) if (field(name) && field(name).checked) set[name] = "1";
    return set;
  }

  function update() {
    const set = settings();
    const words = (set.search || "").toLowerCase().split(/\s+/).filter(Boolean);
    const [low, high] = (set.density || ",").split(",").map(Number);
    found = rows.filter((row) =>
      words.every((word) => row.hay.includes(word)) &&
      (!set.density || (high === 0 ? row.density === 0 : row.density >= low && row.density < high && row.density > 0)) &&
      (!set.detection || (row.detection !== null && row.detection >= Number(set.detection))) &&
      (!set.tasks || row.tasks.length));
    const key = set.sort || "order", way = set.down ? -1 : 1;
    const value = (row) => row[key] === null ? -way * Infinity : row[key];
    found.sort((a, b) => value(a) === value(b) ? a.order - b.order : value(a) < value(b) ? -way : way);
    body.replaceChildren();
    shown = 0;
    chosen = -1;
    show(AT_ONCE);
    field("count").textContent =
      `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} latents`;
    const text = new URLSearchParams(set).toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname);
  }

  function choose(place) {
    if (place < 0 || place >= found.length) return;
    if (place >= shown) show(place + AT_ONCE);
    body.querySelector(".chosen")?.classList.remove("chosen");
    chosen = place;
    const row = body.children[place];
    row.classList.add("chosen");
    row.scrollIntoView({ block: "nearest" });
    row.querySelector("a").focus({ preventScroll: true });
  }

  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const one = field(name);
    if (!one) continue;
    if (one.type === "checkbox") one.checked = value === "1"; else one.value = value;
  }
  document.querySelector(".filters").addEventListener("input", update);
  field("more").addEventListener("click", () => show(shown + AT_ONCE));
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !event.target.closest("a") && !String(getSelection())) row.querySelector("a").click();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === field("search")) { field("search").blur(); return; }
    if (event.key === "ArrowDown" && event.target === field("search")) {
      event.preventDefault();
      choose(0);
      return;
    }
    if (typing(event.target)) return;
    if (event.key === "/") { event.preventDefault(); field("search").focus(); field("search").select(); }
    if (event.key === "ArrowDown" || event.key === "j") { event.preventDefault(); choose(chosen + 1); }
    if (event.key === "ArrowUp" || event.key === "k") { event.preventDefault(); choose(chosen - 1); }
  });
  if ("IntersectionObserver" in window) {
    new IntersectionObserver((seen) => {
      if (seen.some((one) => one.isIntersecting) && shown < found.length) show(shown + AT_ONCE);
    }, { rootMargin: "600px" }).observe(field("more"));
  }
  update();
}
