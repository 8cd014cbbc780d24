"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;

  // --- theme: that of the system until the reader chooses ---
  const toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try { // a page from a file may have no storage
      if (value) localStorage.setItem("advbench-theme", value);
      return localStorage.getItem("advbench-theme");
    } catch { return null; }
  };
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  const kept = stored();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    stored(root.dataset.theme);
    name();
  });
  system.addEventListener("change", name);
  name();

  // --- sorting, inside what may be compared ---
  const bodies = all("#board tbody");
  const buttons = all("#board thead button");
  const cell = (row, key) => row.querySelector(`.c-${key}`).dataset.sort;
  const sort = (button, down) => {
    const { key, kind } = button.dataset;
    const sign = down ? -1 : 1;
    const order = (a, b) => kind === "number"
      ? cell(a, key) - cell(b, key)
      : cell(a, key).localeCompare(cell(b, key), undefined, { numeric: true });
    for (const body of bodies) {
      const rows = all("tr.run", body);
      const open = (row) => Number("open" in row.dataset); // unfinished: last either way
      rows.sort((a, b) => open(a) - open(b) || sign * order(a, b));
      body.append(...rows);
    }
    for (const other of buttons) other.closest("th").setAttribute("aria-sort", "none");
    button.closest("th").setAttribute("aria-sort", down ? "descending" : "ascending");
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const now = button.closest("th").getAttribute("aria-sort");
      const first = button.dataset.kind === "number" && button.dataset.key !== "seconds";
      sort(button, now === "none" ? first : now === "ascending");
    });
  }

  // --- filters ---
  const form = document.getElementById("filters");
  const search = document.getElementById("search");
  const facets = all("select[data-facet]", form);
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, total = 0;
    for (const body of bodies) {
      let left = 0;
      for (const row of all("tr.run", body)) {
        const fits = words.every((word) => row.dataset.words.includes(word))
          && facets.every((f) => !f.value || row.dataset[f.dataset.facet] === f.value);
        row.hidden = !fits;
        left += fits;
        total += 1;
      }
      body.hidden = left === 0;
      shown += left;
    }
    document.getElementById("shown").textContent = `${shown} of ${total}`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter(); // a browser may have kept what was typed before

  // --- links open what they point at ---
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  for (const link of all('a[href^="#"]')) link.addEventListener("click", () => setTimeout(open));
  open();

  // --- copying ---
  const copy = async (button) => {
    const code = button.parentElement.querySelector("code");
    let done = false;
    try {
      await navigator.clipboard.writeText(code.textContent);
      done = true;
    } catch { // a page from a file may not be trusted with the clipboard
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  for (const button of all("button.copy")) button.addEventListener("click", () => copy(button));
})();
