"use strict";
// The page works without this file. It adds: theme, filter, search, sort, keys, and the state in the URL's hash.
// Text is only ever read from the page (textContent), never written back as markup.
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const table = document.querySelector("table.items");
  const items = data.items.map((item, place) => {
    const body = document.getElementById("i" + item.position);
    return { ...item, place, body, more: body.querySelector("details"), toggle: body.querySelector(".toggle") };
  });
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const chips = [...document.querySelectorAll(".chip")];
  const shows = [...document.querySelectorAll("[data-class]")];
  const state = { filter: "all", class: "", q: "", sort: sort.value, item: "" };
  const start = { ...state };
  let shown = items;

  document.documentElement.classList.add("js");
  for (const element of [document.getElementById("tools"), document.getElementById("keys"), ...shows, ...items.map((i) => i.toggle)]) {
    element.hidden = false;
  }

  const text = (item) => (item.text ??= item.body.textContent.toLowerCase());
  const score = (item, metric) => item.scores[metric].value ?? -1;
  const orders = {
    drop: (a, b) => a.place - b.place,
    lowest: (a, b) => a.errored === b.errored ? a.lowest - b.lowest : b.errored - a.errored,
    order: (a, b) => a.position - b.position,
  };

  function apply() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const flags = ["broke", "mended", "errored"];
    const kind = (item) => flags.includes(state.filter) ? item[state.filter] : state.filter === "all" || item.change === state.filter;
    const fits = (item) => kind(item) && (!state.class || item.classes.includes(state.class));
    const metric = state.sort.startsWith("metric:") ? state.sort.slice(7) : null;
    const compare = metric ? (a, b) => score(a, metric) - score(b, metric) : orders[state.sort];
    const sorted = [...items].sort((a, b) => compare(a, b) || a.place - b.place);
    shown = [];
    for (const item of sorted) {
      item.body.hidden = !(fits(item) && words.every((word) => text(item).includes(word)));
      if (!item.body.hidden) shown.push(item);
    }
    table.append(...sorted.map((item) => item.body));
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.filter === state.filter));
    for (const show of shows) show.setAttribute("aria-pressed", String(show.dataset.class === state.class));
    if (search.value !== state.q) search.value = state.q;
    sort.value = state.sort;
    document.getElementById("nothing").hidden = shown.length > 0;
    const narrowed = shown.length < items.length;
    document.getElementById("found").textContent = narrowed ? shown.length + " of " + items.length + " items" : "";
  }

  function remember() {
    const hash = new URLSearchParams();
    for (const key of Object.keys(state)) if (state[key] !== start[key]) hash.set(key, state[key]);
    history.replaceState(null, "", hash.size ? "#" + hash : location.pathname + location.search);
  }

  function recall() {
    const hash = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(state)) state[key] = hash.get(key) ?? start[key];
    if (!shows.some((show) => show.dataset.class === state.class)) state.class = "";
    if (!chips.some((chip) => chip.dataset.filter === state.filter)) state.filter = "all";
    if (![...sort.options].some((option) => option.value === state.sort)) state.sort = start.sort;
    apply();
    const item = items.find((one) => one.id === state.item);
    if (item) { open(item, true); item.body.scrollIntoView({ block: "start" }); }
  }

  function change(what) { Object.assign(state, what); apply(); remember(); }

  function open(item, wanted) {
    item.more.open = wanted;
    item.toggle.setAttribute("aria-expanded", String(wanted));
    item.body.classList.toggle("is-open", wanted);
  }

  function flip(item) {
    open(item, !item.more.open);
    state.item = item.more.open ? item.id : "";
    remember();
  }

  function at(item) {
    for (const other of document.querySelectorAll(".item.at")) other.classList.remove("at");
    item.body.classList.add("at");
  }

  function move(step) {
    const here = shown.findIndex((item) => item.body.classList.contains("at"));
    const next = shown[Math.min(Math.max(here + step, 0), shown.length - 1)];
    if (!next) return;
    at(next);
    next.toggle.focus({ preventScroll: true });
    next.body.scrollIntoView({ block: next.more.open ? "start" : "nearest" });
  }

  for (const item of items) {
    item.body.querySelector(".main").addEventListener("click", (event) => {
      // a drag that selects text is no click on the row
      if (event.target.closest("a") || String(getSelection())) return;
      at(item);
      flip(item);
    });
    // the browser opens details by itself for find-in-page and links
    item.more.addEventListener("toggle", () => open(item, item.more.open));
    item.toggle.addEventListener("focus", () => at(item));
  }
  for (const chip of chips) chip.addEventListener("click", () => change({ filter: chip.dataset.filter }));
  search.addEventListener("input", () => change({ q: search.value }));
  sort.addEventListener("change", () => change({ sort: sort.value }));
  document.getElementById("reset").addEventListener("click", () => change({ filter: "all", class: "", q: "" }));
  for (const show of shows) {
    show.addEventListener("click", () => {
      const wanted = state.class === show.dataset.class ? "" : show.dataset.class;
      change({ class: wanted });
      if (wanted) document.getElementById("changes").scrollIntoView({ block: "start" });
    });
  }
  addEventListener("hashchange", recall);

  // links inside the page open what they point into, and leave the state in the hash alone
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    const target = link && document.getElementById(link.getAttribute("href").slice(1));
    if (!target) return;
    event.preventDefault();
    for (let up = target; up; up = up.parentElement) if (up.tagName === "DETAILS") up.open = true;
    const inner = target.querySelector("details");
    if (inner && target.tagName === "LI") inner.open = true;
    target.scrollIntoView({ block: "center" });
    (target.querySelector("summary") ?? target).focus({ preventScroll: true });
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape") {
      if (event.target === search) { search.blur(); change({ q: "" }); }
      for (const item of items) if (item.more.open) open(item, false);
      state.item = "";
      remember();
    } else if (typing) {
      return;
    } else if (event.key === "j") {
      move(1);
    } else if (event.key === "k") {
      move(-1);
    } else if (event.key === "/") {
      event.preventDefault();
      search.focus();
    }
  });

  const theme = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("ragate-theme"); } catch { return null; } };
  function paint(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    theme.querySelector(".label").textContent = "Theme: " + name;
    theme.setAttribute("aria-label", "Theme: " + name);
    theme.dataset.name = name;
  }
  paint(themes.includes(stored()) ? stored() : "auto");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(theme.dataset.name) + 1) % themes.length];
    paint(next);
    try { localStorage.setItem("ragate-theme", next); } catch { /* a page opened from a file may have no storage */ }
  });

  recall();
})();
