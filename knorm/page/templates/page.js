"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const sheet = document.getElementById("sheet"), body = document.getElementById("sheet-body");
  const show = (title, ...nodes) => {
    document.getElementById("sheet-title").textContent = title;
    body.replaceChildren(...nodes);
    sheet.showModal();
  };
  const element = (name, text, ...inside) => {
    const made = document.createElement(name);
    made.textContent = text;
    made.append(...inside);
    return made;
  };
  const copy = (id) => {
    const made = document.getElementById(id).cloneNode(true);
    for (const one of [made, ...all("[id]", made)]) one.removeAttribute("id");
    return made;
  };
  const follow = (event, action) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    action();
  };

  // Verdicts: the evidence in a sheet; a link from elsewhere opens what it leads to.
  for (const link of all("a.open")) link.addEventListener("click", (event) => follow(event, () => {
    const evidence = copy(link.hash.slice(1));
    for (const snippet of all("details", evidence)) snippet.open = true;
    show(link.closest("tr").dataset.method, evidence);
  }));
  const reveal = () => {
    for (let at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); at; at = at.parentElement)
      if (at.tagName === "DETAILS") at.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
  let shut = [];
  addEventListener("beforeprint", () => { shut = all("details:not([open])"); for (const one of shut) one.open = true; });
  addEventListener("afterprint", () => { for (const one of shut) one.open = false; });

  // Tables: a button in each heading sorts; missing values stand last.
  const value = (row, column, kind) => {
    const cell = row.cells[column], data = cell.querySelector("data");
    const text = cell.textContent.trim();
    return kind === "number" ? Number(data ? data.value : text || NaN) : text;
  };
  for (const heading of all(".sortable th[data-kind]")) {
    const button = element("button", heading.textContent);
    button.type = "button";
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending", table = heading.closest("table"), kind = heading.dataset.kind;
      for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (a, b) => {
        const x = value(a, heading.cellIndex, kind), y = value(b, heading.cellIndex, kind);
        if (kind === "number") return Number.isNaN(x) - Number.isNaN(y) || (up ? x - y : y - x) || 0;
        return up ? x.localeCompare(y) : y.localeCompare(x);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    });
  }

  // Figures: a row and its point are lit together.
  for (const row of all(".costs tbody tr")) {
    const points = all(`a.point[href="#${row.id}"]`);
    const light = (on) => () => { for (const point of points) point.classList.toggle("lit", on); };
    row.addEventListener("mouseenter", light(true));
    row.addEventListener("mouseleave", light(false));
  }

  // Text: time, and what became of a token.
  for (const part of all(".window")) {
    const tokens = all(".tokens a", part), slider = part.querySelector(".slider"), last = Number(part.dataset.length) - 1;
    let at = 0;
    const move = (next) => {
      tokens[at].tabIndex = -1;
      at = Math.max(0, Math.min(tokens.length - 1, next));
      tokens[at].tabIndex = 0;
      tokens[at].focus();
    };
    const tell = (token) => {
      const row = document.getElementById(token.hash.slice(1)), list = document.createElement("dl");
      const heads = all("thead th", row.closest("table"));
      for (const [index, cell] of [...row.cells].entries()) {
        const data = document.createElement("dd");
        data.append(...[...cell.cloneNode(true).childNodes]);
        list.append(element("dt", heads[index].textContent), data);
      }
      for (const one of tokens) one.classList.remove("paid", "chosen");
      token.classList.add("chosen");
      if (row.cells.length > 9) for (const payer of all("data", row.cells[9])) tokens[Number(payer.value)].classList.add("paid");
      show(`Token ${token.dataset.at}: ${token.textContent}`, list);
    };
    tokens.forEach((token, index) => {
      token.tabIndex = index ? -1 : 0;
      token.addEventListener("click", (event) => follow(event, () => { at = index; tell(token); }));
      token.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -tokens.length, End: tokens.length }[event.key];
        if (step) { event.preventDefault(); tokens[at].tabIndex = -1; at = index; move(index + step); }
      });
    });
    if (!slider) continue;
    slider.hidden = false;
    const input = slider.querySelector("input"), told = slider.querySelector("output");
    input.addEventListener("input", () => {
      const now = Number(input.value);
      told.textContent = now;
      for (const token of tokens) {
        const gone = token.dataset.gone;
        token.classList.toggle("gone", gone !== undefined && Number(gone) <= now);
        token.classList.toggle("later", Number(token.dataset.at) > now);
      }
      for (const line of all(".now", part)) line.setAttribute("d", `M0 ${now}H${last + 1}`);
    });
  }
})();
